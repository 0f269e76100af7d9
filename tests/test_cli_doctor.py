"""The doctor's rows, on this machine and on machines where everything is missing or broken."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import spu
from spu import ops
from spu.cli import doctor
from spu.cli.doctor import Row, report

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "-m pip install 'setuptools>=77' 'pybind11>=3.0,<4' 'ninja>=1.11' && "


def play_packages(monkeypatch: pytest.MonkeyPatch, **versions: str | Exception | None) -> None:
    """Packages of these versions; None is not installed, an error is what importing it raises."""
    find, load = metadata.version, importlib.import_module

    def version(name: str) -> str:
        if name not in versions:
            return find(name)
        if versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return str(versions[name])

    def import_module(name: str, *args: Any) -> ModuleType:
        if isinstance(found := versions.get(name), Exception):
            raise found
        return ModuleType(name) if name in versions else load(name, *args)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(importlib, "import_module", import_module)


def assert_sound(rows: list[Row]) -> None:
    for row in rows:
        assert row.name, row
        assert row.detail, row
        assert "\n" not in row.detail + row.fix, row
        if row.works:
            assert not row.fix, row


def test_this_machine_is_reported_on_in_one_screen() -> None:
    rows = report()
    assert_sound(rows)
    assert len(rows) < 20
    by_name = {row.name: row for row in rows}
    names = {"python", "torch", "packages", "CUDA device", "C++ compiler", "spu._host"}
    assert names | {f"backend {name}" for name in ops.backends()} <= set(by_name)
    assert by_name["python"].works
    assert str(torch.__version__) in by_name["torch"].detail
    assert by_name["backend reference"].works
    assert by_name["backend cpu"].works == ops.backends()["cpu"].available
    assert by_name["CUDA device"].works == by_name["CUDA graphs"].works == torch.cuda.is_available()


def test_every_probe_that_fails_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a\nbroken\n  installation")

    parts = ("python", "torch", "packages", "cuda", "openmp", "compiler", "simulator", "backends", "choice", "graphs")
    for name in parts:
        monkeypatch.setattr(doctor, f"_{name}", fail)
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
from spu.cli.doctor import report
for row in report():
    print(row.name, row.works, row.detail, row.fix, sep="|")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "PATH": "/nowhere"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0, run.stderr
    rows = {line.split("|")[0]: line.split("|")[1:] for line in run.stdout.splitlines()}
    assert rows["torch"][:2] == ["False", "cannot be imported: ImportError: torch is broken"]
    assert rows["torch"][2].endswith("-m pip install --upgrade 'torch>=2.11' --force-reinstall")
    assert rows["backends"][0] == "False"
    assert rows["C++ compiler"][0] == "False"
    assert "rich" in rows["packages"][1]


def test_an_old_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    (row,) = doctor._torch()
    assert not row.works
    assert "2.9.1+cu128" in row.detail
    assert "2.11 or later" in row.detail
    assert "--upgrade 'torch>=2.11'" in row.fix


# Backends and what they are built with.


def test_backends_are_judged_by_the_dispatcher_and_have_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "reference": SimpleNamespace(available=True, reason=""),
        "cpu": SimpleNamespace(available=False, reason="spu._C cannot be imported: undefined symbol"),
        "cuda": SimpleNamespace(available=False, reason="not built"),
        "new": SimpleNamespace(available=False, reason="no such device"),
    }
    monkeypatch.setattr(ops, "backends", lambda: found)
    monkeypatch.setattr(doctor, "_has_cuda", lambda: False)
    assert doctor._backends() == [
        Row("backend reference", True, "plain torch"),
        Row("backend cpu", False, "spu._C cannot be imported: undefined symbol", doctor._build()),
        Row("backend cuda", False, "not built"),
        Row("backend new", False, "no such device"),
    ]
    found["cpu"].reason = "SPU_CPU_ISA=avx512: this CPU lacks AVX-512"
    assert doctor._backends()[1].fix == "unset SPU_CPU_ISA"


def test_libraries_that_work_say_for_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(isa=lambda: "avx2", architectures=lambda: "75;90a", cublaslt=lambda: 130100)
    monkeypatch.setattr(importlib, "import_module", lambda name: library)
    assert doctor._kernels_of("cpu") == "C++ kernels for avx2"
    assert doctor._kernels_of("cuda") == "CUDA C++ kernels for sm_75, sm_90a, cuBLASLt 13.1"
    library.cublaslt = lambda: "no cuBLASLt is loaded"
    assert doctor._kernels_of("cuda") == "CUDA C++ kernels for sm_75, sm_90a; no cuBLASLt is loaded"
    assert doctor._simulator() == [Row("spu._host", True, "the simulator and file transfers in C++")]
    play_packages(monkeypatch, **{"spu._host": ImportError("not there")})
    (row,) = doctor._simulator()
    assert (row.works, row.fix) == (False, doctor._build())


@pytest.mark.parametrize(
    ("cuda", "packages"),
    [
        ("13.0", "nvidia-cuda-nvcc==13.* "),
        ("12.6", "nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 "),
        (None, "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl "),
    ],
)
def test_cuda_kernels_are_built_for_the_devices_here(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, packages: str
) -> None:
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: [(9, 0), (8, 9)][index])
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    fix = doctor._fix("cuda", "spu._cuda is not built")
    assert "SPU_BUILD=1 SPU_CUDA=1 SPU_CUDA_ARCHS='89;90a' " in fix
    assert packages in fix.replace("'", "")
    assert "pip install --no-deps nvidia-cutlass==4.2.0.0 && " in fix
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert "nvidia-cuda-nvcc" not in doctor._fix("cuda", "spu._cuda is not built")
    assert doctor._fix("triton", "triton is not installed").endswith("-m pip install 'triton>=3.6,<3.10'")
    assert doctor._fix("triton", "triton cannot build its launcher: no cc") == "sudo apt-get install -y gcc python3-dev"


def test_the_build_command_is_for_the_checkout_or_for_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It named a package that no index has: "No matching distribution found"."""
    source = tmp_path / "my spu"
    (source / "csrc").mkdir(parents=True)
    noted = json.dumps({"url": f"file://{tmp_path}/my%20spu", "dir_info": {}})
    found = SimpleNamespace(read_text=lambda name: noted)
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    monkeypatch.setattr(spu, "__file__", str(tmp_path / "site-packages/spu/__init__.py"))
    assert doctor._installed_from() == ".", "there is no setup.py"
    (source / "setup.py").touch()
    options = "--force-reinstall --no-deps --no-cache-dir --no-build-isolation"
    build = doctor._build()
    assert TOOLS in build
    assert "SPU_BUILD=1 " in build
    assert build.endswith(f"-m pip install {options} '{source}'")
    for text in ("", "[", None):
        found.read_text = lambda name, text=text: text
        assert doctor._build().endswith(f"{options} .")
    monkeypatch.setattr(spu, "__file__", str(source / "python/spu/__init__.py"))
    assert f"{TOOLS}cd '{source}' && SPU_BUILD=1 " in doctor._build()
    assert doctor._build().endswith("setup.py build_ext --inplace")


