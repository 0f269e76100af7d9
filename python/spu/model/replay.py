"""Recompute: a layer's forward runs a second time in the backward, from the same state as the first time.

That state is the first run's input, its popped tensors, its buffers and attributes, what containers and objects of the
user's hold there (`spu.model.spaces`), and the states of its own generators: a later microbatch may have changed them
in between. Changes by the second run are discarded: no batch counts twice in running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spu.common import torch_private
from spu.common.torch_private import generators_equal, pytree
from spu.model.kept import Kept, Park
from spu.model.saved import SavedVersions
from spu.model.spaces import Space, spaces_of
from spu.skips import ReplayedSkips, carried_by, current_carrier

__all__ = ["Habits", "run_twice"]

_LARGE_BYTES = 1 << 16  # of a buffer; constant masks and tables are not copied for every microbatch

_Run = Callable[[Any, Callable[[torch.Generator], None]], Any]


@dataclass
class Habits:
    """The changes that a layer's runs made so far.

    Attributes:
        in_place: whether a run changed its input; None before the first run.
        constant: large buffers that no run changed, by their place and name.
    """

    in_place: bool | None = None
    constant: set[tuple[str, str, Any]] = field(default_factory=set)


def run_twice(module: nn.Module, name: str, x: Any, run: _Run, habits: Habits, park: Park | None = None) -> Any:
    """Run a layer and keep only its input for the backward, which recomputes it.

    Args:
        module: the layer's.
        name: for messages.
        x: its input.
        run: ``run(x, own)`` -> its output; calls ``own`` with a generator of the layer's before it draws from it.
        habits: the layer's, kept by the caller from one microbatch to the next.
        park: takes the input away until the backward; None: it is kept.

    Raises:
        RuntimeError: the layer cannot be recomputed.
    """
    copied = habits.in_place is not False
    tensors = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    versions = [torch_private.version(tensor) for tensor in tensors]
    kept = Kept(x, clone=copied) if copied or park is not None else None
    replay = _Replay(module, name, habits.constant, kept)
    once = [x]  # checkpoint must not keep it, if it is changed or parked
    output = checkpoint(
        lambda *given: run(given[0] if given else replay.input(once), replay.own),
        *((x,) if kept is None else ()),
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (replay.first(), replay),
    )
    replay.end_first()
    changed = versions != [torch_private.version(tensor) for tensor in tensors]
    if changed and not copied:
        raise RuntimeError(
            f"layer {name!r} changes its input in place in this microbatch, and did not in those before, so that "
            "running it again would not repeat it: change a copy there, or train with recompute=False"
        )
    habits.in_place = habits.in_place or changed
    if kept is not None and park is not None:
        kept.park(park, output)
    return output


class _Replay:
    """The context of a layer's recomputation; entered several times if the layer runs a backward of its own."""

    def __init__(self, module: nn.Module, name: str, constant: set[tuple[str, str, Any]], x: Kept | None) -> None:
        self.skips = ReplayedSkips(current_carrier())
        self._name = name
        self._saved = SavedVersions(name)
        self._x = x
        self._constant = constant
        taken: dict[int, _Snapshot] = {}  # by the tensor's identity: it may be in several places
        self._spaces = [
            (space, {key: self._snapshot(space, key, value, taken) for key, value in space.now().items()})
            for space in spaces_of(module)
        ]
        weights = [w for part in module.modules() for w in torch_private.parameters_of(part).values() if w is not None]
        self._weights = [(w, torch_private.version(w)) for w in weights if not w.is_inference()]
        self._written: list[Tensor] = []  # those that the first run changed
        self._before: list[list[Tensor]] = []  # for each active recomputation: their values
        self._generators: list[tuple[torch.Generator, Tensor]] = []  # own ones, with the state before the first draw
        self._undo: list[ExitStack] = []  # for each active recomputation: restores the replaced values

    def _snapshot(self, space: Space, key: Any, value: Any, taken: dict[int, _Snapshot]) -> Any:
        if not isinstance(value, Tensor) or value.requires_grad or isinstance(value, nn.Parameter):
            return value
        if value.is_inference():  # nothing that trains may change it, or ask for its version
            return value
        if id(value) not in taken:
            large = value.numel() * value.element_size() > _LARGE_BYTES
            known = large and (space.path, space.key, key) in self._constant
            taken[id(value)] = _Snapshot(value, None if known else value.clone())
        return taken[id(value)]

    def input(self, once: list[Any]) -> Any:
        """Return the first run's input, taken from the list; later an equal copy of it."""
        if not self._undo:
            return once.pop()
        assert self._x is not None
        return self._x.made()

    def own(self, generator: torch.Generator) -> None:
        """Save the state of a generator of the layer's before its first draw."""
        if not self._undo and not any(generators_equal(generator, known) for known, _ in self._generators):
            self._generators.append((generator, generator.get_state()))

    @contextmanager
    def first(self) -> Iterator[None]:
        """Return the context of the first run."""
        with carried_by(self.skips), self._saved.first():
            yield

    def end_first(self) -> None:
        """End the first run: drop the copies of large buffers that it did not change, also in later microbatches.

        Raises:
            RuntimeError: it changed one that earlier microbatches did not change, so that no copy exists.
        """
        self._written = [w for w, version in self._weights if torch_private.version(w) != version]
        self._weights = []
        for space, kept in self._spaces:
            for key, was in kept.items():
                if not isinstance(was, _Snapshot) or was.tensor.numel() * was.tensor.element_size() <= _LARGE_BYTES:
                    continue
                if torch_private.version(was.tensor) == was.version:
                    was.copy = None
                    self._constant.add((space.path, space.key, key))
                elif was.copy is None:
                    raise RuntimeError(self._lost(space, key))

    def __enter__(self) -> None:
        undo = ExitStack()
        made: dict[int, Tensor] = {}  # by the snapshot's identity
        for space, kept in self._spaces:
            undo.callback(space.become, space.now())
            space.become({key: self._value(space, key, was, made) for key, was in kept.items()})
        for generator, state in self._generators:
            undo.callback(generator.set_state, generator.get_state())
            generator.set_state(state)
        undo.enter_context(self.skips.replaying())
        undo.enter_context(self._saved.second())
        self._undo.append(undo)
        self._before.append([w.detach().clone() for w in self._written])

    def __exit__(self, *error: object) -> None:
        self._undo.pop().close()
        # What the weights were before the first run is lost. A constraint (clamp_, max_norm) finds itself kept.
        if not all(map(torch.equal, self._before.pop(), self._written)):
            raise RuntimeError(
                f"layer {self._name!r} changes its own weights in place, and a second run changes them again: train "
                "with recompute=False, or change them outside of the forward"
            )

    def _value(self, space: Space, key: Any, was: Any, made: dict[int, Tensor]) -> Any:
        """Return a value as the first run found it, free to be changed."""
        if not isinstance(was, _Snapshot):
            return was
        if was.copy is None and torch_private.version(was.tensor) != was.version:
            raise RuntimeError(self._lost(space, key))
        if id(was) not in made:
            made[id(was)] = (was.tensor if was.copy is None else was.copy).clone()
        return made[id(was)]

    def _lost(self, space: Space, key: Any) -> str:
        inner = f"{space.key}[{key!r}]" if space.key else key
        where = ".".join(filter(None, (self._name, space.path, inner)))
        return (
            f"{where!r} was changed in this microbatch, and not in those before, so that running layer {self._name!r} "
            "again would not repeat it: train with recompute=False"
        )


class _Snapshot:
    """A tensor's value before the first run."""

    def __init__(self, tensor: Tensor, copy: Tensor | None) -> None:
        self.tensor = tensor
        self.version = torch_private.version(tensor)
        self.copy = copy  # None: the tensor still has that value
