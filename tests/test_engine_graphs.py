"""Captured microbatches give the bits of eager ones, and what cannot be captured is refused by name.

`Tape` stands for a CUDA graph: it records the operators of a microbatch with the memory they work on, and does these
again, without any Python of the model's. Nothing but what was at those places when it is replayed can reach the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spu
from spu.common.torch_private import TorchDispatchMode, schema_of
from spu.devices.capture import Called
from spu.devices.manager import Device
from spu.engine import graphs as engine_graphs
from spu.engine import head_loss
from spu.engine.capturable import doubt, lacks_room
from spu.engine.stage import Stage


class Tape(TorchDispatchMode):
    """Records operators below autograd; a recording changes nothing that was there before it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal):
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(schema_of(func).arguments, args):
            for tensor in value if isinstance(value, list | tuple) else [value]:
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(tensor, Tensor) and id(tensor) not in self._made:
                    self._before.setdefault(id(tensor), (tensor, tensor.clone()))
        result = func(*args, **kwargs)
        made = [r for r in (result if isinstance(result, list | tuple) else [result]) if isinstance(r, Tensor)]
        self._made |= {id(tensor) for tensor in made}
        self._alive += made
        self.calls.append((func, args, kwargs, made))
        return result

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        self.calls, self._before, self._made, self._alive = [], {}, set[int](), list[Tensor]()
        with self:
            work()
        for tensor, before in self._before.values():
            tensor.copy_(before)
        calls = self.calls

        def replay() -> None:
            with torch.no_grad():
                for func, args, kwargs, made in calls:
                    result = func(*args, **kwargs)
                    again = result if isinstance(result, list | tuple) else [result]
                    for place, value in zip(made, [r for r in again if isinstance(r, Tensor)], strict=True):
                        if place.data_ptr() != value.data_ptr():
                            place.copy_(value)

        return replay


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_graphs, "Called", Tape)


class Decoder(nn.Module):
    """A layer with fused products, a parameter without one, and a dropout.

    Neither a norm nor a trained embedding: on a CPU their 16-bit gradients are made by other operators while a backward
    runs (`spu.ops.wide_sums`), which a tape is not.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(width)), nn.Dropout(0.25)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.scale * x))))


def layers(width: int = 8) -> list[nn.Module]:
    torch.manual_seed(3)
    return [nn.Embedding(11, width).requires_grad_(False), Decoder(width), Decoder(width), nn.Linear(width, 11)]


def trainer(graphs: str, devices: int = 1, model: list[nn.Module] | None = None, **settings: Any) -> Any:
    names = [f"cpu:{i}" for i in range(devices)]
    settings = {"microbatches": 4, "lr": 1e-2, "precision": "fp16"} | settings
    return spu.ModelParallelTrainer(layers() if model is None else model, names, graphs=graphs, **settings)


def batch(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    tokens = torch.randint(11, (rows, 5), generator=source)
    return tokens, torch.randint(11, (rows, 5), generator=source)


def run(made: Any, steps: int = 4, change: Callable[[int, Any], None] = lambda step, made: None) -> list[Any]:
    with made:
        results = []
        for step in range(steps):
            change(step, made)
            results.append(made.step(*batch(step)))
        return [[(r.loss, r.grad_norm, r.loss_scale) for r in results], made.state_dict_for_model(), made]


def replays(made: Any) -> int:
    return made._runner.engine.graphs.replays


def assert_equal(one: list[Any], other: list[Any]) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


@pytest.mark.parametrize(
    ("form", "devices", "settings"),
    [
        (Called, 1, {}),
        (Tape, 1, {}),
        (Tape, 2, {"accumulate": 2, "recompute": [0]}),
        (Tape, 1, {"precision": "fp32", "loss_weight": "sum"}),
    ],
)
def test_replays_give_the_bits_of_eager_microbatches(
    form: type, devices: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_graphs, "Called", form)
    plain, captured = (run(trainer(mode, devices, max_grad_norm=1.0, **settings)) for mode in ("off", "on"))
    assert_equal(captured, plain)
    a_step = 4 * settings.get("accumulate", 1) - 1
    assert replays(captured[2]) == 4 * a_step - 2  # all but the first of each step and the two to warm up


def test_a_loss_without_logits_is_there_after_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "WORTH_BYTES", 1)
    without_bias = [*layers()[:3], nn.Linear(8, 11, bias=False)]
    state = copy.deepcopy(without_bias)
    plain, captured = (run(trainer(mode, model=m), 2) for mode, m in (("off", without_bias), ("on", state)))
    assert_equal(captured, plain)
    assert replays(captured[2]) == 4


@pytest.mark.usefixtures("tape")
def test_what_changes_between_steps_is_seen() -> None:
    def change(step: int, made: Any) -> None:
        if step == 2:
            for module in made._parts.as_module().modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.5
        if step == 4:
            made._parts.as_module().eval()

    plain, captured = (run(trainer(mode), 6, change) for mode in ("off", "on"))
    assert_equal(captured, plain)
    assert replays(captured[2]) == 18 - 3 * 2


@pytest.mark.usefixtures("tape")
def test_a_masked_microbatch_and_a_short_batch() -> None:
    def masked(step: int, rows: int) -> tuple[Tensor, Tensor]:
        tokens, targets = batch(step, rows)
        targets[2:4] = -100
        return tokens, targets

    outcomes = []
    for mode in ("off", "on"):
        with trainer(mode, microbatches=4) as made:
            losses = [made.step(*masked(step, rows)).loss for step, rows in enumerate((8, 8, 8, 6, 6, 8))]
            outcomes.append([losses, made.state_dict_for_model()])
    assert_equal(outcomes[0], outcomes[1])
    assert replays(made) > 0


@pytest.mark.usefixtures("tape")
def test_an_overflow_skips_the_step_and_lowers_the_scale() -> None:
    outcomes = []
    for mode in ("off", "on"):
        scaler = spu.LossScaler(init_scale=2.0**24)
        with trainer(mode, scaler=scaler) as made:
            results = [made.step(*batch(step)) for step in range(9)]
            outcomes.append([[(r.loss, r.skipped, r.loss_scale) for r in results], made.state_dict_for_model()])
    assert_equal(outcomes[0], outcomes[1])
    assert any(skipped for _, skipped, _ in outcomes[1][0])
    assert not all(skipped for _, skipped, _ in outcomes[1][0])
    assert replays(made) > 0


class Counts(nn.Module):
    """A layer whose Python code does another thing each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.abs().amax() > 0)


