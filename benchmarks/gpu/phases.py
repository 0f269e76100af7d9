"""``make gpu``: the phases on a machine with an NVIDIA GPU, each under nine minutes and each leaving its results.

    python benchmarks/gpu/phases.py build|test|tune|bench|train|stream [--dry]

``build`` puts the package into build/gpu-site with the tools that are installed: no environment is made, nothing is
downloaded. The other phases run against it. ``--dry`` needs no GPU: it collects, compiles ahead of time and prints the
plan, so that the first minute on a GPU is not spent on typos.
"""

from __future__ import annotations

import argparse
import importlib.util
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
CACHE = ROOT / "build" / "gpu-cache"  # $SPU_CACHE of the phases: measured speeds, and the tables that tuning has made
RESULTS = ROOT / "benchmarks" / "results"
PHASE_SECONDS = 520.0
TESTS = ("test_triton_gpu.py", "test_cuda_device.py", "test_engine_streaming_gpu.py")
LONG_TEST = "training_job"  # run last, so that it takes no time from the others
MEMCHECK = "kind_of_launch or overflow or wires or optimizer"  # small sets, again under compute-sanitizer
RACECHECK = "kind_of_launch or (wires and float16) or found_inf"
NEEDED = {
    "build": ("torch", "triton", "setuptools"),
    "test": ("torch", "triton", "pytest"),
    "tune": ("torch", "triton"),
    "bench": ("torch", "triton"),
    "train": ("torch", "transformers"),
    "stream": ("torch", "transformers"),
}


class Phase:
    """Commands of one phase: their output goes to the screen and a log, and all end within the phase's time."""

    def __init__(self, name: str, dry: bool) -> None:
        self.name, self.dry, self.failed = name, dry, False
        self._ends = time.monotonic() + PHASE_SECONDS
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = (LOGS / f"{name}{'-dry' if dry else ''}.log").open("w")

    def left(self) -> float:
        return max(10.0, self._ends - time.monotonic())

    def run(
        self, command: Sequence[str], *, at_most: float | None = None, may_fail: bool = False, **variables: str
    ) -> bool:
        """True if it ended with 0; a failure or a time-out marks the phase as failed."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "SPU_CACHE": str(CACHE), **variables}
        earlier = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(SITE), *([earlier] if earlier else [])])
        shown = [f"{name}={value}" for name, value in variables.items()]
        self.say("$ " + " ".join([*shown, *command]))
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        limit, began = min(self.left(), at_most or self.left()), time.monotonic()
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
        took = time.monotonic() - began
        if code:
            self.say(f"ended with {code} after {took:.0f} s" + (f" (its limit: {limit:.0f} s)" if code < 0 else ""))
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


def _card_architecture() -> str:
    """What SPU_CUDA_ARCHS calls the card that is here ("90a"); empty without one. Other cards' code is not built."""
    import torch

    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return "90a" if major == 9 else f"{major}{minor}" if major < 9 else f"{major}0"


def build(phase: Phase) -> None:
    """The package in SITE: by pip without isolation, and where that cannot be, the Python part by copying."""
    shutil.rmtree(SITE, ignore_errors=True)
    # Not quiet: a CUDA library that does not compile is left out, and its messages must be in the log.
    pip = _python(
        "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(SITE)
    )
    built = {"SPU_BUILD": "0" if phase.dry else "auto"}
    if not phase.dry and "SPU_CUDA_ARCHS" not in os.environ:
        built["SPU_CUDA_ARCHS"] = _card_architecture()
    if not phase.run([*pip, "."], at_most=0.7 * PHASE_SECONDS, may_fail=True, **built):
        shutil.rmtree(SITE, ignore_errors=True)
        phase.say("not built: once more without the CUDA C++ kernels")
        if phase.dry or not phase.run([*pip, "."], may_fail=True, SPU_CUDA="0", **built):
            phase.say("pip cannot build here: copying the Python part; CPU and CUDA C++ kernels are left out")
            ignore = shutil.ignore_patterns("__pycache__", "kernels")
            shutil.copytree(ROOT / "python" / "spu", SITE / "spu", ignore=ignore, dirs_exist_ok=True)
            shutil.copytree(ROOT / "kernels" / "triton", SITE / "spu" / "kernels", dirs_exist_ok=True)
    phase.run(_python("-c", "import spu, spu.kernels; print(spu.__version__, spu.__file__)"))
    rows = "from spu.cli.doctor import report\nfor row in report(): print('-+'[row.works], row.name, row.detail)"
    phase.run(_python("-c", rows))


