"""The compiled parts: the extensions, their flags, and a build_ext command that runs ninja.

``spu._C``     csrc/cpu/*.cpp. Tensor kernels over LibTorch's stable ABI and Python's limited API (abi3): one binary
               for torch 2.11 and later and CPython 3.10 and later. Files named ``*_avx2.cpp``, ``*_avx512.cpp`` and so
               on get their instruction set, all others the baseline, so that the choice is made at run time by cpuid.
``spu._host``  csrc/host/*.cpp. pybind11 module over plain C++, one binary per CPython version.
``spu._cuda``  csrc/cuda/*.cu and *.cpp, where nvcc and a GPU are or SPU_CUDA=1 asks for it: see spu_cuda.py.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from spu_cuda import cuda_extension, write_cuda_ninja
from spu_tools import (
    COMMON_FLAGS,
    IS_X86,
    ROOT,
    build_mode,
    cores,
    cuda_mode,
    escape,
    find_compiler,
    module_folder,
    python_include,
    say,
    shell,
    stable_flags,
    torch_link_flags,
)

# gcc 12 warns about its own AVX-512 headers, which use an uninitialised register on purpose
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": AVX512,
    "_avx512bf16": [*AVX512, "-mavx512bf16"],
    "_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def isa_flags(source: str) -> list[str]:
    """Return the extra compiler flags of one source file, from its name's suffix."""
    stem = Path(source).stem
    return next((flags for suffix, flags in ISA_FLAGS.items() if stem.endswith(suffix)), [])


@functools.cache
def has_amx() -> bool:
    """Tell whether the compiler knows the tiles of AMX (g++ 11, clang 12); without, ``*_amx.cpp`` are left out."""
    compiler = find_compiler()
    if compiler is None or not IS_X86:
        return False
    asked = [*compiler, "-mamx-tile", "-mamx-bf16", "-x", "c++", "-fsyntax-only", os.devnull]
    known = subprocess.run(asked, capture_output=True).returncode == 0
    if not known:
        say(f"{compiler[0]} does not know -mamx-tile and -mamx-bf16: the kernels for AMX are left out")
    return known


def _sources(folder: str) -> list[str]:
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / folder).glob("*.cpp"))
    found = [source for source in found if IS_X86 or not isa_flags(source)]
    return [source for source in found if not source.endswith("_amx.cpp") or has_amx()]


def _building() -> bool:
    """Tell whether this run of setup.py makes a package. Others only ask about it, before requirements are there."""
    return not {"egg_info", "dist_info", "sdist", "clean", "--version", "--name"} & set(sys.argv[1:])


def _no_toolchain() -> list[str]:
    """Return, in words, what compiling needs of the machine, and the machine lacks."""
    lacks = []
    if os.name != "posix":
        lacks.append(f"a supported platform (the native build knows Linux and macOS, this is {sys.platform})")
    if find_compiler() is None:
        lacks.append("a C++17 compiler (apt install g++, or set CXX)")
    return lacks


def _missing() -> list[str]:
    """Return, in words, what compiling needs of the environment, and the environment lacks."""
    lacks = []
    torch_folder = module_folder("torch")
    if torch_folder is None:
        lacks.append("torch (pip install torch==2.13.0)")
    elif not (torch_folder / "include/torch/csrc/stable/library.h").exists():
        lacks.append(f"torch >= 2.11 (the one in {torch_folder} has no stable ABI headers)")
    if module_folder("pybind11") is None:
        lacks.append("pybind11 (pip install 'pybind11>=3.0,<4')")
    if _ninja() is None:
        lacks.append("ninja (pip install 'ninja>=1.11')")
    return lacks


