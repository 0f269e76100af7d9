"""The commands that `spu doctor` names are such as work when they are pasted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from spu import installing


def test_the_build_command_is_for_the_checkout_or_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "_source_tree", lambda: Path("/src/my spu"))
    assert (
        "-m pip install 'setuptools>=77' 'pybind11>=3.0,<4' 'ninja>=1.11' && cd '/src/my spu' && "
        in installing.rebuild()
    )
    assert installing.rebuild().endswith("setup.py build_ext --inplace")
    monkeypatch.setattr(installing, "_source_tree", lambda: None)
    monkeypatch.setattr(installing, "_installed_from", lambda: "/src/my spu")
    tools, build = installing.rebuild().split(" && ")
    assert tools.endswith("-m pip install 'setuptools>=77' 'pybind11>=3.0,<4' 'ninja>=1.11'")
    assert build.startswith("SPU_BUILD=1 ")
    assert build.endswith("install --force-reinstall --no-deps --no-cache-dir --no-build-isolation '/src/my spu'")


def test_the_package_is_installed_again_from_where_it_came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command named a package that no index has: "No matching distribution found"."""
    from importlib import metadata

    noted = json.dumps({"url": f"file://{tmp_path}/my%20spu", "dir_info": {}})
    found = SimpleNamespace(read_text=lambda name: noted)
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    assert installing._installed_from() == "."
    (tmp_path / "my spu" / "csrc").mkdir(parents=True)
    (tmp_path / "my spu" / "setup.py").touch()
    assert installing._installed_from() == f"{tmp_path}/my spu"
    for text in ("", "[", None):
        found.read_text = lambda name, text=text: text
        assert installing._installed_from() == "."
    monkeypatch.setattr(installing, "_source_tree", lambda: None)
    commands = (installing.rebuild(), installing.reinstall(), installing.rebuild_cuda())
    assert not [command for command in commands if "spu-torch" in command]
