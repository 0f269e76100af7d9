"""The fused forms of whole blocks. A module gets one by a change of class, to a subclass of its own.

Every call decides whether the fused form serves, from the block's state at that time: parts that were replaced
(adapters, quantised layers) or watched by hooks are run one by one, as they were. So is everything for tensors that the
fused ops do not take (``spu.ops.plain``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spu.common.torch_private import MODULE_HOOKS, has_global_module_hook
from spu.nn.attention import register_attention
from spu.nn.fp32 import PAIR, by_torch
from spu.nn.linear import Linear, fused_linear, torch_linear
from spu.nn.table import ACTIVATIONS, LIBRARIES, Block, GatedBlock, PairBlock, TransposedLinear
from spu.ops import GATED_ACTIVATIONS
from spu.ops.gated import fused_gated_mlp
from spu.ops.linear import compute_dtype
from spu.ops.mlp import fused_mlp
from spu.ops.plain import takes
from spu.ops.reference.linear import torch_activation

__all__ = [
    "MIXINS",
    "FusedBlock",
    "FusedGated",
    "FusedPair",
    "FusedSequential",
    "FusedTransposedLinear",
    "activation_of",
    "from_library",
    "fused_class",
    "is_linear",
    "unwatched",
    "watched_globally",
]


_GATED = 1 << 26  # multiply-adds of a gate's product from which the whole block as one op pays in fp32


def from_library(cls: type) -> bool:
    """Tell whether a class was defined in one of the libraries that the table lists."""
    return cls.__module__.split(".")[0] in LIBRARIES


def unwatched(module: nn.Module) -> bool:
    """Tell whether no one would notice if the module were not called."""
    state = module.__dict__
    return not any(map(state.__getitem__, MODULE_HOOKS)) and "forward" not in state


def activation_of(module: object) -> str | None:
    """Return the op's name for an activation module, None for one that it does not have or that has hooks."""
    cls = type(module)
    known = cls.__module__ == "torch.nn.modules.activation" or from_library(cls)
    if not isinstance(module, nn.Module) or not known or not unwatched(module):
        return None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return ACTIVATIONS.get(cls.__name__)


def is_linear(module: object) -> bool:
    """Tell whether a module is a linear layer without an activation that may be run as part of its block."""
    cls = type(module)
    if cls is Linear:
        plain = module.activation == "none"  # type: ignore[attr-defined]
    else:
        plain = cls is nn.Linear or getattr(cls, "spu_block", None) == TransposedLinear()
    return plain and unwatched(module)  # type: ignore[arg-type]


def watched_globally() -> bool:
    """Tell whether a hook sees the calls of all modules."""
    return has_global_module_hook()


class FusedBlock(nn.Module):
    """A module whose class ``accelerate`` changed.

    Attributes:
        spu_plain: the class it had.
        spu_block: what the table says of it; None for an nn.Sequential.
        spu_dtype: of the computation; None: its parameters', or autocast's.
    """

    spu_plain: ClassVar[type[nn.Module]]
    spu_block: ClassVar[Block | None]
    spu_dtype = None  # type: torch.dtype | None  # (no annotation: TorchScript would read it)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # the class is made at run time: pickle cannot name it
        return _remake, (type(self).__mro__[1], self.spu_plain, self.spu_block), self.__dict__


class FusedTransposedLinear(FusedBlock):
    """transformers' Conv1D."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., in] -> [..., out]."""
        y = fused_linear(self, x, "none", transposed=True)
        if y is not None:
            return y
        return self.spu_plain.forward(self, x) if self.spu_dtype is None else torch_linear(self, x, "none", True)  # type: ignore[no-any-return]


class FusedGated(FusedBlock):
    """down(act(gate(x)) * up(x)) in one op."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., in] -> [..., out]."""
        block = self.spu_block
        assert isinstance(block, GatedBlock)
        layers = [getattr(self, name) for name in (block.gate, block.up, block.down)]
        activation = activation_of(getattr(self, block.activation))
        fits = all(is_linear(layer) and layer.bias is None for layer in layers)
        if not fits or activation not in GATED_ACTIVATIONS or watched_globally():
            return self.spu_plain.forward(self, x)  # type: ignore[no-any-return]
        gate, up, down = (layer.weight for layer in layers)
        fits = takes(x, gate, up, down) and x.dtype.is_floating_point and gate.dtype.is_floating_point
        if not fits or by_torch(x, (gate, up, down), self.spu_dtype, x.numel() * gate.shape[0], _GATED):
            return self.spu_plain.forward(self, x)  # type: ignore[no-any-return]
        y = fused_gated_mlp(x, gate, up, down, str(activation), compute_dtype(x, self.spu_dtype))
        return y if self.spu_dtype is None else y.to(x.dtype)