def _ninja() -> str | None:
    folder = module_folder("ninja")
    if folder is not None:
        import ninja

        if (Path(ninja.BIN_DIR) / "ninja").exists():
            return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def wanted_extensions() -> list[Extension]:
    """Return the extensions to build here; an empty list makes a pure-Python wheel.

    Raises:
        CompileError: what compiling needs is missing, though there is a compiler or SPU_BUILD=1 asks for it. A package
            without kernels is never made in silence: pip shows what setup.py says only where it fails.
    """
    mode = build_mode()
    if mode == "0":
        if cuda_mode() == "1":
            raise CompileError("SPU_CUDA=1 asks for a compiled library, SPU_BUILD=0 forbids it: drop one of them")
        say("SPU_BUILD=0: installing without compiled extensions; ops run on the reference backend")
        return []
    machine, environment = _no_toolchain(), _missing()
    lacks = machine + environment
    asked = "SPU_BUILD=1" if mode == "1" else "SPU_CUDA=1" if cuda_mode() == "1" else ""
    if lacks and not _building():
        return []
    if lacks and (asked or not machine):
        why = f"{asked}, but compiling" if asked else "compiling the kernels"
        raise CompileError(
            f"{why} needs {'; '.join(lacks)}. With --no-build-isolation nothing installs that by itself: do, and "
            "install again. SPU_BUILD=0 installs without kernels; 16-bit training is slow then"
        )
    if lacks:
        say("installing without compiled extensions; compiling needs " + "; ".join(lacks))
        return []
    extensions = []
    for name, folder, limited in (("spu._C", "cpu", True), ("spu._host", "host", False)):
        if sources := _sources(folder):
            extensions.append(Extension(name, sources, py_limited_api=limited))
        elif mode == "1":
            raise CompileError(f"SPU_BUILD=1, but csrc/{folder} has no *.cpp: the source tree is incomplete")
    if (cuda := cuda_extension()) is not None:
        extensions.append(cuda)
    return extensions


def _flags(extension: Extension) -> tuple[list[str], list[str]]:
    """Return (compiler flags, linker flags) of one extension."""
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    if extension.name == "spu._C":
        return [*COMMON_FLAGS, f"-DSPU_AMX={int(has_amx())}", *stable_flags()], [*link, *torch_link_flags()]
    pybind_folder = module_folder("pybind11")
    assert pybind_folder is not None
    return [*COMMON_FLAGS, f"-isystem{pybind_folder / 'include'}", python_include()], link


def write_ninja(extension: Extension, folder: Path) -> Path:
    """Write the ninja file of one extension into ``folder``; return the path of the library it makes."""
    compiler = find_compiler()
    assert compiler is not None
    compile_flags, link_flags = _flags(extension)
    library = folder / (extension.name.replace(".", "_") + ".so")
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {shell(compiler)} -MMD -MF $out.d {shell(compile_flags)} $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = {shell(compiler)} $in {shell(link_flags)} -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in extension.sources:
        output = folder / (Path(source).stem + ".o")
        objects.append(escape(output))
        lines += [f"build {escape(output)}: compile {escape(ROOT / source)}", f"  isa = {shell(isa_flags(source))}"]
    lines += [f"build {escape(library)}: link {' '.join(objects)}", f"default {escape(library)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    return library


def _jobs() -> int:
    return max(1, int(os.environ.get("MAX_JOBS") or min(cores(), 8)))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Two builds of one tree at once would have ninja write the same objects twice.
    import fcntl  # not on Windows, where nothing is compiled

    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class BuildExtensions(build_ext):
    """build_ext that compiles through ninja: in parallel, incrementally, with flags per file."""

    def run(self) -> None:
        # Into the place it is wanted at (the source tree if inplace), without setuptools' copy from build/lib.
        asked_for = self.inplace and not self.editable_mode  # `setup.py build_ext --inplace`: nobody wants it to go on
        if asked_for and not self.extensions and build_mode() != "0":
            raise CompileError("nothing was compiled; what is missing is said above")
        failed = [extension for extension in self.extensions if not self._build(extension)]
        if not failed:
            return
        names = ", ".join(extension.name for extension in failed)
        # SPU_BUILD=1 is about the libraries that every machine has; spu._cuda is demanded by its own variable.
        fatal = [extension for extension in failed if extension.name != "spu._cuda"]
        if cuda_mode() == "1" or (fatal and (build_mode() == "1" or asked_for)):
            raise CompileError(f"{names} did not compile; the compiler's messages are above")
        say(f"{names} did not compile (messages above): installing without; SPU_BUILD=1, SPU_CUDA=1 make this fatal")
        self.extensions = [extension for extension in self.extensions if extension not in failed]

    def _build(self, extension: Extension) -> bool:
        ninja = _ninja()
        assert ninja is not None
        folder = Path(self.build_temp).resolve() / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            library = write_cuda_ninja(folder) if extension.name == "spu._cuda" else write_ninja(extension, folder)
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
