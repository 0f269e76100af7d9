"""The doctor's rows, on this machine and on machines where everything is missing or broken."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from spu import doctor, installing, ops, toolchain
from spu.doctor import Row, report

NAMES = [
    "python",
    "torch",
    "backend reference",
    "backend cpu",
    "backend triton",
    "backend cuda",
    "spu._C",
    "spu._host",
    "C++ compiler",
    "triton",
    "CUDA device",
    "nvcc",
    "spu._cuda",
    "numpy",
    "safetensors",
    "transformers",
    "rich",
    "typer",
    "matplotlib",
]
ROOT = Path(__file__).resolve().parents[1]


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """These modules cannot be found."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a))


def break_import(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """This module is there, and importing it fails."""
    load, find = importlib.import_module, importlib.util.find_spec

    def fail(wanted: str, *args: Any) -> ModuleType:
        if wanted == name:
            raise error
        return load(wanted, *args)

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: SimpleNamespace() if n == name else find(n, *a))


def play_version(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    load, find = importlib.import_module, importlib.util.find_spec
    module = SimpleNamespace(__version__=version)
    monkeypatch.setattr(importlib, "import_module", lambda n, *a: module if n == name else load(n, *a))
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: module if n == name else find(n, *a))


def assert_sound(rows: list[Row]) -> None:
    for row in rows:
        assert row.name, row
        assert row.detail, row
        assert "\n" not in row.detail + row.fix, row
        if row.works:
            assert not row.fix, row


def test_this_machine_is_reported_on() -> None:
    rows = report()
    assert_sound(rows)
    names = [row.name for row in rows]
    assert [name for name in NAMES if name not in names] == []
    by_name = {row.name: row for row in rows}
    assert by_name["python"].works
    assert by_name["torch"].works
    assert str(torch.__version__) in by_name["torch"].detail
    assert by_name["backend reference"].works
    assert by_name["backend cpu"].works == ops.backends()["cpu"].available
    assert by_name["CUDA device"].works == torch.cuda.is_available()


def test_every_probe_that_fails_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a\nbroken\n  installation")

    probes = [name for name in vars(doctor) if name in ("_python", "_torch", "_backends", "_extension", "_compiler")]
    for name in [*probes, "_triton", "_cuda", "_nvcc", "_cuda_library", "_package"]:
        monkeypatch.setattr(doctor, name, fail)
    rows = report()
    assert_sound(rows)
    assert not any(row.works for row in rows)
    assert {row.detail for row in rows} == {"the check itself failed: RuntimeError: a broken installation"}


def test_without_torch_and_everything_else_there_is_still_a_report() -> None:
    # Another process: nothing can be unimported from this one.
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BROKEN:
            raise ImportError(name + " is broken")
BROKEN = {"torch", "numpy", "safetensors", "transformers", "rich", "typer", "matplotlib", "triton"}
sys.meta_path.insert(0, Refuse())
from spu.doctor import report
for row in report():
    print(row.name, row.works, row.detail, row.fix, sep="|")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "PATH": "/nowhere"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0, run.stderr
    rows = {line.split("|")[0]: line.split("|")[1:] for line in run.stdout.splitlines()}
    assert rows["torch"][:2] == ["False", "cannot be imported: ImportError: torch is broken"]
    assert rows["torch"][2].endswith("-m pip install --force-reinstall 'torch>=2.11'")
    assert rows["backends"][0] == "False"
    assert rows["C++ compiler"][0] == "False"
    assert rows["rich"][0] == "False"


def test_an_old_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    row = doctor._torch()
    assert not row.works
    assert "2.9.1+cu128" in row.detail
    assert "2.11 or later" in row.detail
    assert "--upgrade 'torch>=2.11'" in row.fix


# Backends and extensions.


def test_backends_come_from_the_dispatcher_with_a_command_for_the_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "reference": SimpleNamespace(name="reference", available=True, reason="", fix=""),
        "cpu": SimpleNamespace(name="cpu", available=False, reason="not built", fix="build it somehow"),
        "new": SimpleNamespace(name="new", available=False, reason="no card", fix="buy one"),
    }
    monkeypatch.setattr(ops, "backends", lambda: found)
    rows = doctor._backends()
    assert isinstance(rows, list)
    assert [(row.name, row.works, row.detail) for row in rows] == [
        ("backend reference", True, "available"),
        ("backend cpu", False, "not built"),
        ("backend new", False, "no card"),
    ]
    assert [row.fix for row in rows] == ["", installing.rebuild(), "buy one"]


def test_an_extension_that_is_not_built_has_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "spu._C")
    row = doctor._extension("spu._C", "C++ kernels", lambda: "")
    assert not row.works
    assert "not built" in row.detail
    assert row.fix == installing.rebuild()


def test_an_extension_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "spu._C", ImportError("undefined symbol: aoti_torch_x"))
    row = doctor._extension("spu._C", "C++ kernels", lambda: "")
    assert not row.works
    assert "built, but cannot be loaded: ImportError: undefined symbol: aoti_torch_x" in row.detail
    assert row.fix == installing.rebuild()


