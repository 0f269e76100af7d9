"""What is carried to a machine with a GPU: made by ``prepare.py``, checked and taken out by ``lease.py``.

The folder holds ``site`` (the package, compiled), ``triton.tar.xz`` (kernels that Triton finds in its cache),
``launches.json`` (their names), ``wheels``, and ``manifest.json``: every file's hash and what it was made for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 64 << 20  # with the sources


def digest(files: Iterable[Path], base: Path) -> str:
    """Return one hash of some files, their names below ``base`` with them."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(str(path.relative_to(base)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def sources() -> dict[str, str]:
    """Return the hashes of what is compiled: C++ and CUDA, and the Triton kernels."""
    compiled = [path for ext in ("cpp", "h", "cu") for path in (ROOT / "csrc").rglob(f"*.{ext}")]
    return {"csrc": digest(compiled, ROOT), "kernels": digest((ROOT / "kernels" / "triton").glob("*.py"), ROOT)}


@lru_cache(maxsize=1)
def interpreter() -> dict[str, str]:
    """Return what the compiled parts depend on: Python, Triton and the hash of its library."""
    found = {"python": f"cp{sys.version_info.major}{sys.version_info.minor}"}
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        import triton

        library = Path(spec.origin).parent / "_C" / "libtriton.so"
        found |= {"triton": triton.__version__, "libtriton": hashlib.sha256(library.read_bytes()).hexdigest()}
    return found


def files_of(carry: Path) -> list[Path]:
    return [path for path in sorted(carry.rglob("*")) if path.is_file() and path.name != "manifest.json"]


def write_manifest(carry: Path, made_for: dict[str, str], **more: Any) -> dict[str, Any]:
    """Write and return the manifest of a folder."""
    files = {
        str(path.relative_to(carry)): [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in files_of(carry)
    }
    made = {"made_for": made_for, "sources": sources(), **more, "files": files}
    (carry / "manifest.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def unpacked(prepared: Path, into: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Check what was carried and take it out; return (environment of the parts, what was found).

    A file that is missing or changed raises: half a package must not be measured. What was made for another Python or
    Triton is left out, and said.

    Raises:
        SystemExit: a file differs from the manifest.
    """
    carry = prepared / "carry"
    if not (carry / "manifest.json").is_file():
        return {}, {"carried": False, "why": f"no {carry}: `make gpu-prepare` makes it; the installed package is used"}
    manifest = json.loads((carry / "manifest.json").read_text())
    wrong = [
        name for name, (size, value) in manifest["files"].items()
        if not (carry / name).is_file() or hashlib.sha256((carry / name).read_bytes()).hexdigest() != value
    ]  # fmt: skip
    if wrong:
        raise SystemExit(f"{carry}: {', '.join(wrong[:5])} differ from the manifest: run `make gpu-prepare` again")
    identity = hashlib.sha256((carry / "manifest.json").read_bytes()).hexdigest()
    if not (into / identity).exists():  # a second run keeps what the first has compiled
        shutil.rmtree(into, ignore_errors=True)
        (into / "triton").mkdir(parents=True)
        _take_out(carry, into)
        (into / identity).touch()
    here, made_for, now = interpreter(), manifest["made_for"], sources()
    row: dict[str, Any] = {"carried": True, "here": here, "made_for": made_for}
    row["stale"] = [name for name in now if now[name] != manifest["sources"][name]]
    row["package"] = here["python"] == made_for["python"]
    row["cache"] = all(here.get(key) == made_for[key] for key in ("python", "triton", "libtriton"))
    row["kernels"] = sum(1 for _ in (into / "triton").glob("*/*.cubin"))
    environment = {"TRITON_CACHE_DIR": str(into / "triton")}
    if row["package"]:
        overlay(into / "site")  # the sources that travel are the newest
        environment["PYTHONPATH"] = os.pathsep.join([str(into / "site"), str(into / "wheels")])
    return environment, row


def _take_out(carry: Path, into: Path) -> None:
    if (carry / "triton.tar.xz").is_file():
        with tarfile.open(carry / "triton.tar.xz") as archive:
            archive.extractall(into / "triton", filter="data")
    if (carry / "site").is_dir():
        shutil.copytree(carry / "site", into / "site")
    for wheel in carry.glob("wheels/*.whl"):
        with zipfile.ZipFile(wheel) as archive_of_one:
            archive_of_one.extractall(into / "wheels")


def overlay(site: Path) -> None:
    """Put this tree's Python files over a package's."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "kernels")
    shutil.copytree(ROOT / "python" / "spu", site / "spu", ignore=ignore, dirs_exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels" / "triton", site / "spu" / "kernels", ignore=ignore, dirs_exist_ok=True)
