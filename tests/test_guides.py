"""The examples of docs/guides run as they stand: the python blocks of a page in their order, in one namespace."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).resolve().parent.parent / "docs" / "guides"
NEEDS = {"lora": ("transformers", "peft", "accelerate")}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [pytest.param(path, id=path.stem) for path in sorted(GUIDES.glob("*.md"))])
def test_a_guides_examples_run(page: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(page.stem, ("transformers",)):
        pytest.importorskip(package)
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks(page)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