def test_an_extension_that_works_says_with_which_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    play_version(monkeypatch, "spu._C", "")
    row = doctor._extension("spu._C", "C++ kernels", lambda: "runs avx2")
    assert row == Row("spu._C", True, "C++ kernels, runs avx2")
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(isa=lambda: "avx2"))
    for flags, text in (
        ("flags : fpu avx2 fma f16c", " (processor has avx2, fma, f16c)"),
        ("flags : avx512f avx512_bf16 avx2", " (processor has avx2, avx512f, avx512_bf16)"),
        ("flags : fpu", " (processor has no vector instructions that they know)"),
        ("Features : neon", ""),
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, text=flags: text)
        assert doctor._instruction_set() == f"runs its avx2 ones{text}"


def test_an_instruction_set_that_the_processor_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def isa() -> str:
        raise ValueError("SPU_CPU_ISA=avx512: this CPU lacks AVX-512")

    play_version(monkeypatch, "spu._C", "")
    row = doctor._extension("spu._C", "C++ kernels", isa)
    assert row == Row("spu._C", False, "C++ kernels: SPU_CPU_ISA=avx512: this CPU lacks AVX-512", "unset SPU_CPU_ISA")


# Tools.


def test_a_missing_compiler_has_this_systems_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/dnf" if name == "dnf" else None)
    row = doctor._compiler()
    assert not row.works
    assert "none of g++, clang++, c++ is on the PATH" in row.detail
    assert row.fix == "sudo dnf install -y gcc-c++"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._compiler().fix == "conda install -c conda-forge cxx-compiler"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert doctor._compiler().fix == "xcode-select --install"


def test_a_named_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "icpx -O3")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    row = doctor._compiler()
    assert not row.works
    assert "$CXX is 'icpx'" in row.detail
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/opt/{name}")
    assert doctor._compiler() == Row("C++ compiler", True, "/opt/icpx")


def test_nvcc_is_found_in_the_places_where_the_build_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: is_file(self) and str(self).startswith(str(tmp_path)))
    monkeypatch.setattr(toolchain, "nvcc_version", lambda path: (13, 0))
    there = {name: tmp_path / name / "bin/nvcc" for name in ("path", "home", "site/nvidia/cu13")}
    for path in there.values():
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = doctor._nvcc()
    assert not missing.works
    assert "-m pip install nvidia-cuda-nvcc" in missing.fix
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert doctor._nvcc() == Row("nvcc", True, f"{there['site/nvidia/cu13']}, release 13.0")
    monkeypatch.setattr(shutil, "which", lambda name: str(there["path"]) if name == "nvcc" else None)
    assert str(there["path"]) in doctor._nvcc().detail
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert str(there["home"]) in doctor._nvcc().detail, "what was named comes before what is on the PATH"
    monkeypatch.setenv("NVCC", "/gone/nvcc")
    assert "$NVCC is '/gone/nvcc', which is not there" in doctor._nvcc().detail


@pytest.mark.parametrize(("version", "detail"), [((11, 8), "needs 12.4 or later"), (None, "does not run")])
def test_an_nvcc_that_cannot_build_is_no_nvcc(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int] | None, detail: str
) -> None:
    hide(monkeypatch, "spu._cuda")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: "/old/nvcc")
    monkeypatch.setattr(toolchain, "nvcc_version", lambda path: version)
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)
    row = doctor._nvcc()
    assert not row.works
    assert detail in row.detail
    assert "no nvcc that can build them" in doctor._cuda_library().detail


