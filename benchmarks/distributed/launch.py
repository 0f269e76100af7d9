"""Start the ranks of a benchmark, each a process on a core of its own, joined by loopback or by a link of a given rate.

A shaped link is a pair of virtual cards between two network namespaces, each with a token bucket (`tc qdisc ... tbf`),
so both directions have the rate. That needs root and the programs `ip` and `tc`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from ports import free_port

__all__ = ["between", "cpu", "judged", "ranks"]

HERE = Path(__file__).resolve().parent
LATENCY = "50ms"  # that a packet may wait in the bucket's queue before it is dropped


def cpu() -> str:
    """Return what the processor is, how many cores there are, and how busy they are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def _sh(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()} (a shaped link needs root, ip and tc)")


@contextlib.contextmanager
def between(mbit: float | None) -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """Make a link between two ranks; yield, for each, the words before its command and its environment.

    Args:
        mbit: megabits a second, each way; None: loopback as it is.

    Raises:
        OSError: namespaces or token buckets are not to be had here.
    """
    if mbit is None:
        yield [([], {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})] * 2
        return
    if shutil.which("tc") is None or shutil.which("ip") is None:
        raise OSError("no `ip` and `tc` here: install iproute2")
    spaces = [f"spu{os.getpid()}{end}" for end in "ab"]
    cards = ["spua", "spub"]
    try:
        for space in spaces:
            _sh("ip", "netns", "add", space)
        _sh("ip", "link", "add", cards[0], "netns", spaces[0], "type", "veth", "peer", cards[1], "netns", spaces[1])
        for number, (space, card) in enumerate(zip(spaces, cards)):
            inside = ("ip", "netns", "exec", space)
            _sh(*inside, "ip", "link", "set", "lo", "up")
            _sh(*inside, "ip", "addr", "add", f"10.77.0.{number + 1}/24", "dev", card)
            _sh(*inside, "ip", "link", "set", card, "up")
            burst = f"{max(16, int(mbit / 8))}kb"  # a millisecond of the rate, and at least a large packet
            _sh(
                *(*inside, "tc", "qdisc", "add", "dev", card, "root", "tbf"),
                *("rate", f"{mbit}mbit", "burst", burst, "latency", LATENCY),
            )
        yield [
            (["ip", "netns", "exec", space], {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": card})
            for space, card in zip(spaces, cards)
        ]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def ranks(
    script: str, options: Sequence[str], places: Sequence[tuple[list[str], dict[str, str]]], timeout_s: float
) -> list[dict[str, Any]]:
    """Run a script of this folder with ``--rank`` in each place; return the JSON lines that rank 0 prints.

    Raises:
        RuntimeError: a rank failed, or did not end in time.
    """
    port = str(free_port())
    running = []
    for rank, (prefix, own) in enumerate(places):
        environment = os.environ | own
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(len(places)), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        # As torchrun leaves it; spu gives each rank its share of the cores.
        environment |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(len(places)), "TORCHELASTIC_RUN_ID": "bench"}
        command = [*prefix, sys.executable, str(HERE / script), "--rank", *options]
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.PIPE, text=True))
    try:
        said, errors = running[0].communicate(timeout=timeout_s)
        others = [process.communicate(timeout=30)[1] for process in running[1:]]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{script} {' '.join(options)} did not end in {timeout_s:.0f} s") from error
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(text[-3000:] for text in (errors, *others)))
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def judged(ratio: float, target: float | None) -> str:
    """Return a ratio with its target beside it."""
    if target is None:
        return f"{ratio:.2f}x"
    return f"{ratio:.2f}x (target {target:g}x: {'reached' if ratio >= target else 'MISSED'})"
