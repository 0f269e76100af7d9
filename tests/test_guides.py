"""Every guide runs: its python blocks in one namespace and its `sh` blocks through the command, in their order.

Blocks without a language are shown only: they need a GPU, or weights of gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from run_guide import BLOCK

GUIDES = sorted((Path(__file__).parents[1] / "docs" / "guides").glob("*.md"))
RUNNER = Path(__file__).with_name("run_guide.py")


@pytest.mark.parametrize("guide", [pytest.param(path, id=path.stem) for path in GUIDES])
def test_a_guide_runs(guide: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "SPU_CACHE": str(tmp_path / "c"),
    }
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(guide)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_script_of_a_guide_is_its_examples() -> None:
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip()]

    blocks = [
        code for language, code in BLOCK.findall((GUIDES[0].parent / "own-loop.md").read_text()) if language != "sh"
    ]
    script = (Path(__file__).parents[1] / "examples" / "own_loop.py").read_text()
    assert lines(script.split("import annotations\n")[1]) == lines("".join(blocks))
