"""``make gpu-prepare``: make at home what a machine with a GPU is given, so that its time is not spent on compilers.

    python benchmarks/gpu/prepare.py [--python PYTHON] [--jobs N] [--only package cache wheels] [--dry]

In ``build/gpu-prepare/carry``: the package with ``_C``, ``_host`` and ``_cuda`` for sm_90a, compiled for that machine's
Python and torch; the lease's Triton kernels in Triton's cache, packed; and the wheels that the machine lacks. The
manifest says what they were made for. What was compiled is kept beside it: a second run compiles what has changed.
``PYTHON`` is an interpreter with that machine's torch and Triton; by default an environment that is made once in
``build/gpu-prepare/env`` (a download of some gigabytes).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from lease_carried import MOST_BYTES, ROOT, files_of, overlay, write_manifest

FOLDER = ROOT / "build" / "gpu-prepare"
CARRY = FOLDER / "carry"
PYTHON_VERSION = "python3.12"
VERSIONS = ("torch==2.11.0", "triton==3.6.0")
BUILD_TOOLS = ("setuptools>=77", "wheel", "pybind11>=3.0,<4", "ninja>=1.11", "pytest", "pytest-timeout", "numpy<2.3",
               "safetensors", "transformers>=5.0")  # fmt: skip
CUTLASS = "nvidia-cutlass==4.2.0.0"
WHEELS = ("liger-kernel",)  # a peer; nothing else may need it
STEPS = ("package", "cache", "wheels")
_LEFT_OUT = (".source", ".ttir", ".ttgir", ".llir", ".ptx")  # what a launch does not read


def run(command: list[str], **variables: str) -> None:
    """Run a command; its output goes to the log.

    Raises:
        SystemExit: it failed; the log's last lines are printed.
    """
    log = FOLDER / "prepare.log"
    with log.open("a") as out:
        out.write("$ " + " ".join(command) + "\n")
        out.flush()
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = log.read_text(errors="replace").splitlines()[-20:]
        raise SystemExit("\n".join([*lines, f"{command[0]} ended with {done.returncode}: see {log}"]))


def environment(named: str | None) -> str:
    """Return an interpreter of the other machine's versions: the one that is named, or one that is made here."""
    if named:
        return named
    own = FOLDER / "env" / "bin" / "python"
    if not (FOLDER / "env" / "ready").exists():
        run([_python(), "-m", "venv", str(FOLDER / "env")])
        run([str(own), "-m", "pip", "install", "--quiet", *VERSIONS, *BUILD_TOOLS])
        run([str(own), "-m", "pip", "install", "--quiet", "--no-deps", CUTLASS])
        (FOLDER / "env" / "ready").touch()
    return str(own)


