"""Every instruction set of spu._C, also those that this machine would not choose or cannot run.

The narrower ones are forced by SPU_CPU_ISA in a subprocess that runs test_cpu_kernels.py. The AVX-512 kernels are
compiled from the same sources with plain arithmetic on 64-byte vectors for their instructions, those for AMX with tiles
in memory besides, and run that way where the CPU lacks the instructions: elsewhere the same files have run on these.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi", f"-I{CSRC}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]

AMX = ["-mavx512bf16", "-mamx-tile", "-mamx-bf16"]

thorough = pytest.mark.thorough("kernels_avx512bf16.cpp includes the same files, with an instruction more")
WIDE = [
    ("kernels_avx2", AVX2),
    pytest.param("kernels_avx512", AVX512, marks=thorough),
    ("kernels_avx512bf16", [*AVX512, "-mavx512bf16"]),
    ("kernels_amx", [*AVX512, *AMX]),
]

_C = pytest.importorskip("spu._C", reason="spu._C is not built here")
LEVELS = ["scalar", "avx2", "avx512", "avx512bf16", "amx"]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not (CSRC / "cpu").is_dir(), reason="needs g++ and the sources in csrc/"
)


EVERYTHING = ["kernels", "wire_and_optimizer", "fused", "shared", "attention"]


# What is imported is most of a run's time: once, and each run is a fork of this process. spu._C is not among it.
SERVE = """
import json, os, sys
import hypothesis, numpy, pytest, torch, torch._dynamo
import spu.ops
assert "spu._C" not in sys.modules
for line in sys.stdin:
    settings, log, arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(settings)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        code = 99
        try:
            code = int(pytest.main(arguments))
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Run = Callable[..., None]


