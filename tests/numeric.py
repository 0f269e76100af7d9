"""Comparisons whose failures name the element."""

from __future__ import annotations

import torch
from torch import Tensor


def _at(index: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in index)


def _first(mask: Tensor) -> tuple[int, ...]:
    return _at(mask.nonzero()[0])


def assert_equal(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Bit equality of values, dtype and shape (NaN equals NaN, +0 differs from -0 by nothing)."""
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a, b = actual.detach().cpu(), expected.detach().cpu()
    different = a != b
    if a.is_floating_point():
        different &= ~(a.isnan() & b.isnan())
    if bool(different.any()):
        index = _first(different)
        raise AssertionError(
            f"{name} {tuple(a.shape)} {a.dtype}: {int(different.sum())} of {a.numel()} elements differ, first at "
            f"{list(index)}: {a[index].item()!r}, expected {b[index].item()!r}"
        )


def assert_close_to_truth(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    eps: float | None = None,
    limit: Tensor | None = None,
    name: str = "tensor",
) -> None:
    """Asserts err(actual) <= factor * err(plain) + eps, both largest absolute errors against ``truth``.

    Args:
        actual: what is under test.
        plain: plain torch's result in the same dtype.
        truth: the same in fp64 (or fp32).
        eps: default: half a unit in the last place of ``actual``'s dtype at the largest finite magnitude of truth
            (a result rounded once cannot be asked for more, even where plain torch happens to be exact).
        limit: of every element's error, derived from the computation: whoever stays within it passes, however lucky
            plain torch's few elements are.

    Non-finite elements of ``actual`` must stand exactly where ``plain`` or ``truth`` has them.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    a, t, p = (value.detach().cpu().double() for value in (actual, truth, plain))
    bad = ~torch.isfinite(a) & torch.isfinite(p) & torch.isfinite(t)
    missed = torch.isfinite(a) & ~torch.isfinite(t)
    for mask, what in ((bad, "is not finite"), (missed, "is finite where the truth is not")):
        if bool(mask.any()):
            index = _first(mask)
            raise AssertionError(
                f"{name} {tuple(a.shape)}: element {list(index)} {what}: {a[index].item()!r}, "
                f"plain torch {p[index].item()!r}, truth {t[index].item()!r}"
            )
    finite = torch.isfinite(t) & torch.isfinite(a)
    if not bool(finite.any()):
        return
    if eps is None:
        eps = 0.5 * torch.finfo(actual.dtype).eps * float(t[finite].abs().max())
    plain_error = torch.where(finite & torch.isfinite(p), (p - t).abs(), torch.zeros_like(t))
    error = torch.where(finite, (a - t).abs(), torch.zeros_like(t))
    bound = factor * float(plain_error.max()) + eps
    if limit is not None:
        error = torch.where(error <= limit.detach().cpu().double(), torch.zeros_like(error), error)
    if float(error.max()) > bound:
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)) if error.dim() else ()
        raise AssertionError(
            f"{name} {tuple(a.shape)} {actual.dtype}: element {list(index)} is {a[index].item()!r}, truth "
            f"{t[index].item()!r}, plain torch {p[index].item()!r}: error {float(error.max()):.3e} > {bound:.3e} "
            f"(= {factor} x plain's largest error {float(plain_error.max()):.3e} + {eps:.3e})"
        )


def tensor_core_limit(a: Tensor, b: Tensor) -> Tensor:
    """Return what an element of a @ b [M, N], summed in fp32 by 16-bit tensor cores, may be off by, in fp64 on the CPU.

    They add the products of 16 terms to the accumulator at a time and may cut the sum off there (toward zero, where
    IEEE rounds): 2^-23 of it each time. K / 16 sums, and the roundings of the result, of scaling and of adding up after
    it: (ceil(K / 16) + 4) * 2^-23 * sum |a_ik| |b_kj|.
    """
    sums = a.detach().cpu().double().abs() @ b.detach().cpu().double().abs()
    return (-(-a.shape[1] // 16) + 4) * 2.0**-23 * sums
