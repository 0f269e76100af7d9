"""A pass over a batch as an attempt: what its forwards change beside gradients is noted before, and put back if the
pass fails and is to be repeated.

Generators and buffers of the layers can be put back (running statistics of a batch norm, say). What cannot is found:
a batch or a parameter that a layer has changed in place, a large buffer, gradients outside the model. Attributes of
another kind, which a layer may count its calls in, are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spu.common import torch_private
from spu.common.torch_private import pytree
from spu.engine.build import BuiltStages
from spu.engine.generators import named_generators

__all__ = ["Attempt"]

_COPIED = 1 << 16
"""Bytes up to which a buffer is copied, as where layers are recomputed."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class _Noted:
    """A buffer before an attempt: its values too, if it is small."""

    tensor: Tensor
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Noted:
        small = tensor.layout == torch.strided and tensor.numel() * tensor.element_size() <= _COPIED
        return cls(tensor, _version(tensor), tensor.detach().clone() if small else None)

    @property
    def same(self) -> bool:
        return _version(self.tensor) == self.version


class Attempt:
    """Notes what a pass over a batch may change, and puts it back.

    Args:
        built: the stages.
        streamed: the stages whose parameters are updated during a pass.

    Attributes:
        changes_buffers: a forward has changed a buffer, now or earlier: microbatches of another size would change it
            otherwise.
    """

    def __init__(self, built: BuiltStages, streamed: frozenset[int] = frozenset()) -> None:
        self._built, self._streamed = built, streamed
        parts = [layer.module for stage in built.stages for layer in stage.parts]
        self._modules = list({id(module): module for part in parts for module in part.modules()}.values())
        self._buffers: dict[tuple[int, str], _Noted] = {}
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._versions: list[tuple[str, Tensor, int]] = []
        self._outside = False
        self.changes_buffers = False

    def begin(self, *batch: Any) -> None:
        """Note the state before a pass over these trees of tensors."""
        now = {key: self._note(key, tensor) for key, tensor in self._named_buffers()}
        self._buffers = now
        self._generators = [(g, g.get_state()) for _, _, g in named_generators(self._built.stages)]
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._outside = any(leaf.requires_grad for leaf in leaves)
        self._versions = [("the batch", leaf, _version(leaf)) for leaf in leaves]
        for stage in self._built.stages:
            if stage.index not in self._streamed:
                own = ((f"a parameter of stage {stage.index}", p, _version(p)) for p in stage.parameters())
                self._versions += own

    def end(self) -> None:
        """Look, after a pass that did not fail, at what it has changed."""
        self.changes_buffers = self.changes_buffers or any(True for _ in self._changed())
        self._versions = []

    def put_back(self) -> str:
        """Put back what a failed pass has changed; return in words what cannot be, or nothing."""
        lost = ""
        changed = list(self._changed())
        self.changes_buffers = self.changes_buffers or bool(changed)
        modules = {id(module): module for module in self._modules}
        with torch.no_grad():
            for (owner, name), noted in changed:
                setattr(modules[owner], name, noted.tensor)
                if noted.same:
                    continue
                if noted.values is None:
                    lost = f"buffer {name!r} of {tuple(noted.tensor.shape)} was changed, and is too large to be kept"
                else:
                    noted.tensor.copy_(noted.values)
                    noted.version = _version(noted.tensor)
        for generator, state in self._generators:
            generator.set_state(state)
        for what, tensor, version in self._versions:
            if _version(tensor) != version:
                lost = f"{what} was changed in place"
        if self._outside or any(stage.reaches_outside for stage in self._built.stages):
            lost = "gradients go to tensors outside the model, and some may have arrived"
        self._versions = []
        return lost

    def _note(self, key: tuple[int, str], tensor: Tensor) -> _Noted:
        before = self._buffers.get(key)
        return before if before is not None and before.tensor is tensor and before.same else _Noted.of(tensor)

    def _changed(self) -> Iterator[tuple[tuple[int, str], _Noted]]:
        now = dict(self._named_buffers())
        return (
            (key, noted) for key, noted in self._buffers.items() if now.get(key) is not noted.tensor or not noted.same
        )

    def _named_buffers(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        for module in self._modules:
            for name, buffer in torch_private.buffers_of(module).items():
                if buffer is not None:
                    yield (id(module), name), buffer

    def normalizes_batches(self) -> bool:
        """Tell whether a layer's results depend on how many rows a microbatch has: a batch norm in training."""
        return any(isinstance(module, _BATCH_NORMS) and module.training for module in self._modules)


def _version(tensor: Tensor) -> int:
    """Return the tensor's version; tensors of inference mode have none, and are not changed outside of it."""
    return 0 if tensor.is_inference() else torch_private.version(tensor)
