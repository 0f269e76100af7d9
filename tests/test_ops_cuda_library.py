"""What the CUDA library is told and asked: its devices, the tiles of its products, shapes that it takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from spu.kernels import derive, table
from spu.kernels.config import Config, Entry, Table
from spu.ops import cuda_library, dispatch


@pytest.mark.parametrize(
    ("architectures", "capability", "serves"),
    [
        ("75;80;90a", (7, 5), True),
        ("75;80;90a", (8, 6), True),  # machine code of sm_80
        ("75;80;90a", (9, 0), True),
        ("75;80;90a", (12, 0), True),  # PTX of the newest
        ("75;80;90a", (7, 0), False),
        ("90a", (8, 9), False),
        ("80;120", (9, 0), False),
        ("89", (8, 6), False),
    ],
)
def test_the_devices_that_a_library_has_code_for(architectures: str, capability: tuple[int, int], serves: bool) -> None:
    assert cuda_library.serves(architectures, capability) == serves


def test_a_library_without_code_for_a_card_is_unavailable_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    find, load = importlib.util.find_spec, importlib.import_module
    module = type("Library", (), {"architectures": staticmethod(lambda: "90a")})
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: module if n == "spu._cuda" else find(n, *a))
    monkeypatch.setattr(importlib, "import_module", lambda n, *a: module if n == "spu._cuda" else load(n, *a))
    status = dispatch._load_cuda()
    assert not status.available
    assert "compiled for 90a, which has no code for cuda:0 (sm_89)" in status.reason
    assert status.fix.startswith("SPU_CUDA_ARCHS=89 ")


def test_what_to_build_for_is_what_the_build_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [(12, 1), (9, 0), (8, 7), (10, 3), (8, 6)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index])
    assert cuda_library.wanted() == "86;90a;100;120"
    assert not cuda_library.uncovered(cuda_library.wanted())


def test_tiles_are_those_that_are_compiled() -> None:
    for arch in (75, 80, 86, 100):
        assert set(cuda_library.tiles(arch)) == {"large", "small"}
        assert cuda_library.candidates(arch, "linear_dw") == [cuda_library.tiles(arch)["large"], Config("cublaslt")]
        assert len(cuda_library.candidates(arch, "linear")) == 3
    assert set(cuda_library.tiles(90)) == {"large"}


@pytest.mark.parametrize("capability", [(7, 0), (8, 7), (8, 8), (10, 3), (11, 0), (12, 1), (13, 0)], ids=str)
def test_a_capability_of_its_own_has_the_tiles_of_the_nearest(capability: tuple[int, int]) -> None:
    """Orin, GB300, Thor, GB10: telling the library its tiles is part of loading it."""
    assert cuda_library.packed_tiles(capability) == cuda_library.packed_tiles((8, 0))


def test_cublaslt_serves_large_products_of_sm_90_until_somebody_measures() -> None:
    packed = cuda_library.packed_tiles((9, 0))
    one_dtype = bytes([0, 0, 0, 2, 2])  # skinny, deep, small, medium, large
    assert packed == one_dtype * 4 + bytes(10)  # forward and dx of fp16 and bf16; dw of both
    for op in ("linear", "linear_dx", "linear_dz_dx"):
        for name in ("medium", "large"):
            assert derive.config(90, op, "fp16", name).kind == "cublaslt"
            assert derive.config(90, op, "fp32", name).kind != "cublaslt"
            assert derive.of_triton(90, op, "fp16", name).kind == "descriptor"
            assert derive.config(100, op, "fp16", name).kind == "descriptor"
    assert derive.config(90, "linear_dw", "fp16", "large").kind == "descriptor"


def test_the_users_table_comes_before_the_derived_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPU_CACHE", str(tmp_path))
    plain = cuda_library.packed_tiles((8, 6))
    # linear fp16: skinny, deep, small take the small tile; medium and large do not; dw never does
    assert plain[:5] == bytes([1, 1, 1, 0, 0])
    assert set(plain[20:]) == {0}
    entry = Entry(cuda_library.tiles(86)["small"], "cuda", 12.0)
    measured = Table("sm_86", "measured", {"linear_dx/bf16/large": entry}, {"device": "some card"})
    table.write(measured, table.user_path("cuda_sm_86"))
    changed = cuda_library.packed_tiles((8, 6))
    assert [i for i, (a, b) in enumerate(zip(plain, changed)) if a != b] == [19]
    assert cuda_library.tile_table((8, 6)).origin == "measured"
    tried = {"linear_dx/bf16/large": Entry(cuda_library.tiles(86)["large"])}
    assert cuda_library.packed_tiles((8, 6), tried) == plain


def test_ragged_products_are_not_sent_where_aligned_ones_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_library.takes("linear", (7, 64, 32))
    assert not cuda_library.takes("linear", (7, 50257, 768))
    assert cuda_library.takes("adamw_", ())
    monkeypatch.setattr(table, "preferred_backend", lambda *_: "cuda")
    monkeypatch.setattr(dispatch, "cuda_candidates", lambda dtype: ("triton", "cuda"))
    dispatch.select_cuda.cache_clear()
    assert dispatch.select_cuda("linear", torch.float16, (8, 0), (512, 50257, 768)) is None
    assert dispatch.select_cuda("linear", torch.float16, (8, 0), (512, 50256, 768)) == "cuda"
    dispatch.select_cuda.cache_clear()
