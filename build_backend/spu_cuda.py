"""``spu._cuda``: csrc/cuda by nvcc, an object for each kernel file or tensor-core product, linked with a static cudart.

Needs nvcc, CUTLASS's headers (PyPI: nvidia-cutlass) and torch's headers; neither a GPU nor a CUDA build of torch.

SPU_CUDA        ``auto`` (default): build where nvcc and an NVIDIA GPU are; ``1``: build or fail; ``0``: do not
SPU_CUDA_ARCHS  architectures, by default ``75;80;90a``; all of them: ``75;80;86;89;90a;100;120``
SPU_CUTLASS     folder of a CUTLASS checkout to use instead of the package
MAX_JOBS        compiler processes at once; by default the cores, bounded by memory
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension
from setuptools.errors import CompileError
from spu_tools import (
    COMMON_FLAGS,
    ROOT,
    cores,
    cuda_mode,
    escape,
    find_compiler,
    module_folder,
    say,
    shell,
    stable_flags,
    torch_link_flags,
)

OLDEST_NVCC = (12, 4)
KNOWN_ARCHS = {
    "75": (12, 4),
    "80": (12, 4),
    "86": (12, 4),
    "89": (12, 4),
    "90a": (12, 4),
    "100": (12, 8),
    "120": (12, 8),
}
DEFAULT_ARCHS = "75;80;90a"
# Forms of a product and the tiles that they are compiled with. On sm_90a one tile a form: a kernel takes a compiler
# nearly a minute and 3.3 GB there.
FORMS = {"forward": ("large", "small"), "dx": ("large", "small"), "dw": ("large",)}
CUDA = ROOT / "csrc/cuda"
GIGABYTE = 1 << 30


def find_nvcc() -> Path | None:
    """Return nvcc: $NVCC, $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda, or one that pip installed; None if there is
    none.

    In an isolated build pip hides what it installed: set NVCC there.
    """
    named = os.environ.get("NVCC")
    if named:
        found = shutil.which(named)
        return Path(found) if found else None
    candidates = [Path(home) / "bin/nvcc" for home in map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")) if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in filter(None, sys.path):
        candidates += sorted((Path(folder) / "nvidia").glob("*/bin/nvcc"))
    return next((path for path in candidates if path.is_file()), None)


def nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    """Return (major, minor), or None if nvcc does not run."""
    try:
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def toolkit(nvcc: Path) -> Path:
    """Return the folder of nvcc's headers and libraries. nvcc itself is asked for it: it may be a wrapper on PATH."""
    dry = subprocess.run([str(nvcc), "--dryrun", "-c", "x.cu"], capture_output=True, text=True, timeout=60)
    found = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else nvcc.resolve().parent.parent


def cudart(home: Path) -> Path | None:
    folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
    return next((folder / "libcudart_static.a" for folder in folders if (folder / "libcudart_static.a").exists()), None)


def has_gpu() -> bool:
    """Tell whether the NVIDIA driver shows a GPU. Only decides what SPU_CUDA=auto does."""
    signs = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvhost-gpu", "/usr/lib/wsl/lib/libcuda.so.1")  # Jetson, WSL
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or any(Path(sign).exists() for sign in signs)


def cutlass_include() -> Path | None:
    named = os.environ.get("SPU_CUTLASS")
    folder = module_folder("cutlass_library")
    candidates = [Path(named) / "include"] if named else [folder / "source/include"] if folder else []
    return next((path for path in candidates if (path / "cutlass/cutlass.h").exists()), None)


def architectures() -> list[str]:
    """Return the architectures in SPU_CUDA_ARCHS, e.g. ``["75", "80", "90a"]``.

    Raises:
        ValueError: for a name that is not known; the message lists those that are.
    """
    names = re.findall(r"[^;, ]+", os.environ.get("SPU_CUDA_ARCHS", "")) or DEFAULT_ARCHS.split(";")
    unknown = [name for name in names if name not in KNOWN_ARCHS]
    if unknown:
        raise ValueError(f"SPU_CUDA_ARCHS names {', '.join(unknown)}: choose from {';'.join(KNOWN_ARCHS)}")
    return sorted(set(names), key=list(KNOWN_ARCHS).index)


