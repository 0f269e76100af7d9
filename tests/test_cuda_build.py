"""The build of spu._cuda: its settings and their messages, and on machines with nvcc a library made from a sample.

The sample is every kernel without tensor cores for sm_90, of one type, the ops around them, and one matrix product on
the tensor cores of sm_80. All of it, for all architectures: ``make aot-cuda``; SPU_TEST_ALL=1 adds a product of sm_90a.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks/aot"))

import cuda_gate  # noqa: E402

NVCC = shutil.which("nvcc")
thorough = pytest.mark.thorough(
    "half a minute and 3 GB of the compiler's; make aot-cuda and make gpu-prepare compile it"
)


@pytest.fixture
def spu_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    for name in ("SPU_CUDA", "SPU_CUDA_ARCHS", "SPU_CUTLASS", "NVCC", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    import spu_cuda as module  # type: ignore[import-not-found]

    return module


def play_machine(
    monkeypatch: pytest.MonkeyPatch, spu_cuda: ModuleType, nvcc: tuple[int, int] | None, gpu: bool
) -> None:
    """A machine with this nvcc, or none, and everything else that the build needs."""
    monkeypatch.setattr(spu_cuda, "find_nvcc", lambda: None if nvcc is None else Path("/cuda/bin/nvcc"))
    monkeypatch.setattr(spu_cuda, "nvcc_version", lambda path: nvcc)
    monkeypatch.setattr(spu_cuda, "toolkit", lambda path: Path("/cuda"))
    monkeypatch.setattr(spu_cuda, "cudart", lambda home: home / "lib64/libcudart_static.a")
    monkeypatch.setattr(spu_cuda, "cutlass_include", lambda: Path("/cutlass/include"))
    monkeypatch.setattr(spu_cuda, "has_gpu", lambda: gpu)


@pytest.mark.parametrize(
    ("mode", "nvcc", "gpu", "builds"),
    [
        ("auto", (13, 0), True, True),
        ("auto", (13, 0), False, False),
        ("auto", None, True, False),
        ("1", (13, 0), False, True),
        ("0", (13, 0), True, False),
    ],
)
def test_when_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
    spu_cuda: ModuleType,
    mode: str,
    nvcc: tuple[int, int] | None,
    gpu: bool,
    builds: bool,
) -> None:
    play_machine(monkeypatch, spu_cuda, nvcc, gpu)
    monkeypatch.setenv("SPU_CUDA", mode)
    found = spu_cuda.cuda_extension()
    assert (found is not None) == builds
    assert spu_cuda.wants_cuda() == builds
    if found is not None:
        assert found.name == "spu._cuda"
        assert "csrc/cuda/module.cpp" in found.sources


@pytest.mark.parametrize(
    ("nvcc", "archs", "message"),
    [
        (None, "80", "needs nvcc .*12.4 or later, or set CUDA_HOME"),
        ((11, 8), "80", r"nvcc 12.4 or later for SPU_CUDA_ARCHS=80 \(/cuda/bin/nvcc is 11.8\)"),
        ((12, 6), "80;120", "nvcc 12.8 or later for SPU_CUDA_ARCHS=80;120"),
    ],
)
def test_a_missing_or_old_nvcc_is_named(
    monkeypatch: pytest.MonkeyPatch, spu_cuda: ModuleType, nvcc: tuple[int, int] | None, archs: str, message: str
) -> None:
    play_machine(monkeypatch, spu_cuda, nvcc, True)
    monkeypatch.setenv("SPU_CUDA", "1")
    monkeypatch.setenv("SPU_CUDA_ARCHS", archs)
    with pytest.raises(spu_cuda.CompileError, match=message):
        spu_cuda.cuda_extension()
    monkeypatch.setenv("SPU_CUDA", "auto")
    assert spu_cuda.cuda_extension() is None, "where it was not asked for, the installation goes on without it"


def test_wrong_settings_are_listed_against_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, spu_cuda: ModuleType
) -> None:
    monkeypatch.setenv("SPU_CUDA_ARCHS", "70, 80")
    with pytest.raises(ValueError, match=r"names 70: choose from 75;80;86;89;90a;100;120"):
        spu_cuda.architectures()
    monkeypatch.setenv("SPU_CUDA", "yes")
    with pytest.raises(ValueError, match="SPU_CUDA='yes': use 0"):
        spu_cuda.cuda_extension()


def test_the_default_build_stays_within_its_number_of_kernels(spu_cuda: ModuleType) -> None:
    names = [one.name for one in spu_cuda.device_objects(spu_cuda.architectures()) if one.name.startswith("gemm_sm")]
    assert names == [f"gemm_sm{arch}_{form}" for arch in ("90", "80", "75") for form in ("forward", "dx", "dw")]
    counts = {"75": 0, "80": 0, "90": 0}
    for name in names:
        counts[name[7:9]] += len(spu_cuda.products_of(name))
    assert counts == {"75": 5, "80": 10, "90": 6}
    ptx = [flag for one in spu_cuda.device_objects(["75", "80", "90a"]) for flag in one.flags if "code=compute" in flag]
    assert "-gencode=arch=compute_90,code=compute_90" in ptx, "newer devices need PTX"


def test_parallel_compilations_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch, spu_cuda: ModuleType) -> None:
    monkeypatch.setattr(spu_cuda, "cores", lambda: 16)
    for gigabytes, jobs in ((2.0, 1), (9.0, 2), (500.0, 16)):
        monkeypatch.setattr(spu_cuda, "memory_gigabytes", lambda: gigabytes)  # noqa: B023
        assert spu_cuda.heavy_jobs() == jobs
    monkeypatch.setenv("MAX_JOBS", "3")
    assert spu_cuda.heavy_jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "")
    assert spu_cuda.heavy_jobs() == 16, "empty is as unset"


def test_nvcc_is_looked_for_where_it_was_named_first(
    monkeypatch: pytest.MonkeyPatch, spu_cuda: ModuleType, tmp_path: Path
) -> None:
    places = {name: tmp_path / name / "bin/nvcc" for name in ("path", "home", "named")}
    for path in places.values():
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(places["path"].parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert spu_cuda.find_nvcc() == places["path"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert spu_cuda.find_nvcc() == places["home"]
    for named in (str(places["named"]), "nvcc"):
        monkeypatch.setenv("NVCC", named)
        assert spu_cuda.find_nvcc() == places["path" if named == "nvcc" else "named"]
    monkeypatch.setenv("NVCC", "/gone/nvcc")
    assert spu_cuda.find_nvcc() is None


def test_the_named_compiler_is_nvccs_too(monkeypatch: pytest.MonkeyPatch, spu_cuda: ModuleType) -> None:
    one = spu_cuda.device_objects(["80"], products=False)[0]
    monkeypatch.delenv("CXX", raising=False)
    assert not any(flag.startswith("-ccbin") for flag in spu_cuda.nvcc_command(Path("/nvcc"), one))
    monkeypatch.setenv("CXX", f"{sys.executable} -O1")  # anything that is there
    assert f"-ccbin={sys.executable}" in spu_cuda.nvcc_command(Path("/nvcc"), one)


SAMPLE = """
import os, pathlib, shutil, subprocess, sys, spu_cuda, spu_extensions
folder = pathlib.Path(sys.argv[1])
# The compilers' work is the kernels' instances: of one type here.
shutil.copytree(spu_cuda.ROOT / "csrc", folder / "csrc")
spu_cuda.ROOT, spu_cuda.CUDA = folder, folder / "csrc/cuda"
header = spu_cuda.CUDA / "vector.h"
types = header.read_text().split("void with_type(Type type, F f) {\\n")
first, rest = types[1].split("}\\n", 1)
assert [line.count("return f(TypeTag<") for line in first.splitlines()] == [1, 1, 1], first
header.write_text(types[0] + "void with_type(Type, F f) {\\n  return f(TypeTag<Type::fp16>{});\\n}\\n" + rest)
# The host's half: not optimised, and torch's headers, nearly all of the work, are read once for all its files.
spu_cuda.COMMON_FLAGS = ["-O0" if flag == "-O3" else flag for flag in spu_cuda.COMMON_FLAGS]
header = folder / "torch_headers.h"
header.write_text("".join(f"#include <torch/csrc/stable/{name}.h>\\n" for name in ("library", "ops", "tensor")))
home, archs = spu_cuda.toolkit(spu_cuda.find_nvcc()), spu_cuda.architectures()
command = [*spu_cuda.host_command(home, archs, []), "-x", "c++-header", str(header), "-o", f"{header}.gch"]
subprocess.run(command, check=True, stderr=subprocess.STDOUT)
spu_cuda.COMMON_FLAGS += ["-include", str(header), "-Winvalid-pch"]
print("LIBRARY", spu_cuda.write_cuda_ninja(folder, products=False, extra=("-Xptxas=-v",)))
subprocess.run([spu_extensions._ninja(), "-C", str(folder), "-j2"], check=True, stderr=subprocess.STDOUT)
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(library, the compilers' output)."""
    needed = ("setuptools", "ninja", "pybind11")
    if NVCC is None or shutil.which("g++") is None or any(importlib.util.find_spec(name) is None for name in needed):
        pytest.skip("needs nvcc, g++, setuptools, pybind11 and ninja")
    folder = tmp_path_factory.mktemp("sample")
    environment = {**os.environ, "SPU_CUDA_ARCHS": "90a", "PYTHONPATH": str(ROOT / "build_backend"), "CXX": "g++"}
    command = [sys.executable, "-u", "-c", SAMPLE, str(folder)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found = re.search(r"LIBRARY (.*)", done.stdout)
    assert found is not None
    return Path(found[1]), done.stdout


@pytest.mark.timeout(600)
def test_no_kernel_spills(sample: tuple[Path, str]) -> None:
    kernels = cuda_gate.parse(sample[1])
    assert {kernel.arch for kernel in kernels} == {"sm_90"}
    for part in ("dz_kernel", "adamw_kernel", "pack_blocks_kernel", "unpack_plain_kernel", "gemm_fma_kernel"):
        assert any(part in kernel.name for kernel in kernels), part
    assert not cuda_gate.broken_limits(kernels)
    assert max(kernel.registers for kernel in kernels) <= 128, "256 threads a block must leave room for a second block"


@pytest.mark.timeout(600)
def test_symbols_are_the_stable_ones(sample: tuple[Path, str]) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed (binutils)")
    listed = subprocess.run(["nm", "-D", "-C", str(sample[0])], capture_output=True, text=True, check=True).stdout
    undefined = [line.split()[-1] for line in listed.splitlines() if " U " in line]
    defined = [line.split()[-1] for line in listed.splitlines() if re.search(r" [TDBRVW] ", line)]
    assert any("aoti_torch" in name for name in undefined)
    unstable = [name for name in undefined if re.match(r"(at|c10|torch)::|cuda|cu[A-Z]|cublas", name)]
    assert not unstable, f"symbols without a stable ABI, or of a shared CUDA library: {unstable[:10]}"
    foreign = [name for name in defined if "cuda" in name.lower() and name != "PyInit__cuda"]
    assert "PyInit__cuda" in defined
    assert not foreign, f"exported although another copy of the CUDA runtime may be loaded: {foreign[:10]}"


@pytest.mark.timeout(600)
def test_the_library_loads_without_a_gpu(sample: tuple[Path, str]) -> None:
    code = f"""
import importlib.machinery, importlib.util, torch, spu.ops
loader = importlib.machinery.ExtensionFileLoader("spu._cuda", {str(sample[0])!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("spu._cuda", loader))
loader.exec_module(module)
from spu.ops.dispatch import cuda_library_status
print(module.architectures(), cuda_library_status("CUDA"))
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("90a "), done.stdout
    assert "available=True" in done.stdout, done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("arch", "dtype"), [("80", "bf16"), pytest.param("90a", "fp16", marks=thorough)])
def test_a_matrix_product_runs_on_tensor_cores(spu_cuda: ModuleType, tmp_path: Path, arch: str, dtype: str) -> None:
    if NVCC is None or spu_cuda.cutlass_include() is None:
        pytest.skip("needs nvcc and CUTLASS's headers (pip install --no-deps nvidia-cutlass==4.2.0.0)")
    (one,) = (one for one in spu_cuda.device_objects([arch]) if one.name == f"gemm_sm{arch[:2]}_dw")
    # The compiler's work is the kernels: of one type here.
    products = r"SPU_PRODUCT\((\w+), \w+\)"
    text = re.sub(products, lambda found: found[0] if found[1] == dtype else "", one.source.read_text())
    assert f"SPU_PRODUCT({dtype}, large)" in text
    source = tmp_path / one.source.name
    source.write_text(text)
    # device code alone, and no PTX: the host's half of the work is left out
    one = dataclasses.replace(one, source=source)
    flags = [flag for flag in spu_cuda.nvcc_command(Path(NVCC), one) if "code=compute" not in flag and flag != "-c"]
    done = subprocess.run(
        [*flags, "-cubin", "-Xptxas=-v", "-o", str(tmp_path / "dw.cubin")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    (kernel,) = cuda_gate.parse(done.stdout)
    assert kernel.product == (dtype, "large")
    assert not cuda_gate.broken_limits([kernel])
    tool = cuda_gate.disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton")
    (((_, found), mix),) = cuda_gate.instruction_mix(tool, tmp_path / "dw.cubin").items()
    assert found == f"sm_{arch}"
    assert mix["tensor core"] > 0
    assert mix["asynchronous load"] > 0


def test_the_gate_sees_what_it_should() -> None:
    good = (
        "ptxas info    : Compiling entry function '_Z1a' for 'sm_80'\nptxas info    : Function properties for _Z1a\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 8192 bytes smem, 400 bytes cmem[0]\n"
    )
    bad = good.replace("_Z1a", "_Z1b").replace(
        "0 bytes stack frame, 0 bytes spill stores", "8 bytes stack frame, 4 bytes spill stores"
    )
    kernels = cuda_gate.parse(good + bad)
    assert [kernel.registers for kernel in kernels] == [40, 40]
    assert kernels[0] == cuda_gate.Kernel("_Z1a", "sm_80", 40, 0, 0, 8192)
    (message,) = cuda_gate.broken_limits(kernels)
    assert message.startswith("_Z1b on sm_80")


def test_occupancy_is_bounded_by_whatever_runs_out_first() -> None:
    assert cuda_gate.occupancy("sm_80", 32, 256, 0) == 1.0
    assert cuda_gate.occupancy("sm_80", 64, 256, 0) == 0.5  # 65536 registers
    assert cuda_gate.occupancy("sm_80", 96, 128, 64 << 10) == 0.125  # two blocks' shared memory
    assert cuda_gate.occupancy("sm_75", 32, 64, 0) == 1.0  # 16 blocks of 64 threads
    assert cuda_gate.occupancy("sm_90a", 168, 384, 200 << 10) == 384 / 2048
