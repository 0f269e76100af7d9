"""The linear layer: forward with its epilogue, input gradient, and weight gradients that know the loss scale."""

from __future__ import annotations

import torch
from torch import Tensor

from spu.kernels.config import Config
from spu.kernels.finish import column_sums, dz_of, finish, finish_main_grad
from spu.kernels.launch import check_activation, check_operands, check_sink, config_for, for_alignment, rows_of
from spu.kernels.multiply import Derivative, Epilogue, add_column_sums, multiply


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    keep_preact: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y = act(z), z = x @ weight.T + bias, accumulated in fp32; y and z are each rounded once.

    Args:
        x: [..., K] of any strides; fp16, bf16 or fp32.
        weight: [N, K] of any strides, x's dtype.
        bias: [N] or None.
        activation: one of none, relu, gelu, gelu_tanh, silu.
        keep_preact: also store z.
        config: instead of the table's.

    Returns:
        (y [..., N], z [..., N] if kept, else empty [0]), contiguous, in x's dtype.

    Raises:
        ValueError: unknown activation, shapes that do not fit, mixed dtypes or devices.
        TypeError: another dtype.
    """
    check_activation(activation)
    check_operands("x, weight and bias", *([x, weight] if bias is None else [x, weight, bias]))
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: need [..., K] and [N, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}: need [{weight.shape[0]}]"
        )
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    preact = torch.empty_like(y) if keep_preact else y.new_empty(0)
    epilogue = Epilogue(
        bias=None if bias is None else bias.contiguous(), activation=activation, preact=preact if keep_preact else None
    )
    multiply("linear", rows_of(x), weight.t(), y, epilogue, config=config)
    return y, preact


def linear_dz(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """Compute dz = dy * act'(saved) in fp32, rounded once; saved is z, except for relu: y.

    Args:
        dy, saved: of one shape, any strides; fp16, bf16 or fp32.

    Raises:
        ValueError: unknown activation, shapes or dtypes that differ.
    """
    check_activation(activation)
    check_operands("dy and saved", dy, saved)
    if dy.shape != saved.shape:
        raise ValueError(f"dy {tuple(dy.shape)} and saved {tuple(saved.shape)} differ in shape")
    return dz_of(dy, saved, activation)


def linear_dx(dz: Tensor, weight: Tensor, config: Config | None = None) -> Tensor:
    """Compute dx = dz @ weight, accumulated in fp32, rounded once.

    Args:
        dz: [..., N] of any strides, still scaled.
        weight: [N, K] of any strides, dz's dtype.

    Returns:
        [..., K], contiguous, in dz's dtype.
    """
    return _input_gradient(dz, weight, None, config)


def linear_dz_dx(
    dy: Tensor, saved: Tensor, weight: Tensor, activation: str, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Return (dz, dx) from one pass over dy: the product applies the derivative as it loads, where the configuration is
    a tile.

    To the bit, dz is ``linear_dz(dy, saved, activation)`` and dx, for one configuration, ``linear_dx(dz, weight)``.
    """
    check_activation(activation)
    if dy.shape != saved.shape:
        raise ValueError(f"dy {tuple(dy.shape)} and saved {tuple(saved.shape)} differ in shape")
    check_operands("dy, saved and weight", dy, saved, weight)
    rows = rows_of(dy)
    if config is None:
        inner, columns = dy.shape[-1], weight.shape[1]
        found = config_for("linear_dz_dx", dy.dtype, dy.device, (rows.shape[0], columns, inner))
        config = for_alignment(found, dy.dtype, (inner, *weight.stride(), columns))
    if config.kind != "tile" or activation == "none" or weight.shape[1] == 0:  # without columns no tile would write dz
        dz = dz_of(dy, saved, activation)
        return dz, _input_gradient(dz, weight, None, config)
    rows = rows.contiguous()
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    derivative = Derivative(activation, rows_of(saved).contiguous(), rows_of(dz))
    return dz, _input_gradient(rows.view(dy.shape), weight, derivative, config)


def _input_gradient(dz: Tensor, weight: Tensor, derivative: Derivative | None, config: Config | None) -> Tensor:
    check_operands("dz and weight", dz, weight)
    if weight.dim() != 2 or dz.dim() == 0 or dz.shape[-1] != weight.shape[0]:
        raise ValueError(f"dz {tuple(dz.shape)} and weight {tuple(weight.shape)} do not fit: need [..., N] and [N, K]")
    dx = torch.empty((*dz.shape[:-1], weight.shape[1]), dtype=dz.dtype, device=dz.device)
    op = "linear_dx" if derivative is None else "linear_dz_dx"
    multiply(op, rows_of(dz), weight, dx, derivative=derivative, config=config)
    return dx


