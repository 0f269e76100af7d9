"""What is installed: wheel and sdist, build requirements, the op library's symbols, life without a compiler."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKEND = ROOT / "build_backend"


def is_installed(distribution: str) -> bool:
    """Without looking the module up: a lookup of pip switches setuptools' own distutils off for the whole process."""
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_build_tools = pytest.mark.skipif(
    not (is_installed("setuptools") and is_installed("pip")),
    reason="building a wheel needs setuptools and pip in this environment",
)


def run(arguments: list[str], cwd: Path = ROOT, **environment: str | None) -> str:
    """Output of a Python process; ``NAME=None`` unsets a variable. Fails with the output if the process does."""
    env = {key: value for key, value in os.environ.items() if key not in environment}
    env |= {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_wheel(folder: Path, source: Path = ROOT, **environment: str | None) -> Path:
    run(
        ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", str(folder), str(source)],
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built here as it was installed here: compiled (from the objects already built) or not."""
    compiled = importlib.util.find_spec("spu._C") is not None
    return build_wheel(tmp_path_factory.mktemp("wheel"), SPU_BUILD="1" if compiled else "0", SPU_CUDA="0")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(["-c", f"import spu_build; spu_build.build_sdist({str(folder)!r})"], PYTHONPATH=str(BACKEND))
    (made,) = folder.glob("*.tar.gz")
    return made


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def python_sources() -> set[str]:
    """Where each Python file of the tree belongs in a wheel."""
    library = {path.relative_to(ROOT / "python").as_posix() for path in (ROOT / "python/spu").rglob("*.py")}
    return library | {f"spu/kernels/{path.name}" for path in (ROOT / "kernels/triton").glob("*.py")}


@needs_build_tools
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = names_in_wheel(wheel)
    assert {name for name in names if name.endswith(".py")} == python_sources()
    assert "spu/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "spu",
        "spu_torch-" + importlib.metadata.version("spu-torch") + ".dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


@needs_build_tools
def test_wheel_holds_the_extensions(wheel: Path) -> None:
    if importlib.util.find_spec("spu._C") is None:
        pytest.skip("spu was installed without compiled extensions")
    libraries = sorted(name for name in names_in_wheel(wheel) if name.endswith(".so"))
    assert len(libraries) == 2, libraries
    assert libraries[0] == "spu/_C.abi3.so"
    assert re.fullmatch(r"spu/_host\.cpython-\d+.*\.so", libraries[1])


@needs_build_tools
def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "spu = spu.__main__:main" in archive.read(points).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert "Requires-Dist: torch>=2.11" in required, required
    assert not any(name in line for line in required for name in ("pybind11", "ninja", "transformers", "triton"))


@needs_build_tools
def test_without_compiling_the_wheel_is_pure(tmp_path: Path) -> None:
    pure = build_wheel(tmp_path, SPU_BUILD="0")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in names_in_wheel(pure) if name.endswith(".so")]


@needs_build_tools
def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = [path for folder in ("csrc", "build_backend", "kernels", "python") for path in (ROOT / folder).rglob("*")]
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in wanted
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py", ".typed")
        and path.relative_to(ROOT).as_posix() not in names
    ]
    assert not missing
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@needs_build_tools
def test_sdist_makes_the_same_wheel(sdist: Path, tmp_path: Path) -> None:
    made = build_wheel(tmp_path, sdist, SPU_BUILD="0")
    assert {name for name in names_in_wheel(made) if name.endswith(".py")} == python_sources()


HOOKS = "import spu_build as b; print(b.get_requires_for_build_wheel(), b.get_requires_for_build_editable())"


@needs_build_tools
@pytest.mark.parametrize(
    ("mode", "compiler", "asks"),
    [("0", "true", False), ("1", "true", True), (None, "true", True), (None, "nonesuch", False)],
)
def test_torch_is_a_build_requirement_only_to_compile(mode: str | None, compiler: str, asks: bool) -> None:
    # "true" stands for a compiler that is found: the hooks look for one, they do not run it
    output = run(["-c", HOOKS], PYTHONPATH=str(BACKEND), SPU_BUILD=mode, CXX=compiler)
    answer = output.splitlines()[-1]  # setuptools talks before it
    assert answer.count("'torch==2.13.0'") == (2 if asks else 0), answer
    assert answer.count("torch") == answer.count("'torch=="), "torch must never be asked for unpinned"


@needs_build_tools
def test_unknown_build_mode_is_refused() -> None:
    code = "import spu_build as b\ntry: b.build_mode()\nexcept ValueError as error: print(error)"
    assert "SPU_BUILD='yes': use 0" in run(["-c", code], PYTHONPATH=str(BACKEND), SPU_BUILD="yes")


DECIDE = """
import sys; sys.argv = ["setup.py", *{arguments}]
import spu_extensions as e
found = e.module_folder
e.module_folder = lambda name: None if name in {hidden} else found(name)
e._ninja = lambda: None if "ninja" in {hidden} else "ninja"
try:
    print("EXTENSIONS", [extension.name for extension in e.wanted_extensions()])
except e.CompileError as error:
    print("ERROR", error)
"""


def decision(hidden: list[str], *arguments: str, **environment: str | None) -> str:
    """What setup.py decides where these packages are missing: the last line it prints."""
    code = DECIDE.format(hidden=hidden, arguments=list(arguments))
    return run(
        ["-c", code], PYTHONPATH=str(BACKEND), **{"SPU_BUILD": None, "SPU_CUDA": "0", **environment}
    ).splitlines()[-1]


@needs_build_tools
@pytest.mark.parametrize("hidden", ["pybind11", "ninja", "torch"])
def test_a_missing_build_requirement_is_an_error_where_a_compiler_is(hidden: str) -> None:
    """The readme's own two commands installed a package without kernels, and did not say so."""
    said = decision([hidden], "bdist_wheel", CXX="true")
    assert re.match(rf"ERROR compiling the kernels needs {hidden} \(pip install '?{hidden}", said), said
    assert "SPU_BUILD=0 installs without kernels" in said
    assert decision([hidden], "bdist_wheel", CXX="nonesuch") == "EXTENSIONS []"
    assert decision([hidden], "bdist_wheel", CXX="true", SPU_BUILD="0") == "EXTENSIONS []"
    assert "SPU_BUILD=1, but compiling needs" in decision([hidden], "bdist_wheel", CXX="true", SPU_BUILD="1")


@needs_build_tools
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
def test_a_compiler_without_amx_leaves_its_kernels_out(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec g++ "$@"\n')
    old.chmod(0o755)
    code = "import spu_extensions as e; print(e.has_amx(), [s for s in e._sources('cpu') if 'kernels_' in s])"
    said = run(["-c", code], PYTHONPATH=str(BACKEND), CXX=str(old))
    assert f"{old} does not know -mamx-tile and -mamx-bf16: the kernels for AMX are left out" in said
    assert "False" in said
    assert "kernels_avx512bf16.cpp" in said
    assert "kernels_amx.cpp" not in said
    chosen = [str(ROOT / "csrc/cpu/dispatch.cpp"), f"-I{ROOT / 'csrc'}", "-o", str(tmp_path / "dispatch.o")]
    subprocess.run([str(old), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-DSPU_AMX=0", "-c", *chosen], check=True)
    names = subprocess.run(
        ["nm", "-C", str(tmp_path / "dispatch.o")], check=True, capture_output=True, text=True
    ).stdout
    assert "avx512bf16_kernels" in names
    assert "amx_kernels" not in names


@needs_build_tools
@pytest.mark.parametrize("command", ["egg_info", "dist_info", "sdist"])
@pytest.mark.parametrize("mode", [None, "1"])
def test_an_isolated_build_may_ask_before_its_requirements_are_there(command: str, mode: str | None) -> None:
    assert decision(["torch", "pybind11", "ninja"], command, CXX="true", SPU_BUILD=mode) == "EXTENSIONS []"


def test_the_readme_installs_what_its_build_needs() -> None:
    install = (ROOT / "README.md").read_text().split("## Install")[1].split("## ")[0]
    first, second = re.findall(r"^pip install .*$", install, re.MULTILINE)
    sys.path.insert(0, str(BACKEND))
    try:
        from spu_build import COMPILE_REQUIREMENTS
    finally:
        sys.path.remove(str(BACKEND))
    assert all(requirement in first for requirement in [*COMPILE_REQUIREMENTS, "setuptools>=77"])
    assert "--no-build-isolation" in second


def build_with_broken_compiler(folder: Path, mode: str | None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "SPU_BUILD"} | {"CXX": "false"}
    if mode is not None:
        env["SPU_BUILD"] = mode
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "-b", str(folder)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_build_tools
def test_failing_compiler_is_fatal_only_when_asked_for(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("pybind11", "ninja")):
        pytest.skip("needs pybind11 and ninja, which a pure installation has no use for")
    forced = build_with_broken_compiler(tmp_path / "forced", "1")
    assert forced.returncode != 0
    assert "did not compile" in forced.stderr
    auto = build_with_broken_compiler(tmp_path / "auto", None)
    assert auto.returncode == 0, auto.stderr
    assert "installing without" in auto.stderr
    assert list((tmp_path / "auto").glob("lib*/spu/__init__.py")), "the Python part must be there"
    assert not list((tmp_path / "auto").glob("lib*/spu/*.so"))


def installed_library(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed: this is an installation without compiled extensions")
    return Path(spec.origin)


def tool_output(*arguments: str) -> str:
    if shutil.which(arguments[0]) is None:
        pytest.skip(f"{arguments[0]} is not installed (binutils)")
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols")
def test_op_library_imports_only_the_stable_abi() -> None:
    library = installed_library("spu._C")
    assert library.name == "_C.abi3.so"
    undefined = tool_output("nm", "-D", "--undefined-only", "-C", str(library))
    assert "aoti_torch" in undefined, "the op library should import LibTorch's stable C functions"
    unstable = [line.split(maxsplit=1)[-1] for line in undefined.splitlines() if re.search(r"\b(at|c10|torch)::", line)]
    assert not unstable, f"symbols without a stable ABI: {unstable[:10]}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF headers")
@pytest.mark.parametrize("name", ["spu._C", "spu._host"])
def test_libraries_name_no_paths_of_the_build_machine(name: str) -> None:
    dynamic = tool_output("readelf", "-d", str(installed_library(name)))
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert not [library for library in needed if "cuda" in library or "c10" in library or "python" in library], needed


def test_hugging_face_kernels_is_not_shadowed(tmp_path: Path) -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("WHOSE = 'theirs'\n")
    # the repository root comes first on the path here, as for anyone who works in a checkout
    assert run(["-c", "import kernels; print(kernels.WHOSE)"], PYTHONPATH=str(tmp_path)).strip() == "theirs"


WITHOUT_EXTENSIONS = """
import warnings, torch, spu
import torch.nn.functional as F
assert spu.__file__.startswith({folder!r}), spu.__file__
status = spu.backends()
assert status["reference"].available
assert not status["cpu"].available and status["cpu"].reason and status["cpu"].fix, status["cpu"]
warnings.simplefilter("ignore")
x = torch.randn(3, 8, dtype=torch.float16, requires_grad=True)
layer = spu.accelerate(torch.nn.Linear(8, 4).half())
y = layer(x)
y.float().sum().backward()
plain = F.linear(x.float(), layer.weight.float(), layer.bias.float())
assert (y.float() - plain).abs().max() < 2e-3 * plain.abs().max().clamp(min=1), (y, plain)
assert (x.grad.float() - layer.weight.float().sum(0)).abs().max() < 1e-2
print("works")
"""


def test_works_without_compiled_extensions(tmp_path: Path) -> None:
    import spu

    shutil.copytree(Path(spu.__file__).parent, tmp_path / "spu", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = WITHOUT_EXTENSIONS.format(folder=str(tmp_path))
    assert "works" in run(["-c", code], cwd=tmp_path, PYTHONPATH=str(tmp_path), SPU_BACKEND=None)


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, spu; heavy = {'transformers', 'matplotlib', 'triton', 'rich', 'typer'} & set(sys.modules)\n"
        "assert not heavy, f'import spu imported {heavy}'"
    )
    run(["-c", code], cwd=tmp_path)


def test_console_script() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="spu")
    assert entry.value == "spu.__main__:main"
    assert callable(entry.load())