def missing() -> list[str]:
    """Return, in words, what building spu._cuda needs and this machine lacks."""
    nvcc = find_nvcc()
    if nvcc is None:
        return ["nvcc (install the CUDA toolkit 12.4 or later, or set CUDA_HOME)"]
    version = nvcc_version(nvcc)
    if version is None:
        return [f"an nvcc that runs ({nvcc} --version says no release)"]
    lacks = []
    oldest = max([OLDEST_NVCC, *(KNOWN_ARCHS[arch] for arch in architectures())])
    if version < oldest:
        wanted = f"{oldest[0]}.{oldest[1]}"
        lacks.append(f"nvcc {wanted} or later for SPU_CUDA_ARCHS={';'.join(architectures())} ({nvcc} is "
                     f"{version[0]}.{version[1]})")  # fmt: skip
    if cudart(toolkit(nvcc)) is None:
        lacks.append(f"libcudart_static.a beside nvcc in {toolkit(nvcc)} (pip: nvidia-cuda-runtime)")
    if cutlass_include() is None:
        lacks.append("CUTLASS's headers (pip install --no-deps nvidia-cutlass==4.2.0.0, or set SPU_CUTLASS)")
    return lacks


def wants_cuda() -> bool:
    """Tell whether spu._cuda is going to be built, as far as that is known before its build requirements are there."""
    return cuda_mode() == "1" or (cuda_mode() == "auto" and find_nvcc() is not None and has_gpu())


def cuda_extension() -> Extension | None:
    """Return spu._cuda, if it is to be built here.

    Raises:
        CompileError: SPU_CUDA=1 and something is missing; the message says what and how to get it.
    """
    if cuda_mode() == "0" or (cuda_mode() == "auto" and find_nvcc() is None):
        return None
    if not wants_cuda():
        say("nvcc is here but no NVIDIA GPU: installing without the CUDA C++ kernels; SPU_CUDA=1 builds them (minutes)")
        return None
    lacks = missing()
    if not lacks:
        sources = sorted(path.relative_to(ROOT).as_posix() for path in CUDA.glob("*.c*"))
        return Extension("spu._cuda", sources, py_limited_api=True)
    if cuda_mode() == "1":
        raise CompileError("SPU_CUDA=1, but building spu._cuda needs " + "; ".join(lacks))
    say("installing without the CUDA C++ kernels; building them needs " + "; ".join(lacks))
    return None


@dataclass(frozen=True)
class Object:
    """One object file: its source, the flags that are its own, and the memory that compiling it takes."""

    name: str
    source: Path
    flags: tuple[str, ...]
    gigabytes: float = 1.0


def _code(arch: str, *, ptx: bool = False) -> str:
    number = arch.rstrip("a")
    return f"-gencode=arch=compute_{number},code=" + (f"compute_{number}" if ptx else f"sm_{number}")


def _products(arch: str, archs: list[str]) -> list[Object]:
    """Return the matrix products for one generation of tensor cores: an object a form, with all types and tiles."""
    if arch == "90":
        source, code, gigabytes = "gemm_wgmma.cu", ["-gencode=arch=compute_90a,code=sm_90a"], 3.5
    elif arch == "75":
        source, code, gigabytes = "gemm_mma.cu", [_code("75")], 1.2
    else:
        # also as PTX, for the devices that come later
        native = [name for name in archs if name not in ("75", "90a")]
        source, code, gigabytes = "gemm_mma.cu", [*map(_code, native), _code("80", ptx=True)], 1.2
    # 177: unused functions, which each form leaves some of
    flags = ("--expt-relaxed-constexpr", "-DNDEBUG", "-fmad=false", "-diag-suppress=177", *code, f"-DSPU_ARCH={arch}")
    return [
        Object(
            f"gemm_sm{arch}_{form}",
            CUDA / source,
            (*flags, f"-DSPU_FORM={form}", f"-DSPU_SMALL={int('small' in tiles)}"),
            gigabytes,
        )
        for form, tiles in FORMS.items()
    ]


def products_of(name: str) -> list[tuple[str, str]]:
    """Return (type, tile) of each kernel in an object of matrix products, by its name, e.g. "gemm_sm80_forward"."""
    arch, form = name.removeprefix("gemm_sm").split("_")
    dtypes = ("fp16",) if arch == "75" else ("fp16", "bf16")
    return [(dtype, tile) for dtype in dtypes for tile in (FORMS[form][:1] if arch == "90" else FORMS[form])]


def generations(archs: list[str]) -> list[str]:
    """Return the generations of tensor cores whose products are compiled for these architectures, the slowest build
    first.
    """
    some_mma = any(name not in ("75", "90a") for name in archs)
    return [*(["90"] if "90a" in archs else []), *(["80"] if some_mma else []), *(["75"] if "75" in archs else [])]


