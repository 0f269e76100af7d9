"""One case of the equivalence fuzzer: a random model, loss and trainer, and random things done to them; both ways.

The plain way is plain PyTorch: the same model called layer after layer over the same microbatches, its own optimizer,
its own edits. What the trainer refuses by name is no failure, where the menu says that it may refuse it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import tempfile
from collections.abc import Callable, Sequence

import torch
from fuzz_layers import JUMPS, WIDTH, draw_layers
from fuzz_losses import CLASSES, LOSSES, draw_loss
from fuzz_plain import IN, OPTIMIZERS, VOCAB, Case, Plain, batch
from plans import plan
from torch import Tensor, nn

import spu
from spu import Device, DeviceManager, ModelParallelTrainer
from spu.plan import Plan
from spu.plan.layer_cost import LayerCost
from spu.settings import STATES

__all__ = ["Mismatch", "draw_case", "run_case"]

_SCHEDULES = ["gpipe", "1f1b", "zb", "interleaved", "zbv", "layer_outer"]
_SMOOTH_ACTIONS = ["step", "forward_backward", "evaluate", "edit", "reload"]
_ACTIONS = [*_SMOOTH_ACTIONS, "step", "step", "freeze", "mode", "second trainer"]
_EDITS = ["clamp", "load", "data", "copy"]


def _changes_in_place(case: Case) -> bool:
    return any("in place" in name or "inplace" in name for name in case.names)


PACKED = ("fp16", "int8", "int4")

# What the trainer may refuse by name: (name, a part of the error's text, in which cases).
_REFUSALS: list[tuple[str, str, Callable[[Case], bool]]] = [
    ("recompute of a change in place", "changes its input in place", lambda case: bool(case.recompute)),
    ("a change in place of what autograd keeps", "modified by an inplace operation", _changes_in_place),
    ("a parameter unfrozen after prepare", "was frozen when this trainer prepared", lambda c: "freeze" in c.actions),
    (
        "packed inputs that decide on shapes",
        "depend on its input's values",
        lambda c: c.streaming.get("activations") in PACKED,
    ),
    ("a loss that hides what it divides by", "cannot be computed by microbatches", lambda c: LOSSES[c.loss].may_refuse),
]


class Mismatch(AssertionError):
    """The trainer and the plain run differ."""


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def draw_case(seed: int) -> tuple[Case, nn.Sequential]:
    """The case of a seed, and its model."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    long, ids = r.random() < 0.3, r.random() < 0.3
    loss = draw_loss(r, long and r.random() < 0.5)
    precision = r.choices(["fp32", "bf16", "fp16"], [8, 1, 1])[0]
    names, layers = draw_layers(r, r.randint(1, 4), long, smooth=precision != "fp32")
    first: nn.Module = nn.Embedding(VOCAB, WIDTH) if ids else nn.Linear(IN, WIDTH)
    pool = [_Pool()] if long and not LOSSES[loss].long else []
    model = nn.Sequential(first, *layers, *pool, nn.Linear(WIDTH, CLASSES))
    linears = [m for m in layers if type(m) is nn.Linear and m.weight.requires_grad]
    tied = len(linears) > 1 and r.random() < 0.5
    if tied:
        linears[-1].weight = linears[0].weight
    schedule = r.choice(_SCHEDULES)
    virtual = 2 if schedule in ("interleaved", "zbv") else 1
    case = Case(
        seed=seed,
        names=names,
        long=long,
        ids=ids,
        tied=tied,
        loss=loss,
        precision=precision,
        backend="reference" if precision == "fp32" else r.choice(["reference", None]),
        stages=max(1, min(r.randint(1, 3), len(model) // virtual)),
        schedule=schedule,
        microbatches=r.randint(1, 4),
        accumulate=r.choice([1, 1, 2]),
        rows=0,
        recompute=[],
        cuts=None,
        optimizer=r.choice(["sgd", "adamw"]),
        clip=r.choice([None, 0.5]),
        transfer="none",
        actions=[r.choice(_ACTIONS) for _ in range(r.randint(1, 3))],
    )
    if case.precision == "fp32" and r.random() < 0.05:
        case.transfer = "int8"
    if case.precision != "fp32" or case.transfer != "none":
        case.actions = [action if action in _SMOOTH_ACTIONS else "step" for action in case.actions]
    case.recompute = r.choice([[], [], list(range(len(model))), [i for i in range(len(model)) if r.random() < 0.5]])
    if r.random() < 0.95:
        case.cuts = sorted(r.sample(range(1, len(model)), case.stages * virtual - 1))
    else:  # planned, where all layers recompute or none
        case.recompute = list(range(len(model))) if case.recompute else []
    case.rows = case.microbatches * case.accumulate * 2 + r.randint(0, 3)
    if case.transfer == "none" and r.random() < 0.15:
        stream(r, case, len(model))
    return case, model


def stream(r: random.Random, case: Case, layers: int) -> None:
    """Turn a case into one whose layers come from a disk; planned, as nothing else may say how."""
    case.stages, case.accumulate, case.cuts, case.optimizer = 1, 1, None, "adamw"
    case.recompute = list(range(layers)) if r.random() < 0.7 else []
    case.actions = [action if action in _SMOOTH_ACTIONS else "step" for action in case.actions]
    case.streaming = {
        "residency": r.choice(["streamed", "offloaded"]),
        "grads": r.choice(["fp32", "fp32", "bf16"]),
        "activations": r.choice(["keep", "exact", "exact", "fp16", "int8", "int4"] if case.recompute else ["keep"]),
        "state": r.choice(STATES if case.precision != "fp32" else ["fp32"]),
    }


def is_rounded(case: Case) -> bool:
    """Whether something is rounded that plain PyTorch does not round."""
    exact = {"keep", "exact", "fp32", "streamed", "offloaded"}
    state = case.streaming.get("state", "fp32")
    return case.transfer != "none" or state != "fp32" or not exact.issuperset(case.streaming.values())


def edit(model: nn.Sequential, kind: str) -> None:
    """What users do to weights between steps."""
    with torch.no_grad():
        if kind == "clamp":
            for parameter in model.parameters():
                parameter.clamp_(-0.3, 0.3)
        elif kind == "load":
            model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
        elif kind == "data":
            weight = model[-1].weight
            weight.data = weight.data * 0.5
        else:
            model[-1].weight.copy_(torch.linspace(-1, 1, model[-1].weight.numel()).view_as(model[-1].weight))


class Run:
    """A case being run, both ways; in 16 bits a third way, by plain autocast, says how much rounding costs there."""

    def __init__(self, case: Case, model: nn.Sequential) -> None:
        self.case, self.model = case, model
        self.r = random.Random(case.seed + 1)
        self.loss_fn = LOSSES[case.loss].make()
        self.plain = Plain(case, copy.deepcopy(model), copy.deepcopy(self.loss_fn))
        self.others = [self.plain]
        if case.precision != "fp32":
            dtype = torch.float16 if case.precision == "fp16" else torch.bfloat16
            self.others.append(Plain(case, copy.deepcopy(model), copy.deepcopy(self.loss_fn), dtype))
        self.batches = 0
        self.disk = tempfile.TemporaryDirectory()
        self.rounded = is_rounded(case)  # also what has been, before a reload
        self.trainer = self.make_trainer()

    def make_trainer(self) -> ModelParallelTrainer:
        case = self.case
        devices = [dataclasses.replace(d, threads=1) for d in DeviceManager().get_devices(["cpu"] * case.stages)]
        return ModelParallelTrainer(
            self.model,
            devices,
            loss_fn=self.loss_fn,
            optimizer=OPTIMIZERS[case.optimizer][0],
            precision=case.precision,
            microbatches=case.microbatches,
            accumulate=case.accumulate,
            schedule=case.schedule,
            recompute="auto" if case.cuts is not None else bool(case.recompute),
            plan=self.given_plan(devices),
            transfer=case.transfer,
            max_grad_norm=case.clip,
            tiers=f"disk={self.disk.name}:1GB" if "residency" in case.streaming else None,
            scaler=spu.LossScaler(init_scale=1024.0, enabled=case.precision == "fp16"),
            **case.streaming | dict(LOSSES[case.loss].settings),
        )

    def given_plan(self, devices: Sequence[Device]) -> Plan | None:
        """One that cuts the model where the case says; None: the trainer plans, which takes most of a case's time."""
        case, count = self.case, len(self.model)
        if case.cuts is None:
            return None
        ends = [0, *case.cuts, count]
        return plan(
            [LayerCost(name=str(i), param_count=1, trained_count=1, forward_flops=1) for i in range(count)],
            devices,
            schedule=case.schedule,
            microbatches=case.microbatches,
            accumulate=case.accumulate,
            precision=case.precision,
            transfer=case.transfer,
            recompute=case.recompute,
            layers=list(itertools.pairwise(ends)),
        )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        self.batches += 1
        return batch(self.case, self.batches)

    def do(self, action: str) -> None:
        """One of the things that users do, to the trainer and to the others."""
        getattr(self, "do_" + action.replace(" ", "_"))()

    def do_step(self) -> None:
        x, y = self.next_batch()
        result = self.trainer.step(x.clone(), y.clone())
        losses = [other.run(x, y, train=True) for other in self.others]
        if result.skipped:
            raise Mismatch(f"a step was skipped, loss {result.loss}")
        self.compare("loss of a step", torch.as_tensor(float(result.loss)), losses)
        for other in self.others:
            other.update()
        ours = self.trainer.state_dict_for_model()
        states = [other.model.state_dict() for other in self.others]
        for name in states[0]:
            if name not in ours:
                raise Mismatch(f"{name} is missing in state_dict_for_model")
            self.compare(f"{name} after a step", ours[name], [state[name] for state in states])

    def do_forward_backward(self) -> None:
        x, y = self.next_batch()
        loss, _ = self.trainer.forward_backward(x.clone(), y.clone())
        self.compare("loss of forward_backward", loss, [other.run(x, y, train=True) for other in self.others])
        theirs = [dict(other.model.named_parameters()) for other in self.others]
        found = [p.grad for p in theirs[0].values() if p.grad is not None]
        scale = torch.stack([g.norm() for g in found]).norm().item() if found else 0.0
        for name, parameter in self.model.named_parameters():
            expected = [own[name].grad for own in theirs]
            if theirs[0][name].requires_grad and expected[0] is not None:
                if parameter.grad is None:
                    raise Mismatch(f"no gradient of {name}")
                self.compare(f"gradient of {name}", parameter.grad, expected, scale)
        for other in self.others:
            other.forget()

    def do_evaluate(self) -> None:
        x, y = self.next_batch()
        loss = self.trainer.evaluate(x.clone(), y.clone())
        self.compare("loss of evaluate", torch.tensor(loss), [other.evaluate(x, y) for other in self.others])

    def do_edit(self) -> None:
        kind = self.r.choice(_EDITS)
        if self.trainer.plan is not None:
            self.trainer.flush()
        for model in self.models():
            edit(model, kind)

    def do_freeze(self) -> None:
        index, frozen = self.r.randrange(len(self.model)), self.r.random() < 0.5
        for model in self.models():
            model[index].requires_grad_(not frozen)
            model[-1].requires_grad_(True)

    def do_mode(self) -> None:
        training = self.r.random() < 0.5
        for model in self.models():
            model.train(training)

    def do_reload(self) -> None:
        """Save, and go on in a new trainer, of another number of stages."""
        self.do_step()
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.save(f"{folder}/checkpoint")
            self.trainer.close()
            self.case.stages = 1
            if not self.case.streaming:
                self.case.cuts, self.case.schedule, self.case.recompute = [], "1f1b", []
            elif self.r.random() < 0.5:  # resident from now on
                self.case.streaming = {"state": self.case.streaming["state"]}
            self.trainer = self.make_trainer()
            self.trainer.prepare(*batch(self.case, 0))
            self.trainer.load(f"{folder}/checkpoint")

    def do_second_trainer(self) -> None:
        """Another trainer takes the model over: optimizer and draws begin afresh."""
        self.trainer = self.make_trainer()
        for other in self.others:
            other.begin()

    def models(self) -> list[nn.Sequential]:
        return [self.model, *(other.model for other in self.others)]

    def compare(self, what: str, ours: Tensor, expected: list[Tensor], scale: float = 0.0) -> None:
        """Raises Mismatch: in fp32 by more than sums in another order, in 16 bits by more than autocast's own error."""
        if self.rounded:
            # A lossy wire's rounding may turn a decision, and a batch norm makes much more of it: the size is left.
            close(what, ours, expected[0], 5.0 if JUMPS & {*self.case.names} else 0.5)
        elif len(expected) == 1 or not expected[0].is_floating_point():
            # A batch norm over few rows divides by nearly 0, and makes more of every rounding; a second one again.
            # What comes before it has gradients that cancel: their rounding is of the size of all gradients.
            norms = self.case.names.count("batch norm")
            assert_equal_sums(what, ours, expected[0], 2e-5 * 25**norms, 0.1 * scale if norms else 0.0)
        else:
            unit = 2.0**-11 if self.case.precision == "fp16" else 2.0**-8
            truth, rough = (tensor.detach().double() for tensor in expected)
            finite = truth.isfinite()
            size = max(truth[finite].norm().item(), 0.1 * scale, 1e-2)
            close(what, ours, truth, 3 * (rough - truth)[finite].norm().item() / size + 48 * unit, size)


def close(what: str, ours: Tensor, truth: Tensor, bound: float, size: float | None = None) -> None:
    """Raises Mismatch where the relative error, in the norm, is over the bound."""
    if not truth.is_floating_point():
        return
    ours, truth = ours.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    size = size or max(truth[finite].norm().item(), 1e-2)
    error = (ours - truth)[finite].norm().item() / size
    if not error <= bound or not torch.equal(ours[~finite], truth[~finite]):
        raise Mismatch(f"{what}: relative error {error:.2e}, bound {bound:.1e}")


def assert_equal_sums(what: str, ours: Tensor, expected: Tensor, relative: float, size: float = 0.0) -> None:
    """Raises Mismatch where they differ by more than fp32 sums in another order do, of values at least of this size."""
    ours, expected = ours.detach(), expected.detach()
    if ours.shape != expected.shape:
        raise Mismatch(f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}")
    if not expected.is_floating_point() and not expected.is_complex():
        if not torch.equal(ours, expected):
            raise Mismatch(f"{what}: {ours.tolist()}, expected {expected.tolist()}")
        return
    wide = torch.complex128 if expected.is_complex() else torch.float64
    ours, expected = ours.to(wide), expected.to(wide)
    bound = relative * max(expected.abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0, 1e-2, size)
    different = ~torch.isclose(ours, expected, rtol=0, atol=bound, equal_nan=True)
    if different.any():
        at = different.nonzero()[0].tolist()
        raise Mismatch(
            f"{what}: {int(different.sum())} of {ours.numel()} elements, first at {at}: "
            f"{ours[tuple(at)].item()}, expected {expected[tuple(at)].item()}, bound {bound:.1e}"
        )


def run_case(seed: int) -> str:
    """Run a seed's case: "equal", or what was refused.

    Raises:
        Mismatch: the trainer and the plain run differ.
        Exception: the trainer failed where the plain run did not.
    """
    case, model = draw_case(seed)
    with spu.use_backend(case.backend):
        return _run(Run(case, model))


def _run(run: Run) -> str:
    case = run.case
    try:
        for action in [*case.actions, "step", "forward_backward"]:
            run.do(action)
    except (ValueError, TypeError, RuntimeError) as error:
        refused = next((name for name, text, may in _REFUSALS if text in str(error) and may(case)), None)
        if refused is None:
            raise
        return f"refused: {refused}"
    finally:
        run.trainer.close()
        run.disk.cleanup()
    return "equal"
