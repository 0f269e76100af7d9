"""The house: imports run downward, no room and no module is in a cycle, and files stay small enough to read."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python"

# Rooms from the lowest level to the highest; docs/architecture.md says what each one is for. A room imports from lower
# levels only, also inside functions and for types alone.
LEVELS = [
    {"common", "schedules", "skips"},
    {"ops", "checkpoint", "settings"},
    {"devices", "nn", "optim", "transfer", "tune"},
    {"plan", "precision"},
    {"model", "memory"},
    {"engine"},
    {"cost", "data", "distributed"},
    {"trainer"},
    {"train", "integrations"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

Edge = tuple[str, str]


def module_names() -> dict[str, Path]:
    names = {}
    for path in sorted((PACKAGE / "spu").rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = module_names()
FILES = sorted(
    [*MODULES.values(), ROOT / "setup.py"]
    + [path for folder in ("build_backend", "kernels", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements(node: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """Every node below; without ``types`` those under ``if TYPE_CHECKING`` are left out."""
    for child in ast.iter_child_nodes(node):
        if types or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child, types=types)


def imported(path: Path, *, types: bool = True) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in the file."""
    for node in statements(parsed(path), types=types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES or node.module in MODULES:
                    yield whole if whole in MODULES else node.module


def edges(*, types: bool) -> list[Edge]:
    found = ((name, other) for name, path in MODULES.items() for other in imported(path, types=types))
    return sorted({(name, other) for name, other in found if name not in ("spu", other)})


@functools.cache
def names_of(path: Path) -> set[str]:
    """Names that a module has when it has been imported, also those under ``if`` and ``try``."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def room(name: str) -> str:
    own = name.split(".")[1] if "." in name else ""
    return "cli" if own == "__main__" else own


def find_cycle(graph: list[Edge]) -> list[str]:
    """A cycle in a graph, as the names along it; empty if there is none."""
    after: dict[str, list[str]] = {}
    for a, b in graph:
        after.setdefault(a, []).append(b)
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in after.get(name, []):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in list(after) if (found := visit(name, []))), [])


def test_the_search_for_cycles_finds_one() -> None:
    assert find_cycle([("a", "b"), ("b", "c")]) == []
    assert find_cycle([("z", "a"), ("a", "b"), ("b", "c"), ("c", "a")]) == ["a", "b", "c", "a"]


def test_every_room_has_a_level_and_there_are_at_most_ten() -> None:
    rooms = {room(name) for name in MODULES} - {""}
    assert rooms == set(LEVEL)
    assert len(LEVELS) <= 10


def test_imports_run_downward() -> None:
    found = edges(types=True)
    assert len(found) > 200
    upward = [
        f"{a} (level {LEVEL[room(a)]}) imports {b} (level {LEVEL[room(b)]})"
        for a, b in found
        if room(b) and room(a) != room(b) and LEVEL[room(a)] <= LEVEL[room(b)]
    ]
    assert upward == []


def test_no_module_is_in_a_cycle() -> None:
    # A package's __init__ imports its modules, and they import each other, not the package. A plan prints itself by
    # functions that name its type: within a room that much is allowed.
    assert find_cycle(edges(types=False)) == []


def test_what_is_imported_from_the_package_is_there() -> None:
    """Benchmarks and functions import what nothing else runs."""
    absent = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES and node.module != "spu":
                there = names_of(MODULES[node.module])
                names = [a.name for a in node.names if a.name not in there and f"{node.module}.{a.name}" not in MODULES]
                absent += [f"{path.relative_to(ROOT)}: from {node.module} import {name}" for name in names]
    assert absent == []


def test_few_modules_lie_loose() -> None:
    assert len(list((PACKAGE / "spu").glob("*.py"))) <= 7


def test_the_map_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for name in LEVEL:
        assert f"{name}/" in page or f"{name}.py" in page, name


@pytest.mark.parametrize(
    ("listing", "folder"),
    [
        ("python/spu/data/__init__.py", "python/spu/data"),
        ("python/spu/train/__init__.py", "python/spu/train"),
        ("kernels/README.md", "kernels/triton"),
    ],
)
def test_a_list_of_files_is_whole(listing: str, folder: str) -> None:
    text = (ROOT / listing).read_text()
    listed = set(re.findall(r"[\w/]+\.py\b", text)) - {"__init__.py"}
    assert listed == {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}


def test_files_and_functions_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    long = [
        f"{path.relative_to(ROOT)}: {node.name}: {node.end_lineno - node.lineno + 1}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 60
    ]
    assert long == []


def test_modules_share_one_style() -> None:
    faults = [f"{name}: {fault}" for name, path in MODULES.items() for fault in faults_of_style(parsed(path))]
    assert faults == []


def faults_of_style(tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "no docstring"
    relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    if relative:
        yield f"relative imports in lines {relative}"
    if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
        names = [
            t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
        ]
        if "__all__" not in names:
            yield "no __all__"


MAKERS = {"arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"}
MAKERS |= {"rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}
OF_THEIR_VALUES = {"arange", "as_tensor", "asarray", "randint", "randperm", "tensor"}  # integers, here


def test_tensors_are_made_with_a_dtype_and_on_a_device() -> None:
    """What a user's script has set (``torch.set_default_dtype``, ``torch.set_default_device``) is meant for its own
    tensors. (``spu tune`` is a process of its own.)
    """
    left = []
    for path in [*MODULES.values(), *(ROOT / "kernels").rglob("*.py")]:
        if "tune" in path.parts:
            continue
        for call in ast.walk(parsed(path)):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).removeprefix("torch.") in MAKERS):
                continue
            if not ast.unparse(call.func).startswith("torch."):
                continue
            named = {keyword.arg for keyword in call.keywords}
            needed = {"device"} if call.func.attr in OF_THEIR_VALUES else {"device", "dtype"}  # type: ignore[attr-defined]
            if None not in named and not needed <= named:
                left.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not left
