"""Checkpoints: exact round trips, every way a file can be damaged, and a crash at every step of a save."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spu import checkpoint
from spu.checkpoint import CheckpointError, load, save

FILES = ("manifest.json", "meta.json", "tensors.safetensors")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def some(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 4), float(step)), "step": torch.tensor(step)}


def step_at(path: Path) -> int:
    """The step of the checkpoint that :func:`some` made, which must be consistent in itself."""
    tensors, meta = load(path)
    assert list(tensors) == ["w", "step"]
    assert tensors["step"].item() == meta["step"]
    assert torch.equal(tensors["w"], torch.full((3, 4), float(meta["step"])))
    return int(meta["step"])


def save_step(path: Path, step: int) -> None:
    save(path, tensors=some(step), meta={"step": step})


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    assert bits(actual) == bits(expected), f"{name}: {actual}, expected {expected}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoint"


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many saves: waiting for the disk is most of a small save's time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# Round trips.


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_every_dtype_comes_back_bit_for_bit(path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (6, 8), dtype=torch.uint8)
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
    manifest["sha256"] = checkpoint._digest_of(manifest)
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
        ({"w": torch.zeros(2, dtype=torch.complex64)}, {}, r"'w' \(torch.complex64"),
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


# Crashes: the process dies before its n-th operation on the disk, and does nothing after.


class Crash(BaseException):
    """Not an Exception: a dead process runs no handler, and no cleaning up that touches the disk succeeds."""


class Disk:
    """Counts operations that change the disk; from number ``limit`` on each fails with ``error``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int | None, error: BaseException, once: bool) -> None:
        self.done, self.limit, self.error, self.once = 0, limit, error, once
        monkeypatch.setattr(os, "replace", self.wrap(os.replace))
        monkeypatch.setattr(os, "fsync", self.wrap(lambda handle: None))
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)
        monkeypatch.setattr(Path, "mkdir", self.wrap(Path.mkdir))
        monkeypatch.setattr(checkpoint, "open", self.open, raising=False)

    def fails(self) -> bool:
        self.done += 1
        over = self.limit is not None and self.done > self.limit
        if over and self.once:
            self.limit = None
        return over

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if self.fails():
                raise self.error
            return function(*args, **kwargs)

        return operation

    def open(self, path: Path, mode: str) -> Any:
        file = builtins.open(path, mode)  # noqa: SIM115
        if "w" in mode:
            write = file.write

            def half_write(data: Any) -> None:
                if self.fails():
                    write(data[: len(data) // 2])
                    file.flush()
                    raise self.error
                write(data)

            return _File(file, half_write)
        return file

    def rmtree(self, path: Path, ignore_errors: bool = False) -> None:
        for file in sorted(path.iterdir()):
            if self.fails():
                if ignore_errors and isinstance(self.error, Exception):
                    return
                raise self.error
            file.unlink()
        path.rmdir()


class _File:
    """A file whose write can be watched."""

    def __init__(self, file: Any, write: Callable[[Any], None]) -> None:
        self.file, self.write = file, write
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *details: object) -> None:
        self.file.close()


def attempt(path: Path, step: int, limit: int | None, error: BaseException, once: bool = False) -> tuple[bool, int]:
    """A save on a disk that fails from operation ``limit`` on: whether it ended well, and how many were done."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch, limit, error, once)
        try:
            save_step(path, step)
        except (Crash, CheckpointError):
            return False, disk.done
        return True, disk.done


def places(tmp_path: Path) -> Iterator[Path]:
    for i in range(10**6):
        yield tmp_path / str(i) / "checkpoint"


@pytest.mark.usefixtures("no_sync")
def test_a_crash_at_any_step_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    fresh = places(tmp_path)
    first = next(fresh)
    save_step(first, 1)
    ok, operations = attempt(first, 2, None, Crash())
    assert ok
    assert operations > 12
    outcomes = []
    for limit in range(operations):
        path = next(fresh)
        save_step(path, 1)
        assert attempt(path, 2, limit, Crash()) == (False, limit + 1), f"limit {limit}"
        outcomes.append(step_at(path))
        save_step(path, 3)
        assert step_at(path) == 3
        assert [p.name for p in path.parent.iterdir()] == ["checkpoint"], f"limit {limit}"
    # Old ones up to some step, new ones from there on, and both occur.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


@pytest.mark.usefixtures("no_sync")
def test_a_crash_of_the_first_save_leaves_nothing_or_the_new_one(tmp_path: Path) -> None:
    fresh = places(tmp_path)
    _, operations = attempt(next(fresh), 1, None, Crash())
    seen = set()
    for limit in range(operations):
        path = next(fresh)
        attempt(path, 1, limit, Crash())
        try:
            seen.add(step_at(path))
        except CheckpointError as error:
            assert "no checkpoint at" in str(error)  # noqa: PT017
            seen.add(0)
        save_step(path, 2)
        assert [p.name for p in path.parent.iterdir()] == ["checkpoint"], f"limit {limit}"
    assert seen == {0, 1}


@pytest.mark.usefixtures("no_sync")
def test_a_second_crash_while_the_first_is_being_tidied_up_loses_nothing(tmp_path: Path) -> None:
    fresh = places(tmp_path)
    first = next(fresh)
    save_step(first, 1)
    _, operations = attempt(first, 2, None, Crash())
    for limit in range(operations):
        for second_limit in range(operations + 4):
            path = next(fresh)
            save_step(path, 1)
            attempt(path, 2, limit, Crash())
            before = step_at(path)
            attempt(path, 3, second_limit, Crash())
            assert step_at(path) in (before, 3), f"limits {limit}, {second_limit}"
            shutil.rmtree(path.parent)


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("once", [True, False], ids=["one operation", "all further operations"])
def test_a_disk_error_at_any_step_is_reported_and_loses_nothing(tmp_path: Path, once: bool) -> None:
    fresh = places(tmp_path)
    first = next(fresh)
    save_step(first, 1)
    _, operations = attempt(first, 2, None, Crash())
    full = OSError(28, "No space left on device")
    for limit in range(operations):
        path = next(fresh)
        save_step(path, 1)
        ok, _ = attempt(path, 2, limit, full, once)
        assert step_at(path) == 2 if ok else step_at(path) in (1, 2), f"limit {limit}"
        save_step(path, 3)
        assert [p.name for p in path.parent.iterdir()] == ["checkpoint"], f"limit {limit}"


def test_a_full_disk_is_named_with_the_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(path, 1)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"checkpoint .*checkpoint: writing failed: .*No space left.*make room"):
        save_step(path, 2)
    assert step_at(path) == 1
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint"]


def test_a_damaged_leftover_is_passed_over_for_the_older_good_one(path: Path) -> None:
    save_step(path, 1)
    new, old = checkpoint._leftovers(path)
    os.replace(path, old)
    save_step(path.with_name("other"), 2)
    os.replace(path.with_name("other"), new)
    assert step_at(path) == 2
    with open(new / "tensors.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert step_at(path) == 1


KILLED = """
import sys, torch
from pathlib import Path
from spu.checkpoint import save
step = int(sys.argv[2])
while True:
    step += 1
    save(sys.argv[1], tensors={"w": torch.full((3, 4), float(step)), "step": torch.tensor(step)}, meta={"step": step})
    print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_leaves_what_it_last_saved(path: Path) -> None:
    saved = 0
    for wait_for in (3, 12):
        environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(saved)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout is not None
        for _ in range(wait_for):
            saved = int(child.stdout.readline())
        child.kill()
        rest = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        printed = max([saved, *map(int, rest)])
        # It may have died after the rename and before the print.
        assert step_at(path) in (printed, printed + 1)
        saved = step_at(path)


def test_savers_and_loaders_at_once_never_see_half_a_checkpoint(path: Path) -> None:
    save_step(path, 0)
    failures: list[BaseException] = []

    def work(function: Callable[[int], Any]) -> None:
        try:
            for i in range(8):
                function(i)
        except BaseException as error:
            failures.append(error)

    jobs: list[Callable[[int], Any]] = [
        lambda i: save_step(path, 10 + i),
        lambda i: save_step(path, 20 + i),
        lambda i: step_at(path),
        lambda i: step_at(path),
    ]
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert step_at(path) in (17, 27)
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint"]


def test_without_file_locks_saving_and_loading_still_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "fcntl", None)
    save_step(path, 1)
    save_step(path, 2)
    assert step_at(path) == 2


def test_an_unreadable_checkpoint_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(path, 1)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"reading failed: .*Permission denied.*check its permissions"):
        load(path)