def device_objects(archs: list[str], *, products: bool = True) -> list[Object]:
    """Return the objects that nvcc compiles, the slowest first; without ``products`` only the small ones.

    -fmad=false: a multiply-add is fused where the arithmetic says so, as on the CPU; the products themselves are not
    made of multiply-adds.
    """
    large = [one for arch in generations(archs) for one in _products(arch, archs)] if products else []
    code = (*map(_code, archs), _code(archs[-1], ptx=True))
    plain = [
        Object(path.stem, path, ("-fmad=false", *code))
        for path in sorted(CUDA.glob("*.cu"))
        if path.name not in ("gemm_mma.cu", "gemm_wgmma.cu")
    ]
    return [*large, *plain]


def nvcc_command(nvcc: Path, one: Object) -> list[str]:
    """Return the command that compiles an object, without its output."""
    include = cutlass_include()
    command = [str(nvcc), "-std=c++17", "-O3", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    if "CXX" in os.environ and (compiler := find_compiler()) is not None:
        command.append(f"-ccbin={compiler[0]}")  # the one that was named: the default may be too new for this nvcc
    command += ["--threads=1", f"-I{ROOT / 'csrc'}", *([f"-isystem={include}"] if include else []), *one.flags]
    return [*command, "-c", str(one.source)]


def host_command(home: Path, archs: list[str], products: list[str]) -> list[str]:
    """Return the command that compiles the files without device code; ``products``: the generations that are linked."""
    compiler = find_compiler()
    assert compiler is not None
    have = [f"-DSPU_SM{arch}={int(arch in products)}" for arch in ("75", "80", "90")]
    include = next(path for path in (home / "include", *home.glob("targets/*/include")) if path.exists())
    return [*compiler, *COMMON_FLAGS, *stable_flags(), *have, f'-DSPU_CUDA_ARCHS="{";".join(archs)}"',
            f"-isystem{include}"]  # fmt: skip


def memory_gigabytes() -> float:
    """Return the memory that is free for compilers."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 / GIGABYTE if found else 4.0


def heavy_jobs() -> int:
    """Return how many of the largest compilations may run at once: one for each 4 GB of memory, at most one a core."""
    most = int(os.environ.get("MAX_JOBS") or cores())
    return max(1, min(most, int(memory_gigabytes() // 4)))


def write_cuda_ninja(folder: Path, *, products: bool = True, extra: tuple[str, ...] = ()) -> Path:
    """Write the ninja file of spu._cuda into ``folder``; return the path of the library it makes.

    Args:
        products: False leaves out the matrix products on tensor cores, nearly all of the work (for tests).
        extra: more flags for nvcc.
    """
    nvcc, archs = find_nvcc(), architectures()
    assert nvcc is not None
    compiler, home = find_compiler(), toolkit(nvcc)
    static = cudart(home)
    assert compiler is not None
    assert static is not None
    library = folder / "spu__cuda.so"
    # Nothing of the static libraries is exported: another copy of the runtime may be in the process.
    link = [*compiler, "-shared", "-Wl,--exclude-libs,ALL"]
    after = [str(static), *torch_link_flags(), "-ldl", "-lrt", "-lpthread"]
    lines = ["ninja_required_version = 1.5", "pool heavy", f"  depth = {heavy_jobs()}"]
    lines += ["rule device", "  command = $compile -MD -MF $out.d -o $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["  description = compile $out", "rule host"]
    host = shell(host_command(home, archs, generations(archs) if products else []))
    lines += [f"  command = {host} -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d"]
    lines += ["  deps = gcc", "  description = compile $in", "rule link"]
    lines += [f"  command = {shell(link)} $in {shell(after)} -o $out", "  description = link $out"]
    outputs = []
    for one in device_objects(archs, products=products):
        outputs.append(escape(folder / f"{one.name}.o"))
        command = shell([*nvcc_command(nvcc, one), *extra])
        lines += [f"build {outputs[-1]}: device {escape(one.source)}", f"  compile = {command}"]
        lines += ["  pool = heavy"] if one.gigabytes > 2 else []
    for source in sorted(CUDA.glob("*.cpp")):
        outputs.append(escape(folder / f"{source.stem}_host.o"))
        lines.append(f"build {outputs[-1]}: host {escape(source)}")
    lines += [f"build {escape(library)}: link {' '.join(outputs)}", f"default {escape(library)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    return library
