"""The tables of CPUs, and the ways that they name: torch's fp32 product and narrower kernels give the op's results."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from numeric import assert_close_to_truth
from torch import Tensor

from spu.ops import cpu_table
from spu.ops.cpu_table import CpuTable

_C = pytest.importorskip("spu._C", reason="spu._C is not built here")
if not hasattr(_C, "set_way"):
    pytest.skip("spu._C was built from older sources", allow_module_level=True)

OPS = torch.ops.spu
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch multiplies without MKL")


@pytest.fixture
def no_ways() -> Iterator[None]:
    name = cpu_table.family(_C.isa())
    cpu_table.install(())
    yield
    cpu_table.install(cpu_table.tables(name) if name else ())


def everywhere(way: str) -> CpuTable:
    return CpuTable(
        "here", {f"{op}/{t}/{shape}": way for op in cpu_table.OPS for t in DTYPES for shape in cpu_table.CLASSES}
    )


def random(*size: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(size) / max(1, size[-1]) ** 0.5).to(dtype)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = CpuTable("intel-6-85-avx512", {"linear/fp16/large": "torch", "linear/fp16/deep": ""}, {"torch": "2"},
                     {"linear/fp16/large": 1.25})  # fmt: skip
    cpu_table.write(table, tmp_path / "deeper" / "t.json")
    assert cpu_table.read(tmp_path / "deeper" / "t.json") == table


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "family": "a", "rows": {"x": {}}}'])
def test_what_is_no_table_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="bad.json is not a CPU's table"):
        cpu_table.read(tmp_path / "bad.json")


def test_the_users_rows_come_before_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_table, "SHIPPED", tmp_path)
    name = "intel-6-143-avx512bf16"
    cpu_table.write(CpuTable(name, {"linear_dw/fp32/large": "torch"}), tmp_path / f"{name}.json")
    cpu_table.write(CpuTable(name, {"linear_dw/fp32/large": ""}), cpu_table.user_path(name))
    found = cpu_table.tables(name)
    assert found[0].ways["linear_dw/bf16/deep"] == "avx512"
    assert [table.ways.get("linear_dw/fp32/large") for table in found] == [None, "torch", ""]
    cpu_table.write(CpuTable("amd-25-33-avx2", {}), cpu_table.user_path(name))
    with pytest.raises(ValueError, match="amd-25-33-avx2, not intel"):
        cpu_table.tables(name)


def test_what_a_familys_name_says() -> None:
    plain = cpu_table.derived("intel-6-143-amx").ways
    assert plain["linear_dx/fp32/row"] == "torch"
    half = {f"linear_dx/{dtype}/{shape}" for dtype in ("fp16", "bf16") for shape in ("deep", "large")}
    assert set(cpu_table.derived("intel-6-85-avx2").ways) == {*plain, "linear_dw/fp32/large", *half}
    assert cpu_table.derived("intel-6-85-scalar").ways == {}
    assert cpu_table.derived("amd-25-97-avx512bf16").ways == {}
    assert set(plain.values()) == {"torch"}
    assert {key.split("/")[1] for key in plain} == {"fp32"}
    slow = cpu_table.derived("intel-6-207-avx512bf16").ways
    assert {way for key, way in slow.items() if key not in plain} == {"avx512"}
    assert {key.split("/")[1] for key in slow.keys() - plain.keys()} == {"bf16"}


def test_what_torch_won_on_every_intel_family_measured_is_derived_for_the_others() -> None:
    measured = [cpu_table.read(path).ways for path in cpu_table.SHIPPED.glob("intel-*-a[vm]*.json")]
    won = set.intersection(*({key for key, way in ways.items() if way == "torch"} for ways in measured))
    assert len(measured) >= 2
    assert "gated_linear/fp32/few" in won
    assert won <= cpu_table.derived("intel-6-143-avx512").ways.keys()


@pytest.mark.parametrize("path", sorted(cpu_table.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_name_what_there_is(path: Path) -> None:
    table = cpu_table.read(path)
    assert table.family == path.stem
    assert set(json.loads(path.read_text())["facts"]) >= {"device", "torch", "spu", "date", "threads"}
    for key, way in table.ways.items():
        op, dtype, shape = key.split("/")
        assert op in cpu_table.OPS
        assert dtype in DTYPES
        assert shape in cpu_table.CLASSES
        assert way in ("", "torch", "avx512", "avx512bf16")


def test_ways_that_do_not_serve_are_passed_over(no_ways: None) -> None:
    assert not _C.set_way("linear", "fp16", "row", "torch")
    assert _C.set_way("linear_dx", "fp32", "row", "torch")
    assert not _C.set_way("linear_ce", "fp16", "large", "torch")
    assert not _C.set_way("linear", "fp64", "large", "torch")
    assert not _C.set_way("linear", "fp16", "large", "sse9")
    cpu_table.install((everywhere("sse9"),))
    assert _C.way("linear", "fp16", 512, 2048, 1024) == _C.isa()
    with pytest.raises(ValueError, match="no product linear of fp64"):
        _C.way("linear", "fp64", 1, 1, 1)


@needs_mkl
@pytest.mark.parametrize("shape", [(0, 6, 8), (8, 0, 6), (8, 6, 0)], ids=str)
def test_empty_operands_have_empty_results(no_ways: None, shape: tuple[int, int, int]) -> None:
    cpu_table.install((everywhere("torch"),))
    rows, out, inner = shape
    for dtype in DTYPES.values():
        x, w, dz = (random(*size, dtype=dtype) for size in ((rows, inner), (out, inner), (rows, out)))
        assert OPS.linear.cpu(x, w, None, "gelu", True)[0].eq(0).all()
        assert OPS.linear_dx.cpu(dz, w).eq(0).all()
        assert OPS.gated_dx.cpu(dz, dz, w, w).eq(0).all()
        main, inv, found = torch.full((out, inner), 7.0), torch.tensor([1.0]), torch.zeros(1)
        OPS.linear_dw_.cpu(dz, x, main, inv, found, False)
        assert main.eq(0).all()
        assert found.item() == 0


@needs_mkl
def test_classes_of_shapes(no_ways: None) -> None:
    sizes = {"row": (4, 9000, 9000), "skinny": (64, 64, 9000), "few": (128, 9000, 9000), "small": (129, 512, 704)}
    sizes |= {"deep": (512, 1024, 4096), "large": (512, 2048, 2048)}
    for shape, size in sizes.items():
        took = _C.set_way("linear", "fp32", shape, "torch")
        assert (_C.way("linear", "fp32", *size) == "torch") is took is (shape != "row"), shape
        assert (_C.way("linear", "fp32", 9000, 9000, 128) == "torch") is (shape == "few")
        _C.set_way("linear", "fp32", shape, "")
        assert _C.way("linear", "fp32", *size) == _C.isa()


# rows in the classes row, skinny and small, ragged; strided operands; the last one in blocks of sums would be large
@needs_mkl
@pytest.mark.parametrize("way", ["torch", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 37, 129])
def test_a_way_gives_the_ops_results(no_ways: None, way: str, dtype: str, rows: int) -> None:
    if way != "torch" and not _C.set_way("linear", "fp32", "small", way):
        pytest.skip(f"this processor lacks {way}")
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    x, w, up, bias = (
        random(rows, 70, dtype=kind),
        random(45, 70, dtype=kind),
        random(45, 70, dtype=kind),
        random(45, dtype=kind),
    )
    dz = random(45, rows, dtype=kind).t()
    dy, down, gate = random(rows, 24, dtype=kind), random(24, 45, dtype=kind), random(rows, 45, dtype=kind) * 9
    main, one, found_inf = torch.randn(45, 70), torch.full((1,), 0.5), torch.zeros(1)

    def results() -> list[Tensor]:
        into, alone = main.clone(), main.clone()
        OPS.linear_dw_.cpu(dz, x, into, one, found_inf, True)
        OPS.linear_dw_.cpu(dz, x, alone, one, found_inf, False)
        return [alone, OPS.gated_linear.cpu(x, w, up, "silu", False)[0], OPS.linear.cpu(x, w, bias, "gelu", False)[0],
                *OPS.linear.cpu(x, w, bias, "gelu", True), OPS.linear.cpu(x, w, None, "none", False)[0],
                OPS.linear_dx.cpu(dz, w), OPS.linear_dw.cpu(dz, x), into,
                *OPS.gated_linear.cpu(x, w, up, "silu", True), OPS.gated_dx.cpu(dz, gate, w, up),
                *OPS.gated_dh.cpu(dy, down, gate, dz, "silu")]  # fmt: skip

    own = results()
    cpu_table.install((everywhere(way),))
    found = results()
    wide = [t.double() for t in (x, w, up, bias, dz)]
    z = wide[0] @ wide[1].t()
    dh = OPS.gated_dh.reference(*(t.double() for t in (dy, down, gate, dz)), "silu")
    h = torch.nn.functional.silu(z) * (wide[0] @ wide[2].t())
    dw, acted = wide[4].t() @ wide[0], torch.nn.functional.gelu(z + wide[3])
    truths = [0.5 * dw, h, acted, acted, z + wide[3], z, wide[4] @ wide[1], dw, main.double() + 0.5 * dw, h, z,
              wide[0] @ wide[2].t(), wide[4] @ wide[1] + gate.double() @ wide[2], *dh]  # fmt: skip
    assert found_inf.item() == 0
    for i, (ours, plain, truth) in enumerate(zip(found, own, truths, strict=True)):
        assert_close_to_truth(ours, plain, truth, name=f"result {i}")


@needs_mkl
def test_a_non_finite_gradient_is_seen_behind_torchs_product(no_ways: None) -> None:
    cpu_table.install((everywhere("torch"),))
    dz, x, found_inf = torch.ones(100, 65).half(), torch.ones(100, 30).half(), torch.zeros(1)
    main = torch.zeros(65, 30)
    OPS.linear_dw_.cpu(dz, x, main, torch.ones(1), found_inf, True)
    assert found_inf.item() == 0
    assert torch.equal(main, torch.full_like(main, 100.0))
    OPS.linear_dw_.cpu(dz, x, main, torch.ones(1), found_inf, False)
    assert found_inf.item() == 0
    assert torch.equal(main, torch.full_like(main, 100.0))
    dz[3, 7] = float("inf")
    for accumulate in (True, False):
        found_inf.zero_()
        OPS.linear_dw_.cpu(dz, x, main, torch.ones(1), found_inf, accumulate)
        assert found_inf.item() == 1


@needs_mkl
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_sums_in_several_blocks_of_rows(no_ways: None, dtype: str) -> None:
    """fp32 sums are made where the result is to be, 16-bit ones in memory for some rows: 256 of them at this width.

    Blocks are of whole rows: a part of the columns tells, the last ones with it.
    """
    wide = 16400
    x, w, up = (random(rows, 20, dtype=DTYPES[dtype]) for rows in (280, wide, wide))
    bias = random(wide, dtype=DTYPES[dtype])
    some = torch.cat((torch.arange(0, wide - 40, 8), torch.arange(wide - 40, wide)))

    def results() -> list[Tensor]:
        plain, acted = OPS.linear.cpu(x, w, None, "none", False)[0], OPS.linear.cpu(x, w, bias, "relu", False)[0]
        gated = [*OPS.gated_linear.cpu(x, w, up, "silu", True), OPS.gated_dx.cpu(x, x, w.t(), up.t())]
        return [whole[:, some] for whole in (plain, acted, *gated)]

    own = results()
    cpu_table.install((everywhere("torch"),))
    found = results()
    z, u = x.double() @ w[some].double().t(), x.double() @ up[some].double().t()
    truths = [z, (z + bias[some].double()).relu(), torch.nn.functional.silu(z) * u, z, u, z + u]
    for i, (ours, plain, truth) in enumerate(zip(found, own, truths, strict=True)):
        assert_close_to_truth(ours, plain, truth, name=f"blocks {i}")


@needs_mkl
def test_a_product_in_inference_mode_leaves_the_next_one_alone(no_ways: None) -> None:
    """The question whether torch rounds is asked by tensors that a thread keeps."""
    x, w = torch.randn(100, 30), torch.randn(20, 30)
    cpu_table.install((everywhere("torch"),))
    found: list[Tensor] = []

    def run() -> None:  # a thread of its own asks for the first time
        with torch.inference_mode():
            found.append(OPS.linear_dx.cpu(x, w.t()))
        found.append(OPS.linear_dx.cpu(x, w.t()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 2
    assert torch.equal(found[0], found[1])


@needs_mkl
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fp32_products_of_fewer_bits_are_not_used(no_ways: None, precision: str) -> None:
    """torch.set_float32_matmul_precision may make torch round the operands: then ours serve, to the bit."""
    x, w = torch.randn(256, 300), torch.randn(64, 300)
    own, exact = OPS.linear.cpu(x, w, None, "none", False)[0], torch.get_float32_matmul_precision()
    cpu_table.install((everywhere("torch"),))
    torch.set_float32_matmul_precision(precision)
    try:
        found = OPS.linear.cpu(x, w, None, "none", False)[0]
        rounds = not torch.equal(
            torch.full((24, 24), 1 + 2**-12) @ torch.ones(24, 24), torch.full((24, 24), 24 + 24 * 2**-12)
        )
    finally:
        torch.set_float32_matmul_precision(exact)
    if rounds:
        assert torch.equal(found, own)
    assert_close_to_truth(found, own, x.double() @ w.double().t(), name=precision)
