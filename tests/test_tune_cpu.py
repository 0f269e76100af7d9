"""spu tune on a CPU: which ways it compares, what it takes for faster, and the table that it writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spu.ops import cpu_table
from spu.ops.cpu_table import CpuTable
from spu.tune import cpu

_C = pytest.importorskip("spu._C", reason="spu._C is not built here")
if not hasattr(_C, "set_way"):
    pytest.skip("spu._C was built from older sources", allow_module_level=True)
NAME = cpu_table.family(_C.isa())
needs_a_name = pytest.mark.skipif(NAME is None, reason="the system does not name the processor")


class Clock:
    """Time that calls spend by the seconds they are given."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[], None]:
        turns = itertools.cycle(seconds)

        def call() -> None:
            self.now += next(turns)

        return call


def test_a_gain_holds_in_the_median_and_in_the_best() -> None:
    clock = Clock()
    assert cpu.compare(clock.taking(0.02), clock.taking(0.01), clock) == pytest.approx(2.0)
    # an outlier of either side is neither the median nor the best
    noisy = cpu.compare(clock.taking(0.01, 0.01, 0.5), clock.taking(0.01), clock)
    assert noisy == pytest.approx(1.0)
    # faster in most pairs, but not at its best
    assert cpu.compare(clock.taking(0.02, 0.02, 0.01), clock.taking(0.012), clock) == pytest.approx(0.01 / 0.012)


def test_ways_that_are_compared() -> None:
    mkl = ["torch"] if torch.backends.mkl.is_available() else []
    assert cpu.ways_of("linear", "bf16", "large", "amx") == ["avx512bf16", "avx512", *mkl]
    assert cpu.ways_of("linear_dw", "fp32", "large", "amx") == mkl
    assert cpu.ways_of("linear_ce", "fp16", "large", "avx512") == []
    assert cpu.ways_of("linear", "fp16", "row", "avx2") == []
    assert cpu.ways_of("linear_dx", "fp32", "row", "avx2") == mkl
    lines = cpu.plan_lines(("linear", "linear_ce"), ("fp16",), "avx512bf16")
    assert len(lines) == 2 * len(cpu_table.CLASSES)
    assert lines[0] == "linear/fp16/row: avx512 beside avx512bf16 at 2 x 1024 x 1024"


@pytest.mark.parametrize("shape", cpu_table.CLASSES)
def test_a_shape_is_of_the_class_that_it_stands_for(shape: str) -> None:
    if not _C.set_way("linear", "fp16", shape, "avx2"):
        pytest.skip("this processor lacks AVX2")
    others = [_C.way("linear", "fp16", *cpu.SHAPES[other]) for other in cpu_table.CLASSES if other != shape]
    own = _C.way("linear", "fp16", *cpu.SHAPES[shape])
    _C.set_way("linear", "fp16", shape, "")
    assert own == "avx2"
    assert "avx2" not in others or _C.isa() == "avx2"


@pytest.mark.parametrize("op", cpu_table.OPS)
def test_every_op_is_called_as_it_is_defined(op: str) -> None:
    cpu.call_of(op, torch.float16, (8, 48, 32))()


@needs_a_name
def test_a_run_writes_what_is_faster_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NAME is not None
    monkeypatch.setenv("SPU_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_table, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(cpu_table, "derived", lambda name: CpuTable(name, {}))
    monkeypatch.setattr(cpu, "call_of", lambda op, dtype, shape: lambda: (op, shape))
    monkeypatch.setattr(cpu, "ways_of", lambda op, dtype, shape, isa: ["avx2"])
    gains = {"avx2": 1.04}
    monkeypatch.setattr(cpu, "compare", lambda ours, other, clock: gains[_way(other)])
    said: list[str] = []
    path = cpu.tune(("linear",), ("fp32",), say=said.append)
    assert path == cpu_table.user_path(NAME)
    assert set(cpu_table.read(path).ways.values()) == {""}
    assert said == []
    gains["avx2"] = 1.5
    has = _C.set_way("linear", "fp32", "large", "avx2")
    path = cpu.tune(("linear",), ("fp32",), say=said.append)
    found = cpu_table.read(path)
    if has:
        assert found.ways["linear/fp32/large"] == "avx2"
        assert found.gains["linear/fp32/large"] == 1.5
        assert _C.way("linear", "fp32", 512, 2048, 1024) == "avx2"
        assert len(said) == len(cpu_table.CLASSES)
        assert "linear/fp32/row: avx2, was " in said[0]
    # what another run measured stays, unless the versions differ
    cpu.tune(("linear_dx",), ("fp32",), say=said.append)
    assert set(cpu_table.read(path).ways) >= {"linear/fp32/large", "linear_dx/fp32/large"}
    old = cpu_table.read(path)
    cpu_table.write(CpuTable(NAME, old.ways, {**old.facts, "torch": "1.0"}), path)
    cpu.tune(("linear_dw",), ("fp32",), say=said.append)
    assert {key.split("/")[0] for key in cpu_table.read(path).ways} == {"linear_dw"}
    monkeypatch.undo()
    cpu_table.install(cpu_table.tables(NAME))


def _way(call: Callable[[], object]) -> str:
    """Return the way that a call of ``cpu._faster`` multiplies by."""
    cells = getattr(call, "__closure__", ()) or ()
    return next(cell.cell_contents for cell in cells if isinstance(cell.cell_contents, str))


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown \['linear_dq', 'fp8'\]"):
        cpu.tune(("linear_dq",), ("fp8",))
