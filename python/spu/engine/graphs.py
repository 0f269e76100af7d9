"""The last stage's forward, loss and backward of a microbatch as CUDA graphs, where microbatches repeat.

A small microbatch takes the host longer to launch than the card to compute. So its work is captured once and replayed:
two launches for all of it. Inputs, targets and the microbatch's share of the loss are copied to where the captured
work reads them; the loss scale and the flag of non-finite gradients are there already; main gradients are added to
where they are; generators of random numbers are seeded anew before each replay, so that dropout masks are the eager
ones.

What Python does in a forward is done once, when it is captured. So the first microbatch of every step runs eagerly, and
with it a look at all that a forward may depend on (`digest`): if anything has changed, what was captured is dropped.
The other stages run eagerly: their forwards and backwards lie apart, with other microbatches between them.

On a CPU nothing is won: there a replay calls the work again, which is how tests run all but the capture itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spu import ops
from spu.common.errors import kind_and_line
from spu.common.torch_private import pytree
from spu.devices.capture import Called, Capture, CudaCapture
from spu.engine.capturable import digest, doubt, lacks_room, refusal
from spu.engine.channel import Exchange
from spu.engine.microbatch import move
from spu.engine.skips import StageSkips
from spu.engine.stage import Stage
from spu.model.layers import DrawKey
from spu.model.randomness import KeptGenerators
from spu.ops.sink import BackwardScope
from spu.schedules import Action

__all__ = ["StageGraphs", "graphs_for"]

_WARM_UP = 2  # eager microbatches of a kind before it is captured: kernels are compiled, handles made
_MOST_CHANGES = 2  # of what a forward depends on, between steps; then it is no longer captured
_MOST_KINDS = 4  # of microbatches: each holds the memory of its activations
_NUMBER = -1  # the microbatch number of captured work, which none of the schedule's has


@dataclass
class _Kind:
    """One kind of microbatch: its captured work, and the places that this reads and writes."""

    seen: int = 0
    statics: list[Tensor] = field(default_factory=list)  # of the leaves of x, inputs and targets that are tensors
    weight: Tensor | None = None
    grads: list[Tensor | None] = field(default_factory=list)  # of each parameter
    loss: Tensor | None = None
    gradients: Any = None
    forward: Callable[[], None] | None = None
    backward: Callable[[], None] | None = None


class StageGraphs:
    """Captures and replays the microbatches of a last stage; used by its worker thread.

    Args:
        stage: whose forward of a microbatch is followed by its backward.
        capture: makes what records the work.
        refusal: returns why it cannot be captured as it is now; "" if it can.
        must: raise where something cannot be captured, instead of running it eagerly.

    Attributes:
        why_eager: why it no longer captures; "" while it does.
        replays: microbatches that were replayed.
        generators: of the stage's layers, also where it runs eagerly.
    """

    def __init__(self, stage: Stage, capture: Callable[[], Capture], refusal: Callable[[], str], *, must: bool) -> None:
        self._stage, self._capture, self._refusal, self._must = stage, capture, refusal, must
        self._kinds: list[tuple[tuple[Any, ...], _Kind]] = []
        self._digest: list[Any] | None = None
        self._changes = 0
        self._held: _Kind | None = None  # between its forward and its backward
        self._loss: Tensor | None = None  # what its forward returned
        self.why_eager = ""
        self.replays = 0
        self.generators = KeptGenerators()

    def forward(
        self,
        given: tuple[Any, Any, Any],
        weight: Tensor,
        key: DrawKey,
        scope: BackwardScope,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor | None:
        """Run forward and loss of a microbatch by a replay, if it is of a captured kind; capture it if it is due.

        Args:
            given: x and inputs as `Stage.forward` takes them, and the targets as `Stage.loss`.
            weight: as `Stage.loss` takes it.
            key: of the microbatch.
            scope: of the backward to come.
            autocast: entered around the work that is captured.

        Returns:
            What `Stage.loss` returns; None where the microbatch has to run eagerly.
        """
        if self.why_eager or self._held is not None or self._stage.watch_loss is not None:
            return None
        if key.microbatch == 0:
            self._look()
            return None
        if weight.device.type == "cpu" and weight == 0:  # its loss has no backward: see `Stage.loss`
            return None
        given = *given[:2], move(given[2], self._stage.device.torch_device)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(given)):
            return None  # their gradients leave the model
        kind = self._kind_of(given)
        if kind is None or not self._reached(kind):
            return None
        if kind.forward is None:
            if kind.seen < _WARM_UP:
                kind.seen += 1
                return None
            try:
                self._record(kind, given, weight, key, scope, autocast)
            except Exception as error:  # whatever a model's code raises where it may not wait for the card
                self._give_up(kind_and_line(error), error)
                return None
        return self._replay(kind, given, weight, key)

    def backward(self) -> list[Tensor | None] | None:
        """Run the backward of the microbatch whose forward was replayed, and return what `Stage.backward` returns; None
        where the forward ran eagerly.
        """
        kind, self._held = self._held, None
        if kind is None:
            return None
        assert kind.backward is not None
        self.generators.replayed = True
        try:
            kind.backward()
        finally:
            self.generators.replayed = False
        self._check_grads(kind)
        if self._loss is not None and kind.loss is not None:
            self._loss.copy_(kind.loss)  # a loss without logits is there only after its backward
        self._loss = None
        return [None if gradient is None else gradient.clone() for gradient in kind.gradients]

    def clear(self) -> None:
        """Forget a microbatch whose backward has not run, after a failure."""
        self._held = self._loss = None

    def stop(self, why: str) -> None:
        """Run eagerly from now on, and free what captured work holds."""
        self.why_eager = why
        self._kinds.clear()

    def _look(self) -> None:
        """Drop what was captured if something that a forward depends on has changed since the last step."""
        now = digest(self._stage)
        before, self._digest = self._digest, now
        if before is None or before == now:
            return
        self._kinds.clear()
        self._changes += 1
        if why := self._refusal():
            self._give_up(why)
        elif self._changes > _MOST_CHANGES:
            changed = next(((b or a)[0] for a, b in zip(before, now) if a != b), "the number of modules")
            self._give_up(f"{changed} changes from step to step")

    def _kind_of(self, given: Any) -> _Kind | None:
        """Return the kind of a microbatch; None if there are too many."""
        device = self._stage.device.torch_device.type
        known = torch.amp.is_autocast_available(device)
        cast = (
            torch.is_autocast_enabled(device) if known else False,
            torch.get_autocast_dtype(device) if known else None,
        )
        leaves, spec = pytree.tree_flatten(given)
        places = {id(leaf): place for place, leaf in enumerate(leaves)}  # one tensor may be several leaves
        signature = (spec, cast, ops.forced_backend(), *((places[id(leaf)], _form(leaf)) for leaf in leaves))
        for other, kind in self._kinds:
            if _same(other, signature):
                return kind
        if len(self._kinds) >= _MOST_KINDS:
            return None
        self._kinds.append((signature, _Kind()))
        return self._kinds[-1][1]

    def _reached(self, kind: _Kind) -> bool:
        """Tell whether each parameter has a gradient already, or will get none; bring gradients to where captured work
        adds to them.
        """
        if kind.forward is None:
            return True
        parameters = self._stage.parameters()
        if any((p.grad is None) != (home is None) for p, home in zip(parameters, kind.grads, strict=True)):
            return False
        for parameter, home in zip(parameters, kind.grads, strict=True):
            if home is not None and parameter.grad is not None and parameter.grad.data_ptr() != home.data_ptr():
                home.copy_(parameter.grad)
                parameter.grad = home
        return True

    def _record(
        self,
        kind: _Kind,
        given: Any,
        weight: Tensor,
        key: DrawKey,
        scope: BackwardScope,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        stage, device = self._stage, self._stage.device.torch_device
        leaves, spec = pytree.tree_flatten(given)
        copies = {id(leaf): torch.empty_like(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        kind.statics = [copies[id(leaf)] for leaf in leaves if isinstance(leaf, Tensor)]
        x, inputs, targets = pytree.tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], spec)
        kind.weight = share = torch.empty((), dtype=torch.float32, device=device)
        kind.grads = [parameter.grad for parameter in stage.parameters()]
        if problem := self._problem(leaves, copies):
            raise RuntimeError(problem)
        inside = DrawKey(key.run_seed, key.step, _NUMBER, self.generators)

        def forward() -> None:
            skips = StageSkips(Exchange(), 0, device, train=True)
            with autocast():
                output = stage.forward(x, inputs, inside, train=True, skips=skips, whole=False)
                kind.loss = stage.loss(output, targets, share, inside, scope)

        def backward() -> None:
            kind.gradients = stage.backward(None, inside, scope)

        made, generators = self._capture(), list(self.generators.made.values())
        self._fill(kind, given, weight)  # nothing reads it before a replay, but a capture may read it to no purpose
        self.generators.seed(key.run_seed, key.step, key.microbatch)
        self.generators.replayed = True
        try:
            kind.forward = made.record(forward, generators)
            kind.backward = made.record(backward, generators)
        except BaseException:
            kind.forward = kind.backward = None
            stage.clear()
            raise
        finally:
            self.generators.replayed = False
        self._check_grads(kind)

    def _problem(self, leaves: list[Any], copies: dict[int, Tensor]) -> str:
        """Return why the stage cannot be captured, for what is known only after it has run; "" if it can."""
        if problem := lacks_room(self._stage.device):
            return problem
        if any(copies[id(leaf)].stride() != leaf.stride() for leaf in leaves if isinstance(leaf, Tensor)):
            return "an input has several elements in one place, or gaps between them"
        elsewhere = [d for _, d in self.generators.made if d.type != self._stage.device.torch_device.type]
        if elsewhere:
            return f"a layer draws random numbers on {elsewhere[0]}, which is not the stage's device"
        if self.generators.made and any(self._stage.recompute):
            return "layers that draw random numbers are recomputed"
        if self._stage.reaches_outside:
            return "gradients go to tensors that the stage does not own"
        return ""

    def _fill(self, kind: _Kind, given: Any, weight: Tensor) -> None:
        """Copy a microbatch to where captured work reads it."""
        assert kind.weight is not None
        leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        for static, leaf in zip(kind.statics, leaves, strict=True):
            static.copy_(leaf, non_blocking=True)
        if weight.device.type == "cpu":
            kind.weight.fill_(weight.item())
        else:
            kind.weight.copy_(weight)

    def _replay(self, kind: _Kind, given: Any, weight: Tensor, key: DrawKey) -> Tensor:
        assert kind.forward is not None
        with torch.no_grad():
            self._fill(kind, given, weight)
        self.generators.seed(key.run_seed, key.step, key.microbatch)
        self.generators.replayed = True
        try:
            kind.forward()
        finally:
            self.generators.replayed = False
        assert kind.loss is not None
        self._held, self._loss = kind, kind.loss.clone()
        self.replays += 1
        return self._loss

    def _check_grads(self, kind: _Kind) -> None:
        """Raise RuntimeError where the backward has put a gradient elsewhere than where it was."""
        for parameter, home in zip(self._stage.parameters(), kind.grads, strict=True):
            here = parameter.grad
            if (here is None) != (home is None) or (here is not None and here.data_ptr() != home.data_ptr()):  # type: ignore[union-attr]
                raise RuntimeError(
                    f"a gradient of {tuple(parameter.shape)} comes to another place, or only in some microbatches"
                )

    def _give_up(self, why: str, error: BaseException | None = None) -> None:
        self.stop(why)
        if self._must:
            raise RuntimeError(
                f"graphs='on', but stage {self._stage.index} cannot be captured: {why}; use graphs='auto'"
            ) from error


def _form(leaf: Any) -> Any:
    """Return what of a leaf captured work depends on: all but a tensor's values."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    try:
        return bool(one == other)
    except (ValueError, RuntimeError, TypeError):  # a leaf that has no plain answer, such as an array of several
        return False


def graphs_for(
    stage: Stage, actions: Sequence[Action], mode: str, *, shared: bool, known_loss: bool
) -> tuple[StageGraphs | None, str]:
    """Return what captures the last stage's microbatches, or None with the reason.

    Args:
        stage: the pipeline's last.
        actions: of its rank.
        mode: "auto", "on" or "off".
        shared: the stage has parameters or modules of other stages, or some that are not always on their device.
        known_loss: the loss is torch's, or the default one.

    Raises:
        ValueError: mode is "on" and the stage cannot be captured; says why.
    """
    if mode == "off":
        return None, "switched off"
    device = stage.device.torch_device
    if mode == "auto" and device.type != "cuda":
        return None, f"nothing is won on {device.type}"

    def why_not() -> str:
        return refusal(stage, actions, shared=shared) or (doubt(stage, known_loss) if mode == "auto" else "")

    if why := why_not():
        if mode == "on":
            raise ValueError(f"graphs='on' cannot capture stage {stage.index}: {why}; use graphs='auto'")
        return None, why
    capture: Callable[[], Capture] = CudaCapture.maker(device) if device.type == "cuda" else Called
    return StageGraphs(stage, capture, why_not, must=mode == "on"), ""
