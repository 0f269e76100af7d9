"""``make gpu``: the phases on a machine with an NVIDIA GPU, each under nine minutes and each leaving its results.

    python benchmarks/gpu/phases.py build|test|tune|bench|train [--dry]

``build`` puts the package into build/gpu-site with the tools that are installed: no environment is made, nothing is
downloaded. The other phases run against it. ``--dry`` needs no GPU: it collects, compiles ahead of time and prints the
plan, so that the first minute on a GPU is not spent on typos.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "gpu-site"
LOGS = ROOT / "build" / "gpu-logs"
RESULTS = ROOT / "benchmarks" / "results"
PHASE_SECONDS = 520.0
SANITIZED = "kinds or kind_of_launch or overflow or wires or optimizer"  # the small set, again under the memory checker


class Phase:
    """Commands of one phase: their output goes to the screen and a log, and all end within the phase's time."""

    def __init__(self, name: str, dry: bool) -> None:
        self.name, self.dry, self.failed = name, dry, False
        self._ends = time.monotonic() + PHASE_SECONDS
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = (LOGS / f"{name}.log").open("w")

    def left(self) -> float:
        return max(10.0, self._ends - time.monotonic())

    def run(self, command: Sequence[str], *, at_most: float | None = None, may_fail: bool = False) -> bool:
        """True if it ended with 0; a failure or a time-out marks the phase as failed."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        earlier = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(SITE), *([earlier] if earlier else [])])
        self.say("$ " + " ".join(command))
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        limit = min(self.left(), at_most or self.left())
        previous = signal.signal(signal.SIGALRM, lambda *_: _end(process))
        signal.setitimer(signal.ITIMER_REAL, limit)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self.say(line.rstrip("\n"))
            code = process.wait()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        if code:
            self.say(f"ended with {code}" + (f" (after its {limit:.0f} s)" if code < 0 else ""))
            self.failed |= not may_fail
        return code == 0

    def say(self, line: str) -> None:
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def build(phase: Phase) -> None:
    """The package in SITE: by pip without isolation, and where that cannot be, the Python part by copying."""
    shutil.rmtree(SITE, ignore_errors=True)
    if phase.dry:
        os.environ["SPU_BUILD"] = "0"
    pip = _python("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    if not phase.run([*pip, "--target", str(SITE), "."], may_fail=True):
        phase.say("pip cannot build here: copying the Python part; CPU and CUDA C++ kernels are left out")
        ignore = shutil.ignore_patterns("__pycache__", "kernels")
        shutil.copytree(ROOT / "python" / "spu", SITE / "spu", ignore=ignore, dirs_exist_ok=True)
        shutil.copytree(ROOT / "kernels" / "triton", SITE / "spu" / "kernels", dirs_exist_ok=True)
    phase.run(_python("-c", "import spu, spu.kernels; print(spu.__version__, spu.__file__)"))
    rows = (
        "from spu.doctor import report\nfor row in report(): print('ok' if row.works else '--', row.name, row.detail)"
    )
    phase.run(_python("-c", rows))


def test(phase: Phase) -> None:
    """Every test marked gpu; then a small set of them under compute-sanitizer."""
    pytest = _python("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests")
    if phase.dry:
        phase.run([*pytest, "--collect-only", "-q"])
        phase.run(_python("-m", "spu.kernels.gate", "--sample", "--arch", "90"))
        return
    report = f"--junitxml={LOGS / 'gpu-test.xml'}"
    phase.run([*pytest, "-v", report], at_most=PHASE_SECONDS * 0.65)
    if shutil.which("compute-sanitizer"):
        phase.run(
            ["compute-sanitizer", "--error-exitcode", "9", *pytest, "-v", "-k", SANITIZED, "-x"], at_most=phase.left()
        )
    else:
        phase.say("compute-sanitizer is not on the PATH: memory accesses were not checked")


def tune(phase: Phase) -> None:
    """The user's table of this card, row by row; a second run goes on where this one ends."""
    if phase.dry:
        phase.run(_python("-c", "from spu.tune import plan_lines\nprint('\\n'.join(plan_lines(90)))"))
        return
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom spu import tune\nfrom spu.kernels import table\n"
        "name = table.arch_name(torch.cuda.get_device_capability())\n"
        f"tune.tune(seconds={PHASE_SECONDS - 90})\n"
        f"copy = Path({str(RESULTS)!r}) / 'tuned' / (name + '.json')\n"
        "copy.parent.mkdir(parents=True, exist_ok=True)\n"
        "copy.write_text(table.user_path(name).read_text())\nprint('copied to', copy)\n"
    )
    phase.run(_python("-c", code))


def bench(phase: Phase) -> None:
    """Kernels beside their peers, into benchmarks/results."""
    program = str(ROOT / "benchmarks/gpu/bench.py")
    phase.run(_python(program, *(["--dry"] if phase.dry else ["--minutes", "7.5"])))
    phase.run(_python(str(ROOT / "benchmarks/gpu/overhead.py")))


def train(phase: Phase) -> None:
    """The main job on the card; dry: two steps of it on the CPU."""
    settings = "devices='cpu', steps=2, evals=1" if phase.dry else "devices='cuda:0', minutes=5.0"
    out = LOGS / "runs"
    shutil.rmtree(out, ignore_errors=True)
    code = (
        "from spu.job.command import train_command\n"
        f"train_command(dict({settings}), out={str(out)!r}, name='gpu', resume=None, only_reference=False, "
        "compare=False)\n"
    )
    if phase.run(_python("-c", code)) and not phase.dry:
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "gpu" / "summary.json", RESULTS / "gpu-train.json")


PHASES: dict[str, Callable[[Phase], None]] = {
    "build": build, "test": test, "tune": tune, "bench": bench, "train": train,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="One phase of make gpu.")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    phase = Phase(f"gpu-{options.phase}", options.dry)
    PHASES[options.phase](phase)
    phase.say(f"gpu-{options.phase}: {'failed' if phase.failed else 'done'}{' (dry)' if options.dry else ''}")
    return 1 if phase.failed else 0


if __name__ == "__main__":
    sys.exit(main())
