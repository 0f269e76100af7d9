"""The last layer and its loss as one, where a training computes the loss without logits (`spu.engine.head_loss`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spu.common.fake_ops import fake_copy
from spu.common.torch_private import FakeTensorMode
from spu.devices.manager import Device
from spu.engine.head_loss import HeadInput, HeadLoss, head_of, worth_bytes
from spu.engine.loss import plain_cross_entropy
from spu.model.layers import Layer

__all__ = ["LogitsError", "WithLoss", "device_type_of", "rows_without_logits"]


class LogitsError(Exception):
    """The loss is computed from logits."""


@dataclass
class WithLoss(HeadLoss):
    """The last layer and the loss of what it returns.

    Attributes:
        targets: of one microbatch.
        mode: of the fake tensors that it runs on.
    """

    targets: Any = None
    mode: FakeTensorMode | None = None

    @classmethod
    def on_fakes(cls, layer: Layer, loss_fn: Any, targets: Any, mode: FakeTensorMode) -> WithLoss:
        """Return it for the last layer of a model."""
        made = HeadLoss.of(layer, loss_fn)
        own = (made.name, made.module, made.wants_inputs, made.parameter_names, made.products, loss_fn)
        return cls(*own, targets=targets, mode=mode)

    def _call(self, x: Any, inputs: Any) -> Any:
        """Return the loss, fp32.

        Raises:
            LogitsError: the layer returns logits.
        """
        given = super()._call(x, inputs)
        if not isinstance(given, HeadInput):
            raise LogitsError
        assert self.mode is not None
        targets = fake_copy(self.mode, self.targets)
        share = self.share(given, targets, 1.0)
        return self.loss(given, targets).float() * 1.0 if share is None else share


def device_type_of(devices: Iterable[Device]) -> str:
    """Return the type of the device that the last layer is taken to run on: a GPU's, if there is one."""
    return next((device.torch_device.type for device in devices if device.torch_device.type != "cpu"), "cpu")


def rows_without_logits(module: nn.Module, loss_fn: Any, tokens: int, dtype: torch.dtype) -> int | None:
    """Return the rows of a microbatch from which on its logits are left out, if the loss is computed so; else None.

    Args:
        module: of the last layer.
        loss_fn: of the training.
        tokens: of a row.
        dtype: of the training.
    """
    head = head_of(module)
    if head is None or plain_cross_entropy(loss_fn) is None:
        return None
    return -(-worth_bytes(dtype) // (tokens * head.weight.shape[0] * torch.float32.itemsize))