@pytest.mark.parametrize(
    ("program", "fix"),
    [
        ("apt-get", "sudo apt-get install -y g++"),
        ("dnf", "sudo dnf install -y gcc-c++"),
        ("pacman", "sudo pacman -S --noconfirm gcc"),
        ("xcode-select", "xcode-select --install"),
        ("", ""),
    ],
)
def test_a_missing_compiler_has_this_systems_command(monkeypatch: pytest.MonkeyPatch, program: str, fix: str) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if name == program else None)
    (row,) = doctor._compiler()
    assert (row.works, row.fix) == (False, fix)
    assert "none of g++, clang++, c++ is on the PATH" in row.detail
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    assert doctor._compiler()[0].fix == fix.removeprefix("sudo ")


def test_a_named_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "icpx -O3")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    (row,) = doctor._compiler()
    assert not row.works
    assert "$CXX is 'icpx'" in row.detail
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/opt/{name}")
    assert doctor._compiler() == [Row("C++ compiler", True, "/opt/icpx")]


# Devices.


@pytest.mark.parametrize(
    ("driver", "build", "detail", "fix"),
    [
        (False, None, "no NVIDIA driver", ""),
        (True, None, "built for the CPU only", "-m pip install --force-reinstall torch"),
        (True, "13.0", "torch (CUDA 13.0) finds no device", "nvidia-smi"),
    ],
)
def test_why_there_is_no_device(
    monkeypatch: pytest.MonkeyPatch, driver: bool, build: str | None, detail: str, fix: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi" if driver else None)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: False if "nvidia" in str(self) else exists(self))
    (row,) = doctor._cuda()
    assert not row.works
    assert detail in row.detail
    assert row.fix.endswith(fix)
    assert bool(row.fix) == bool(fix)


def test_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="RTX 2070", total_memory=8 * 10**9, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: device)
    assert doctor._cuda() == [Row("CUDA device", True, "cuda:0 RTX 2070 8.0 GB (sm_75)")]


