"""Whole batches through the stages: cut into microbatches, run by the plan's schedule, gradients added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from spu import schedules
from spu.common.heap import give_back
from spu.common.interrupts import delayed_interrupts
from spu.common.torch_private import pytree
from spu.engine.attempt import Attempt
from spu.engine.build import BuiltStages
from spu.engine.embeddings import check_embeddings
from spu.engine.engine import Engine, Recording, Round
from spu.engine.generators import check_generators
from spu.engine.graphs import graphs_for
from spu.engine.local import LocalEngine
from spu.engine.loss import Weighing
from spu.engine.loss_check import LossCheck
from spu.engine.make_optimizer import OptimizerFactory
from spu.engine.microbatch import batch_rows, count_targets, elements, split_batch, unscaled_leaves
from spu.engine.peers import Peers
from spu.engine.result import join_outputs, sum_losses
from spu.engine.streaming import Streaming
from spu.engine.update import Updater
from spu.plan import Plan
from spu.precision import LossScaler

__all__ = ["Pass", "Runner", "split_inputs"]


@dataclass(frozen=True)
class Pass:
    """The results of a forward and backward of a whole batch, except the gradients.

    Attributes:
        loss: mean over the batch's counted targets, fp32, 0-dimensional.
        outputs: the last stage's, the whole batch in one; None if they were not to be kept.
        counted: how many targets counted.
        recording: what ran when in the last run of the schedule.
    """

    loss: torch.Tensor
    outputs: Any
    counted: int | torch.Tensor
    recording: Recording


def split_inputs(inputs: Any, parts: int) -> list[Any]:
    """Split a batch of inputs into microbatches, in their own dtypes. Raises ValueError as `split_batch`."""
    return [unscaled_leaves(part) for part in split_batch(inputs, parts)]


class Runner:
    """Runs batches through stages as a plan says.

    Args:
        built: the stages.
        plan: the plan that they were built by.
        scaler: the loss scaler.
        backend: a forced kernel backend, or None.
        weighing: the weights of microbatches.
        optimizer, lr, max_grad_norm: as `Updater` takes them.
        engine: makes the engine that runs the stages, from the arguments of `LocalEngine`.
        graphs: whether the last stage's microbatches are captured: see `spu.engine.graphs`.
        make_streaming: makes what streams the stages (`spu.engine.tiers.stream`) from stages, optimizers and main
            gradients; None if all are resident.
        peers: the processes of other stages; None: all stages are in this one.
    """

    def __init__(
        self,
        built: BuiltStages,
        plan: Plan,
        scaler: LossScaler,
        *,
        backend: str | None,
        weighing: Weighing,
        optimizer: OptimizerFactory | type[torch.optim.Optimizer] | None,
        lr: float | None,
        max_grad_norm: float | None,
        engine: Callable[..., Engine] = LocalEngine,
        graphs: str = "off",
        make_streaming: Callable[..., Streaming] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.built, self._peers = built, peers
        self._plan, self._actions = plan, plan.actions()
        self._ranks = [plan.devices.index(stage.device) for stage in plan.stages]
        self._weighing = weighing
        self._check = LossCheck(built.stages[-1].loss_fn, weighing)
        try:
            check_generators(built.stages)
            planned = plan.settings.parts
            if (planned if peers is None else peers.parts(planned)) > 1:
                check_embeddings([*built.stages, *built.others])
            captures, self._why_eager = graphs_for(
                built.stages[-1],
                self._actions[self._ranks[-1]],
                graphs,
                shared=bool(built.tied or built.twins or make_streaming is not None),
                known_loss=weighing.known,
            )
            self.engine = engine(built.stages, self._ranks, codecs=plan.codecs, backend=backend)
            self.updater = Updater(
                built,
                self.engine,
                scaler,
                optimizer=optimizer,
                lr=lr,
                max_grad_norm=max_grad_norm,
                make_streaming=make_streaming,
                peers=peers,
            )
            if self.updater.streaming is not None:
                self.engine.residencies = list(self.updater.streaming.residencies)
            self.engine.graphs = captures
        except BaseException:
            built.restore()
            raise
        built.masters.clear()  # the optimizers own them now
        streaming = self.updater.streaming
        self.attempt = Attempt(built, frozenset() if streaming is None else frozenset(streaming.units))
        self._settled = False

    def accumulate(self, inputs: Any, targets: Any, *, seed: int, step: int, keep_outputs: bool = False) -> Pass:
        """Run forward and backward of a whole batch; gradients stay in the parameters, for `Updater.reduce`.

        Args:
            inputs, targets: pytrees of tensors, [batch, ...] each.
            seed, step: with the microbatch's number, they decide the random draws; step counts batches.
            keep_outputs: join the last stage's outputs.

        Raises:
            ValueError: a batch that cannot be split as planned, or without a counted target.
            StageError: a stage failed; the gradients are gone.
        """
        size = self._plan.settings.run_microbatches
        parts = self._parts(inputs)
        # (1) in docs/architecture.md
        inputs_by_part = split_inputs(inputs, parts)
        targets_by_part = split_batch(targets, parts, "targets")
        counts = self._weighing.counts(targets_by_part)
        weights = self._weighing.shares(targets_by_part, counts)
        losses: dict[int, torch.Tensor] = {}
        outputs: list[Any] = []  # none where another process has the last stage
        recordings = []
        autocast = self._autocast()
        self.updater.begin_step()
        share = range(parts) if self._peers is None else self._peers.share(parts)
        if self._peers is not None:
            self._peers.begin(self.built, len(share), (inputs, targets))
        checks = self._watch(parts)
        try:
            with self.built.running():
                for first in share[::size] or [share.start]:
                    own = slice(first, min(first + size, share.stop))
                    work = Round(
                        self._actions_of(own.stop - first),
                        inputs_by_part[own],
                        targets_by_part[own],
                        weights[own],
                        seed,
                        step,
                        first,
                        self.updater.scopes,
                        keep_outputs,
                        autocast,
                        self._largest(inputs_by_part),
                    )
                    recordings.append(self.engine.run(work))
                    losses.update({first + index: loss for index, loss in work.losses.items()})
                    outputs.extend(work.outputs[index] for index in sorted(work.outputs))
            if self._peers is None:  # else their gradients count too: `Updater.reduce` looks
                self._check_trained(inputs)
            if checks:
                self._check.end()
        except BaseException:
            self._check.cancel()
            self.updater.clear_gradients()
            raise
        self._settle()
        each = counts or (count_targets(part, self._weighing.ignore_index) for part in targets_by_part)
        return Pass(sum_losses(losses), join_outputs(outputs) if outputs else None, sum(each), recordings[-1])

    def _settle(self) -> None:
        """Give back what the first pass and all before it have freed, before there are moments: later passes would have
        it beside what they use themselves.
        """
        if not self._settled:
            self._settled = True
            give_back()

    @property
    def graphs_lines(self) -> list[str]:
        """A line about captured microbatches, or why there are none; none where there is no card to capture for."""
        made = self.engine.graphs
        why = self._why_eager if made is None else made.why_eager
        if made is None and self.built.stages[-1].device.torch_device.type != "cuda":
            return []
        if made is None or why:
            return [f"CUDA graphs: none ({why})"]
        return [f"CUDA graphs: {made.replays} microbatches of the last stage were replayed"]

    def follow(self, plan: Plan) -> None:
        """Run the next batches by a plan with the same stages, in which other layers are recomputed, or with another
        number of microbatches.
        """
        self._plan, self._actions = plan, plan.actions()
        for stage, planned in zip(self.built.stages, plan.stages, strict=True):
            stage.recompute = [k in planned.recompute for k in range(*planned.layers)]

    def _parts(self, inputs: Any) -> int:
        """Return the number of microbatches: as planned, but at most the batch's rows (an epoch's last batch)."""
        rows, planned = batch_rows(inputs), self._plan.settings.parts
        if self._peers is not None:
            planned = self._peers.parts(planned)
        return max(1, min(planned, rows))

    def _largest(self, inputs_by_part: Sequence[Any]) -> Any:
        """Return the largest microbatch of all pipelines, where there are others: each is given the whole batch."""
        return None if self._peers is None else max(inputs_by_part, key=elements)

    def _actions_of(self, microbatches: int) -> list[list[schedules.Action]]:
        if microbatches == self._plan.settings.microbatches:
            return self._actions
        if microbatches == 0:  # the other pipelines have all rows
            return []
        try:
            settings = dataclasses.replace(self._plan.settings, microbatches=microbatches)
            return dataclasses.replace(self._plan, settings=settings).actions()
        except ValueError as error:
            raise ValueError(
                f"a batch with too few rows for {self._plan.settings.microbatches} microbatches: {error}; leave out an "
                "epoch's short last batch: DataLoader(drop_last=True)"
            ) from error

    def _autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        return _callers_autocast(stage.device.torch_device.type for stage in self.built.stages)

    def _check_trained(self, inputs: Any) -> None:
        """Raise RuntimeError if plain torch's backward would find no graph to run."""
        wanted = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad)
        if not self.updater.has_gradients() and not any(True for _ in wanted):
            raise RuntimeError(
                "nothing to train: the loss depends on no parameter that requires a gradient. Unfreeze one, or look "
                "for a detach(), item() or no_grad() between the parameters and the loss"
            )

    def evaluate(self, inputs: Any, targets: Any, *, seed: int, step: int) -> torch.Tensor:
        """Return the mean loss of a batch in evaluation mode, without gradients, fp32, 0-dimensional.

        Raises:
            RuntimeError: the trainer was closed.
        """
        self.updater.check_open()
        modules = [m for stage in self.built.stages for layer in stage.layers for m in layer.module.modules()]
        training = [module for module in modules if module.training]
        parts = self._parts(inputs)  # no larger than in training
        share = range(parts) if self._peers is None else self._peers.share(parts)
        own = slice(share.start, share.stop)
        together = parts if self.updater.streaming is not None else None  # so that a stage's weights come once
        inputs_by_part, targets_by_part = split_inputs(inputs, parts), split_batch(targets, parts, "targets")
        places = max(self._ranks) + 1
        work = Round(
            schedules.forward_only(places, len(share), stage_ranks=self._ranks, together=together) if share else [],
            inputs_by_part[own],
            targets_by_part[own],
            self._weighing.shares(targets_by_part)[own],
            seed,
            step,
            share.start,
            autocast=self._autocast(),
            largest=self._largest(inputs_by_part),
        )
        checks = self._watch(parts)
        if self._peers is not None:
            self._peers.agree()
        with delayed_interrupts():  # no module is left in evaluation mode
            try:
                for module in training:
                    module.training = False
                self.updater.reveal()
                with self.built.running():
                    self.engine.run(work)
            finally:
                for module in training:
                    module.training = True
                self.updater.hide()
        if checks:
            self._check.end()
        loss = sum_losses(work.losses)
        return loss if self._peers is None else self._peers.total(loss, (inputs, targets))

    def _watch(self, parts: int) -> bool:
        """Begin a batch; tell whether its loss will be checked."""
        last = self.built.stages[-1]
        if self._peers is not None and last.index not in self._peers.own:
            return False
        checks = self._check.begin(parts)
        last.watch_loss = self._check.add if checks else None
        last.checks_rows = self._weighing.broadcasts and parts > 1
        return checks

    def close(self) -> None:
        """End the worker threads and give the model back with its ties; harmless when called twice."""
        with delayed_interrupts():
            self.engine.close()
            self.updater.close()


def _callers_autocast(kinds: Iterable[str]) -> Callable[[], AbstractContextManager[Any]]:
    """Return the calling thread's autocast state, as a context for other threads, which do not inherit it.

    Args:
        kinds: of devices, such as "cpu".
    """
    caches = torch.is_autocast_cache_enabled()
    known = [kind for kind in set(kinds) if torch.amp.is_autocast_available(kind)]
    active = [(kind, torch.get_autocast_dtype(kind)) for kind in known if torch.is_autocast_enabled(kind)]
    if not active:
        return nullcontext

    def enter() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for kind, dtype in active:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=caches))
        return stack

    return enter
