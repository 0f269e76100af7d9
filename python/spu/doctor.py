"""What of spu works on this machine, what does not, why, and the one command that adds it.

:func:`report` only looks: it installs nothing and prints nothing. Every probe is guarded, and nothing of torch or spu
is imported before the probe that is about it, so that an installation that is broken anywhere can be reported on.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spu import installing, toolchain

__all__ = ["Row", "report"]


@dataclass(frozen=True)
class Row:
    """One thing that spu can use.

    Attributes:
        name: what it is.
        works: whether it can be used here.
        detail: the version or place of what works, the reason why something does not.
        fix: the one command that adds it; empty where it works, and where no command would help.
    """

    name: str
    works: bool
    detail: str
    fix: str = ""


def report() -> list[Row]:
    """Probes everything; takes a few seconds, since it imports what it reports on. Never raises for a broken part."""
    probes: list[tuple[str, Callable[[], Row | list[Row]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("backends", _backends),
        ("spu._C", lambda: _extension("spu._C", "C++ kernels", _instruction_set)),
        ("spu._host", lambda: _extension("spu._host", "schedule simulator in C++", lambda: "")),
        ("C++ compiler", _compiler),
        ("triton", _triton),
        ("CUDA device", _cuda),
        ("kernel choice", _choice),
        ("nvcc", _nvcc),
        ("spu._cuda", _cuda_library),
    ]
    probes += [(name, _package_probe(name)) for name in _PACKAGES]
    rows: list[Row] = []
    for name, probe in probes:
        try:
            found = probe()
        except Exception as error:
            found = Row(name, False, f"the check itself failed: {_text(error)}")
        rows += found if isinstance(found, list) else [found]
    return rows


# Packages that some part of spu needs: for what, the first version that works, the first that may not.
_PACKAGES: dict[str, tuple[str, str, str]] = {
    "numpy": ("arrays", "1.26", ""),
    "safetensors": ("reading models", "0.5", ""),
    "transformers": ("Hugging Face models, spu train", "5.0", ""),
    "rich": ("the progress display of spu train", "13", ""),
    "typer": ("the spu command", "0.12", ""),
    "matplotlib": ("pictures of runs and plans", "3.8", ""),
}
_TRITON = ("kernels on CUDA devices", "3.6", "3.10")


def _python() -> Row:
    return Row("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Row:
    try:
        import torch
    except Exception as error:
        return Row(
            "torch",
            False,
            f"cannot be imported: {_text(error)}",
            f"{installing.pip()} install --force-reinstall 'torch>=2.11'",
        )
    version = str(torch.__version__)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if _numbers(version) < (2, 11):
        return Row(
            "torch",
            False,
            f"{version} ({build}); spu needs 2.11 or later",
            f"{installing.pip()} install --upgrade 'torch>=2.11'",
        )
    return Row("torch", True, f"{version} ({build}), {torch.get_num_threads()} threads")


def _backends() -> list[Row]:
    try:
        from spu.ops import backends

        found = backends()
    except Exception as error:
        return [Row("backends", False, f"spu.ops cannot be imported: {_text(error)}", installing.reinstall())]
    rows = []
    for name, status in found.items():
        # The dispatcher's fix explains; a row's is a command to paste.
        fix = "" if status.available else installing.rebuild() if name == "cpu" else status.fix
        if name == "cuda" and not status.available:
            fix = _cuda_library().fix  # what would make it work, if anything would on this machine
        rows.append(Row(f"backend {name}", status.available, status.reason or "available", fix))
    return rows


def _extension(module: str, what: str, more: Callable[[], str]) -> Row:
    """A compiled module of ours: not there, there but not loadable, or working."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:
        return Row(module, False, f"{what}: cannot be looked for: {_text(error)}", installing.reinstall())
    if spec is None:
        return Row(module, False, f"{what}: not built; spu works without, slower", installing.rebuild())
    try:
        importlib.import_module(module)
    except Exception as error:
        return Row(module, False, f"{what}: built, but cannot be loaded: {_text(error)}", installing.rebuild())
    try:
        extra = more()
    except ValueError as error:  # SPU_CPU_ISA asks for what this processor lacks
        return Row(module, False, f"{what}: {error}", "unset SPU_CPU_ISA")
    return Row(module, True, f"{what}{', ' + extra if extra else ''}")