def _check_rows(dz: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    check_operands("dz and x", dz, x)
    rows, inputs = rows_of(dz), rows_of(x)
    if inputs.shape[0] != rows.shape[0]:
        raise ValueError(f"dz {tuple(dz.shape)} and x {tuple(x.shape)} do not fit: need [..., N] and [..., K]")
    return rows, inputs


def linear_dw(dz: Tensor, x: Tensor, config: Config | None = None) -> Tensor:
    """Compute dw = dz.T @ x over all rows, accumulated in fp32, rounded once: [N, K] in dz's dtype."""
    rows, inputs = _check_rows(dz, x)
    dw = torch.empty((rows.shape[1], inputs.shape[1]), dtype=dz.dtype, device=dz.device)
    multiply("linear_dw", rows.t(), inputs, dw, config=config)
    return dw


def linear_dw_(
    dz: Tensor,
    x: Tensor,
    main_grad: Tensor,
    inv_scale: Tensor,
    found_inf: Tensor,
    accumulate: bool,
    bias_grad: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Compute main_grad (+)= inv_scale * dz.T @ x in fp32, never rounded to 16 bits; deterministic.

    Args:
        dz: [..., N], the scaled gradient of the pre-activation; fp16, bf16 or fp32.
        x: [..., K], the layer's input, dz's dtype and leading dimensions.
        main_grad: [N, K] contiguous fp32. Its old content is not read unless ``accumulate``.
        inv_scale: fp32 [1], on the device: 1 / loss scale.
        found_inf: fp32 [1], set to 1 if any accumulator is infinite or NaN, and never reset.
        accumulate: add to main_grad (and bias_grad) instead of storing.
        bias_grad: [N] contiguous fp32: (+)= inv_scale * sum over rows of dz, in the same kernel.
        config: instead of the table's.

    Raises:
        ValueError: shapes that do not fit, mixed dtypes or devices, a main_grad that is not contiguous.
        TypeError: another dtype.
    """
    rows, inputs = _check_rows(dz, x)
    n, k = rows.shape[1], inputs.shape[1]
    check_sink(main_grad, inv_scale, found_inf, (n, k), dz)
    if bias_grad is not None:
        check_sink(bias_grad, inv_scale, found_inf, (n,), dz)
        if k == 0:  # no tile would sum it
            linear_db_(dz, bias_grad, inv_scale, found_inf, accumulate)
    epilogue = Epilogue(True, inv_scale, found_inf, accumulate, bias_grad)
    multiply("linear_dw", rows.t(), inputs, main_grad, epilogue, config=config)


def linear_dw_db_(
    dz: Tensor, x: Tensor, main_grad: Tensor, bias_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool
) -> None:
    """Compute ``linear_dw_`` and its bias gradient, with the arguments of the op's schema."""
    linear_dw_(dz, x, main_grad, inv_scale, found_inf, accumulate, bias_grad)


def linear_db(dz: Tensor) -> Tensor:
    """Compute db = sum over rows of dz, accumulated in fp32: [N] in dz's dtype."""
    rows = rows_of(dz)
    db = torch.empty(rows.shape[1], dtype=dz.dtype, device=dz.device)
    if rows.shape[0] == 0:
        return db.zero_()
    parts, count = column_sums(rows)
    finish(parts, db, count=count)
    return db


def linear_db_(dz: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """Compute main_grad [N] (+)= inv_scale * sum over rows of dz; found_inf as in ``linear_dw_``."""
    rows = rows_of(dz)
    check_sink(main_grad, inv_scale, found_inf, (rows.shape[1],), dz)
    add_column_sums(rows, main_grad, inv_scale, found_inf, accumulate)


def unscale_(grad: Tensor, main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, accumulate: bool) -> None:
    """Compute main_grad (+)= inv_scale * grad in fp32, for any strides and floating dtype; found_inf: see
    ``linear_dw_``.
    """
    check_sink(main_grad, inv_scale, found_inf, tuple(grad.shape), grad)
    finish_main_grad(grad.contiguous(), main_grad, inv_scale, found_inf, accumulate)
