"""Random draws that depend on where they happen in the model, not on when or on which device thread.

PyTorch's default CPU generator is one per process: two pipeline stages that draw dropout masks from it race, and a
recomputed layer draws a different mask than the first time. Here every layer of every microbatch of every step draws
from a generator of its own, seeded by (run seed, step, microbatch, layer name). The draws are then the same for every
split into stages, every schedule and every recompute mode, and the plain model reproduces them by entering the same
context around the same layer.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable

import torch

from spu.common import torch_private
from spu.model.draws import drawn_from

__all__ = ["LOSS", "BackwardRandomness", "KeptGenerators", "LayerRandomness", "layer_seed"]

LOSS = "(loss)"  # the loss function's name for its draws


def layer_seed(run_seed: int, step: int, microbatch: int, layer_name: str) -> int:
    """Return a 63-bit seed for one layer of one microbatch of one step, equal on all machines and Python versions."""
    key = f"{run_seed}\0{step}\0{microbatch}\0{layer_name}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class KeptGenerators:
    """The generators of a microbatch that is captured and replayed: the same ones each time, seeded anew.

    Attributes:
        made: by the name that each is seeded with, and its device.
        replayed: what runs now is captured or replayed: no other generators are made, and :meth:`seed` has seeded them.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[str, torch.device], torch.Generator] = {}
        self.replayed = False

    def seed(self, run_seed: int, step: int, microbatch: int) -> None:
        """Begin the draws of a microbatch: those that it has without being captured."""
        for (name, _), generator in self.made.items():
            generator.manual_seed(layer_seed(run_seed, step, microbatch, name))

    def take(self, key: tuple[int, int, int, str], device: torch.device) -> torch.Generator:
        """Return the generator for a key of `layer_seed`.

        Raises:
            RuntimeError: there is none in what is replayed, where it would have been made and seeded once for all.
        """
        name = key[3], device
        if self.replayed:
            if name not in self.made:
                raise RuntimeError(f"{key[3].split(chr(0))[0]!r} draws random numbers in some microbatches only")
            return self.made[name]
        if name not in self.made:
            self.made[name] = torch.Generator(device=device)
        self.made[name].manual_seed(layer_seed(*key))
        return self.made[name]


class LayerRandomness:
    """Context, local to the calling thread, in which every random operator draws from a generator of its own.

    An operator that was given a generator by the caller draws from that one, as always. Functions that save or set the
    state of torch's default generator reach this context's while it lasts.

    Args:
        run_seed: the seed of the whole run.
        step: index of the optimizer step, from 0.
        microbatch: index of the microbatch in the step, counted over all accumulation rounds.
        layer_name: the layer's name in the model.
        on_own: called with a generator of the caller's before something draws from it.
        kept: has the generators; None: they are made here.

    Attributes:
        draws: number of draws, and of reads of the generator, inside.
    """

    def __init__(
        self,
        run_seed: int,
        step: int,
        microbatch: int,
        layer_name: str,
        *,
        on_own: Callable[[torch.Generator], None] | None = None,
        kept: KeptGenerators | None = None,
    ) -> None:
        self._key = (run_seed, step, microbatch, layer_name)
        self._kept = kept
        self._on_own = on_own
        self._generators: dict[torch.device, torch.Generator] = {}
        self._context: drawn_from | None = None
        self.draws = 0

    def __enter__(self) -> LayerRandomness:
        self._context = drawn_from(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._context is not None
        self._context.__exit__(*error)
        self._context = None  # a cycle: made for every layer of every microbatch, they would keep the collector busy

    def layer(self, name: str, on_own: Callable[[torch.Generator], None] | None = None) -> None:
        """Go on with another layer's draws: to enter a context for each would cost more than most layers draw."""
        self._key, self._on_own, self._generators = (*self._key[:3], name), on_own, {}

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator that replaces the device's default one."""
        self.draws += 1
        generator = self._generators.get(device)
        if generator is None and self._kept is not None:
            generator = self._generators[device] = self._kept.take(self._key, device)
        elif generator is None:
            generator = self._generators[device] = torch.Generator(device=device)
            generator.manual_seed(layer_seed(*self._key))
        return generator

    def own(self, generator: torch.Generator) -> None:
        """Note that an operator is about to draw from a generator of the caller's."""
        if self._on_own is not None:
            self._on_own(generator)


class BackwardRandomness:
    """Random draws in the backward of one microbatch: a node draws for the layer whose forward made it.

    A layer's backward has generators of its own. A recomputation (``torch.utils.checkpoint``) that restores the state
    saved in the forward repeats the forward's draws. New draws in a backward are equal in every schedule and split.

    Nodes are told apart by the sequence number that autograd gives each node of one thread.
    """

    def __init__(self, run_seed: int, step: int, microbatch: int, kept: KeptGenerators | None = None) -> None:
        self._key, self._kept = (run_seed, step, microbatch), kept
        self._starts: list[int] = []
        self._names: list[str] = []
        self._sources: dict[str, LayerRandomness] = {}
        self._end = -1
        self._last = 0

    def layer(self, name: str) -> None:
        """Assign the nodes that the forward makes from now on to this layer."""
        self._starts.append(_sequence_number())
        self._names.append(name)

    def end(self) -> None:
        """Assign the nodes that are made from now on to no layer."""
        self._end = _sequence_number()

    def during(self, device: torch.device) -> drawn_from:
        """Return the context of the backward."""
        return drawn_from(self, (device.index or 0) if device.type == "cuda" else None)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator of the layer whose backward is running, in place of the device's default one."""
        name = self._running()
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = LayerRandomness(*self._key, f"{name}\0backward", kept=self._kept)
        return source.generator(device)

    def own(self, generator: torch.Generator) -> None:
        """Refuse: a pipeline runs forwards and backwards in another order than a plain loop.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"layer {self._running()!r} draws from a generator of its own (generator=) in the backward: the draws "
            "would depend on the schedule. Draw from the default generator there, or in the forward only"
        )

    def _running(self) -> str:
        number = torch_private.running_node_number()
        # A node that the backward itself has made (a reentrant checkpoint's) belongs to the layer that made it.
        if number is not None and self._starts and self._starts[0] <= number < self._end:
            self._last = bisect_right(self._starts, number) - 1
        return self._names[self._last]


def _sequence_number() -> int:
    return torch_private.sequence_number()
