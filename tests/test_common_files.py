"""Files that a crash leaves whole."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from together import together

from spu.common.files import naming, write_atomically, write_json
from spu.train.metrics import MetricsFile


def test_a_file_is_replaced_with_the_permissions_of_new_files_and_nothing_else_stays(tmp_path: Path) -> None:
    path, plain = tmp_path / "figures.json", tmp_path / "plain"
    plain.touch()
    for text in ("old", "né\n"):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert path.stat().st_mode == plain.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [path, plain]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "figures.json"
    write_json(path, {"a": 1})

    def fail(*_: Any) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space") as raised:
        write_json(path, {"a": 2})
    assert raised.value.filename == str(path)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_path_leave_one_of_their_files(tmp_path: Path) -> None:
    path, texts = tmp_path / "figures.json", [str(i) * 50_000 for i in range(4)]

    def write(text: str) -> None:
        for _ in range(10):
            write_atomically(path, text)

    together(*(partial(write, text) for text in texts))
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    """A write knows its file by number: the command said `error: : No space left on device`."""
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        MetricsFile(full).append(step=1)
    assert raised.value.filename == str(full)
    with pytest.raises(FileNotFoundError) as missing, naming("other"):
        open(tmp_path / "none")  # noqa: SIM115
    assert missing.value.filename == str(tmp_path / "none")