# Packages.


def test_all_that_is_missing_broken_or_old_has_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    play_packages(monkeypatch, rich=None, typer="0.11.9")
    (row,) = doctor._packages()
    assert row.detail == (
        "rich is not installed (for the progress display of spu train); "
        "typer is 0.11.9, not >=0.12 (for the spu command)"
    )
    assert row.fix.endswith("-m pip install 'rich>=13' 'typer>=0.12'")
    play_packages(monkeypatch, rich="13", typer="1", matplotlib=RuntimeError("numpy ABI"))
    (row,) = doctor._packages()
    assert row.detail == "matplotlib cannot be imported: RuntimeError: numpy ABI (for pictures of runs and plans)"
    assert row.fix.endswith("-m pip install --force-reinstall 'matplotlib>=3.8'")


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
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)
    play_packages(monkeypatch, **{**dict.fromkeys(doctor._PACKAGES, "99"), "triton": version})
    (row,) = doctor._packages()
    assert row.works == works, row
    assert version in row.detail
    assert row.fix.endswith("" if works else "-m pip install 'triton>=3.6,<3.10'")


def test_versions_asked_for_are_those_of_the_packaging() -> None:
    tomllib = pytest.importorskip("tomllib")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not run from a checkout")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [entry for group in project["optional-dependencies"].values() for entry in group]
    declared = {entry.split(";")[0].strip() for entry in [*project["dependencies"], *extras]}
    for name, (_, versions) in {**doctor._PACKAGES, "triton": doctor._TRITON}.items():
        assert f"{name}>={versions}" in declared


def test_nothing_is_printed_or_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.setattr(builtins, "input", refuse)
    assert_sound(report())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (130100, "CUDA C++ kernels for sm_80, sm_90a, cuBLASLt 13.1"),
        ("no cuBLASLt is loaded", "; no cuBLASLt is loaded"),
    ],
)
def test_the_cuda_backend_tells_its_cublaslt(found: int | str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(architectures=lambda: "80;90a", cublaslt=lambda: found)
    monkeypatch.setattr(importlib, "import_module", lambda name: {"spu._cuda": module}[name])
    assert doctor._kernels_of("cuda").endswith(told)


@pytest.mark.parametrize(
    ("environment", "others", "cores", "works", "said"),
    [
        ({"OMP_WAIT_POLICY": "passive"}, 2.0, 2, True, "sleep (OMP_WAIT_POLICY=PASSIVE)"),
        ({"GOMP_SPINCOUNT": "0"}, 2.0, 2, True, "sleep (GOMP_SPINCOUNT=0)"),
        ({"OMP_WAIT_POLICY": "active"}, 1.5, 2, False, "others use 1.5 of 2 cores now"),
        ({}, 1.5, 2, False, "others use 1.5 of 2 cores now"),
        ({}, 1.5, 16, True, "others use 1.5 of 16 cores now"),
        ({}, 0.0, 2, True, "others use 0.0 of 2 cores now"),
        ({}, None, 2, True, "not known"),
        ({}, 1.0, 1, True, "not known"),
    ],
)
def test_threads_that_spin_are_a_fault_where_cores_are_shared(
    environment: dict[str, str],
    others: float | None,
    cores: int,
    works: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("spu.devices.host.cores_of_others", lambda: others)
    monkeypatch.setattr("spu.devices.host.usable_cores", lambda: list(range(cores)))
    rows = doctor._openmp()
    assert_sound(rows)
    assert rows[0].works == works
    assert said in rows[0].detail
    assert rows[0].fix == ("" if works else "export OMP_WAIT_POLICY=PASSIVE")
