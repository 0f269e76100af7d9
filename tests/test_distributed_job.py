"""A process leaves its groups before Python ends: a thread of theirs that is still at work then would abort it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from torch import nn

from spu import ModelParallelTrainer
from spu.distributed.job import Job

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def gloo_threads() -> int:
    """Return how many threads work for process groups; torch has two for each group over gloo."""
    names = [task / "comm" for task in Path("/proc/self/task").iterdir()]
    return sum(name.read_text().startswith("pt_gloo") for name in names if name.exists())


def waited(threads: int, seconds: float = 10.0) -> int:
    """Return gloo's threads, as soon as there are so many: one that begins or ends is counted a moment later."""
    end = time.monotonic() + seconds
    while (found := gloo_threads()) != threads and time.monotonic() < end:
        time.sleep(0.01)
    return found


LONE = """
import atexit
import sys
sys.path.insert(0, sys.argv[1])
from test_distributed_job import waited
atexit.register(lambda: print("at exit", waited(0)))  # the last of them
import torch, torch.distributed as dist
from spu.distributed.job import Job
job = Job("cpu", timeout_s=60)
from torch.distributed import pipelining  # as a trainer does, when the group is there
dist.all_reduce(torch.ones(1))
print("at work", waited(2))
if sys.argv[2] == "closed":
    job.close()
    print("closed", waited(0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_no_thread_of_a_group_outlives_it(how: str) -> None:
    """Torch's pipelining kept the default group for ever, and one run in sixteen ended in SIGABRT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", LONE, str(Path(__file__).parent), how]
    done = subprocess.run(command, env=os.environ | given, text=True, capture_output=True, timeout=150)
    assert done.returncode == 0, done.stderr
    closed = ["closed 0"] if how == "closed" else []
    assert done.stdout.splitlines() == ["at work 2", *closed, "at exit 0"]


def replicas_in_a_group_of_the_users() -> tuple[int, int, int, float]:
    """Returns gloo's threads before a trainer, with it and when it is closed, and a sum over the user's group then."""
    before = waited(2)
    trainer = ModelParallelTrainer(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "cpu", engine="distributed", replicas=2, microbatches=2
    )
    trainer.step(torch.ones(4, 4), torch.zeros(4, dtype=torch.int64))
    during = waited(6)
    trainer.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    return before, during, waited(2), total.item()


def test_a_closed_trainer_ends_its_groups_and_no_other() -> None:
    assert in_ranks(2, replicas_in_a_group_of_the_users) == [(2, 6, 2, 2.0)] * 2


def wait_for_a_replica(done: str) -> str:
    job = Job("cpu", replicas=2, timeout_s=2)
    if job.rank > 0:  # hang
        while not Path(done).exists():
            time.sleep(0.05)
        return ""
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(1), group=job.alike)
    Path(done).write_text("")
    return str(caught.value)


def test_a_replica_that_hangs_is_given_up_after_wait_s(tmp_path: Path) -> None:
    """The groups of a DeviceMesh waited for half an hour."""
    said = in_ranks(4, wait_for_a_replica, str(tmp_path / "done"))
    assert "2000ms" in said[0] or "imed out" in said[0], said


def lose_one(of: int) -> str:
    job = Job("cpu")
    if job.rank == of - 1:
        return ""
    with pytest.raises(ConnectionError) as caught:
        job.gathered(0)
    return str(caught.value)


@pytest.mark.parametrize("of", [2, 3])
def test_one_of_several_is_not_taken_for_all(of: int) -> None:
    """It said that ranks 1, 2, 3 have ended, where it knows of one of them; and in some places torch's words alone."""
    said = in_ranks(of, lose_one, of)[0]
    with_whom = "rank 1, which has" if of == 2 else "ranks 1, 2, one of which has"
    assert said.startswith(f"rank 0 exchanged what each knows with {with_whom} ended or no longer answers"), said
