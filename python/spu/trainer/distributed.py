"""What a trainer does otherwise where its stages are in several processes (``engine="distributed"``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from spu.common import torch_private
from spu.common.dtypes import DTYPES
from spu.common.product_cache import bound_product_caches
from spu.cost.boundary import layer_outputs
from spu.devices.manager import Device, DeviceManager, Spec, default_devices
from spu.devices.tiers import Tiers
from spu.distributed.consistency import WEIGHTS, given_facts
from spu.distributed.engine import SCHEDULES, DistributedEngine
from spu.distributed.gather import Far, gathered_samples, save_state, with_tensors
from spu.distributed.job import Job
from spu.distributed.lend import load_anywhere
from spu.distributed.peers import PipelinePeers
from spu.distributed.remote_layers import check_here, let_go
from spu.distributed.wire import Leaf
from spu.engine.base import base_record, sampled
from spu.engine.build import BuiltStages, frozen_dtypes
from spu.engine.joined import whole
from spu.engine.loss import loss_part
from spu.engine.optimizer_state import Optimizers
from spu.engine.state import load_training, model_state, state_for_model
from spu.model.adapter_base import base_values
from spu.model.deferred import bring
from spu.model.layers import Layer
from spu.plan import Plan
from spu.plan.machine import Machine
from spu.settings import AUTO, TrainSettings
from spu.trainer.arguments import warn_of_emulation
from spu.trainer.rank_machine import measured_machine

__all__ = ["Spread", "placed"]


def placed(devices: Spec, settings: TrainSettings, tiers: Tiers) -> tuple[list[Device], Spread | None]:
    """Return a trainer's devices, in pipeline order, and the processes where its stages are in several.

    Raises:
        ValueError: an unknown device, or as `Spread`.
    """
    if settings.grad_wire != "fp32" and settings.replicas == 1:
        raise ValueError(
            f"grad_wire={settings.grad_wire!r} would change nothing: one pipeline sends no gradients; leave it out, or "
            "give replicas"
        )
    if settings.engine == "local":
        if settings.replicas != 1:
            raise ValueError(
                f"replicas={settings.replicas} is for engine='distributed': leave it out, or give that too"
            )
        found, spread = DeviceManager().get_devices(default_devices(devices, settings.residency, tiers.disk)), None
    else:
        spread = Spread(devices, settings)
        found = spread.devices()
    warn_of_emulation(found if spread is None else [spread.job.device], settings.precision)
    bound_product_caches([device.budget_bytes for device in found if device.torch_device.type == "cpu"])
    return found, spread


class Spread:
    """The processes of a training, as its trainer uses them. Every one makes the same model and gives the same batches.

    Args:
        devices: this process's device, or "auto".
        settings: of the training.

    Attributes:
        job: the processes.
        beside: what is kept of the frozen weights of all (`spu.model.adapter_base.base_values`), of the last state.

    Raises:
        ValueError: a setting that needs all stages in one process, or no processes are there.
    """

    def __init__(self, devices: Spec, settings: TrainSettings) -> None:
        refused = {
            "residency": settings.residency not in (AUTO, "resident"),
            "replan": settings.replan,
            "graphs": settings.graphs == "on",
            "schedule": settings.schedule not in SCHEDULES,
            "microbatches": settings.microbatches == AUTO,
        }
        for name in (name for name, wrong in refused.items() if wrong):
            raise ValueError(
                f"engine='distributed' does not go with {name}={getattr(settings, name)!r}: "
                + {
                    "residency": "its layers stay on their devices; leave it out",
                    "replan": "layers do not move between processes; leave it out",
                    "graphs": "its stages run eagerly; leave it out",
                    "schedule": f"give one of {', '.join(map(repr, SCHEDULES))}",
                    "microbatches": "give their number",
                }[name]
            )
        if settings.schedule == "zbv" and TorchVersion(torch.__version__) < "2.13":
            raise ValueError(
                f"schedule='zbv' with engine='distributed' needs torch 2.13 or later, this is {torch.__version__}: "
                "earlier ones send between the two stages of one process over gloo, which cannot; take 'zb'"
            )
        self.job = Job(devices, replicas=settings.replicas, timeout_s=settings.wait_s)
        self._settings = settings
        self._own: frozenset[int] = frozenset()
        self.beside: dict[str, dict[str, Any]] = {}
        self._peers: PipelinePeers | None = None

    def devices(self) -> list[Device]:
        """Return the places of the pipeline; those of other processes as names alone."""
        return self.job.places(len(self.job.devices))

    def planned_for(self, layers: Sequence[Layer], given: tuple[Any, ...]) -> tuple[list[Device], Machine | None]:
        """Return the first pipeline's devices, and what was measured of them; called in every process.

        Args:
            layers: the model's.
            given: the arguments of `spu.distributed.consistency.given_facts`.

        Raises:
            ValueError: the processes have other models, settings, first batches or versions of torch.
        """
        record = base_record(sampled({n: p.detach() for layer in layers for n, p in layer.named_parameters()}))
        self.job.check_alike(
            {
                "model (names and shapes of its parameters)": record["form"],
                WEIGHTS: record["values"],
                "settings of the training": repr(self._settings),
                **given_facts(*given),
            }
        )
        return self.job.devices, measured_machine(self.job, self._settings)

    def plan(self, make: Callable[[], Plan]) -> Plan:
        """Return the plan that rank 0 makes, in every process.

        Raises:
            ValueError: rank 0 could not plan.
        """
        return Plan.from_json(self.job.decided(lambda: make().to_json(), "plan"))

    def let_go(self, plan: Plan, layers: Sequence[Layer], model: nn.Module, loss_fn: Any) -> frozenset[int]:
        """Read the deferred weights of this process's layers, and free the memory of the others'; return the ids of
        their parameters.

        Raises:
            ValueError: a layer counts statistics that replicas do not share; nothing was freed.
        """
        if self.job.replicas > 1:
            _check_rows_apart(layers)
        places = [plan.devices.index(stage.device) for stage in plan.stages for _ in range(*stage.layers)]
        own = [layer for layer, place in zip(layers, places, strict=True) if place == self.job.place]
        loss = loss_part(loss_fn, layers) if places[-1] == self.job.place else None  # the last stage trains it
        own += [] if loss is None else [loss]
        kept = {id(p) for layer in own for p in layer.module.parameters()}
        bring(model, kept, frozen_dtypes(layers, self._settings.precision))
        check_here(own)
        others = (layer.module for layer, place in zip(layers, places, strict=True) if place != self.job.place)
        return let_go(others, kept)

    def runs(self, built: BuiltStages, plan: Plan) -> dict[str, Any]:
        """Return the arguments of a `Runner` for the stages; leave those of other processes nothing to train here."""
        ranks = [plan.devices.index(stage.device) for stage in plan.stages]
        peers = self._peers = PipelinePeers(self.job, ranks, built, self._settings.grad_wire)
        for index in range(len(built.owned)):
            if index not in peers.own:
                built.away |= built.owned[index]
                built.owned[index] = {}
        self._own = peers.own
        layers = [layer for stage in built.stages[:-1] for layer in stage.layers]
        ends = [stage.layers[1] for stage in plan.stages[:-1]]
        dtype, fused = DTYPES[plan.settings.precision], plan.settings.fused

        def outputs(sample: Any) -> list[list[Leaf]]:
            found = layer_outputs(layers, sample, dtype, fused=fused) if layers else []
            return [[Leaf(*leaf) for leaf in found[end - 1]] for end in ends]

        engine = partial(
            DistributedEngine, job=self.job, schedule=plan.settings.schedule, outputs=outputs, sums=peers.sums
        )
        return {"engine": engine, "peers": peers, "graphs": "off"}

    def save(
        self, path: str | Path, built: BuiltStages, optimizers: Optimizers, meta: dict[str, Any], *, frozen: bool
    ) -> None:
        """Write a checkpoint, in rank 0, that any number of processes and stages can resume from.

        Called in every process, and returns in each when it is written.

        Raises:
            CheckpointError: writing failed.
        """
        save_state(self.job, path, built, optimizers, self._own, meta, frozen=frozen)

    def load(
        self, path: str | Path, built: BuiltStages, optimizers: Optimizers, begin: Callable[[], None]
    ) -> dict[str, Any]:
        """Load this process's stages from a checkpoint of rank 0's disk, as `load_training`; called in every one."""
        resting = gathered_samples(self.job, built, self._own)
        load = partial(load_training, path, built, optimizers, begin, resting=resting, own=self._own)
        meta: dict[str, Any] = load_anywhere(self.job, path, lambda opened: load(opened=opened))
        if self._peers is not None:
            self._peers.ties.changed()
            self._peers.agree()
        return meta

    def with_state(
        self,
        built: BuiltStages,
        optimizers: Optimizers,
        work: Callable[[dict[str, Any]], str],
        *,
        trained: bool = False,
    ) -> None:
        """Call ``work`` in rank 0 with parameters in full precision, and buffers; called in every process.

        Args:
            work: reads what it wants, one tensor after the other.
            trained: give it trained parameters alone.
        """
        here = built.only(self._own)
        state = model_state(here, optimizers)
        if trained:
            layers = [layer for stage in (*here.stages, *here.others) for layer in stage.parts]
            names = {name for layer in layers for name, p in layer.named_parameters() if p.requires_grad}
            state = {name: tensor for name, tensor in state.items() if name in names}
        with_tensors(self.job, state, work, "take the model's state")

    def state_for_model(
        self, model: nn.Module, built: BuiltStages, optimizers: Optimizers, *, trained: bool = False
    ) -> dict[str, Any]:
        """Return the model's state in rank 0, or what is trained of it, and nothing in the others; called in every
        process. With what is trained, :attr:`beside` is gathered.
        """
        state: dict[str, Any] = {}
        if trained:
            everyones = self.job.gathered(base_values(model))  # each process has the weights of its own stages
            self.beside = {name: own for theirs in everyones for name, own in theirs.items()}

        def take(tensors: dict[str, Any]) -> str:
            if trained:
                for name, value in tensors.items():
                    state[name] = value.read() if isinstance(value, Far) else whole(value).to("cpu", copy=True)
                return "done"
            away = {name: tensor.read() for name, tensor in tensors.items() if isinstance(tensor, Far)}
            state.update(state_for_model(model, built, optimizers, away))
            return "done"

        self.with_state(built, optimizers, take, trained=trained)
        return state


def _check_rows_apart(layers: Sequence[Layer]) -> None:
    """Raise ValueError for a layer that counts statistics of the rows it has seen, which each replica has others of."""
    for layer in layers:
        for name, module in layer.module.named_modules():
            if isinstance(module, torch_private.NormBase) and module.track_running_stats:
                raise ValueError(
                    f"{layer.name_of(name) if name else layer.name!r} ({type(module).__name__}) counts statistics "
                    "of the rows that it has seen, and each replica sees others: replicas=1, or a LayerNorm or "
                    "GroupNorm, or track_running_stats=False"
                )
