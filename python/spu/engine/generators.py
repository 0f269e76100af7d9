"""The model's own generators (``generator=`` of random operators): which stages use them, and their states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from spu.common.torch_private import generators_equal
from spu.engine.stage import Stage
from spu.model.layers import Layer
from spu.model.randomness import LOSS

__all__ = ["check_generators", "generator_states", "named_generators", "set_generator_states"]


def named_generators(stages: Sequence[Stage]) -> Iterator[tuple[int, str, torch.Generator]]:
    """Yield (stage, name, generator) for each of the model's own generators, and the loss's."""
    for stage in stages:
        loss = [Layer(LOSS, stage.loss_fn)] if stage.is_last and isinstance(stage.loss_fn, nn.Module) else []
        for layer in (*stage.layers, *loss):
            for name, generator in layer.named_generators():
                yield stage.index, name, generator


def check_generators(stages: Sequence[Stage]) -> None:
    """Check that each generator is used in one stage alone.

    Raises:
        ValueError: two stages share one: their order would depend on the schedule, not on the layers.
    """
    users: list[tuple[torch.Generator, int, str]] = []
    for index, name, generator in named_generators(stages):
        for known, first, other in users:
            if first != index and generators_equal(known, generator):
                raise ValueError(
                    f"{other!r} and {name!r} are one torch.Generator, in stages {first} and {index}: their draws would "
                    "depend on the schedule. Give each layer a generator of its own"
                )
        users.append((generator, index, name))


def generator_states(stages: Sequence[Stage]) -> dict[str, str]:
    """Return the states of the model's own generators, by name, in hexadecimal."""
    return {name: bytes(generator.get_state().tolist()).hex() for _, name, generator in named_generators(stages)}


def set_generator_states(stages: Sequence[Stage], states: dict[str, str]) -> None:
    """Restore the states of `generator_states`; generators that it does not name keep theirs."""
    for _, name, generator in named_generators(stages):
        if name in states:
            generator.set_state(torch.tensor(list(bytes.fromhex(states[name])), dtype=torch.uint8, device="cpu"))
