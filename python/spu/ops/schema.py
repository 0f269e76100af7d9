"""Every op of spu: its schema, its fake kernel and its backends, each defined once.

A backend is an *overload*: ``spu::linear.reference`` and ``spu::linear.cpu`` share one schema and one fake kernel.
A choice of backend is therefore visible in a graph, survives ``torch.compile``, and needs no state in other threads.
The reference implementations are in ``reference/``; the C++ library only registers implementations for the overloads
that are defined here, so that an installation without a compiler has the same ops. A backend may lack the kernels of
``COMPOSED``: there a composition of its own smaller ops serves (``reference/composed.py``), until it registers one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from spu.common import wire
from spu.ops.reference import attention as reference_attention
from spu.ops.reference import codec as reference_codec
from spu.ops.reference import composed
from spu.ops.reference import fused as reference_fused
from spu.ops.reference import linear as reference
from spu.ops.reference import norm as reference_norm
from spu.ops.reference import optimizer as reference_optimizer

__all__ = [
    "BACKENDS",
    "COMPOSED",
    "COMPOSED_REFERENCE",
    "FAKES",
    "SCHEMAS",
    "overload",
    "register_autograd",
    "register_backend",
]

BACKENDS = ("reference", "cpu", "triton", "cuda")

_LIBRARY = torch.library.Library("spu", "DEF")  # kept alive: the ops vanish with it

_SINK = "Tensor(a!) main_grad, Tensor inv_scale, Tensor(b!) found_inf, bool accumulate"

SCHEMAS: dict[str, str] = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias, str activation, bool keep_preact) -> (Tensor y, Tensor preact)",
    "linear_dz": "(Tensor dy, Tensor saved, str activation) -> Tensor",
    "linear_dx": "(Tensor dz, Tensor weight) -> Tensor",
    "linear_dz_dx": "(Tensor dy, Tensor saved, Tensor weight, str activation) -> (Tensor dz, Tensor dx)",
    "linear_dw": "(Tensor dz, Tensor x) -> Tensor",
    "linear_db": "(Tensor dz) -> Tensor",
    "linear_dw_": f"(Tensor dz, Tensor x, {_SINK}) -> ()",
    "linear_db_": f"(Tensor dz, {_SINK}) -> ()",
    "linear_dw_db_": (
        "(Tensor dz, Tensor x, Tensor(a!) main_grad, Tensor(c!) bias_grad, Tensor inv_scale, Tensor(b!) found_inf, "
        "bool accumulate) -> ()"
    ),
    # addend + y, which is rounded before; of the addend's dtype, that of x or fp32
    "linear_add": "(Tensor x, Tensor weight, Tensor? bias, Tensor addend) -> Tensor",
    # products that share x
    "linear_each": "(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]",
    "linear_dw_each_": (
        "(Tensor[] dzs, Tensor x, Tensor(a!)[] main_grads, Tensor inv_scale, Tensor(b!) found_inf, bool accumulate) "
        "-> ()"
    ),
    "unscale_": f"(Tensor grad, {_SINK}) -> ()",
    "pack": "(Tensor x, str codec) -> Tensor",
    "unpack": "(Tensor wire, SymInt[] shape, ScalarType dtype, str codec) -> Tensor",
    # into memory that is there: wire and sources may be on the device or in pinned host memory
    "pack_": "(Tensor x, str codec, Tensor(a!) wire) -> ()",
    "unpack_": "(Tensor wire, str codec, Tensor(a!) out) -> ()",
    "copy_in_": "(Tensor[] sources, Tensor(a!)[] targets) -> ()",
    "adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
        "Tensor[] steps, Tensor grad_scale, Tensor found_inf, float lr, float beta1, float beta2, float eps, "
        "float weight_decay) -> ()"
    ),
    "grad_sqnorm": "(Tensor[] grads) -> Tensor",
    "gated_linear": (
        "(Tensor x, Tensor w_gate, Tensor w_up, str activation, bool keep) -> (Tensor h, Tensor gate, Tensor up)"
    ),
    "gated_dz": ("(Tensor dh, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup, Tensor h)"),
    "gated_dh": (
        "(Tensor dy, Tensor w_down, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup, Tensor h)"
    ),
    "gated_dx": "(Tensor dgate, Tensor dup, Tensor w_gate, Tensor w_up) -> Tensor",
    "gated_mlp": (
        "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, str activation, bool keep) -> "
        "(Tensor y, Tensor gate, Tensor up)"
    ),
    # addend + y as in linear_add; gate and up are kept
    "gated_mlp_add": (
        "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, str activation, Tensor addend) -> "
        "(Tensor y, Tensor gate, Tensor up)"
    ),
    # a mixture of experts: spu.ops.reference.experts says what rows, ends and weights are
    "experts_order": "(Tensor ids, int experts) -> (Tensor order, Tensor places, Tensor ends)",
    "experts_mlp": (
        "(Tensor x, Tensor ends, Tensor w_gate_up, Tensor w_down, str activation, bool keep) -> "
        "(Tensor y, Tensor gate, Tensor up)"
    ),
    "experts_dh": (
        "(Tensor dy, Tensor ends, Tensor w_down, Tensor gate, Tensor up, str activation) -> "
        "(Tensor dgate, Tensor dup, Tensor h)"
    ),
    "experts_dx": "(Tensor dgate, Tensor dup, Tensor ends, Tensor w_gate_up) -> Tensor",
    "experts_dw": "(Tensor[] dzs, Tensor x, Tensor ends) -> Tensor",
    "experts_dw_": f"(Tensor[] dzs, Tensor x, Tensor ends, {_SINK}) -> ()",
    "rows_sum": "(Tensor rows, Tensor places, Tensor? factors, ScalarType dtype) -> Tensor",
    "rows_dot": "(Tensor a, Tensor b, Tensor places) -> Tensor",
    "mlp": (
        "(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str activation, bool keep) -> "
        "(Tensor y, Tensor saved)"
    ),
    "mlp_dz": (
        "(Tensor dy, Tensor w_out, Tensor saved, str activation, bool needs_h, bool needs_sums) -> "
        "(Tensor dz, Tensor h, Tensor sums)"
    ),
    "attention": "(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> (Tensor out, Tensor lse)",
    "attention_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, bool causal) -> "
        "(Tensor dq, Tensor dk, Tensor dv)"
    ),
    "linear_ce": ("(Tensor hidden, Tensor weight, Tensor target, int ignore_index) -> (Tensor loss_rows, Tensor lse)"),
    "linear_ce_dz": (
        "(Tensor hidden, Tensor weight, Tensor target, Tensor lse, Tensor grad_rows, int ignore_index) -> Tensor"
    ),
    "linear_ce_and_dz": (
        "(Tensor hidden, Tensor weight, Tensor target, Tensor grad_rows, Tensor(a!) logits, int ignore_index) -> "
        "(Tensor loss_rows, Tensor dz)"
    ),
    # into memory that is there; dz may be the logits'
    "linear_ce_and_dz_": (
        "(Tensor hidden, Tensor weight, Tensor target, Tensor grad_rows, Tensor(a!) logits, Tensor(b!) dz, "
        "int ignore_index) -> Tensor loss_rows"
    ),
    "embedding_dw_": f"(Tensor dy, Tensor ids, int padding_idx, {_SINK}) -> ()",
    "rms_norm": (
        "(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset, bool rounded) -> "
        "(Tensor y, Tensor rstd, Tensor sum)"
    ),
    # y in another dtype than x
    "rms_norm_to": (
        "(Tensor x, Tensor? weight, float eps, float offset, bool rounded, ScalarType dtype) -> (Tensor y, Tensor rstd)"
    ),
    # dy may be of 16 bits beside an fp32 x
    "rms_norm_backward": (
        "(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor rstd, float offset, bool rounded, bool needs_dx, "
        "bool needs_dw) -> (Tensor dx, Tensor dw)"
    ),
    "layer_norm": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> "
        "(Tensor y, Tensor mean, Tensor rstd, Tensor sum)"
    ),
    "layer_norm_backward": (
        "(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool needs_dx, bool needs_dw, "
        "bool needs_db) -> (Tensor dx, Tensor dw, Tensor db)"
    ),
    "rotary": (
        "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor q_out, Tensor k_out)"
    ),
}
COMPOSED = frozenset(composed.IMPLEMENTATIONS)  # ops that a backend may lack
COMPOSED_REFERENCE = (  # those that the reference lacks too
    "linear_dz_dx", "linear_dw_db_", "gated_dh", "gated_mlp", "mlp", "pack_", "unpack_", "copy_in_", "rms_norm_to",
    "linear_add", "linear_each", "linear_dw_each_", "linear_ce_and_dz", "gated_mlp_add", "experts_order",
    "experts_mlp", "experts_dh", "experts_dx", "experts_dw", "experts_dw_", "rows_sum", "rows_dot",
)  # fmt: skip

_REFERENCE: dict[str, Callable[..., Any]] = {
    **reference.IMPLEMENTATIONS,
    **reference_codec.IMPLEMENTATIONS,
    **reference_optimizer.IMPLEMENTATIONS,
    **reference_fused.IMPLEMENTATIONS,
    **reference_attention.IMPLEMENTATIONS,
    **reference_norm.IMPLEMENTATIONS,
    **{name: composed.implementation(name, "reference") for name in COMPOSED_REFERENCE},
}


def _fake_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, keep_preact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep_preact else (0,))


def _fake_gated(x: torch.Tensor, w_gate: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], w_gate.shape[0]) if keep else (0,)
    return x.new_empty(shape), x.new_empty(shape)


def _fake_mlp(
    x: torch.Tensor, w_in: torch.Tensor, b_in: Any, w_out: torch.Tensor, b_out: Any, activation: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[:-1]
    return x.new_empty((*rows, w_out.shape[0])), x.new_empty((*rows, w_in.shape[0]) if keep else (0,))


def _fake_mlp_dz(
    dy: torch.Tensor, w_out: torch.Tensor, saved: torch.Tensor, activation: str, needs_h: bool, needs_sums: bool
) -> tuple[torch.Tensor, ...]:
    dz = saved.new_empty(saved.shape)
    return dz, saved.new_empty(saved.shape if needs_h else (0,)), _fp32(dy, saved.shape[-1] if needs_sums else 0)


def _fake_linear_ce(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.new_empty((hidden.shape[0],), dtype=dtype)
    return rows, torch.empty_like(rows)


def _fake_attention(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=dtype)


def _fake_norm(x: torch.Tensor, residual: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, ...]:
    rows = _fp32(x, x.shape[:-1].numel())
    return x.new_empty(x.shape), rows, x.new_empty((0,) if residual is None else x.shape)


def _fake_layer_norm(x: torch.Tensor, residual: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, ...]:
    y, rstd, total = _fake_norm(x, residual)
    return y, torch.empty_like(rstd), rstd, total


def _fake_norm_gradients(x: torch.Tensor, needs_dx: bool, *needs: bool) -> tuple[torch.Tensor, ...]:
    dx = x.new_empty(x.shape if needs_dx else (0,))
    return dx, *(_fp32(x, x.shape[-1] if needed else 0) for needed in needs)


def _fp32(like: torch.Tensor, size: int) -> torch.Tensor:
    return like.new_empty((size,), dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _fake_nothing(*_: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "linear": _fake_linear,
    "linear_dz": lambda dy, saved, activation: dy.new_empty(dy.shape),
    "linear_dx": lambda dz, weight: dz.new_empty((*dz.shape[:-1], weight.shape[1])),
    "linear_dz_dx": lambda dy, saved, weight, activation: (
        dy.new_empty(dy.shape),
        dy.new_empty((*dy.shape[:-1], weight.shape[1])),
    ),
    "linear_dw": lambda dz, x: dz.new_empty((dz.shape[-1], x.shape[-1])),
    "linear_db": lambda dz: dz.new_empty((dz.shape[-1],)),
    "linear_dw_": _fake_nothing,
    "linear_db_": _fake_nothing,
    "linear_dw_db_": _fake_nothing,
    "linear_add": lambda x, weight, bias, addend: addend.new_empty((*x.shape[:-1], weight.shape[0])),
    "linear_each": lambda x, weights, biases: [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights],
    "linear_dw_each_": _fake_nothing,
    "unscale_": _fake_nothing,
    "pack": lambda x, codec: x.new_empty(wire.wire_bytes(x.shape, x.dtype, codec), dtype=torch.uint8),
    "unpack": lambda buffer, shape, dtype, codec: buffer.new_empty(tuple(shape), dtype=dtype),
    "pack_": _fake_nothing,
    "unpack_": _fake_nothing,
    "copy_in_": _fake_nothing,
    "adamw_": _fake_nothing,
    "grad_sqnorm": lambda grads: grads[0].new_empty((1,), dtype=torch.float64),
    "gated_linear": lambda x, w_gate, w_up, activation, keep: (
        x.new_empty((*x.shape[:-1], w_gate.shape[0])),
        *_fake_gated(x, w_gate, keep),
    ),
    "gated_dz": lambda dh, gate, up, activation: tuple(dh.new_empty(dh.shape) for _ in range(3)),
    "gated_dh": lambda dy, w_down, gate, up, activation: tuple(gate.new_empty(gate.shape) for _ in range(3)),
    "gated_dx": lambda dgate, dup, w_gate, w_up: dgate.new_empty((*dgate.shape[:-1], w_gate.shape[1])),
    "gated_mlp": lambda x, w_gate, w_up, w_down, activation, keep: (
        x.new_empty((*x.shape[:-1], w_down.shape[0])),
        *_fake_gated(x, w_gate, keep),
    ),
    "gated_mlp_add": lambda x, w_gate, w_up, w_down, activation, addend: (
        addend.new_empty((*x.shape[:-1], w_down.shape[0])),
        *_fake_gated(x, w_gate, True),
    ),
    "experts_order": lambda ids, experts: (
        ids.new_empty((ids.numel(),)),
        ids.new_empty(ids.shape),
        ids.new_empty((experts,)),
    ),
    "experts_mlp": lambda x, ends, w_gate_up, w_down, activation, keep: (
        x.new_empty((x.shape[0], w_down.shape[1])),
        *(x.new_empty((x.shape[0], w_down.shape[2]) if keep else (0,)) for _ in range(2)),
    ),
    "experts_dh": lambda dy, ends, w_down, gate, *_: tuple(gate.new_empty(gate.shape) for _ in range(3)),
    "experts_dx": lambda dgate, dup, ends, w_gate_up: dgate.new_empty((dgate.shape[0], w_gate_up.shape[2])),
    "experts_dw": lambda dzs, x, ends: x.new_empty((ends.shape[0], sum(dz.shape[1] for dz in dzs), x.shape[1])),
    "experts_dw_": _fake_nothing,
    "rows_sum": lambda rows, places, factors, dtype: rows.new_empty((places.shape[0], rows.shape[1]), dtype=dtype),
    "rows_dot": lambda a, b, places: _fp32(a, places.numel()).view(places.shape),
    "mlp": _fake_mlp,
    "mlp_dz": _fake_mlp_dz,
    "attention": _fake_attention,
    "attention_backward": lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    "linear_ce": _fake_linear_ce,
    "linear_ce_dz": lambda hidden, weight, *_: hidden.new_empty((hidden.shape[0], weight.shape[0])),
    "linear_ce_and_dz": lambda hidden, weight, *_: (
        _fake_linear_ce(hidden)[0],
        hidden.new_empty((hidden.shape[0], weight.shape[0])),
    ),
    "linear_ce_and_dz_": lambda hidden, *_: _fake_linear_ce(hidden)[0],
    "embedding_dw_": _fake_nothing,
    "rms_norm": _fake_norm,
    "rms_norm_to": lambda x, weight, eps, offset, rounded, dtype: (
        x.new_empty(x.shape, dtype=dtype),
        _fp32(x, x.shape[:-1].numel()),
    ),
    "rms_norm_backward": lambda dy, dsum, x, weight, rstd, offset, rounded, *needs: _fake_norm_gradients(x, *needs),
    "layer_norm": _fake_layer_norm,
    "layer_norm_backward": lambda dy, dsum, x, weight, mean, rstd, *needs: _fake_norm_gradients(x, *needs),
    "rotary": lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
}


def _define() -> None:
    for name, schema in SCHEMAS.items():
        for backend in BACKENDS:
            _LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"spu::{name}.{backend}", FAKES[name], lib=_LIBRARY)
        # CompositeExplicitAutograd: one function for every device, below autograd.
        _LIBRARY.impl(f"{name}.reference", _REFERENCE[name], "CompositeExplicitAutograd")
    for name in COMPOSED:
        for backend in BACKENDS[1:]:
            # A device's key comes before this one: the backend's own kernel wins where it has one.
            _LIBRARY.impl(f"{name}.{backend}", composed.implementation(name, backend), "CompositeExplicitAutograd")


def register_backend(backend: str, implementations: Mapping[str, Callable[..., Any]], *keys: str) -> None:
    """Register the kernels of a backend that is written in Python, for the dispatch keys named ("CUDA", "CPU").

    Raises:
        ValueError: for an op that does not exist, and where one is missing that a backend may not lack.
    """
    unknown = [name for name in implementations if name not in SCHEMAS]
    missing = [name for name in SCHEMAS if name not in implementations and name not in COMPOSED]
    if unknown or missing:
        raise ValueError(f"backend {backend!r}: unknown ops {unknown}, missing ops {missing}")
    for name, implementation in implementations.items():
        for key in keys:
            _LIBRARY.impl(f"{name}.{backend}", implementation, key)


def register_autograd(name: str, backend: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """Register the derivative of ``spu::name.backend``; see ``torch.library.register_autograd``."""
    torch.library.register_autograd(f"spu::{name}.{backend}", backward, setup_context=setup, lib=_LIBRARY)


_define()


def overload(name: str, backend: str) -> Any:
    """Return the callable ``torch.ops.spu.<name>.<backend>``."""
    return _OVERLOADS[name, backend]


_OVERLOADS = {
    (name, backend): getattr(getattr(torch.ops.spu, name), backend) for name in SCHEMAS for backend in BACKENDS
}
