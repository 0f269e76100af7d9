"""The engine for devices of one process: a worker thread for each rank runs the actions of its stages."""

from __future__ import annotations

import contextvars
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from spu import ops
from spu.common.denormals import call_as, flushes_denormals
from spu.common.interrupts import delayed_interrupts
from spu.common.out_of_memory import is_out_of_memory
from spu.common.torch_private import pytree
from spu.common.tracker import MemoryTracker, Tally
from spu.devices.clock import Mark, mark
from spu.devices.manager import Device
from spu.devices.order import in_callers_order
from spu.devices.pin import pin_current_thread
from spu.engine.channel import Aborted, Exchange
from spu.engine.engine import MarkedSpan, Recording, Round, StageError
from spu.engine.graphs import StageGraphs
from spu.engine.microbatch import move
from spu.engine.skips import StageSkips, check_all_popped
from spu.engine.stage import Stage
from spu.memory.residency import RESIDENT, Residency, visits_of
from spu.model.layers import DrawKey
from spu.schedules import Action
from spu.transfer import Link, side_for

__all__ = ["LocalEngine", "Worker"]

T = TypeVar("T")


class Worker:
    """A thread that runs one task at a time, with the cores, the thread count and the CUDA device of ``device``.

    Each task has the context variables of the thread that submits it, and treats denormal numbers as that thread does
    (`torch.set_flush_denormal`).
    A process forked from this one has none of its threads. There, the first task starts one.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._start()

    def submit(self, task: Callable[..., T], *args: Any) -> Future[T]:
        if self._process != os.getpid():
            self._start()
        in_context: Callable[..., T] = contextvars.copy_context().run
        return self._pool.submit(in_context, call_as, flushes_denormals(), task, *args)

    def close(self) -> None:
        """Wait for the running task and end the thread; harmless when called twice."""
        if self._process == os.getpid():
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix=f"spu {self.device.name}", initializer=pin_current_thread, initargs=(self.device,)
        )


class LocalEngine:
    """Runs schedules over stages, those of a rank in one worker thread, with links between neighbours.

    Args:
        stages: in pipeline order.
        ranks: the rank of each stage, by default one each; stages of one rank are on one device.
        codecs: how tensors are packed over each boundary, None or "none" for not at all; one name for all. Between two
            stages of one rank nothing is packed or copied. Beside a GPU, both run beside the stages' work
            (`spu.transfer.side`).
        backend: a forced kernel backend, or None for automatic choice; handed to the workers here because context
            variables do not reach other threads.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        ranks: Sequence[int] | None = None,
        *,
        codecs: Sequence[str | None] | str | None = None,
        backend: str | None = None,
    ) -> None:
        self.stages = list(stages)
        self.ranks = list(range(len(self.stages)) if ranks is None else ranks)
        self.backend = backend
        self._process, self._busy = os.getpid(), False
        self.graphs: StageGraphs | None = None
        self.tallies: list[Tally] | None = None  # workers count allocated bytes here; see `counted_bytes`
        self.here = frozenset(self.ranks)
        device_of = {rank: stage.device for rank, stage in zip(self.ranks, self.stages)}
        self._workers = [Worker(device_of[rank]) for rank in range(len(device_of))]
        self._cards = {place for stage in self.stages if (place := stage.device.torch_device).type == "cuda"}
        self.residencies: list[Residency] = [RESIDENT] * len(self._workers)
        self._forward_links, self._backward_links = [], []
        boundaries = len(self.stages) - 1
        each = [codecs] * boundaries if codecs is None or isinstance(codecs, str) else list(codecs)
        for before, codec in zip(range(boundaries), each, strict=True):
            same = self.ranks[before] == self.ranks[before + 1]
            packed = None if codec == "none" or same else codec
            here, there = (self.stages[s].device.torch_device for s in (before, before + 1))
            sides = (None, None) if same else (side_for(here, there), side_for(there, here))
            self._forward_links.append(Link(there, packed, sides[0], activations=True))
            self._backward_links.append(Link(here, packed, sides[1]))
        self._sends: list[list[Link]] = [[] for _ in self._workers]  # of each rank
        for before, (forward, backward) in enumerate(zip(self._forward_links, self._backward_links)):
            self._sends[self.ranks[before]].append(forward)
            self._sends[self.ranks[before + 1]].append(backward)

    def run(self, work: Round) -> Recording:
        """Run one schedule to its end and return what ran when. On cards the work has been handed over by then.

        Raises:
            StageError: a stage failed; every other one has stopped, and the round leaves nothing behind.
            KeyboardInterrupt: likewise.
        """
        on_cpus = all(stage.device.torch_device.type == "cpu" for stage in self.stages)
        exchange = Exchange(helpers=len(self._workers) if on_cpus else 0)
        spans: list[list[MarkedSpan]] = [[] for _ in self._workers]
        start = time.perf_counter()
        with delayed_interrupts():
            try:
                # (2) in docs/architecture.md
                self._together(
                    [partial(self._run_actions, rank, work, exchange, own) for rank, own in enumerate(spans)],
                    range(len(spans)),
                    exchange,
                )
            except BaseException as error:
                if self.graphs is not None and is_out_of_memory(error):
                    self.graphs.stop("a step ran out of memory")
                raise
            finally:
                for stage in self.stages:
                    stage.clear()
                if self.graphs is not None:
                    self.graphs.clear()
        check_all_popped(exchange)
        assert len(exchange) == 0, f"{len(exchange)} messages were never received"
        return Recording(self.stages, self.ranks, start, [span for own in spans for span in own])

    def each(self, task: Callable[[Stage], Any]) -> list[Any]:
        """Run ``task`` for every stage in its rank's worker, ranks side by side; the results are in stage order.

        Raises:
            StageError: a task failed; the others have ended.
        """

        def guarded(stage: Stage) -> Any:
            try:
                with ops.use_backend(self.backend):
                    return task(stage)
            except Exception as error:
                raise StageError(stage.index, stage.device.name, None, error) from error

        return self._together([partial(guarded, stage) for stage in self.stages], self.ranks, None)

    def sent_bytes(self) -> int:
        """Return the bytes that have crossed the stage boundaries so far, both directions."""
        return sum(link.sent_bytes for link in (*self._forward_links, *self._backward_links))

    def close(self) -> None:
        """End the worker threads; harmless when called twice."""
        for worker in self._workers:
            worker.close()
        for link in (*self._forward_links, *self._backward_links):
            link.close()

    def _together(
        self, tasks: Sequence[Callable[[], Any]], ranks: Sequence[int], exchange: Exchange | None
    ) -> list[Any]:
        """Run each task in its rank's worker; at the first failure stop the others, wait for them, and raise it.

        The main thread waits on a `SimpleQueue`; on Ctrl-C its signal handler puts None there, because no worker sees
        the signal.
        """
        self._check_fork()
        reports: SimpleQueue[Future[Any] | None] = SimpleQueue()
        futures: list[Future[Any]] = []
        self._busy = True
        with in_callers_order(self._cards), delayed_interrupts(partial(reports.put, None)):
            try:
                for task, rank in zip(tasks, ranks):
                    futures.append(self._workers[rank].submit(task))
                    futures[-1].add_done_callback(reports.put)
            except BaseException:
                reports.put(None)
                raise
            finally:
                self._wait(len(futures), reports, exchange)
                self._busy = False
            errors = [error for future in futures if (error := future.exception()) is not None]
            for error in errors:
                if not isinstance(error, Aborted):
                    raise error
            if errors:  # by Ctrl-C, which is raised instead of this
                raise errors[0]
            return [future.result() for future in futures]

    @staticmethod
    def _wait(running: int, reports: SimpleQueue[Future[Any] | None], exchange: Exchange | None) -> None:
        """Wait until all have reported; a failure, or None for Ctrl-C, stops each after its present action."""
        while running:
            report = reports.get()
            if exchange is not None and (report is None or report.cancelled() or report.exception() is not None):
                exchange.abort()
            running -= report is not None

    def _check_fork(self) -> None:
        """Let workers restart in a forked process; raise RuntimeError if it was forked while they worked."""
        if self._process != os.getpid():
            if self._busy:
                raise RuntimeError(
                    "this process was forked while the trainer was at work in another thread, so its state is half "
                    "done: make a new trainer here, or fork between two steps"
                )
            self._process = os.getpid()

    def _run_actions(self, rank: int, work: Round, exchange: Exchange, spans: list[MarkedSpan]) -> None:
        counting = nullcontext() if self.tallies is None else MemoryTracker(self.tallies[rank])
        with ops.use_backend(self.backend), torch.set_grad_enabled(work.train), counting:
            residency, visits = self.residencies[rank], visits_of(work.actions[rank])
            try:
                with self._blamed(self.stages[visits[0][0].stage], visits[0][1][0], exchange):
                    residency.begin([visit for visit, _ in visits])
                for visit, actions in visits:
                    stage = self.stages[visit.stage]
                    with self._blamed(stage, actions[0], exchange):
                        residency.fetch(visit)
                    for action in actions:
                        if exchange.aborted:
                            raise Aborted
                        with self._blamed(stage, action, exchange):
                            begin = self._perform(stage, action, work, exchange)
                        spans.append(MarkedSpan(action, begin, mark(stage.device.torch_device)))
                    with self._blamed(stage, actions[-1], exchange):
                        residency.release(visit)
            finally:
                residency.end()
            for link in self._sends[rank]:
                link.settle()
        exchange.leave()

    @staticmethod
    @contextmanager
    def _blamed(stage: Stage, action: Action, exchange: Exchange) -> Iterator[None]:
        """Stop the other ranks when an action fails, and say which it was.

        An interrupt or an exit that the user's code raises (``sys.exit()`` in a hook) stays what it is.
        """
        try:
            yield
        except Aborted:
            raise
        except BaseException as error:
            exchange.abort()
            if not isinstance(error, Exception):
                raise
            raise StageError(stage.index, stage.device.name, action, error) from error

    def _perform(self, stage: Stage, action: Action, work: Round, exchange: Exchange) -> Mark:
        """Run one action and return a mark of when its inputs had arrived, so that waiting counts as idle."""
        graphs = self._graphs_of(stage, work)
        kept = None if graphs is None else graphs.generators
        key = DrawKey(work.run_seed, work.step, work.first_microbatch + action.microbatch, kept)
        if action.kind == "F":
            return self._forward(stage, action.microbatch, key, work, exchange)
        if action.kind == "W":
            begin = mark(stage.device.torch_device)
            stage.weight_backward(key)
            return begin
        return self._backward(stage, action.microbatch, key, work, exchange, defer=action.kind == "I")

    def _graphs_of(self, stage: Stage, work: Round) -> StageGraphs | None:
        """Return what captures the stage's microbatches in this run."""
        usual = stage.is_last and work.train and not work.keep_outputs and self.tallies is None
        return self.graphs if usual else None

    def _forward(self, stage: Stage, index: int, key: DrawKey, work: Round, exchange: Exchange) -> Mark:
        device = stage.device.torch_device
        if stage.is_first:
            begin = mark(device)
            x = move(work.inputs[index], device)
        else:
            link = self._forward_links[stage.index - 1]
            message = link.arrive(exchange.take(("F", stage.index, index)))
            begin = mark(device)
            x = link.unpack(message)
        inputs = None
        if stage.wants_inputs:
            inputs = x if stage.is_first else move(work.inputs[index], device)
        graphs = self._graphs_of(stage, work)
        if graphs is not None and work.targets is not None and work.weights is not None and work.scopes is not None:
            given = x, inputs, work.targets[index]
            loss = graphs.forward(given, work.weights[index], key, work.scopes[stage.index], work.autocast)
            if loss is not None:
                work.losses[index] = loss
                return begin
        skips = StageSkips(exchange, index, device, train=work.train)
        with work.autocast():
            whole = work.keep_outputs or work.targets is None
            output = stage.forward(x, inputs, key, train=work.train, skips=skips, whole=whole)
        skips.send()
        if not stage.is_last:  # (4) in docs/architecture.md
            exchange.put(("F", stage.index + 1, index), self._forward_links[stage.index].send(output))
            return begin
        if work.keep_outputs:
            work.outputs[index] = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)
        if work.targets is not None:
            assert work.weights is not None
            scope = work.scopes[stage.index] if work.scopes is not None else None
            with work.autocast():
                work.losses[index] = stage.loss(output, work.targets[index], work.weights[index], key, scope)
        return begin

    def _backward(
        self, stage: Stage, index: int, key: DrawKey, work: Round, exchange: Exchange, *, defer: bool
    ) -> Mark:
        assert work.scopes is not None
        device, gradients = stage.device.torch_device, None
        if stage.is_last:
            begin = mark(device)
        else:
            link = self._backward_links[stage.index]
            message = link.arrive(exchange.take(("B", stage.index, index)))
            begin = mark(device)
            gradients = link.unpack(message)
        graphs = self._graphs_of(stage, work)
        replayed = None if graphs is None else graphs.backward()
        if replayed is None:
            gradients = stage.backward(gradients, key, work.scopes[stage.index], defer=defer)
        else:
            gradients = replayed
        if not stage.is_first:  # (4) in docs/architecture.md, backwards
            exchange.put(("B", stage.index - 1, index), self._backward_links[stage.index - 1].send(gradients))
        return begin
