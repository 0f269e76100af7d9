"""The frame of `make gpu-lease`: parts that fail, hang or are cut leave what they have; what is carried is checked."""

from __future__ import annotations

import base64
import json
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

GPU = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import card_memory  # noqa: E402
import lease  # noqa: E402
import lease_carried  # noqa: E402
import lease_lines  # noqa: E402
import prepare  # noqa: E402
from lease import Lease, Part  # noqa: E402

EMIT = "import lease_lines, sys, time; lease_lines.emit({'what': 'x', 'value': 1}); print('said'); "


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lease, "WORK", tmp_path / "work")
    monkeypatch.setattr(lease, "ROOT", tmp_path)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path / "out"


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_part_leaves_its_results_and_a_second_run_takes_up_the_rest(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {"good": "", "bad": "sys.exit(3)", "hangs": "time.sleep(60)"}
    made = [Part(name, 20, ("-c", EMIT + code), ()) for name, code in codes.items()]
    run, began = Lease(60, dry=False), time.monotonic()
    run.begin(again=False)
    assert [run.run(part, 1.5 if part.name == "hangs" else 20) for part in made] == ["passed", "failed", "cut"]
    assert time.monotonic() - began < 30
    found = rows(out)
    assert [row["part"] for row in found if row.get("what") == "x"] == list(codes)
    ends = {row["part"]: row["outcome"] for row in found if row.get("event") == "ends"}
    assert ends == {"good": "passed", "bad": "failed", "hangs": "cut"}
    log = (out / "log.txt").read_text()
    assert log.count("said") == 3
    assert "@lease" not in log
    assert run.end(made) == 1
    later = Part("later", 20, ("-c", EMIT), ())
    monkeypatch.setattr(lease, "parts", lambda: [*made, later])
    monkeypatch.setattr(sys, "argv", ["lease", "--again", "--seconds", "12"])
    assert lease.main() == 1
    order = [row["part"] for row in rows(out)[len(found) :] if row.get("event") == "begins"]
    assert order == ["later", "hangs"], "what has not run comes first; for the failed part no time is left"


def test_what_is_left_of_the_time_goes_to_the_next_parts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "parts", lambda: [Part(name, 30, ("-c", "pass"), ()) for name in "ab"])
    monkeypatch.setattr(sys, "argv", ["lease", "--seconds", "100"])
    assert lease.main() == 0
    limits = [row["limit_s"] for row in rows(out) if row.get("event") == "begins"]
    assert limits[0] == 30
    assert 40 < limits[1] <= 60  # type: ignore[operator]


def test_the_parts_have_names_of_their_own_and_fit_the_command() -> None:
    found = lease.parts()
    assert len({part.name for part in found}) == len(found)
    assert all(Path(part.command[0]).exists() or part.command[0] == "-m" for part in found)
    first = [part for part in found if not part.name.startswith(("cap", "test-streaming", "memcheck", "cases-other"))]
    assert sum(part.seconds for part in first) <= 620, "limits; most parts end before theirs"
    assert len(lease._FILES) <= 8


@pytest.mark.parametrize(
    ("when", "outcome", "reason", "expected"),
    [
        ("call", "passed", "", "passed"),
        ("setup", "passed", "", ""),
        ("setup", "skipped", "backend cuda: spu._cuda is not built", "failed"),
        ("call", "skipped", "needs two GPUs", "excused"),
        ("setup", "failed", "", "failed"),
    ],
)
def test_a_skipped_test_has_failed(when: str, outcome: str, reason: str, expected: str) -> None:
    report = SimpleNamespace(
        when=when, skipped=outcome == "skipped", failed=outcome == "failed", longrepr=("file", 1, reason)
    )
    assert lease_lines.outcome_of(report) == expected


def carried(tmp_path: Path, **made_for: str) -> Path:
    carry = tmp_path / "carry"
    (carry / "site" / "spu").mkdir(parents=True)
    (carry / "site" / "spu" / "_C.abi3.so").write_bytes(b"library")
    kernel = tmp_path / "AAAA" / "k.cubin"
    kernel.parent.mkdir()
    kernel.write_bytes(b"code")
    with tarfile.open(carry / "triton.tar.xz", "w:xz") as archive:
        archive.add(kernel, "AAAA/k.cubin")
    lease_carried.write_manifest(carry, {**lease_carried.interpreter(), **made_for})
    return carry


def test_what_is_carried_is_taken_out_with_the_newest_sources(tmp_path: Path) -> None:
    carried(tmp_path)
    environment, row = lease_carried.unpacked(tmp_path, tmp_path / "into")
    site = tmp_path / "into" / "site"
    assert environment["PYTHONPATH"].split(":")[0] == str(site)
    assert (site / "spu" / "_C.abi3.so").read_bytes() == b"library"
    assert (site / "spu" / "kernels" / "launch.py").exists()
    assert (Path(environment["TRITON_CACHE_DIR"]) / "AAAA" / "k.cubin").exists()
    assert (row["package"], row["kernels"], row["stale"]) == (True, 1, [])


def test_kernels_of_earlier_sources_and_what_no_launch_reads_are_not_packed(tmp_path: Path) -> None:
    now, before = "ab" * 32, "cd" * 32
    for name, files in ((now, ("k.cubin", "k.ttir", "__grp__k.json")), (before, ("k.cubin",)), ("ef" * 32, ("l.so",))):
        folder = tmp_path / "triton" / base64.b32encode(bytes.fromhex(name)).decode().rstrip("=")
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    prepare.pack(tmp_path / "triton", {now}, tmp_path / "packed")
    with tarfile.open(tmp_path / "packed") as archive:
        assert sorted(Path(name).name for name in archive.getnames()) == ["__grp__k.json", "k.cubin", "l.so"]


def test_a_package_for_another_python_is_left_out_and_half_a_package_refused(tmp_path: Path) -> None:
    carry = carried(tmp_path, python="cp39")
    environment, row = lease_carried.unpacked(tmp_path, tmp_path / "into")
    assert "PYTHONPATH" not in environment
    assert not row["package"]
    (carry / "site" / "spu" / "_C.abi3.so").write_bytes(b"other")
    with pytest.raises(SystemExit, match="gpu-prepare"):
        lease_carried.unpacked(tmp_path, tmp_path / "into")


def test_memory_of_a_card_is_asked_by_names_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but a card would tell, in the minutes for which there is one."""
    asked: list[str] = []

    class Stats(dict[str, int]):
        def __missing__(self, key: str) -> int:
            asked.append(key)
            return 5

    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: Stats())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))
    for name, value in {"memory_reserved": 30, "max_memory_reserved": 31, "max_memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    found = card_memory.card_memory()
    assert (found["context_bytes"], found["reserved_bytes"], found["peak_bytes"]) == (10, 31, 20)
    assert len(asked) == 4
    doc = torch.cuda.memory.memory_stats.__doc__ or ""
    for key in asked:
        name, *of = key.split(".")
        assert name in doc
        assert all(part in doc for part in of)