def _instruction_set() -> str:
    """Which kernels the C++ library chose, and what the processor has."""
    flags = _cpu_flags()
    have = "" if flags is None else f" (processor has {', '.join(flags) or 'no vector instructions that they know'})"
    return f"runs its {importlib.import_module('spu._C').isa()} ones{have}"


def _cpu_flags() -> list[str] | None:
    """Those of the processor's instruction sets that kernels are compiled for; None where the system lists none."""
    known = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return [name for name in known if name in match[1].split()] if match else None


def _compiler() -> Row:
    named = os.environ.get("CXX", "").split()
    candidates = named[:1] or ["g++", "clang++", "c++"]
    path = next((found for name in candidates if (found := shutil.which(name))), None)
    if path is not None:
        return Row("C++ compiler", True, path)
    why = f"$CXX is {named[0]!r}, which is not there" if named else f"none of {', '.join(candidates)} is on the PATH"
    return Row(
        "C++ compiler", False, f"{why}; needed to build spu._C and spu._host only", installing.install_compiler()
    )


def _triton() -> Row:
    if sys.platform != "linux":
        return Row("triton", False, "there is no triton for this system; spu works without")
    row = _package("triton", *_TRITON)
    if row.works and not _has_cuda():
        return Row("triton", True, f"{row.detail}; without a CUDA device its kernels run only under TRITON_INTERPRET=1")
    return row


def _cuda() -> Row:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        text = ", ".join(
            f"cuda:{i} {card.name} {card.total_memory / 1e9:.1f} GB (sm_{card.major}{card.minor})"
            for i, card in enumerate(cards)
        )
        return Row("CUDA device", True, text)
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if not driver:
        return Row("CUDA device", False, "no NVIDIA driver is installed, so no card can be used; spu runs on the CPU")
    if torch.version.cuda is None:
        why = "there is an NVIDIA driver, but this torch is built for the CPU only"
        return Row("CUDA device", False, why, f"{installing.pip()} install --force-reinstall torch")
    why = f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) finds no card it can use"
    return Row("CUDA device", False, f"{why}; see which driver and cards there are", "nvidia-smi")


def _choice() -> list[Row]:
    """What the tables choose for the products of a card, one row a card; nothing without one."""
    if not _has_cuda():  # the rows above say why
        return []
    import torch

    from spu.kernels import table
    from spu.ops import choose_backend, forced_backend

    rows = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        used = table.tables(capability)[0]
        probe = torch.empty(1, dtype=torch.float16, device=f"cuda:{index}")
        parts = []
        for name, shape in (
            ("skinny", (16, 4096, 4096)),
            ("medium", (2048, 4096, 4096)),
            ("large", (8192, 8192, 8192)),
        ):
            config = table.config_of(capability, "linear", torch.float16, shape)
            backend = forced_backend() or choose_backend(probe, op="linear", shape=shape)
            tile = f" ({config.kind} {config.block_m}x{config.block_n}x{config.block_k})"
            parts.append(f"{name} {backend}{tile if backend == 'triton' else ''}")
        origin = ", ".join(f"{key} {value}" for key, value in used.facts.items() if key in ("device", "date"))
        text = f"linear fp16: {'; '.join(parts)}; table {used.arch} {used.origin} {origin}".rstrip()
        advice = "" if used.origin == "measured" else "; `spu tune` measures this card"
        rows.append(Row(f"kernels on cuda:{index}", True, text + advice))
    return rows