@pytest.fixture(scope="module")
def run_kernel_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run tests/test_cpu_*.py in a process of their own, but for tests whose names contain a word of ``without``."""
    log = tmp_path_factory.mktemp("levels") / "log"
    # one thread: on a busy machine the waiting of a second one is most of the time
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None

    def run(settings: dict[str, str], files: list[str] = EVERYTHING, without: str = "") -> None:
        names = ["direct_callers", "python_threads", "nothing_wrong"]  # the same code at every level
        arguments = ["-q", "-x", "-p", "no:cacheprovider", *(f"tests/test_cpu_{name}.py" for name in files)]
        arguments += ["-k", f"not ({' or '.join([*names, *without.split()])})"]
        print(json.dumps([settings, str(log), arguments]), file=server.stdin, flush=True)
        code = server.stdout.readline().strip()
        said = log.read_text() if log.exists() else ""
        assert code == "0", said[-6000:]
        assert " passed" in said

    yield run
    server.kill()
    server.wait()


# torch is imported once, and each instruction set asked for in a fork of that process.
ASK = """
import os, sys, torch
for level in sys.argv[1:]:
    print("ASKED", level, flush=True)
    if not os.fork():
        os.environ["SPU_CPU_ISA"] = level
        try:
            import spu._C
            print(spu._C.isa(), flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.wait()
"""


@functools.cache
def chosen() -> dict[str, str]:
    """What a process says that asks for an instruction set: its name, or the error."""
    command = [sys.executable, "-c", ASK, "scalar", "sse9", "amx"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return {part.split("\n")[0]: part.partition("\n")[2].strip() for part in said.split("ASKED ")[1:]}


def cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def test_isa_is_the_widest_unless_forced() -> None:
    if "SPU_CPU_ISA" not in os.environ:
        flags = cpu_flags()
        if flags >= {"avx512f", "amx_tile", "amx_bf16"} and chosen()["amx"] == "amx":
            assert _C.isa() == "amx"
        elif flags >= {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"}:
            assert _C.isa() == ("avx512bf16" if "avx512_bf16" in flags else "avx512")
        elif flags >= {"avx2", "fma", "f16c"}:
            assert _C.isa() == "avx2"
    assert _C.isa() in LEVELS
    assert chosen()["scalar"] == "scalar"
    assert chosen()["sse9"].startswith("ValueError: SPU_CPU_ISA=sse9")


def test_amx_works_or_says_what_is_missing() -> None:
    asked = chosen()["amx"]
    if asked != "amx":
        assert re.search("ValueError: SPU_CPU_ISA=amx: .*(AMX|amx).*; unset it to let spu choose", asked)


def has_bf16() -> bool:
    """Whether this CPU multiplies pairs of bf16 by AVX512_BF16, as every one with AMX should."""
    return LEVELS.index(_C.isa()) >= LEVELS.index("avx512bf16") and "avx512_bf16" in cpu_flags()


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_narrower_instruction_sets(level: str, run_kernel_tests: Run) -> None:
    if LEVELS.index(level) >= LEVELS.index(_C.isa()):
        pytest.skip(f"this machine runs {_C.isa()}, which test_cpu_kernels.py has tested")
    if level == "avx512bf16" and not has_bf16():
        pytest.skip("this CPU lacks AVX512_BF16, whose kernels run in plain arithmetic below")
    run_kernel_tests({"SPU_CPU_ISA": level})


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not (TORCH / "include/torch/csrc/stable/library.h").exists():
        pytest.skip("needs torch's stable ABI headers")
    folder = tmp_path_factory.mktemp("emulated")
    build_emulated(folder)
    return str(folder / "_C.so")


@needs_compiler
@pytest.mark.skipif(has_bf16(), reason="this CPU has run these kernels on their own instructions, above")
def test_avx512_kernels_without_avx512(emulated: str, run_kernel_tests: Run) -> None:
    run_kernel_tests({"SPU_TEST_LIBRARY": emulated})


@needs_compiler
@pytest.mark.skipif(_C.isa() == "amx", reason="this CPU runs these files on its own tiles, in the suite itself")
def test_amx_kernels_without_amx(emulated: str, run_kernel_tests: Run) -> None:
    products = ["amx", "kernels", "fused", "shared", "attention", "help"]
    # the AVX-512 kernels, which the test above has run
    others = "float32 every_fp16 unscale test_dz gated_strides found_inf_sees"
    run_kernel_tests({"SPU_TEST_LIBRARY": emulated, "SPU_CPU_ISA": "amx"}, products, others)


def test_the_files_of_the_library_compile_as_one() -> None:
    """What `build_emulated` needs, which a CPU with every instruction does not try."""
    owners: dict[str, list[str]] = {}
    for path in (CSRC / "cpu").glob("*.cpp"):
        if not path.stem.startswith("kernels_"):
            for name in re.findall(r"^(?:struct|class|enum(?: class)?) (\w+)(?=[ ;{])", path.read_text(), re.M):
                owners.setdefault(name, []).append(path.name)
    assert {name: files for name, files in owners.items() if len(files) > 1} == {}


def build_emulated(folder: Path) -> None:
    """The op library with 16-lane kernels in plain vector arithmetic, on the registers that the CPU has."""
    # The widest ones are compiled in a third of the time: nothing has to be cut into pieces.
    registers = {"scalar": [], "avx2": AVX2}.get(_C.isa(), AVX512)
    defines = ["-DSPU_EMULATE_AVX512", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]
    includes = [f"-isystem{TORCH / 'include'}", f"-isystem{sysconfig.get_paths()['include']}"]
    # One file for all but the kernels: torch's headers are most of the compiler's work.
    others = sorted(path for path in (CSRC / "cpu").glob("*.cpp") if not path.stem.startswith("kernels_"))
    unity = folder / "ops.cpp"
    unity.write_text("#include <Python.h>\n" + "".join(f'#include "{path}"\n' for path in others))
    objects, running = [], []
    # The table with pairs of bf16: fp16, fp32 and chained products of odd length go the way of plain AVX-512.
    wide = [(CSRC / f"cpu/kernels_{name}.cpp", registers) for name in ("avx512bf16", "amx")]
    for source, extra in (*wide, (unity, [])):
        objects.append(folder / f"{source.stem}.o")
        command = ["g++", *FLAGS, *defines, *includes, *extra, "-c", str(source), "-o", str(objects[-1])]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        finish(process)
    link = ["g++", "-shared", *map(str, objects), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", str(folder / "_C.so")]
    subprocess.run(link, check=True, capture_output=True, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize(("source", "flags"), WIDE)
def test_wide_objects_share_no_inline_function(source: str, flags: list[str], tmp_path: Path) -> None:
    """A weak symbol compiled with AVX-512 could be the copy that the linker keeps for every caller."""
    made = tmp_path / "kernels.o"
    # -O0 keeps every function that inlining would hide. Symbols are there before instructions, which are most work.
    reader = shutil.which("gcc-nm")
    half = ["-flto", "-fno-fat-lto-objects"] if reader else []
    command = ["g++", *FLAGS, "-O0", *half, *flags, "-c", str(CSRC / f"cpu/{source}.cpp"), "-o", str(made)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized command-line option" in compiled.stderr and source == "kernels_amx":
        pytest.skip("this g++ does not know AMX")
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    listed = subprocess.run([reader or "nm", "-C", str(made)], check=True, capture_output=True, text=True).stdout
    weak = [line for line in listed.splitlines() if " W " in line]  # functions; weak data (V) holds no instructions
    assert any("spu::isa_" in line for line in weak), listed
    # names that hold this instruction set's namespace, or its vector type, exist in this object alone
    shared = [line for line in weak if "spu::isa_" not in line and "__vector(" not in line]
    assert not shared, shared
