"""Run a page's examples in this process and folder: python blocks, and lines of `sh` blocks that call spu.

python tests/run_guide.py PAGE.md
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_line(line: str) -> None:
    """Run `spu ...`, or `echo ... | spu ...`."""
    from spu.cli.app import main

    words = shlex.split(line, comments=True)
    if words[0] == "echo":
        bar = words.index("|")
        sys.stdin = io.StringIO(" ".join(words[1:bar]) + "\n")
        words = words[bar + 1 :]
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


if __name__ == "__main__":
    torch.set_num_threads(2)
    run_page(Path(sys.argv[1]))