def _python() -> str:
    """Return an interpreter of the other machine's version; pyenv's shim of one that is not chosen does not run."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    version = PYTHON_VERSION.rpartition("python")[2]
    for path in (shutil.which(PYTHON_VERSION), *sorted(map(str, pyenv.glob(f"{version}*/bin/python")))):
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    raise SystemExit(f"{PYTHON_VERSION} is not here, which the GPU's machine has: say LEASE_PYTHON=INTERPRETER")


def package(python: str, jobs: int, dry: bool) -> None:
    """Build into carry/site; dry: without compiling."""
    shutil.rmtree(FOLDER / "site", ignore_errors=True)  # modules that are gone; objects stay
    mode = {"SPU_BUILD": "0"} if dry else {"SPU_BUILD": "1", "SPU_CUDA": "1", "SPU_CUDA_ARCHS": "90a"}
    run([python, "setup.py", "build", "--build-temp", str(FOLDER / "objects"), "--build-lib", str(FOLDER / "site")],
        MAX_JOBS=str(jobs), **mode)  # fmt: skip
    shutil.rmtree(CARRY / "site", ignore_errors=True)
    shutil.copytree(FOLDER / "site", CARRY / "site", ignore=shutil.ignore_patterns("__pycache__"))
    for library in CARRY.glob("site/spu/*.so"):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=False)
    if not dry and len(list(CARRY.glob("site/spu/_*.so"))) != 3:
        raise SystemExit("the package lacks one of _C, _host and _cuda: see prepare.log")


def cache(python: str, jobs: int, dry: bool) -> dict[str, object]:
    """Compile what the lease launches and pack it; return the counts."""
    made = FOLDER / "triton"
    made.mkdir(parents=True, exist_ok=True)
    stub = _empty_libcuda()
    listed, log = FOLDER / "launches.json", FOLDER / "carry.log"
    command = [python, str(ROOT / "benchmarks/gpu/carry.py"), "--cache", str(made), "--jobs", str(jobs), "--list",
               str(listed), *(["--dry"] if dry else [])]  # fmt: skip
    with tempfile.TemporaryDirectory() as own:
        overlay(Path(own) / "site")  # recording needs no compiled part
        paths = os.pathsep.join([str(Path(own) / "site"), str(ROOT / "benchmarks" / "gpu")])
        variables = {"PYTHONPATH": paths, "SPU_CACHE": str(Path(own) / "cache"), **stub}
        with log.open("w") as out:  # a line as each source is recorded
            done = subprocess.run(
                command, cwd=FOLDER, env={**os.environ, **variables}, stdout=out, stderr=subprocess.STDOUT
            )
    lines = log.read_text(errors="replace").splitlines()
    if done.returncode:
        raise SystemExit("\n".join([*lines[-20:], f"no kernel was compiled: see {log}"]))
    counts: dict[str, object] = next(json.loads(line) for line in reversed(lines) if line.startswith('{"launches"'))
    shutil.copy(listed, CARRY / "launches.json")
    pack(made, set(json.loads(listed.read_text())), CARRY / "triton.tar.xz")
    return counts


def pack(made: Path, hashes: set[str], into: Path) -> None:
    """Pack these kernels of a Triton cache, and the C modules that launch them; Triton names a kernel's folder by its
    hash in base32.
    """
    names = {base64.b32encode(bytes.fromhex(one)).decode().rstrip("=") for one in hashes}
    with tarfile.open(into, "w:xz", preset=6) as archive:
        for folder in sorted(path for path in made.iterdir() if path.is_dir()):
            if folder.name not in names and any(folder.glob("*.cubin")):
                continue  # of an earlier state of the sources
            for path in sorted(folder.iterdir()):
                if path.suffix not in _LEFT_OUT and path.is_file() and path.name != "lock":
                    archive.add(path, f"{folder.name}/{path.name}")


def _empty_libcuda() -> dict[str, str]:
    """Return the environment in which Triton links its C modules against a driver library of the right name that has
    nothing in it; they look its functions up on the card. Empty without a C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return {}
    folder = FOLDER / "libcuda"
    folder.mkdir(parents=True, exist_ok=True)
    name = "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", str(folder / name)]
    run(command)
    earlier = os.environ.get("LD_LIBRARY_PATH", "")
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": f"{folder}:{earlier}".rstrip(":")}


def wheels(python: str) -> None:
    (CARRY / "wheels").mkdir(parents=True, exist_ok=True)
    pip = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(CARRY / "wheels")]
    for name in WHEELS:
        run([*pip, name])


def travelling() -> int:
    """Return the bytes of the files that git tracks: they travel too."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in listed if name and (ROOT / name).is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description="Make what is carried to a machine with a GPU.")
    parser.add_argument("--python", default=os.environ.get("LEASE_PYTHON"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only", nargs="+", choices=("package", "cache", "wheels"), default=["package", "cache", "wheels"]
    )
    parser.add_argument("--dry", action="store_true", help="nothing compiled, few kernels")
    options = parser.parse_args()
    began = time.monotonic()
    CARRY.mkdir(parents=True, exist_ok=True)
    python, counts = environment(options.python), {}
    if "package" in options.only:
        package(python, options.jobs, options.dry)
    if "cache" in options.only:
        counts = cache(python, options.jobs, options.dry)
    if "wheels" in options.only:
        wheels(python)
    ask = "import json, lease_carried; print(json.dumps(lease_carried.interpreter()))"
    said = subprocess.run([python, "-c", ask], cwd=ROOT / "benchmarks/gpu", capture_output=True, text=True, check=True)
    write_manifest(CARRY, json.loads(said.stdout), kernels=counts)
    for path in files_of(CARRY):
        if path.stat().st_size > 200_000:
            print(f"{path.stat().st_size / 1e6:8.1f} MB {path.relative_to(CARRY)}")
    carried, tree = sum(path.stat().st_size for path in files_of(CARRY)), travelling()
    wrong = counts.get("wrong") or []
    if wrong:
        print(f"not recorded or not compiled, left to the card: {wrong}")
    print(f"carry {carried / 2**20:.1f} MiB and the tree {tree / 2**20:.1f} MiB of {MOST_BYTES >> 20} MiB; "
          f"{counts.get('compiled', 'the same')} kernels; {time.monotonic() - began:.0f} s")  # fmt: skip
    crashed = any("recording ended" in str(text) for text in wrong)  # all kernels of a source: minutes on the card
    return int(crashed or carried + tree > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
