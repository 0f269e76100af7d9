"""Private names of torch are used in one module, which has a canary for each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spu
from spu.common import torch_private

SOURCES = Path(spu.__file__).parent
ALLOWED = {
    "_unscale_grads_",  # an override has to bear the name of what it overrides
    "_growth_tracker",  # a key of GradScaler.state_dict(), which is public
}


def _private_attributes() -> set[str]:
    """The private attributes of the objects of torch's that spu meets."""
    module, tensor = nn.BatchNorm1d(2), torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([tensor], lr=0.1)
    objects: list[Any] = [module, tensor, optimizer, tensor.untyped_storage(), torch.Generator(), (tensor * 2).grad_fn]
    objects += [
        torch.ops.aten.add,
        torch.ops.aten.add.Tensor,
        torch.compile(nn.Linear(1, 1)),
        torch.amp.GradScaler("cpu"),
    ]
    objects += [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
    names = {name for thing in objects for name in dir(thing)}
    return {name for name in names if _is_private(name)} - ALLOWED


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def _uses(tree: ast.AST, attributes: set[str]) -> Iterator[tuple[int, str]]:
    """(line, code) of every use of a private name of torch."""
    of_torch = {"torch"}  # names of torch's modules and what was imported from them
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    of_torch.add(alias.asname or "torch")
                    if any(map(_is_private, alias.name.split("."))):
                        yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            of_torch.update(alias.asname or alias.name for alias in node.names)
            if any(map(_is_private, [*(node.module or "").split("."), *(alias.name for alias in node.names)])):
                yield node.lineno, ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            name = root.id if isinstance(root, ast.Name) else ""
            if name in of_torch or (node.attr in attributes and not (name == "self" and node.value is root)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and node.value in attributes:
            yield node.lineno, repr(node.value)


@pytest.mark.parametrize(
    "code",
    [
        "torch._C._is_tracing()",
        "from torch._subclasses import fake_tensor",
        "from torch import nn\nnn.modules.dropout._DropoutNd",
        "def f(module): return module._parameters",
        "def f(module): return self.module._buffers",
        "getattr(module, '_forward_hooks')",
    ],
)
def test_a_private_name_is_found(code: str) -> None:
    assert list(_uses(ast.parse(code), _private_attributes()))


def test_no_other_module_uses_private_names_of_torch() -> None:
    attributes = _private_attributes()
    found = [
        f"{path.relative_to(SOURCES)}:{line}: {code}"
        for path in sorted(SOURCES.rglob("*.py"))
        if path != Path(torch_private.__file__)
        for line, code in _uses(ast.parse(path.read_text()), attributes)
    ]
    assert not found, "move these into spu/common/torch_private.py, with a canary:\n" + "\n".join(found)


def test_the_inside_of_the_grad_scaler() -> None:
    """Canary: if a new torch fails here, spu.GradScaler has to change: it overrides a method and reads its state."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert list(torch.amp.GradScaler._unscale_grads_.__annotations__) == [
        "optimizer", "inv_scale", "found_inf", "allow_fp16", "return",
    ]  # fmt: skip
    assert scaler._scale is None
    scaler.scale(torch.ones(1))
    assert isinstance(scaler._scale, torch.Tensor)
    assert "stage" in scaler._per_optimizer_states[0]
