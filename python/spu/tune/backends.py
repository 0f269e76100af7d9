"""Whole layers for ``spu tune``: forward and backward of one backend, whose choice at the forward decides both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from spu.kernels.config import Config

__all__ = ["LAYERS", "layer_of"]

# the op that asks the table for a backend, and the products that its layer runs
LAYERS: dict[str, tuple[str, ...]] = {
    "linear": ("linear", "linear_dz_dx", "linear_dw"),
    "gated_linear": ("gated_linear", "gated_dh", "gated_dx"),
    "linear_ce": ("linear_ce",),
}


def layer_of(
    op: str,
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: torch.device,
    configs: Mapping[str, Config],
) -> Callable[[], object]:
    """Return the layer (rows, columns, inner) as a call: by Triton's kernels in ``configs``, or by another backend's
    ops.
    """
    m, n, k = shape

    def random(*size: int) -> Tensor:
        return (torch.randn(size, device=device) / size[-1] ** 0.5).to(dtype)

    x, w, other, dy = random(m, k), random(n, k), random(n, k), random(m, n)
    run = _Ops(backend, configs)
    if op == "linear":
        main, sums, bias = torch.zeros(n, k, device=device), torch.zeros(n, device=device), random(n)
        one, found = torch.ones(1, device=device), torch.zeros(1, device=device)

        def linear() -> None:
            _, z = run("linear", x, w, bias, "gelu", True)
            dz, _ = run("linear_dz_dx", dy, z, w, "gelu")
            run("linear_dw_db_", dz, x, main, sums, one, found, True)

        return linear
    if op == "gated_linear":
        down, dout = random(k, n), random(m, k)

        def gated() -> None:
            _, gate, up = run("gated_linear", x, w, other, "silu", True)
            dgate, dup, _ = run("gated_dh", dout, down, gate, up, "silu")
            run("gated_dx", dgate, dup, w, other)

        return gated
    target, rows = torch.randint(0, n, (m,), device=device), torch.ones(m, device=device)
    logits = torch.empty(m, n, device=device)
    return lambda: run("linear_ce_and_dz", x, w, target, rows, logits, -100)  # as a training asks


class _Ops:
    """Ops by name: of Triton with the configuration of their product, of other backends as they are registered."""

    _PRODUCT: ClassVar = {"linear_dw_db_": "linear_dw", "linear_ce_and_dz": "linear_ce"}

    def __init__(self, backend: str, configs: Mapping[str, Config]) -> None:
        self._backend, self._configs = backend, configs

    def __call__(self, name: str, *args: object) -> tuple[Tensor, ...]:
        if self._backend != "triton":
            from spu.ops import schema

            return schema.overload(name, self._backend)(*args)  # type: ignore[no-any-return]
        from spu.kernels.backend import IMPLEMENTATIONS

        config = self._configs[self._PRODUCT.get(name, name)]
        return IMPLEMENTATIONS[name](*args, config=config)  # type: ignore[no-any-return]
