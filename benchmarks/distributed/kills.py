"""Kill a random rank of `torchrun --max-restarts` at random moments; every run must end as if nobody had disturbed it.

    python benchmarks/distributed/kills.py [--kills 30] [--ranks 2] [--replicas 1] [--seed 0] [--in-steps] [--tied]

Each kill (SIGKILL) has a run of its own. Its moment is drawn from the whole life of the ranks: they import, meet, plan,
train, save, export; on a busy machine most of it is import. With --in-steps it is within half a second of the end of a
step that is drawn. A line for each says what was lost; the last one how many of them resumed. About a minute each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
STEPS = 100
SETTINGS = {
    "model": "small.json", "data": "text.txt", "seq": 32, "batch": 8, "microbatches": 4, "steps": STEPS,
    "eval-every": 25, "save-every": 10, "wait-s": 60, "transfer": "int8",
}  # fmt: skip
POLL_S = 0.02


@dataclass
class Run:
    """A `torchrun -m spu train` in a session of its own, and every process that has come from it."""

    folder: Path
    name: str
    ranks: int
    replicas: int
    restarts: int

    def __post_init__(self) -> None:
        self.mark = f"SPU_KILLS={uuid.uuid4().hex}"
        options = [f"--{key}={value}" for key, value in SETTINGS.items()]
        if self.replicas > 1:
            options.append(f"--replicas={self.replicas}")
        key, value = self.mark.split("=")
        self.begin = time.monotonic()
        with open(self.folder / f"{self.name}.log", "w") as log:
            self.torchrun = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *("--max-restarts", str(self.restarts), "--nproc-per-node", str(self.ranks)),
                    *("-m", "spu", "train", *options, "--no-sample", "--name", self.name, "--resume", "auto"),
                ],
                cwd=self.folder,
                env=os.environ | {key: value, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def processes(self) -> dict[int, int]:
        """Return the processes that live (no zombies): pid -> rank, -1 of those without one."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                own = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if self.mark in own and state != "Z":
                ranks = [int(value[5:]) for value in own if value.startswith("RANK=")]
                found[int(entry.name)] = ranks[0] if ranks else -1
        return found

    def kill(self, rank: int, step: int, moment: float) -> bool:
        """Kill a rank so many seconds after a step was done (0: it was there); return False if the run ended before."""
        first = None
        while self.torchrun.poll() is None:
            there = {theirs: pid for pid, theirs in self.processes().items()}
            if first is None and rank in there and (not step or any(row["step"] >= step for row in self.rows())):
                first = time.monotonic()
            if first is not None and time.monotonic() - first >= moment and rank in there:
                os.kill(there[rank], signal.SIGKILL)
                return True
            time.sleep(POLL_S)
        return False

    def wait(self, seconds: float) -> int | None:
        """Return torchrun's exit code; None if it is still there after so many seconds."""
        try:
            return self.torchrun.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def left(self) -> int:
        """Return how many processes outlive torchrun, given a second to die; end them."""
        end = time.monotonic() + 1
        while (found := self.processes()) and time.monotonic() < end:
            time.sleep(POLL_S)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return len(found)

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics written so far, without speeds; a torn last line is no row."""
        rows = []
        path = self.folder / "runs" / self.name / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                rows.append({key: value for key, value in json.loads(line).items() if key != "tokens_per_s"})
            except ValueError:
                break
        return rows

    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")


def tensors(run: Run) -> bytes:
    return (run.folder / "runs" / run.name / "checkpoint" / "tensors.safetensors").read_bytes()


def one(run: Run, whole: Run, rank: int, when: tuple[int, float], longest: float) -> tuple[bool | None, str]:
    """Kill one rank of a run and watch it end: whether all is as it should be (None: too late to kill), and a line."""
    if not run.kill(rank, *when):
        run.left()
        return None, "the run had ended"
    killed, rows = run.seconds(), run.rows()
    code = run.wait(longest)
    took, hung = run.seconds(), code is None
    if hung:
        os.killpg(run.torchrun.pid, signal.SIGKILL)
        run.torchrun.wait()
    left = run.left()
    step = max((row["step"] for row in rows if "loss" in row), default=0)
    saved = max((row["step"] for row in rows if row.get("saved")), default=0)
    log = run.log().splitlines()
    on = [int(line.split()[-1]) for line in log if line.startswith("going on with")]
    if any(line.startswith(f"run {run.name} is complete") for line in log):  # killed after the end of its work
        on = [STEPS]
    faults = {
        f"hung for {longest:.0f} s": hung,
        f"exit code {code}": code not in (0, None),
        f"{left} processes outlived it": left > 0,
        "lost a checkpoint": bool(saved) and (not on or min(on) < saved),
        "other losses": run.rows() != whole.rows(),
    }
    if not any(faults.values()):
        faults["other weights or moments"] = tensors(run) != tensors(whole)
    wrong = ", ".join(name for name, is_so in faults.items() if is_so)
    went = f"went on after {on[0]}" if on else "began anew"
    return not wrong, (
        f"rank {rank} killed at {killed:5.1f} s, step {step:3}, saved {saved:3}; {went}; ended at {took:5.1f} s; "
        + (wrong.upper() if wrong else "same losses, weights and moments; no process left")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-steps", action="store_true")
    parser.add_argument("--tied", action="store_true", help="the head's weight is the embedding's")
    parser.add_argument("--out", type=Path, help="keeps the runs and their logs; default: a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "small.json").write_text(json.dumps(MODEL | {"tie_word_embeddings": given.tied}))
        text = random.Random(0)
        words = ["".join(text.choices("etaoinshrdlu", k=text.randint(2, 7))) for _ in range(200)]
        (folder / "text.txt").write_text(" ".join(text.choices(words, k=4000)))
        draws = random.Random(given.seed)
        whole = Run(folder, "whole", given.ranks, given.replicas, 0)
        if (code := whole.wait(600)) != 0:
            sys.exit(f"the undisturbed run failed with {code}:\n{whole.log()[-2000:]}")
        life = whole.seconds()
        print(
            f"undisturbed: {given.ranks} ranks, {life:.1f} s, {len(whole.rows())} rows; seed {given.seed}", flush=True
        )
        good = done = drawn = 0
        while done < given.kills:
            drawn += 1
            run = Run(folder, f"killed{drawn}", given.ranks, given.replicas, 3)
            rank = draws.randrange(given.ranks)
            when = (draws.randrange(1, STEPS), draws.uniform(0, 0.5)) if given.in_steps else (0, draws.uniform(0, life))
            fine, line = one(run, whole, rank, when, 3 * life + 120)
            print(f"{run.name}: {line}", flush=True)
            if fine is not None:
                done, good = done + 1, good + fine
        verdict = "reached" if good == done else "MISSED"
        print(f"{good} of {done} resumed (target: all, {verdict}); ranks {given.ranks}, replicas {given.replicas}")
    sys.exit(good != done)


if __name__ == "__main__":
    main()
