"""The folder of a run: where it is, that nobody's is written over, and its settings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from spu.common.files import write_json
from spu.train.config import TrainConfig
from spu.train.model import has_weights
from spu.train.options import write_yaml

__all__ = ["FORMAT", "RunFolder", "find_folder", "new_folder"]

try:
    import fcntl
except ImportError:  # Windows: two processes in one run are not kept apart there
    fcntl = None  # type: ignore[assignment]

FORMAT = "spu-run"


class RunFolder:
    """``runs/NAME`` with config.json, metrics.jsonl, checkpoint/ and what the report adds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def create(self, config: TrainConfig, corpus: dict[str, Any]) -> None:
        """Make the folder and write its settings.

        Raises:
            ValueError: it exists, or cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except FileExistsError:
            if not self._unused():
                raise ValueError(self._exists()) from None
        except OSError as error:
            raise ValueError(
                f"--out {self.path.parent}: {error.strerror}: give a folder that can be written"
            ) from error
        self.lock()
        self.write_config(config, corpus)

    def write_config(self, config: TrainConfig, corpus: dict[str, Any]) -> None:
        """Write config.json, with which the run goes on, and config.yaml, which begins another one like it."""
        began = self._began_from_weights()
        weights = has_weights(config.model) if began is None else began
        record = {"format": FORMAT, "settings": config.to_json(), "corpus": corpus, "weights": weights}
        write_json(self / "config.json", record)
        write_yaml(self / "config.yaml", config, f"spu train --config {self / 'config.yaml'} --name ANOTHER")

    def read_config(self) -> tuple[TrainConfig, dict[str, Any]]:
        """Return (settings, name and hash of the text) of an existing run.

        Raises:
            ValueError: not a run, or its config.json is damaged.
        """
        file = self / "config.json"
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved.get("format") != FORMAT:
                raise ValueError("not written by spu train")
            return TrainConfig.from_json(saved["settings"], partly=True), saved["corpus"]
        except FileNotFoundError:
            raise ValueError(f"{self.path}: no config.json there: give the name or folder of a run") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{self.path}: {file.name} cannot be used ({error}): give another run") from error

    def _began_from_weights(self) -> bool | None:
        """Return whether the run did; None: there is none yet, or it has not noted it."""
        try:
            began = json.loads((self / "config.json").read_text(encoding="utf-8")).get("weights")
        except FileNotFoundError:
            return None
        return None if began is None else bool(began)

    def check_weights(self, config: TrainConfig) -> None:
        """Raise ValueError if the weights that the run began from are gone, or others are where it had random ones: its
        adapter does not belong to what the model's folder makes now.
        """
        began, there = self._began_from_weights(), has_weights(config.model)
        if began and not there:
            raise ValueError(
                f"{self.path} began from the weights in {config.model}, which are gone: put them back there"
            )
        if began is False and there:
            raise ValueError(
                f"{self.path} began from random weights, and {config.model} has weights now: move them elsewhere"
            )

    def check_new(self) -> None:
        """Raise ValueError if something is there already."""
        if self.path.exists() and not self._unused():
            raise ValueError(self._exists())

    def _unused(self) -> bool:
        """Tell whether a run was killed before its settings were written, so that nothing can go on from it."""
        if not self.path.is_dir():
            return False
        names = {file.name for file in self.path.iterdir()}
        return all(name == ".lock" or (name.startswith(".config.json.") and name.endswith(".new")) for name in names)

    def _exists(self) -> str:
        return f"--name {self.name}: {self.path} exists: give another name, or --resume {self.name} to go on with it"

    def lock(self) -> None:
        """Keep other processes out of this run until this one ends.

        Raises:
            ValueError: another process has it.
        """
        if fcntl is None or self._lock is not None:
            return
        self._lock = os.open(self / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.unlock()
            raise ValueError(f"run {self.path} is being trained by another process: wait for it, or stop it") from None

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def new_folder(out: str, name: str | None) -> RunFolder:
    """Return the folder of a new run, not made yet: ``out``/``name``, or a name from the time that no run has.

    Raises:
        ValueError: a name that is a path, or that is taken; ``out`` is a file.
    """
    if Path(out).is_file():
        raise ValueError(f"--out {out} is a file: give a folder, which holds all runs")
    if name is not None:
        if name in ("", ".", "..", "latest") or Path(name).name != name:
            raise ValueError(
                f"--name {name!r} is not a plain name: give one word, and the folder of all runs with --out"
            )
        folder = RunFolder(Path(out) / name)
        folder.check_new()
        return folder
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (Path(out) / (stamp if k == 1 else f"{stamp}-{k}") for k in range(1, 1000))
    return RunFolder(next(path for path in candidates if not path.exists()))


def find_folder(out: str, which: str, asked: str = "--resume") -> RunFolder:
    """Return the folder of an existing run: a path, a name in ``out``, or "latest".

    Args:
        out: the folder of all runs.
        which: the run.
        asked: who names it, for messages.

    Raises:
        ValueError: there is no such run; the text lists what there is.
    """
    runs = sorted(Path(out).glob("*/config.json"), key=lambda file: file.stat().st_mtime)
    if which == "latest":
        if not runs:
            raise ValueError(f"{asked}: there is no run in {out}: give --out, or start one without --resume")
        return RunFolder(runs[-1].parent)
    for path in (Path(out) / which, Path(which)):
        if (path / "config.json").exists():
            return RunFolder(path)
    known = ", ".join(file.parent.name for file in runs[-5:]) or "none"
    raise ValueError(f"{asked} {which}: no such run; runs in {out}: {known}")
