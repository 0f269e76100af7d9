"""spu tune without a GPU: what it would try, and a run with the clock and the GPU replaced."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

table = pytest.importorskip("spu.kernels.table", reason="spu.kernels is not there: spu runs in place, not installed")

from spu.kernels.config import CLASSES, LIBRARY_OPS, PRODUCTS, Config, Entry, Table  # noqa: E402
from spu.kernels.derive import SHARED_BYTES  # noqa: E402
from spu.tune import calls as tune_calls  # noqa: E402
from spu.tune import run as tune  # noqa: E402


@pytest.mark.parametrize("arch", [75, 86, 90])
@pytest.mark.parametrize("op", PRODUCTS)
def test_candidates_fit_the_card_and_begin_with_cublas(op: str, arch: int) -> None:
    for shape_class in CLASSES:
        found = tune.candidates(op, torch.float16, shape_class, arch)
        assert found[0].kind == "torch"
        by_library = [one.algorithm for one in found if one.kind == "cublaslt"]
        assert by_library == ([0, 1, 2] if op in LIBRARY_OPS else [])
        assert (len(found) == 1 + len(by_library)) == (arch == 75)
        assert all(tune_calls._shared_bytes(op, one, torch.float16) <= SHARED_BYTES[arch] for one in found[1:])
        assert not any(one.kind == "descriptor" for one in found if arch < 90)


def test_a_plan_has_a_line_a_row() -> None:
    lines = tune.plan_lines(90)
    assert len(lines) == 2 * len(PRODUCTS) * len(CLASSES)
    assert lines[0].startswith("linear/fp16/skinny")


def test_the_products_of_a_layer_follow_each_other_so_that_its_backend_is_named_early() -> None:
    rows = [line.split(":")[0] for line in tune.plan_lines(90, dtypes=("fp16",), classes=("large", "medium"))]
    assert rows[:3] == ["linear/fp16/large", "linear_dz_dx/fp16/large", "linear_dw/fp16/large"]
    assert rows[3] == "linear/fp16/medium"
    assert sorted(rows) == sorted(f"{op}/fp16/{name}" for op in PRODUCTS for name in ("large", "medium"))


@pytest.mark.parametrize("gone", [True, False])
def test_a_refused_launch_is_a_note_and_a_dead_context_ends_the_run(
    gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize(device: object) -> None:
        if gone:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    device = torch.device("cuda")
    assert tune.context_is_gone(RuntimeError("Triton Error [CUDA]: invalid argument"), device) is gone
    assert not tune.context_is_gone(RuntimeError("out of resources: shared memory"), device)
    assert tune.context_is_gone(torch.AcceleratorError("CUDA error"), device)


def test_without_a_card_the_error_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="spu doctor"):
        tune.tune()
    with pytest.raises(ValueError, match="'linear_dq'"):
        tune.tune(ops=("linear_dq",))


class Gpu:
    """An sm_90 GPU on which 64-row tiles are fastest, and the CUDA C++ layer faster than Triton's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Processors(132))
        monkeypatch.setattr(torch.cuda, "device", lambda *_: Nothing())
        monkeypatch.setattr(tune, "Compiling", lambda *_: Nothing())
        monkeypatch.setattr(tune, "_facts", lambda *_: dict.fromkeys(("device", "torch", "triton", "spu"), "x"))
        monkeypatch.setattr(tune, "call_of", lambda *_: lambda config: config)
        monkeypatch.setattr(tune, "layer_of", lambda op, backend, *_: lambda: backend)
        monkeypatch.setattr(tune, "measure_us", self.measure)
        monkeypatch.setattr("spu.ops.dispatch.cuda_candidates", lambda dtype: ("triton", "cuda"))
        monkeypatch.setattr(tune, "choose_tiles", lambda module, path, *row: self.tiles.append((path.name, *row[:2])))
        monkeypatch.setitem(sys.modules, "spu._cuda", SimpleNamespace())
        self.tiles: list[tuple[str, str, str]] = []

    def measure(self, call: object, device: torch.device) -> float:
        self.measured += 1
        what = call()  # type: ignore[operator]
        if isinstance(what, str):
            return {"triton": 9.0, "cuda": 7.0}[what]
        if what.block_n == 256:
            raise RuntimeError("out of resources: shared memory")
        return 1.0 if (what.kind, what.block_m) == ("tile", 64) else 2.0


class Processors(NamedTuple):
    multi_processor_count: int


class Nothing:
    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self, row: object) -> None:
        pass


def test_a_run_keeps_the_fastest_and_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, said = Gpu(monkeypatch), []
    path = tmp_path / "sm_90.json"
    ops = ("linear", "linear_dz_dx", "linear_dw")
    tune.tune("cpu", ops, ("fp16",), out=path, seconds=0.0, say=said.append)
    assert not path.exists()
    assert "run again" in said[-1]
    tune.tune("cpu", ops[:1], ("fp16",), out=path, say=said.append)
    first, cut = gpu.measured, table.read(path)
    assert any("shared memory" in line for line in said)
    assert {entry.backend for entry in cut.entries.values()} == {"triton"}  # the layer's other products are not there
    said.clear()
    tune.tune("cpu", ops, ("fp16",), classes=("large",), out=path, say=said.append)
    named = next(place for place, line in enumerate(said) if line.startswith("linear/fp16/large: forward and backward"))
    assert named == len(said) - 1
    assert table.read(path).entries["linear/fp16/large"].backend == "cuda"
    assert gpu.tiles == [("cuda_sm_90.json", "fp16", "large")], "before the layer is timed on CUDA C++"
    tune.tune("cpu", ops, ("fp16",), out=path, say=said.append)
    made = table.read(path)
    assert gpu.measured > first
    assert made.origin == "measured"
    for shape_class in ("small", "medium", "large"):
        entry = made.entries[f"linear/fp16/{shape_class}"]
        assert (entry.config.kind, entry.config.block_m, entry.time_us) == ("tile", 64, 1.0)
        assert (entry.backend, entry.layer_us) == ("cuda", {"triton": 9.0, "cuda": 7.0})
        assert made.entries[f"linear_dw/fp16/{shape_class}"].backend == "triton"
    again = gpu.measured
    tune.tune("cpu", ops, ("fp16",), out=path, say=said.append)
    assert gpu.measured == again, "everything was there"
    changed = dataclasses.replace(made, facts={**made.facts, "torch": "another"})
    table.write(changed, path)
    tune.tune("cpu", ops, ("fp16",), out=path, say=said.append)
    assert gpu.measured > again, "another version is measured once more"


def test_the_users_table_comes_first_then_the_shipped_one_then_the_derived(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = [f"linear/fp16/{shape_class}" for shape_class in ("small", "medium", "large")]
    own, shipped = (Config("tile", 32, 32, 32, warps) for warps in (1, 2))
    monkeypatch.setenv("SPU_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    table.write(Table("sm_87", "measured", {keys[0]: Entry(own)}, {}), table.user_path("sm_87"))
    table.write(
        Table("sm_86", "measured", dict.fromkeys(keys[:2], Entry(shipped)), {}), tmp_path / "shipped/sm_86.json"
    )
    table.forget()
    derived = table.entry_of((8, 6), keys[2])
    assert derived is not None
    assert [table.entry_of((8, 7), key).config for key in keys] == [own, shipped, derived.config], "sm_87 is near sm_86"
    assert [found.origin for found in table.tables((9, 0))] == ["derived"], "nothing measured"
    assert table.tables((7, 0))[0].arch == "sm_75", "older than all"
    table.forget()
