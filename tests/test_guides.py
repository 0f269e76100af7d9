"""Every guide runs: its python blocks in one namespace and its `sh` blocks through the command, in their order.

Blocks without a language are shown only: they need a GPU, or weights of gigabytes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
RUNNER = Path(__file__).with_name("run_guide.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_the_guides_run(tmp_path: Path) -> None:
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "SPU_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(tmp_path), *map(str, GUIDES)],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "ran " + " ".join(page.name for page in GUIDES)
    assert len(GUIDES) >= 5


@pytest.mark.parametrize("guide", ["own-loop", "several-machines"])
def test_the_script_of_a_guide_is_its_examples(guide: str) -> None:
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip()]

    page = (ROOT / "docs" / "guides" / f"{guide}.md").read_text()
    kind = "python" if guide == "own-loop" else "py"
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    script = (ROOT / "examples" / f"{guide.replace('-', '_')}.py").read_text()
    assert lines(script.split("import annotations\n")[1]) == lines("".join(blocks))
