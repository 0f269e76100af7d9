"""The proof that a decoder's layers, run one after the other, are the decoder: bit for bit, on two small batches.

The whole model runs on each batch, with hooks on its blocks. What a block gets there must be what the block before
returned, with the arguments that the split model would give it; and the split model's layer must return what the block
returns. So a difference names its layer, and the weights are read once for both, which counts where they lie on a disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spu.common.errors import first_line
from spu.common.out_of_memory import is_out_of_memory
from spu.common.torch_private import swap_compiled_call
from spu.model.deferred import with_any_values
from spu.model.hf_context import Inputs, same
from spu.model.hf_stand_ins import hidden_of

__all__ = ["prove_split"]

ROWS, TOKENS = 2, 6
_FIRST = 1024  # elements of a weight


def prove_split(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Compare a decoder with its layers on a plain batch, and on one with padding on both sides and positions.

    Args:
        model: of transformers; its weights are not changed, its random draws neither.
        layers: (name, part), embedding first and head last.

    Raises:
        ValueError: a layer gets or returns something else than in the whole model; it is named.
    """
    plain = _uncompiled(model)  # compiled, a whole rounds otherwise than its parts
    with _evaluating(model, *(part for _, part in layers)), torch.enable_grad(), plain:
        for inputs in _batches(model):
            try:
                _compare(model, layers, inputs)
            except Exception as error:
                if isinstance(error, ValueError) or is_out_of_memory(error):  # a ValueError names what it is already
                    raise
                why = first_line(error)
                raise ValueError(f"{type(model).__name__} cannot be run in parts: {why}; {_ADVICE}") from error


