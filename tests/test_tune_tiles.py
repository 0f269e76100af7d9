"""The choice among the CUDA library's tiles and cuBLASLt, with the library and the clock replaced."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spu.kernels import table
from spu.kernels.config import Config
from spu.ops import cuda_library
from spu.tune import tiles

FACTS = {"device": "a card", "torch": "2.11", "spu": "1"}
DEVICE = torch.device("cuda")


class Library:
    """A library on which a tile takes ``times`` microseconds by (op, its byte), and a call that is timed by it."""

    def __init__(self, times: dict[tuple[str, int], float], found: int | str = 130100) -> None:
        self.times, self.found, self.tiles, self.measured = times, found, b"", 0

    def cublaslt(self) -> int | str:
        return self.found

    def set_tiles(self, capability: int, packed: bytes) -> None:
        assert capability == 80
        self.tiles = packed

    def measure(self, op: object, device: torch.device) -> float:
        self.measured += 1
        assert isinstance(op, str)
        byte = self.tiles[10 * cuda_library.FORMS.index(op) + 4]  # fp16, large
        if (op, byte) not in self.times:
            raise RuntimeError("out of memory")
        return self.times[op, byte]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPU_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(tiles, "product_of", lambda op, *_: op)
    return tmp_path / "cuda_sm_80.json"


def choose(library: Library, path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str] = FACTS) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(tiles, "measure_us", library.measure)
    tiles.choose_tiles(library, path, "fp16", "large", DEVICE, facts, said.append)
    return said


def test_the_fastest_is_written_and_used(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {("linear", 0): 5.0, ("linear", 1): 9.0, ("linear", 2): 4.0, ("linear_dx", 0): 6.0, ("linear_dx", 1): 3.0,
             ("linear_dw", 0): 7.0, ("linear_dw", 2): 8.0}  # fmt: skip
    library = Library(times)
    said = choose(library, card, monkeypatch)
    made = table.read(card)
    kinds = {key: (entry.config.kind, entry.config.block_m, entry.time_us) for key, entry in made.entries.items()}
    assert kinds == {
        "linear/fp16/large": ("cublaslt", Config().block_m, 4.0),
        "linear_dx/fp16/large": ("tile", 64, 3.0),
        "linear_dw/fp16/large": ("tile", 128, 7.0),
    }
    assert [library.tiles[10 * form + 4] for form in range(3)] == [2, 1, 0], "what is in use afterwards"
    assert any("cublaslt: RuntimeError: out of memory" in line for line in said)
    assert said[0].startswith("linear/fp16/large of CUDA C++: 128x128 5.0 us, 64x64 9.0 us, cublaslt 4.0 us: cublaslt")
    measured = library.measured
    choose(library, card, monkeypatch)
    assert library.measured == measured, "a later run measures what is missing"
    choose(library, card, monkeypatch, {**FACTS, "torch": "2.12"})
    assert library.measured == 2 * measured, "another version of torch brings another cuBLASLt"
    other = dataclasses.replace(table.read(card), entries={})
    table.write(other, card)
    assert choose(library, card, monkeypatch)[0].startswith("linear/fp16/large")


def test_without_cublaslt_the_tiles_alone_are_tried(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {(op, tile): 1.0 + tile for op in cuda_library.FORMS for tile in (0, 1, 2)}
    library = Library(times, "no cuBLASLt is loaded; torch with CUDA loads one")
    choose(library, card, monkeypatch)
    assert library.measured == 5, "dw has one tile"
    tiles.choose_tiles(library, card, "fp32", "large", DEVICE, FACTS, print)
    assert library.measured == 5, "fp32 has one kernel"


def test_each_form_is_a_call_of_the_librarys_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, list[tuple[int, ...]]]] = []

    def op(name: str) -> SimpleNamespace:
        def call(*arguments: object) -> None:
            called.append((name, [tuple(one.shape) for one in arguments if isinstance(one, torch.Tensor)]))

        return SimpleNamespace(cuda=call)

    names = ("linear", "linear_dx", "linear_dw_")
    monkeypatch.setattr(torch.ops, "spu", SimpleNamespace(**{name: op(name) for name in names}))
    for form in cuda_library.FORMS:
        tiles.product_of(form, torch.float16, (8, 16, 24), torch.device("cpu"))()
    assert [name for name, _ in called] == list(names)
    assert called[0][1] == [(8, 24), (16, 24), (16,)]
    assert called[1][1] == [(8, 24), (24, 16)]
    assert called[2][1][:3] == [(24, 8), (24, 16), (8, 16)]