def test(phase: Phase) -> None:
    """Every test marked gpu, a report a file; then small sets of them under compute-sanitizer."""
    pytest = _python("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
    files = [f"tests/{name}" for name in TESTS]
    if phase.dry:
        phase.run([*pytest, *files, "--collect-only", "-q"])
        phase.run(_python(str(ROOT / "benchmarks/aot/aot_triton.py"), "--sample", "--arch", "90"))
        return
    for name, file in zip(TESTS, files):
        report = f"--junitxml={LOGS / name.replace('.py', '.xml')}"
        phase.run([*pytest, file, "-v", "-k", f"not {LONG_TEST}", report], at_most=0.4 * PHASE_SECONDS)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        phase.say("compute-sanitizer is not on the PATH: memory accesses were not checked")
    # Each tensor its own allocation: inside torch's caching allocator nothing is out of bounds.
    for tool, chosen in (("memcheck", MEMCHECK), ("racecheck", RACECHECK)) if sanitizer else ():
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest, *files, "-v", "-k", chosen]
        phase.run(command, at_most=0.25 * PHASE_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    phase.run([*pytest, files[0], "-v", "-k", LONG_TEST])


def tune(phase: Phase) -> None:
    """The table of this card, row by row, into benchmarks/results/tuned; a second run goes on where this one ends."""
    if phase.dry:
        phase.run(_python("-c", "from spu.tune.run import plan_lines\nprint('\\n'.join(plan_lines(90)))"))
        return
    code = (
        "import torch\nfrom pathlib import Path\nfrom spu.kernels import config\nfrom spu.tune import run as tune\n"
        "name = config.arch_name(torch.cuda.get_device_capability())\n"
        f"tune.tune(out=Path({str(RESULTS)!r}) / 'tuned' / f'{{name}}.json', seconds={PHASE_SECONDS - 60})\n"
    )
    phase.run(_python("-c", code))


def bench(phase: Phase) -> None:
    """Kernels beside their peers, into benchmarks/results."""
    phase.run(_python(str(ROOT / "benchmarks/gpu/overhead.py"), "--json", str(LOGS / "overhead.json")))
    program = str(ROOT / "benchmarks/gpu/bench.py")
    phase.run(_python(program, *(["--dry"] if phase.dry else ["--minutes", f"{phase.left() / 60 - 0.5:.1f}"])))


def train(phase: Phase) -> None:
    """The main job on the card alone, on card and CPU as two unequal stages, and on the CPU; dry: on the CPU alone.

    The same steps on the card and on the CPU: their losses are compared in the summary files.
    """
    runs = {"cpu": "devices='cpu', precision='fp32', steps=1, evals=1, batch=2, microbatches=2, seq=32"}
    if not phase.dry:
        runs = {
            "gpu": "devices='cuda:0', minutes=3.0",
            "gpu-steps": "devices='cuda:0', steps=30, evals=2",
            "cpu-steps": "devices='cpu', steps=30, evals=2",
            "gpu-and-cpu": "devices='cuda:0,cpu', steps=30, evals=2",
        }
    out = LOGS / "runs"
    shutil.rmtree(out, ignore_errors=True)
    for name, settings in runs.items():
        code = (
            "from spu.cli.train import train_command\n"
            "from spu.train.config import RunOptions\n"
            f"train_command(dict({settings}), RunOptions(out={str(out)!r}, name={name!r}))\n"
        )
        if phase.run(_python("-c", code)) and not phase.dry:
            RESULTS.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / name / "summary.json", RESULTS / f"train-{name}.json")


def stream(phase: Phase) -> None:
    """A model of 13.6 GB of training state on a card of which 8 GB may be used, from the host's memory and a disk.

    The first case has no limit: it gives the losses. A later one that fails does not keep the next from running. Dry: a
    small model on the CPU, and the plan for a card of 8 GB.
    """
    if phase.dry:
        plan = (
            "plan",
            "--budget",
            "cuda:0=8GB,cpu=32GB",
            "--residency",
            "streamed",
            "--state",
            "exact",
            "--out",
            str(LOGS / "plan.json"),
        )
        phase.run(_python("-m", "spu", *plan))
    out = LOGS / "streamed"
    out.mkdir(parents=True, exist_ok=True)
    cases: tuple[str, ...] = ("resident", "streamed", "streamed-compact", "offloaded", "disk")
    cases = cases[1:2] if phase.dry else cases
    for case in cases:
        file = out / f"{case}.json"
        file.unlink(missing_ok=True)
        command = _python(str(ROOT / "benchmarks/gpu/streamed.py"), case, "--json", str(file))
        command += ["--dry"] if phase.dry else ["--reference", str(out / "resident.json")]
        phase.run(command, at_most=PHASE_SECONDS / len(cases))
        if file.exists() and not phase.dry:
            RESULTS.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, RESULTS / f"stream-{case}.json")


PHASES: dict[str, Callable[[Phase], None]] = {
    "build": build, "test": test, "tune": tune, "bench": bench, "train": train, "stream": stream,
}  # fmt: skip


def _obstacle(phase: str, dry: bool) -> str:
    """What keeps a phase from running here, in words; empty if nothing does."""
    missing = [name for name in NEEDED[phase] if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{sys.executable} lacks {', '.join(missing)}: choose another with PYTHON=..., or bring them on PYTHONPATH"
        )
    if dry:
        return ""
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device here: DRY=1 rehearses the phases without one"


def main() -> int:
    parser = argparse.ArgumentParser(description="One phase of make gpu.")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    phase = Phase(f"gpu-{options.phase}", options.dry)
    obstacle = _obstacle(options.phase, options.dry)
    if obstacle:
        phase.say(obstacle)
        phase.failed = True
    else:
        for table in sorted((RESULTS / "tuned").glob("sm_*.json")):  # what an earlier machine measured
            (CACHE / "tuned").mkdir(parents=True, exist_ok=True)
            shutil.copy(table, CACHE / "tuned" / table.name)
        PHASES[options.phase](phase)
    phase.say(f"gpu-{options.phase}: {'failed' if phase.failed else 'done'}{' (dry)' if options.dry else ''}")
    return 1 if phase.failed else 0


if __name__ == "__main__":
    sys.exit(main())
