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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'triton>=3.6,<3.10'"
)
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("spu.kernels") is None, reason="spu.kernels is not there: spu runs in place, not installed"
)


INTERPRETED = {
    "interpreted_triton.py": 45,
    "interpreted_fused.py": 71,
    "interpreted_products.py": 90,
    "interpreted_accumulation.py": 6,
}
OP_LAYER = [
    f"test_ops_{name}.py"
    for name in ("linear", "gated", "cross_entropy", "optimizer", "sink", "main_grads", "norm", "embedding", "rotary")
]
CHOSEN = "triton and (ragged or strid or leading or found or sinks or own_gradient or main_gradients or norms)"
GATE = [str(TESTS.parent / "benchmarks/aot/aot_triton.py"), "--sample", "--arch", "90"]


@dataclass(frozen=True)
class Started:
    """A Python process that writes its output to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        """All of it, once the process has ended; fails with it if the process did."""
        code = self.process.wait()
        text = self.log.read_text()
        assert code == 0, text
        return text


def start(arguments: list[str], log: Path, **environment: str) -> Started:
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "SPU_BACKEND")}
    with log.open("wb") as file:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, env=env | environment, cwd=TESTS, stdout=file, stderr=subprocess.STDOUT)
    return Started(process, log)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """The long ones, side by side: each is one thread's work."""
    folder = tmp_path_factory.mktemp("triton")
    suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    runs = {"interpreted": start([*suite, *INTERPRETED], folder / "interpreted", **environment)}
    runs["op layer"] = start([*suite, *OP_LAYER, "-k", CHOSEN], folder / "op_layer", **environment)
    runs["gate"] = start(GATE, folder / "gate", TRITON_CACHE_DIR=str(folder / "cache"))
    yield runs
    for one in runs.values():
        one.process.kill()
        one.process.wait()


def check_passed(output: str, at_least: int) -> None:
    """Of an interpreted run; no test may be skipped."""
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) >= at_least, output
    assert "skipped" not in output, output


def run(code: str, tmp_path: Path) -> None:
    start(["-c", code], tmp_path / "log").output()


def test_what_takes_long_is_imported_when_it_is_used(tmp_path: Path) -> None:
    code = (
        "import sys, spu.kernels as k\n"
        "k.available(); assert 'triton' not in sys.modules\n"
        "from spu import ModelParallelTrainer\n"
        "assert 'torch.distributed.pipelining' not in sys.modules\n"
    )
    run(code, tmp_path)


def test_without_triton_the_error_names_the_fix(tmp_path: Path) -> None:
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
    run(code, tmp_path)


@needs_triton
@pytest.mark.timeout(600)
def test_interpreted(started: dict[str, Started]) -> None:
    check_passed(started["interpreted"].output(), sum(INTERPRETED.values()))


@needs_triton
@pytest.mark.timeout(600)
def test_the_op_layer_runs_on_interpreted_kernels(started: dict[str, Started]) -> None:
    """Autograd, sinks, accelerated modules: the ops' own tests, with use_backend("triton") on CPU tensors."""
    check_passed(started["op layer"].output(), 25)


@needs_triton
@pytest.mark.timeout(600)
def test_compiles_ahead_of_time(started: dict[str, Started]) -> None:
    """A sample of one architecture; `make aot` compiles the whole matrix."""
    output = started["gate"].output()
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(rows) >= 25, output
    assert not [row for row in rows if row["faults"]], output
    products = [row for row in rows if row["tensor_core"] == "wgmma.mma_async" and row["uses_tma"]]
    assert products, output
    listed = [row for row in products if row["mix"]]
    assert {row["name"] for row in listed} == {"descriptor_kernel", "linear_ce_kernel"}, output
    assert all(row["peak_share"] > 0 for row in listed), output
    wide = [row for row in rows if row["name"] in ("adamw_kernel", "square_sum_kernel")]
    assert len(wide) >= 2, output
    assert all(row["widest_load"] == 16 for row in wide), output


def test_the_gate_reads_how_wide_accesses_are() -> None:
    from spu.kernels.limits import access_bytes

    narrow = "\t@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];\n\tst.global.b16 [ %rd2 + 0 ], { %rs1 };\n"
    wide = narrow + "\t@%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\n"
    assert access_bytes("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];") == (0, 0)
    assert access_bytes(narrow) == (4, 2)
    assert access_bytes(wide + "\tst.global.v2.f64 [ %rd2 + 0 ], { %fd1, %fd2 };\n") == (16, 16)
