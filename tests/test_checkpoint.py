"""Checkpoints: exact round trips, and every way a file can be damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import save_step, step_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spu.checkpoint import writing as checkpoint
from spu.checkpoint.writing import CheckpointError, load, save

FILES = ("manifest.json", "meta.json", "tensors.safetensors")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    assert bits(actual) == bits(expected), f"{name}: {actual}, expected {expected}"


# Round trips.


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX, *INTEGERS], ids=str)
def test_every_dtype_comes_back_bit_for_bit(path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (6, 16), dtype=torch.uint8)
    values = raw.bool() if dtype == torch.bool else raw.view(dtype)
    tensors = {"values": values, "zero-dim": values[0, 0], "empty": values[:0], "odd": values.reshape(-1)[1:4]}
    save(path, tensors=tensors, meta={})
    loaded, _ = load(path)
    assert list(loaded) == list(tensors)
    for name, expected in tensors.items():
        assert_same(loaded[name], expected, name)
        assert loaded[name].is_contiguous()


def test_strides_shared_storage_ties_and_parameters(path: Path) -> None:
    base = torch.randn(4, 6)
    parameter = torch.nn.Parameter(torch.randn(3))
    tensors = {
        "transposed": base.t(),
        "every second": base[:, ::2],
        "expanded": base[:1].expand(3, 6),
        "tied": base,
        "parameter": parameter,
        "lazily conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "imaginary, lazily negated": torch.randn(3, dtype=torch.complex64).conj().imag,
    }
    save(path, tensors=tensors, meta={})
    loaded, _ = load(path)
    for name, expected in tensors.items():
        assert_same(loaded[name], expected, name)
        assert not loaded[name].requires_grad
    loaded["tied"].zero_()
    assert_same(loaded["transposed"], base.t(), "transposed after writing to its loaded tie")


@pytest.mark.usefixtures("no_sync")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
            st.sampled_from([torch.float32, torch.float16, torch.uint8, torch.int64]),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
        unique_by=lambda entry: entry[0],
    )
)
def test_any_names_and_shapes(tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, Any, Any]]) -> None:
    tensors = {name: torch.randint(0, 255, shape).to(dtype) for name, dtype, shape in entries}
    path = tmp_path_factory.mktemp("any") / "c"
    save(path, tensors=tensors, meta={"names": list(tensors)})
    loaded, meta = load(path)
    assert list(loaded) == list(tensors) == meta["names"]
    for name, expected in tensors.items():
        assert_same(loaded[name], expected, repr(name))


def test_meta_comes_back_as_json_has_it(path: Path) -> None:
    meta = {"a": [1, 2.5, None, True, "text é"], "b": {"c": {}}, "big": 2**80, "inf": float("inf"), "t": (1, 2)}
    save(path, tensors={}, meta=meta)
    assert load(path)[1] == meta | {"t": [1, 2]}


def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(path: Path) -> None:
    tensors = {"b": torch.arange(5, dtype=torch.uint8), "a": torch.randn(3, 3).half(), "s": torch.tensor(2.5)}
    save(path, tensors=tensors, meta={})
    theirs = safetensors.torch.load_file(path / "tensors.safetensors")
    for name, expected in tensors.items():
        assert_same(theirs[name], expected, name)
    save(path, tensors={}, meta={"of": "theirs"})
    safetensors.torch.save_file(tensors, path / "tensors.safetensors")
    content = (path / "tensors.safetensors").read_bytes()
    rewrite_manifest(
        path,
        lambda m: m["files"].update(
            {"tensors.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        ),
    )
    loaded, _ = load(path)
    for name, expected in tensors.items():
        assert_same(loaded[name], expected, name)


def test_wide_elements_are_aligned_in_the_file(path: Path) -> None:
    save(path, tensors={"odd": torch.zeros(3, dtype=torch.uint8), "wide": torch.zeros(2)}, meta={})
    raw = (path / "tensors.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header["wide"]["data_offsets"] == [0, 8]
    assert header["odd"]["data_offsets"] == [8, 11]


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest as someone who knows the format would: with the right checksum."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = checkpoint.digest_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_saving_replaces_and_leaves_nothing_else(path: Path) -> None:
    for step in range(3):
        save_step(path, step)
        assert step_at(path) == step
        assert sorted(p.name for p in path.parent.iterdir()) == ["checkpoint"]
        assert sorted(p.name for p in path.iterdir()) == list(FILES)


def test_a_link_stays_a_link(path: Path) -> None:
    real = path.with_name("real")
    save_step(real, 1)
    path.symlink_to(real)
    save_step(path, 2)
    assert path.is_symlink()
    assert step_at(path) == step_at(real) == 2


# What is refused, before anything is written.


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({"w": 3}, {}, r"'w' is a int, not a tensor"),
        ({3: torch.zeros(1)}, {}, r"tensor name 3"),
        ({"__metadata__": torch.zeros(1)}, {}, r"__metadata__"),
        ({"w": torch.zeros(2, device="meta")}, {}, r"'w' \(torch.float32, torch.strided, meta\)"),
        ({"w": torch.zeros(2, dtype=torch.complex32)}, {}, r"'w' \(torch.complex32"),
        ({"w": torch.zeros(2).to_sparse()}, {}, r"'w' .*torch.sparse_coo"),
        ({}, {"a": {"b": [torch.zeros(1)]}}, r"meta\['a'\]\['b'\]\[0\] is a Tensor"),
        ({}, {"a": {1: 2}}, r"meta\['a'\] has the key 1, a int"),
    ],
)
def test_what_cannot_be_saved_is_named_and_the_old_one_stays(path: Path, tensors: Any, meta: Any, message: str) -> None:
    save_step(path, 1)
    with pytest.raises(TypeError, match=message):
        save(path, tensors=tensors, meta=meta)
    assert step_at(path) == 1


def test_other_things_at_the_path_are_never_replaced(tmp_path: Path) -> None:
    folder, file = tmp_path / "thesis", tmp_path / "thesis.txt"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("It was")
    file.write_text("all for this")
    for place in (folder, file):
        with pytest.raises(CheckpointError, match=f"{place.name} exists and is not a spu checkpoint"):
            save_step(place, 1)
    assert (folder / "chapter1.tex").read_text() == "It was"
    assert file.read_text() == "all for this"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_folder_is_filled(path: Path) -> None:
    path.mkdir(parents=True)
    save_step(path, 1)
    assert step_at(path) == 1


# Damage.


def test_nothing_there_is_named(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*checkpoint: the folder .*run does not exist"):
        load(path)
    path.parent.mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*checkpoint; check the path"):
        load(path)


def test_foreign_folders_files_and_manifests_are_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    torch.save({"w": torch.zeros(1)}, tmp_path / "old.pt")
    for name in ("model", "old.pt"):
        with pytest.raises(CheckpointError, match=f"{name} is not a spu checkpoint: it has no manifest.json"):
            load(tmp_path / name)
    for content in ('{"name": "a web app"}', "[1]", "3"):
        (tmp_path / "model" / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"manifest.json is not the manifest of a spu checkpoint"):
            load(tmp_path / "model")


def test_a_newer_version_is_named(path: Path) -> None:
    save_step(path, 1)
    rewrite_manifest(path, lambda m: m.update(version=2))
    with pytest.raises(CheckpointError, match=r"manifest.json is of version 2, this spu reads 1; install"):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(path: Path, name: str) -> None:
    save_step(path, 1)
    good = (path / name).read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        (path / name).write_bytes(bad)
        with pytest.raises(CheckpointError, match=name):
            load(path)
    (path / name).write_bytes(good)
    assert step_at(path) == 1


@pytest.mark.parametrize("name", FILES)
def test_any_truncation_extension_or_loss_is_found(path: Path, name: str) -> None:
    save_step(path, 1)
    good = (path / name).read_bytes()
    for length in {0, 1, 7, 8, 9, len(good) // 2, len(good) - 1}:
        (path / name).write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=name):
            load(path)
    (path / name).write_bytes(good + b"x")
    with pytest.raises(CheckpointError, match=name):
        load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F77", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        3,
    ],
)
def test_a_header_that_makes_no_sense_is_found_even_with_the_right_checksum(path: Path, entry: Any) -> None:
    save(path, tensors={"w": torch.zeros(2)}, meta={})
    header = json.dumps({"w": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (path / "tensors.safetensors").write_bytes(content)
    entry_of = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(path, lambda m: m["files"].update({"tensors.safetensors": entry_of}))
    with pytest.raises(CheckpointError, match=r"tensors.safetensors is damaged: its header makes no sense"):
        load(path)