def _run_mlp(first: nn.Module, activation: str, second: object, x: Tensor) -> Tensor | None:
    """Compute second(activation(first(x))) in one op, or by torch's where they are faster; None where ``second`` is no
    linear layer that may be part of it, or torch's own modules must serve. ``first`` is one.
    """
    if not is_linear(second):
        return None
    assert isinstance(second, nn.Module)
    transposed, dtype = isinstance(first, FusedTransposedLinear), getattr(first, "spu_dtype", None)
    if isinstance(second, FusedTransposedLinear) is not transposed or getattr(second, "spu_dtype", None) is not dtype:
        return None
    parameters: list[Any] = [first.weight, first.bias, second.weight, second.bias]
    if not takes(x, *parameters) or not all(t is None or t.dtype.is_floating_point for t in (x, *parameters)):
        return None
    w_in, b_in, w_out, b_out = parameters
    if by_torch(x, parameters, dtype, 2 * x.numel() * w_in.shape[1 if transposed else 0], PAIR):
        hidden = torch_activation(F.linear(x, w_in.t() if transposed else w_in, b_in), activation)
        return F.linear(hidden, w_out.t() if transposed else w_out, b_out)
    y = fused_mlp(x, w_in, b_in, w_out, b_out, activation, compute_dtype(x, dtype), transposed)
    return y if dtype is None else y.to(x.dtype)


class FusedPair(FusedBlock):
    """A linear layer and its activation in one op, then the rest; with a second linear layer, all three in one."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute x [..., in] -> [..., out]."""
        block = self.spu_block
        assert isinstance(block, PairBlock)
        linear, activation = getattr(self, block.linear), activation_of(getattr(self, block.activation))
        if activation is None or not is_linear(linear) or watched_globally():
            return self.spu_plain.forward(self, x)  # type: ignore[no-any-return]
        rest = [getattr(self, name) for name in block.rest]
        y = _run_mlp(linear, activation, rest[0], x) if rest else None
        if y is not None:
            del rest[0]
        else:
            y = fused_linear(linear, x, activation, isinstance(linear, FusedTransposedLinear))
        if y is None:
            return self.spu_plain.forward(self, x)  # type: ignore[no-any-return]
        for module in rest:
            y = module(y)
        return y


class FusedSequential(FusedBlock):
    """nn.Sequential, in which a linear layer and an activation are one op, and so is a linear layer after them."""

    def forward(self, input: Tensor) -> Tensor:
        """Run like nn.Sequential, pairs of layers fused, and linear, activation, linear."""
        if torch.jit.is_scripting():
            for module in self:  # type: ignore[attr-defined]
                input = module(input)
            return input
        else:  # TorchScript compiles the branch that it takes, and no more
            return _run_fused(list(self._modules.values()), input)  # type: ignore[arg-type]


def _run_fused(layers: list[nn.Module], x: Any) -> Any:
    i, watched = 0, watched_globally()
    while i < len(layers):
        layer = layers[i]
        activation = None if watched else _activation_at(layers, i + 1)
        if activation is not None and is_linear(layer):
            y, taken = None, 3
            if i + 2 < len(layers) and _activation_at(layers, i + 3) is None:  # else the next one is a pair's first
                y = _run_mlp(layer, activation, layers[i + 2], x)
            if y is None:
                y, taken = fused_linear(layer, x, activation, isinstance(layer, FusedTransposedLinear)), 2
            if y is not None:
                x, i = y, i + taken
                continue
        x, i = layer(x), i + 1
    return x


def _activation_at(layers: list[nn.Module], i: int) -> str | None:
    return activation_of(layers[i]) if i < len(layers) else None


_CLASSES: dict[tuple[type, type, Block | None], type[FusedBlock]] = {}


def fused_class(mixin: type[FusedBlock], plain: type[nn.Module], block: Block | None) -> type[FusedBlock]:
    """Return the subclass of a module's class that runs it fused; one for each class."""
    found = _CLASSES.get((mixin, plain, block))
    if found is not None:
        return found
    members = {"spu_plain": plain, "spu_block": block, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return _CLASSES.setdefault((mixin, plain, block), type(plain.__name__, (mixin, plain), members))


def _remake(mixin: type[FusedBlock], plain: type[nn.Module], block: Block | None) -> FusedBlock:
    if from_library(plain):
        register_attention()  # the model's configuration may name it
    cls = fused_class(mixin, plain, block)
    return cls.__new__(cls)


MIXINS: dict[type, type[FusedBlock]] = {
    GatedBlock: FusedGated,
    PairBlock: FusedPair,
    TransposedLinear: FusedTransposedLinear,
}
