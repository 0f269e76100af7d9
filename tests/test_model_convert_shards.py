"""Damaged and foreign checkpoints: an error that names the file and the fix, exit status 2, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from internlm2 import CONFIG, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import run

from spu.model.convert.shards import INDEX, Shards, write_shard

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"  # in the first shard


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internlm2")
    write_checkpoint(folder)
    (folder / "tokenizer.bytes").write_text("")
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / FIRST)
    change(tensors)
    save_file(tensors, folder / FIRST, {"format": "pt"})


def change_index(folder: Path, **places: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {name.replace("__", "."): place for name, place in places.items()}
    (folder / INDEX).write_text(json.dumps(index))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def change_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (CONFIG | changes).items() if v is not None}))


def break_header(folder: Path) -> None:
    data = bytearray((folder / FIRST).read_bytes())
    data[8:9] = b"["
    (folder / FIRST).write_bytes(data)


def shift_offsets(folder: Path) -> None:
    data = (folder / FIRST).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[NORM]["shape"] = [10**12]
    text = json.dumps(header).encode()
    (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: cut(f / FIRST, (f / FIRST).stat().st_size - 10), rf"{FIRST} is truncated.*copy it again"),
    "cut in its header": (lambda f: cut(f / SECOND, 20), rf"{SECOND} is truncated or no safetensors file"),
    "no header": (break_header, rf"{FIRST} is no safetensors file: its header is no JSON object"),
    "damaged entry": (shift_offsets, rf"{FIRST}: the header's entry of '{NORM}' is damaged"),
    "missing shard": (lambda f: (f / SECOND).unlink(), rf"{SECOND} is missing, which {INDEX} names"),
    "outside": (lambda f: change_index(f, model__norm__weight="../x.safetensors"), r"no file in its folder"),
    "wrong shard": (lambda f: change_index(f, model__norm__weight=SECOND), rf"{SECOND} has no tensor '{NORM}'"),
    "no index": (lambda f: (f / INDEX).write_text("[]"), rf"{INDEX} is no index of safetensors"),
    "missing tensor": (
        lambda f: (change_tensors(f, lambda t: t.pop(NORM)), (f / INDEX).unlink()),
        rf"has no tensor '{NORM}'; give the weights of the whole model",
    ),
    "unexpected tensor": (
        lambda f: change_tensors(f, lambda t: t.update(extra=torch.zeros(2))),
        rf"{FIRST} has tensors that the model has not: 'extra'",
    ),
    "wrong shape": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.zeros(31)})),
        rf"{FIRST}: {NORM} is \[31\], config.json asks for \[32\]",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})),
        rf"{FIRST}: {NORM} is I8, not F32, F16, BF16 or F64; give weights that are not quantised",
    ),
    "no field": (lambda f: change_config(f, hidden_size=None), r"config.json has no hidden_size"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_and_nothing_is_written(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder, out, text = tmp_path / "model", tmp_path / "runs", tmp_path / "text.txt"
    shutil.copytree(whole, folder)
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    change, said = DAMAGES[damage]
    change(folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert run("train", "--model", folder, "--data", text, "--out", out, "--steps", 1, "--seq", 8) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(said, error), error
    assert not out.exists()
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_pieces_cross_no_boundary_and_are_the_packages_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spu.model.convert.shards.PIECE_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 13, generator=generator),
        "empty": torch.empty(0, 4),
        "half": torch.randn(33, generator=generator).to(torch.bfloat16),
        "number": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    for name, tensor in tensors.items():
        read = [values.clone() for _, values in shards.pieces(name)]
        assert all(values.nbytes <= 64 for values in read)
        whole = torch.cat(read) if read else torch.empty(0)
        assert torch.equal(whole, tensor.flatten()), name


def test_what_is_written_are_the_packages_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(4), "ü": torch.randn(2, 2)}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    shapes = [(name, tuple(tensors[name].shape)) for name in sorted(tensors)]
    write_shard(
        tmp_path / "ours", shapes, torch.float32, lambda name: iter(tensors[name].flatten().split(2)), {"format": "pt"}
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with safe_open(tmp_path / "ours", "pt") as opened:
        assert torch.equal(opened.get_tensor("b"), tensors["b"])


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def fails(name: str) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "file", [("a", (2,))], torch.float32, fails, {})  # type: ignore[arg-type]
    assert [f.name for f in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
