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

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'triton>=3.6,<3.10'"
)
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("spu.kernels") is None, reason="spu.kernels is not there: spu runs in place, not installed"
)


def run(arguments: list[str], **environment: str) -> str:
    """Output of a Python process; fails with all of it if the process does."""
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "SPU_BACKEND")}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=env | environment,
        cwd=TESTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_interpreted(arguments: list[str], at_least: int) -> None:
    """Runs pytest under the interpreter; no test may be skipped."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    output = run(["-m", "pytest", *options, *arguments], TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) >= at_least, output
    assert "skipped" not in output, output


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
@pytest.mark.parametrize(
    ("file", "at_least"), [("interpreted_triton.py", 50), ("interpreted_products.py", 90), ("interpreted_fused.py", 50)]
)
def test_interpreted(file: str, at_least: int) -> None:
    run_interpreted([str(TESTS / file)], at_least)


@needs_triton
def test_the_op_layer_runs_on_interpreted_kernels() -> None:
    """Autograd, sinks, accelerated modules: the ops' own tests, with use_backend("triton") on CPU tensors."""
    chosen = "triton and not any_shape and not any_values and not compile and not opcheck and not large"
    files = ["test_ops_linear.py", "test_ops_gated.py", "test_ops_cross_entropy.py", "test_ops_optimizer.py"]
    run_interpreted([*(str(TESTS / file) for file in files), "-k", chosen], 60)


@needs_triton
def test_compiles_ahead_of_time(tmp_path: Path) -> None:
    """Two architectures of the matrix that `make aot` compiles whole."""
    output = run(["-m", "spu.kernels.gate", "--sample", "--arch", "80", "90"], TRITON_CACHE_DIR=str(tmp_path))
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert {row["arch"] for row in rows} == {80, 90}
    assert not [row for row in rows if row["faults"]], output
    instructions = {(row["arch"], row["tensor_core"]) for row in rows}
    assert (80, "mma.sync") in instructions
    assert (90, "wgmma.mma_async") in instructions
    assert any(row["uses_tma"] for row in rows if row["arch"] == 90)