def test_a_layer_that_counts_its_calls_is_named() -> None:
    with trainer("on", model=[*layers()[:3], Counts(), layers()[3]]) as made:
        for step in range(3):
            made.step(*batch(step))
        with pytest.raises(spu.StageError, match=r"graphs='on', but stage 0 cannot be captured: .*changes from step"):
            made.step(*batch(3))


def test_a_layer_that_reads_a_value_runs_eagerly_or_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_graphs, "Called", Tape)
    model = [*layers()[:3], Reads(), layers()[3]]
    with trainer("on", model=model) as made, pytest.raises(spu.StageError, match="cannot be captured: .*capturing"):
        made.step(*batch(0))
    plain = run(trainer("off", model=[*layers()[:3], Reads(), layers()[3]]))
    made = trainer("on", model=[*layers()[:3], Reads(), layers()[3]])
    made.prepare(*batch(0))
    made._runner.engine.graphs._must = False  # as "auto" is
    captured = run(made)
    assert_equal(captured, plain)
    assert "capturing" in made.compare()


def test_recomputed_layers_that_draw_are_named() -> None:
    with trainer("on", recompute=[1]) as made, pytest.raises(spu.StageError, match="draw .* are recomputed"):
        made.step(*batch(0))


def test_captured_work_needs_room_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Device("cuda:0", torch.device("cuda:0"), (), 1, 20, 16, "a card")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 11)
    assert lacks_room(card) == ""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12)
    assert "18 B in all, and the budget of cuda:0 is 16 B" in lacks_room(card)


def test_a_step_without_memory_ends_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer("on", retry=False) as made:
        made.step(*batch(0))
        made.step(*batch(1))
        before = replays(made)

        def full(self: Stage, *args: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as patch, pytest.raises(spu.StageError, match="out of memory"):
            patch.setattr(Stage, "loss", full)
            made.step(*batch(2))
        made.step(*batch(2))
        assert replays(made) == before > 0
        assert "ran out of memory" in made.compare()


def test_auto_captures_nothing_on_a_cpu() -> None:
    with trainer("auto") as made:
        made.step(*batch(0))
        assert made._runner.engine.graphs is None
        assert "nothing is won on cpu" in made._runner._why_eager
        assert "CUDA graphs" not in made.compare()


def test_auto_leaves_code_alone_that_no_library_wrote() -> None:
    with trainer("on") as made:
        made.prepare(*batch(0))
        stage = made._runner.built.stages[-1]
        assert doubt(stage, True).startswith("Decoder is not a library's")
        assert "loss_fn" in doubt(stage, False)
    with trainer("on", model=[nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)]) as made:
        made.prepare(*batch(0))
        assert doubt(made._runner.built.stages[-1], True) == ""


def with_hook() -> list[nn.Module]:
    model = layers()
    model[1].register_forward_hook(lambda module, args, output: None)
    return model


def with_gradient_hook() -> list[nn.Module]:
    model = layers()
    model[1].up.weight.register_hook(lambda gradient: None)
    return model


def with_generator() -> list[nn.Module]:
    model = layers()
    model[1].source = torch.Generator()
    return model


def tied() -> list[nn.Module]:
    model = layers()
    model[3].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"schedule": "gpipe"}, "several forwards before their backwards"),
        ({"schedule": "zb", "devices": 2}, "defers weight gradients"),
        ({"microbatches": 1}, "the first one runs eagerly"),
        ({"model": with_hook}, "has a hook, or a forward of its own"),
        ({"model": with_gradient_hook}, "has a hook on its gradient"),
        ({"model": with_generator}, "has a generator of its own"),
        ({"model": tied, "devices": 2}, "shares weights with another stage"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(settings: dict[str, Any], why: str) -> None:
    model = settings.pop("model", layers)()
    message = rf"graphs='on' cannot capture stage \d: .*{why}.*graphs='auto'"
    with trainer("on", model=model, **settings) as made, pytest.raises(ValueError, match=message):
        made.prepare(*batch(0))
    with trainer("off", model=model, **settings) as made:
        made.step(*batch(0))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_card_replays_the_bits_of_eager_microbatches(precision: str) -> None:
    outcomes = []
    for mode in ("off", "on"):
        made = spu.ModelParallelTrainer(
            layers(64), ["cuda:0"], graphs=mode, microbatches=4, lr=1e-2, precision=precision, max_grad_norm=1.0
        )
        outcomes.append(run(made))
    assert_equal(*outcomes)
    assert replays(outcomes[1][2]) == 10
