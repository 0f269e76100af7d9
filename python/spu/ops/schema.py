"""Every op of spu: its schema, its fake kernel and its backends, each defined once.

A backend is an *overload*: ``spu::linear.reference`` and ``spu::linear.cpu`` share one schema and one fake kernel.
A choice of backend is therefore visible in a graph, survives ``torch.compile``, and needs no state in other threads.
The reference implementations are in ``reference.py``; the C++ library only registers implementations for the overloads
that are defined here, so that an installation without a compiler has the same ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import reference, wire

BACKENDS = ("reference", "cpu", "triton")

_LIBRARY = torch.library.Library("spu", "DEF")  # kept alive: the ops vanish with it

_SINK = "Tensor(a!) main_grad, Tensor inv_scale, Tensor(b!) found_inf, bool accumulate"

SCHEMAS: dict[str, str] = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias, str activation, bool keep_preact) -> (Tensor y, Tensor preact)",
    "linear_dz": "(Tensor dy, Tensor saved, str activation) -> Tensor",
    "linear_dx": "(Tensor dz, Tensor weight) -> Tensor",
    "linear_dw": "(Tensor dz, Tensor x) -> Tensor",
    "linear_db": "(Tensor dz) -> Tensor",
    "linear_dw_": f"(Tensor dz, Tensor x, {_SINK}) -> ()",
    "linear_db_": f"(Tensor dz, {_SINK}) -> ()",
    "unscale_": f"(Tensor grad, {_SINK}) -> ()",
    "pack": "(Tensor x, str codec) -> Tensor",
    "unpack": "(Tensor wire, SymInt[] shape, ScalarType dtype, str codec) -> Tensor",
    "adamw_": (
        "(Tensor(a!) param, Tensor grad, Tensor(b!)? master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor step, "
        "Tensor grad_scale, Tensor found_inf, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()"
    ),
    "grad_sqnorm": "(Tensor grad) -> Tensor",
}


def _fake_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, keep_preact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep_preact else (0,))


def _fake_unpack(buffer: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, codec: str) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=buffer.device)


def _fake_pack(x: torch.Tensor, codec: str) -> torch.Tensor:
    return torch.empty(wire.wire_bytes(x.shape, x.dtype, codec), dtype=torch.uint8, device=x.device)


def _fake_nothing(*_: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "linear": _fake_linear,
    "linear_dz": lambda dy, saved, activation: dy.new_empty(dy.shape),
    "linear_dx": lambda dz, weight: dz.new_empty((*dz.shape[:-1], weight.shape[1])),
    "linear_dw": lambda dz, x: dz.new_empty((dz.shape[-1], x.shape[-1])),
    "linear_db": lambda dz: dz.new_empty((dz.shape[-1],)),
    "linear_dw_": _fake_nothing,
    "linear_db_": _fake_nothing,
    "unscale_": _fake_nothing,
    "pack": _fake_pack,
    "unpack": _fake_unpack,
    "adamw_": _fake_nothing,
    "grad_sqnorm": lambda grad: grad.new_empty((1,), dtype=torch.float32),
}


def _define() -> None:
    for name, schema in SCHEMAS.items():
        for backend in BACKENDS:
            _LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"spu::{name}.{backend}", FAKES[name], lib=_LIBRARY)
        # CompositeExplicitAutograd: one function for every device, below autograd.
        _LIBRARY.impl(f"{name}.reference", reference.IMPLEMENTATIONS[name], "CompositeExplicitAutograd")


def register_backend(backend: str, implementations: Mapping[str, Callable[..., Any]], *keys: str) -> tuple[str, ...]:
    """Gives a backend that is written in Python its kernels, for the dispatch keys named ("CUDA", "CPU").

    An op that it has no kernel for is served by the reference's code under the backend's name.

    Returns:
        The names of those ops.

    Raises:
        ValueError: for an implementation of an op that does not exist.
    """
    unknown = [name for name in implementations if name not in SCHEMAS]
    if unknown:
        raise ValueError(f"backend {backend!r} implements unknown ops: {', '.join(unknown)}")
    for name in SCHEMAS:
        for key in keys:
            _LIBRARY.impl(f"{name}.{backend}", implementations.get(name, reference.IMPLEMENTATIONS[name]), key)
    return tuple(name for name in SCHEMAS if name not in implementations)


def register_autograd(name: str, backend: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """Gives ``spu::name.backend`` its derivative; see ``torch.library.register_autograd``."""
    torch.library.register_autograd(f"spu::{name}.{backend}", backward, setup_context=setup, lib=_LIBRARY)


_define()


def overload(name: str, backend: str) -> Any:
    """The callable ``torch.ops.spu.<name>.<backend>``."""
    return _OVERLOADS[name, backend]


_OVERLOADS = {
    (name, backend): getattr(getattr(torch.ops.spu, name), backend) for name in SCHEMAS for backend in BACKENDS
}
