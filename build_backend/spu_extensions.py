"""What is compiled and how: the two extensions, their flags, and a build_ext command that runs ninja.

``spu._C``     csrc/cpu/*.cpp. Tensor kernels over LibTorch's stable ABI and Python's limited API (abi3): one binary
               for torch 2.11 and later and CPython 3.10 and later. Files named ``*_avx2.cpp`` and ``*_avx512.cpp``
               get their instruction set, all others the baseline, so that the choice is made at run time by cpuid.
``spu._host``  csrc/host/*.cpp. pybind11 module over plain C++, one binary per CPython version.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from spu_build import ROOT, build_mode, find_compiler

TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11: the oldest one whose stable ABI the op library uses
PY_LIMITED_API = "0x030a0000"  # CPython 3.10

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# gcc 12 warns about its own AVX-512 headers, which use an uninitialised register on purpose
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": AVX512,
    "_avx512bf16": [*AVX512, "-mavx512bf16"],
}
# Contraction is off everywhere: a kernel that wants a fused multiply-add says so, and all builds round alike.
COMMON_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off",
    "-Wall", "-Wextra", f"-DSPU_X86={int(IS_X86)}", f"-I{ROOT / 'csrc'}",
]  # fmt: skip


def isa_flags(source: str) -> list[str]:
    """Extra compiler flags of one source file, from its name's suffix."""
    stem = Path(source).stem
    return next((flags for suffix, flags in ISA_FLAGS.items() if stem.endswith(suffix)), [])


def _sources(folder: str) -> list[str]:
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / folder).glob("*.cpp"))
    return [source for source in found if IS_X86 or not isa_flags(source)]


def _module_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _missing() -> list[str]:
    """What compiling needs and this environment lacks, in words."""
    lacks = []
    if os.name != "posix":
        lacks.append(f"a supported platform (the native build knows Linux and macOS, this is {sys.platform})")
    if find_compiler() is None:
        lacks.append("a C++17 compiler (apt install g++, or set CXX)")
    torch_folder = _module_folder("torch")
    if torch_folder is None:
        lacks.append("torch (pip install torch==2.13.0)")
    elif not (torch_folder / "include/torch/csrc/stable/library.h").exists():
        lacks.append(f"torch >= 2.11 (the one in {torch_folder} has no stable ABI headers)")
    if _module_folder("pybind11") is None:
        lacks.append("pybind11 (pip install pybind11)")
    if _ninja() is None:
        lacks.append("ninja (pip install ninja)")
    return lacks


def _ninja() -> str | None:
    folder = _module_folder("ninja")
    if folder is not None:
        import ninja

        if (Path(ninja.BIN_DIR) / "ninja").exists():
            return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def say(message: str) -> None:
    print(f"spu: {message}", file=sys.stderr, flush=True)


def wanted_extensions() -> list[Extension]:
    """The extensions to build here; an empty list makes a pure-Python wheel.

    Raises:
        CompileError: SPU_BUILD=1 and a tool or the sources are missing.
    """
    mode = build_mode()
    if mode == "0":
        say("SPU_BUILD=0: installing without compiled extensions; ops run on the reference backend")
        return []
    lacks = _missing()
    if lacks:
        if mode == "1":
            raise CompileError("SPU_BUILD=1, but compiling needs " + "; ".join(lacks))
        say("installing without compiled extensions; compiling needs " + "; ".join(lacks))
        return []
    extensions = []
    for name, folder, limited in (("spu._C", "cpu", True), ("spu._host", "host", False)):
        if sources := _sources(folder):
            extensions.append(Extension(name, sources, py_limited_api=limited))
        elif mode == "1":
            raise CompileError(f"SPU_BUILD=1, but csrc/{folder} has no *.cpp: the source tree is incomplete")
    return extensions


def _flags(extension: Extension) -> tuple[list[str], list[str]]:
    """(compiler flags, linker flags) of one extension."""
    python_include = f"-isystem{sysconfig.get_paths()['include']}"
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    if extension.name == "spu._C":
        torch_folder = _module_folder("torch")
        assert torch_folder is not None  # wanted_extensions() has looked
        compile_flags = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-DPy_LIMITED_API={PY_LIMITED_API}",
            f"-isystem{torch_folder / 'include'}", python_include,
        ]  # fmt: skip
        # No rpath: `import spu` imports torch first, which has the library loaded under this name.
        return COMMON_FLAGS + compile_flags, [*link, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    pybind_folder = _module_folder("pybind11")
    assert pybind_folder is not None
    return [*COMMON_FLAGS, f"-isystem{pybind_folder / 'include'}", python_include], link


def _escape(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(arguments: list[str]) -> str:
    import shlex

    return shlex.join(arguments).replace("$", "$$")


def write_ninja(extension: Extension, folder: Path) -> Path:
    """Writes the ninja file of one extension into ``folder``; returns the path of the library it makes."""
    compiler = find_compiler()
    assert compiler is not None
    compile_flags, link_flags = _flags(extension)
    library = folder / (extension.name.replace(".", "_") + ".so")
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {_shell(compiler)} -MMD -MF $out.d {_shell(compile_flags)} $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = {_shell(compiler)} $in {_shell(link_flags)} -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in extension.sources:
        output = folder / (Path(source).stem + ".o")
        objects.append(_escape(output))
        lines += [f"build {_escape(output)}: compile {_escape(ROOT / source)}", f"  isa = {_shell(isa_flags(source))}"]
    lines += [f"build {_escape(library)}: link {' '.join(objects)}", f"default {_escape(library)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    return library


def _jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Two builds of one tree at once would have ninja write the same objects twice.
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class BuildExtensions(build_ext):
    """build_ext that compiles through ninja: in parallel, incrementally, with flags per file."""

    def run(self) -> None:
        # Into the place it is wanted at (the source tree if inplace), without setuptools' copy from build/lib.
        failed = [extension for extension in self.extensions if not self._build(extension)]
        if not failed:
            return
        names = ", ".join(extension.name for extension in failed)
        asked_for = self.inplace and not self.editable_mode  # `setup.py build_ext --inplace`: nobody wants it to go on
        if build_mode() == "1" or asked_for:
            raise CompileError(f"{names} did not compile; the compiler's messages are above")
        say(f"{names} did not compile (messages above): installing without; SPU_BUILD=1 makes this fatal")
        self.extensions = [extension for extension in self.extensions if extension not in failed]

    def _build(self, extension: Extension) -> bool:
        ninja = _ninja()
        assert ninja is not None
        folder = Path(self.build_temp).resolve() / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            library = write_ninja(extension, folder)
            if subprocess.run([ninja, "-C", str(folder), f"-j{_jobs()}"]).returncode != 0:
                return False
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: overwriting a library that a running process has mapped would crash that process.
            beside = target.with_name(target.name + ".new")
            shutil.copyfile(library, beside)
            beside.chmod(0o755)
            os.replace(beside, target)
        return True
