"""A run in several processes: rank 0 decides, reads, prints and writes; the others do what it tells them.

What a trainer does in all of its processes is told by name, with its arguments: so the others need neither the data nor
the run's folder.
"""

from __future__ import annotations

import contextlib
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spu.distributed.job import join, leave
from spu.plan import Plan
from spu.train.adapter import make_trained_model
from spu.train.config import TrainConfig
from spu.train.signals import Stopped
from spu.trainer.trainer import ModelParallelTrainer, StepResult

__all__ = ["LeadingTrainer", "check_not_elsewhere", "follow", "leading", "tell"]

Make = Callable[[TrainConfig, Any, Plan | None, Callable[[int], float]], ModelParallelTrainer]


def tell(what: str, *arguments: Any) -> None:
    """Tell the other processes what to do; called in rank 0.

    Raises:
        ConnectionError: one has ended, or listens no more.
    """
    try:
        dist.broadcast_object_list([what, arguments], src=0)
    except RuntimeError as error:
        raise ConnectionError(
            f"a rank has ended, or does not listen; its own output says why. torch: {error}"
        ) from error


def check_not_elsewhere(file: Path) -> None:
    """Raise ValueError if another process's machine has a run that rank 0's has not; called in rank 0.

    After a restart another machine may have become rank 0: it would begin the run anew.

    Args:
        file: of the run, by which it is known.
    """
    tell("look", str(file.resolve()))
    for rank, host in enumerate(_lookers(file)):
        if host:
            raise ValueError(
                f"rank {rank} (on {host}) has the run {file.parent}, and rank 0 has not: start {host}'s process as "
                "rank 0 (torchrun --node-rank 0 there, with a static rendezvous), or give --out a folder that all "
                "machines see"
            )


def _lookers(file: Path) -> list[str]:
    """Return each process's host if the file is there, else ""; called in every process."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, platform.node() or "its machine" if file.exists() else "")
    return found


@contextlib.contextmanager
def leading(timeout_s: int) -> Iterator[bool]:
    """Join the others while the block runs; yield whether this is rank 0, at whose end the others end too.

    A failure that the others do not share, such as bad input, ends them by a word; after any other they find that
    rank 0 has gone.
    """
    join("auto", timeout_s)
    leads, told = dist.get_rank() == 0, False
    try:
        yield leads
        told = True
    except ConnectionError:  # the others are not to take it for the end of the run: it has lost a process
        raise
    except (Stopped, ValueError, OSError):
        told = True
        raise
    finally:
        if leads and told:
            with contextlib.suppress(ConnectionError):
                tell("end")
        if told:
            leave()


def follow(make: Make) -> None:
    """Do what rank 0 tells, until it says that the run has ended. Signals are for rank 0 to heed.

    Args:
        make: makes the trainer of a run from its configuration, model, plan and learning rates.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    trainer: ModelParallelTrainer | None = None
    rates = [1.0]
    while True:
        box: list[Any] = [None, None]
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            raise ConnectionError(f"rank 0 has ended, or says nothing any more. torch: {error}") from error
        what, arguments = box
        if what == "end":
            return
        if what == "look":
            _lookers(Path(*arguments))
            continue
        if what == "make":
            config, plan = TrainConfig.from_json(arguments[0]), arguments[1]
            made = make(
                config, make_trained_model(config, later=True), plan and Plan.from_json(plan), lambda _: rates[0]
            )
            trainer = made
            continue
        assert trainer is not None
        if what == "serve":
            _with_state(trainer, _nothing)
            continue
        if what == "step":
            *arguments, rates[0] = arguments
        getattr(trainer, what)(*arguments)


def _with_state(trainer: ModelParallelTrainer, work: Callable[[dict[str, Any]], str]) -> None:
    runner = trainer._readable()
    assert trainer._spread is not None
    trainer._spread.with_state(runner.built, runner.updater.optimizers, work)


def _nothing(tensors: dict[str, Any]) -> str:
    return ""


class LeadingTrainer(ModelParallelTrainer):
    """The trainer in rank 0: the others do with theirs what is done with this one."""

    _alone = False  # something has failed: nobody listens any more

    @torch.inference_mode(False)
    def prepare(self, inputs: Any, targets: Any = None) -> Plan:
        with self._told("prepare", inputs, targets):
            return super().prepare(inputs, targets)

    @torch.inference_mode(False)
    def step(self, inputs: Any, targets: Any = None) -> StepResult:
        factor = 1.0 if self.lr_schedule is None else self.lr_schedule(self.steps_done)
        with self._told("step", inputs, targets, factor):
            return super().step(inputs, targets)

    @torch.inference_mode(False)
    def forward_backward(
        self, inputs: Any, targets: Any = None, *, keep_outputs: bool = False
    ) -> tuple[torch.Tensor, Any]:
        with self._told("forward_backward", inputs, targets):
            return super().forward_backward(inputs, targets, keep_outputs=keep_outputs)

    @torch.inference_mode(False)
    def evaluate(self, inputs: Any, targets: Any = None) -> float:
        with self._told("evaluate", inputs, targets):
            return super().evaluate(inputs, targets)

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> None:
        with self._told("save", str(path)):
            super().save(path, extra)

    @torch.inference_mode(False)
    def load(self, path: str | Path) -> dict[str, Any]:
        with self._told("load", str(Path(path).resolve())):
            return super().load(path)

    def _state_for_model(self, trained: bool = False) -> dict[str, torch.Tensor]:
        with self._told("_state_for_model", trained):
            return super()._state_for_model(trained)

    def with_state(self, work: Callable[[dict[str, Any]], str]) -> None:
        """Call ``work`` with the model's parameters and buffers by name, in full precision: tensors, and
        `spu.distributed.gather.Far` ones, which their process sends when they are read.
        """
        with self._told("serve"):
            _with_state(self, work)

    def close(self) -> None:
        if not self._alone and self._runner is not None and not self._runner.updater.closed:
            tell("close")
        super().close()

    @contextlib.contextmanager
    def _told(self, what: str, *arguments: Any) -> Iterator[None]:
        tell(what, *arguments)
        try:
            yield
        except BaseException:
            self._alone = True
            raise