def _batches(model: Any) -> Iterator[Inputs]:
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, ROWS * TOKENS + 1, device=device).view(ROWS, TOKENS) % vocabulary
    yield ids
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    mask[-1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    yield {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


class _Comparison:
    """Hooks for the blocks of the whole model, each compared with its part of the split one."""

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, nn.Module]], inputs: Inputs) -> None:
        self._name, self._layers, self._inputs = type(model).__name__, layers, inputs
        self.last: torch.Tensor | None = None  # what the block before returned
        self._count = 0
        self._busy = False

    def hook(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self._busy:  # called by the part itself
            return
        name: str = self._layers[index + 1][0]
        part: Any = self._layers[index + 1][1]
        hidden, rest, named = hidden_of(args, kwargs)
        if index != self._count:
            raise ValueError(f"{self._name} runs {name} out of order: {_ADVICE}")
        self._busy = True
        try:
            before = self._layers[0][1](self._inputs, self._inputs) if self.last is None else self.last
            if not (same(before, hidden) if self.last is None else before is hidden):
                raise ValueError(f"{self._name} gives {name} other hidden states than the layer before made: {_ADVICE}")
            if isinstance(self._inputs, dict):
                for key in self._inputs.keys() & part.arguments(hidden, self._inputs)[1].keys() - named.keys():
                    part.context.keep_back(key)
            else:
                part.context.mixes(index, _mixes(part, hidden))
            self._check_arguments(name, part.arguments(hidden, self._inputs), (rest, named))
            returned = part(hidden, self._inputs)
        finally:
            self._busy = False
        self.last = out[0] if isinstance(out, tuple | list) else out
        if not same(returned, self.last):
            raise ValueError(f"{self._name}: {name} alone returns other values than in the whole model: {_ADVICE}")
        self._count += 1

    def _check_arguments(self, name: str, split: Any, whole: Sequence[Any]) -> None:
        args, kwargs = split
        if len(args) != len(whole[0]) or not all(map(same, args, whole[0])):
            raise ValueError(f"{self._name} gives {name} positional arguments that depend on other layers: {_ADVICE}")
        for key in {**kwargs, **whole[1]}:
            value = whole[1].get(key)
            alone = kwargs.get(key)
            # A flag that is off may be missing: the head's forward sets some from the config.
            if not (_is_off(value) and _is_off(alone)) and not same(alone, value):
                raise ValueError(f"{self._name} gives {name} another {key} than it gives it alone: {_ADVICE}")
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise ValueError(f"{self._name} gives {name} a {key} that depends on trained parameters: {_ADVICE}")


def _mixes(part: nn.Module, hidden: torch.Tensor) -> bool:
    """Tell whether what a layer makes of a document depends on the one before it in its row, given the mask between
    them: by the derivative, which is exactly 0 where it does not. (Values differ by rounding where experts have other
    rows.)
    """
    row = hidden[:1].detach()
    try:
        gradient = _derivative(part, row)
        if not gradient.isfinite().all() or _has_zeros(part):  # such weights tell nothing of those that come
            with with_any_values(part, everywhere=True):
                values = torch.linspace(-1, 1, row.numel(), dtype=torch.float32, device="cpu").view_as(row)
                gradient = _derivative(part, values.to(row))
    except Exception as error:  # without a mask, positions or a derivative: refused where such rows come
        if is_out_of_memory(error):
            raise
        return True
    return bool(gradient[:, : TOKENS // 2].any())


def _has_zeros(part: nn.Module) -> bool:
    """Tell whether a weight is 0 in all elements, as some are before they are trained: nothing goes through it yet.

    An adapter's may be, beside the weights of its layer.
    """
    adapted = [f"{name}." for name, module in part.named_modules() if hasattr(module, "base_layer")]
    for name, weight in part.named_parameters():
        beside = any(name.startswith(path) and not name.startswith(f"{path}base_layer.") for path in adapted)
        if not weight.is_floating_point() or name.endswith("bias") or beside:
            continue
        if not (weight.ravel()[:_FIRST].any() or weight.any()):  # seldom read whole
            return True
    return False


def _derivative(part: nn.Module, row: torch.Tensor) -> torch.Tensor:
    """Return that of a row's second document by its states [1, TOKENS, hidden]; its first one has as many tokens."""
    half, row = TOKENS // 2, row.clone().requires_grad_()
    ids = torch.zeros((1, TOKENS), dtype=torch.long, device=row.device)
    inputs = {"input_ids": ids, "position_ids": torch.arange(half, device=row.device).repeat(2)[None]}
    second = part(row, inputs)[:, half:]
    weights = torch.linspace(-1, 1, second.numel(), dtype=torch.float32, device="cpu").view_as(second).to(second)
    (gradient,) = torch.autograd.grad(second, row, weights)
    return gradient


def _is_off(value: Any) -> bool:
    return value is None or value is False


_ADVICE = (
    "it cannot be split exactly; give the trainer a list of layers of your own, or train on one device with "
    "spu.accelerate(model) and spu.GradScaler"
)


def _compare(model: nn.Module, layers: Sequence[tuple[str, nn.Module]], inputs: Inputs) -> None:
    comparison = _Comparison(model, layers, inputs)
    handles = [
        part.layer.register_forward_hook(  # type: ignore[operator, union-attr]
            lambda _, args, kwargs, out, index=index: comparison.hook(index, args, kwargs, out), with_kwargs=True
        )
        for index, (_, part) in enumerate(layers[1:-1])
    ]
    try:
        given = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
        logits = model(**given, use_cache=False, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()
    head, name = layers[-1][1], type(model).__name__
    if comparison.last is None or not same(head(comparison.last, inputs), logits):
        raise ValueError(f"{name}: its head alone gives other logits than in the whole model: {_ADVICE}")


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Let modules whose ``compile()`` was called run as they are in this block."""
    compiled = {module: swap_compiled_call(module) for module in model.modules()}
    try:
        yield
    finally:
        for module, call in compiled.items():
            swap_compiled_call(module, call)


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Switch dropouts off in this block."""
    modes = {module: module.training for given in modules for module in given.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