def _cuda_library() -> Row:
    """The CUDA C++ kernels: whether they are built, and whether this machine could build or use them."""
    what = "CUDA C++ kernels"
    if importlib.util.find_spec("spu._cuda") is None:
        return _cuda_library_not_built(what)
    try:
        import torch  # noqa: F401  (the library needs torch's symbols)

        architectures = importlib.import_module("spu._cuda").architectures()
    except Exception as error:
        return Row(
            "spu._cuda", False, f"{what}: built, but cannot be loaded: {_text(error)}", installing.rebuild_cuda()
        )
    built = f"{what} for sm_{', sm_'.join(architectures.split(';'))}"
    if not _has_cuda():
        return Row("spu._cuda", True, f"{built}; idle, since torch sees no CUDA device")
    from spu.ops import cuda_library

    if lacks := cuda_library.uncovered(architectures):
        fix = f"SPU_CUDA_ARCHS='{cuda_library.wanted()}' {installing.rebuild_cuda()}"
        return Row("spu._cuda", False, f"{built}: no code for {', '.join(lacks)}", fix)
    return Row("spu._cuda", True, f"{built}; used where the table of this card names them, or SPU_BACKEND=cuda does")


def _cuda_library_not_built(what: str) -> Row:
    nvcc, device = _nvcc().works, _has_cuda()
    if device and nvcc:
        return Row(
            "spu._cuda", False, f"{what}: not built, though nvcc is here; Triton's serve", installing.rebuild_cuda()
        )
    if device:
        why = f"{what}: not built, and there is no nvcc that can build them; Triton's serve"
        return Row(
            "spu._cuda", False, why, f"{toolchain.install_nvcc(installing.pip())} && {installing.rebuild_cuda()}"
        )
    if nvcc:
        why = f"{what}: not built; nvcc is here, but without a CUDA device they would have no use"
        return Row("spu._cuda", False, why)
    return Row("spu._cuda", False, f"{what}: not built; without a CUDA device they would have no use")


def _nvcc() -> Row:
    path = toolchain.find_nvcc()
    if path is None:
        named = os.environ.get("NVCC")
        why = (
            f"$NVCC is {named!r}, which is not there"
            if named
            else "not on the PATH, in $CUDA_HOME or /usr/local/cuda, nor installed by pip"
        )
        return Row("nvcc", False, f"{why}; only compiling CUDA code needs it", toolchain.install_nvcc(installing.pip()))
    version = toolchain.nvcc_version(path)
    if version is None:
        return Row(
            "nvcc", False, f"{path} does not run: --version says no release", toolchain.install_nvcc(installing.pip())
        )
    text = f"{path}, release {'.'.join(map(str, version))}"
    if version < toolchain.OLDEST_NVCC:
        oldest = ".".join(map(str, toolchain.OLDEST_NVCC))
        return Row(
            "nvcc",
            False,
            f"{text}; building spu._cuda needs {oldest} or later",
            toolchain.install_nvcc(installing.pip()),
        )
    return Row("nvcc", True, text)


def _package_probe(name: str) -> Callable[[], Row]:
    return lambda: _package(name, *_PACKAGES[name])


def _package(name: str, purpose: str, first: str, before: str) -> Row:
    wanted = f"{name}>={first}" + (f",<{before}" if before else "")
    install = f"{installing.pip()} install '{wanted}'"
    if importlib.util.find_spec(name) is None:
        return Row(name, False, f"not installed; needed for {purpose}", install)
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return Row(name, False, f"cannot be imported: {_text(error)}", f"{install} --force-reinstall")
    version = getattr(module, "__version__", None) or _metadata_version(name)
    if version and (_numbers(version) < _numbers(first) or (before and _numbers(version) >= _numbers(before))):
        return Row(name, False, f"{version}; {purpose} needs {wanted}", install)
    return Row(name, True, version or "installed")


def _metadata_version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _has_cuda() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False


def _text(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without trailing zeros: "2.13.0+cpu" is (2, 13)."""
    match = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in match[0].split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
