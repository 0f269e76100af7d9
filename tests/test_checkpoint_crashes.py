"""Checkpoints: the process dies, or the disk fails, before the n-th operation of a save; and several savers at once."""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_step, step_at
from together import together

from spu.checkpoint import writing as checkpoint
from spu.checkpoint.writing import CheckpointError, load

FILES = ("manifest.json", "meta.json", "tensors.safetensors")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


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
    together(*(partial(work, job) for job in jobs))
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
