"""The Triton kernels of spu.kernels, without a GPU: interpreted on the CPU, and compiled ahead of time.

Triton reads TRITON_INTERPRET when it is imported, and an interpreting process cannot compile: each has its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # what a block may have, CUDA programming guide, compute capabilities

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'triton>=3.6,<3.10'"
)


def run(arguments: list[str], **environment: str) -> str:
    """Output of a Python process; fails with all of it if the process does."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_import_does_not_import_triton() -> None:
    run(
        ["-c", "import sys, spu.kernels as k; k.available(); assert 'triton' not in sys.modules, 'triton was imported'"]
    )


def test_without_triton_the_error_names_the_fix() -> None:
    # None in sys.modules is how Python marks a module as not importable
    code = (
        "import sys, importlib.util as u, spu.kernels as k\n"
        "sys.modules['triton'] = None; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "assert not k.available()\n"
        "try: k.pack\n"
        "except ImportError as error: assert 'pip install' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    run(["-c", code])


@needs_triton
def test_interpreted() -> None:
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    output = run(["-m", "pytest", *options, str(TESTS / "interpreted_triton.py")], TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) >= 50, output
    assert "skipped" not in output, output


@needs_triton
def test_compiles_ahead_of_time(tmp_path: Path) -> None:
    output = run([str(TESTS / "aot_triton.py"), *map(str, SHARED_BYTES)], TRITON_CACHE_DIR=str(tmp_path))
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(rows) == 5 * 2 * len(SHARED_BYTES), output
    for row in rows:
        assert row["stack_bytes"] == 0, f"spills: {row}"
        assert row["shared_bytes"] <= SHARED_BYTES[row["sm"]], f"too much shared memory: {row}"
        assert not row["contracted"], f"multiplications and additions were fused: {row}"
        if row["kernel"].startswith("linear"):
            assert row["tensor_core"] is not None, f"no tensor-core instruction: {row}"
