"""A model without values: its parameters take no memory until they are given some."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from spu.model.deferred import fill_meta

__all__ = ["materialise", "meta_parameters"]


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Put the parameters of modules that this thread makes in this block on the meta device, where nothing is computed.

    Buffers have their values, unlike those of a model built under ``torch.device("meta")``: tables of rotary embeddings
    are made by code that no checkpoint replaces.
    """
    here = threading.get_ident()

    def replace(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def materialise(model: nn.Module) -> dict[str, Tensor]:
    """Give every parameter on the meta device memory of its own, without values; what is tied stays tied.

    Returns:
        All parameters and all buffers that are part of a model's state, by name, also those that are tied.
    """
    fill_meta(model, lambda shape, dtype: torch.empty(shape, dtype=dtype, device="cpu"))
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
