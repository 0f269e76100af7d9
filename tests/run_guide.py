"""Run pages' examples: python blocks, and lines of `sh` blocks that call spu or torchrun. Run by test_guides.py.

    python tests/run_guide.py FOLDER PAGE.md ...

Each page runs in a fork of this process, which only imports, and in a folder of its own under FOLDER. Prints "ran" and
the pages that have run to their end.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported once, before the forks)
import matplotlib.backends.backend_agg
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch
import torch._dynamo.config
import torch.distributed.pipelining
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401

from spu import ModelParallelTrainer  # noqa: F401
from spu.cli.app import main
from spu.train import chat, loop, results  # noqa: F401

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_under_torchrun(script: Path, processes: int) -> None:
    """Run a script in processes that torchrun's own launcher starts, as forks of this one, which has imported torch."""
    torch.set_num_threads(1)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="guide", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="fork", monitor_interval=0.1, max_restarts=0,
    )  # fmt: skip
    elastic_launch(config, _run_script)(str(script))


def _run_script(path: str) -> None:
    runpy.run_path(path, run_name="__main__")


def run_line(line: str) -> None:
    """Run `spu ...`, or `echo ... | spu ...`."""
    words = shlex.split(line, comments=True)
    if words[0] == "echo":
        bar = words.index("|")
        sys.stdin = io.StringIO(" ".join(words[1:bar]) + "\n")
        words = words[bar + 1 :]
    if words[0] == "torchrun":  # of a script in examples/
        run_under_torchrun(EXAMPLES / words[-1], int(words[words.index("--nproc-per-node") + 1]))
        return
    assert words[0] == "spu", line
    code = None
    try:
        main(words[1:])
    except SystemExit as ended:
        code = ended.code
    assert not code, f"exit code {code}: {line}"


def run_page(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": page.stem}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks, f"{page} has no example that runs"
    for number, (language, block) in enumerate(blocks, 1):
        if language == "python":
            exec(compile(block, f"{page.name}, example {number}", "exec"), namespace)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                run_line(line)


def in_child(page: Path, folder: Path) -> int:
    """The exit code of a fork that runs a page."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        folder.mkdir()
        os.chdir(folder)
        torch.set_num_threads(2)
        run_page(page)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    pages = [Path(name).resolve() for name in sys.argv[2:]]
    failed = [page.name for page in pages if in_child(page, Path(sys.argv[1]) / page.stem)]
    print("ran", *(page.name for page in pages if page.name not in failed))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