@pytest.mark.parametrize(
    ("cuda", "packages"),
    [
        ("13.0", "nvidia-cuda-nvcc==13.*"),
        ("12.6", "nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12"),
        (None, "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"),
    ],
)
def test_the_compiler_that_is_advised_is_of_torchs_cuda_version(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, packages: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert packages in toolchain.install_nvcc("pip").replace("'", "")


@pytest.mark.parametrize(
    ("nvcc", "device", "detail", "fix"),
    [
        (None, False, "without a CUDA device they would have no use", ""),
        ("/bin/nvcc", False, "nvcc is here, but without a CUDA device", ""),
        (None, True, "no nvcc that can build them", "SPU_CUDA=1"),
        ("/bin/nvcc", True, "though nvcc is here", "SPU_CUDA=1"),
    ],
)
def test_cuda_kernels_that_are_not_built(
    monkeypatch: pytest.MonkeyPatch, nvcc: str | None, device: bool, detail: str, fix: str
) -> None:
    hide(monkeypatch, "spu._cuda")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(toolchain, "nvcc_version", lambda path: (12, 8))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_has_cuda", lambda: device)
    row = doctor._cuda_library()
    assert not row.works
    assert detail in row.detail
    assert fix in row.fix
    assert bool(fix) == bool(row.fix)
    assert ("install nvidia-cuda-nvcc" in row.fix) == (device and nvcc is None)
    assert (f"NVCC={nvcc} " in row.fix) == (device and nvcc is not None), "an isolated build sees no nvcc of pip's"
    status = SimpleNamespace(available=False, reason="spu._cuda is not built", fix="advice, not a command")
    monkeypatch.setattr(ops, "backends", lambda: {"cuda": status})
    (backend,) = doctor._backends()
    assert backend == Row("backend cuda", False, "spu._cuda is not built", row.fix)


@pytest.mark.parametrize("device", [False, True])
def test_cuda_kernels_that_are_built(monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    load, find = importlib.import_module, importlib.util.find_spec
    module = SimpleNamespace(architectures=lambda: "75;80;90a")
    monkeypatch.setattr(importlib, "import_module", lambda n, *a: module if n == "spu._cuda" else load(n, *a))
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: module if n == "spu._cuda" else find(n, *a))
    monkeypatch.setattr(doctor, "_has_cuda", lambda: device)
    row = doctor._cuda_library()
    assert row.works
    assert "sm_75, sm_80, sm_90a" in row.detail
    assert ("idle" in row.detail) != device


def test_cuda_kernels_that_were_built_for_other_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    play_version(monkeypatch, "spu._cuda", "")
    module = importlib.import_module("spu._cuda")
    module.architectures = lambda: "90a"
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 9)][index])
    row = doctor._cuda_library()
    assert not row.works
    assert "no code for cuda:1 (sm_89)" in row.detail
    assert "SPU_CUDA_ARCHS='89;90a' " in row.fix


def test_cuda_kernels_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "spu._cuda", ImportError("undefined symbol: aoti_torch_x"))
    row = doctor._cuda_library()
    assert not row.works
    assert "undefined symbol: aoti_torch_x" in row.detail
    assert "SPU_CUDA=1" in row.fix


@pytest.mark.parametrize(
    ("driver", "build", "detail", "fix"),
    [
        (False, None, "no NVIDIA driver", ""),
        (True, None, "built for the CPU only", "-m pip install --force-reinstall torch"),
        (True, "13.0", "torch (CUDA 13.0) finds no card", "nvidia-smi"),
    ],
)
def test_why_there_is_no_card(
    monkeypatch: pytest.MonkeyPatch, driver: bool, build: str | None, detail: str, fix: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi" if driver else None)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: False if "nvidia" in str(self) else exists(self))
    row = doctor._cuda()
    assert not row.works
    assert detail in row.detail
    assert row.fix.endswith(fix)
    assert bool(row.fix) == bool(fix)


def test_cards_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="RTX 2070", total_memory=8 * 10**9, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    assert doctor._cuda() == Row("CUDA device", True, "cuda:0 RTX 2070 8.0 GB (sm_75)")


# Packages.


def test_a_missing_package_says_what_for_and_how_to_add_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "rich")
    row = doctor._package_probe("rich")()
    assert (row.works, row.detail) == (False, "not installed; needed for the progress display of spu train")
    assert row.fix.endswith("-m pip install 'rich>=13'")


def test_a_broken_package_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "matplotlib", RuntimeError("numpy ABI"))
    row = doctor._package_probe("matplotlib")()
    assert (row.works, row.detail) == (False, "cannot be imported: RuntimeError: numpy ABI")
    assert row.fix.endswith("'matplotlib>=3.8' --force-reinstall")


@pytest.mark.parametrize(
    ("version", "works"),
    [
        ("3.5.1", False),
        ("3.6", True),
        ("3.6.0", True),
        ("3.9.9", True),
        ("3.10", False),
        ("4.0", False),
        ("3.7rc1", True),
    ],
)
def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch, version: str, works: bool) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    play_version(monkeypatch, "triton", version)
    row = doctor._triton()
    assert row.works == works, row
    assert version in row.detail
    assert row.fix.endswith("" if works else "-m pip install 'triton>=3.6,<3.10'")


def test_triton_without_a_card_says_that_it_is_only_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    play_version(monkeypatch, "triton", "3.7.0")
    assert "TRITON_INTERPRET=1" in doctor._triton().detail
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not doctor._triton().works


def test_versions_asked_for_are_those_of_the_packaging() -> None:
    tomllib = pytest.importorskip("tomllib")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not run from a checkout")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [entry for group in project["optional-dependencies"].values() for entry in group]
    declared = {entry.split(";")[0].strip() for entry in [*project["dependencies"], *extras]}
    for name, (_, first, before) in {**doctor._PACKAGES, "triton": doctor._TRITON}.items():
        assert f"{name}>={first}" + (f",<{before}" if before else "") in declared


def test_nothing_is_printed_or_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started {args}")

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [(subprocess, "Popen", refuse), (os, "system", refuse)]
    for module, name, function in replaced:
        monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(builtins, "input", refuse)
    assert_sound(report())
    assert capsys.readouterr().out == ""
