"""Launches that keep their compiled kernel give it what Triton's own way would give it.

Nothing is compiled here and nothing is launched: what would reach the C function that launches is recorded.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from spu.kernels import optim  # noqa: E402
from spu.kernels.kept import Launch, Launcher  # noqa: E402
from spu.kernels.product import product_kernel  # noqa: E402

_PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu" / "overhead.py"
_SPEC = importlib.util.spec_from_file_location("spu_overhead", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
overhead = sys.modules["spu_overhead"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(overhead)


def seen(arguments: tuple[Any, ...]) -> list[Any]:
    """What of a launch's arguments the device would see, in order; a tensor by its shape, dtype and alignment."""
    found: list[Any] = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            found.append((tuple(value.shape), value.dtype, value.data_ptr() % 16))
        elif isinstance(value, tuple | list):
            found += seen(tuple(value))
        elif isinstance(value, int | float | str):
            found.append(value)
        elif isinstance(value, triton.language.dtype):
            found.append(str(value))
    return found


@pytest.fixture
def launched() -> Iterator[tuple[list[list[Any]], list[Any]]]:
    launches: list[list[Any]] = []
    with overhead.stubbed(lambda *arguments: launches.append(seen(arguments))) as compiled:
        yield launches, compiled


def test_a_kept_launch_is_tritons(launched: tuple[list[list[Any]], list[Any]]) -> None:
    launches, compiled = launched
    for name, call in overhead.calls().items():
        launches.clear()
        with overhead.by_triton():
            call()
        expected = list(launches)
        assert expected
        call()
        count = len(compiled)
        launches.clear()
        call()
        assert launches == expected, name
        assert len(compiled) == count, f"{name}: the last call went Triton's way"


def a_launch() -> Launch:
    options = dict.fromkeys(product_kernel.arg_names[17:], False)
    return Launch(product_kernel, (2, 3), (64, 64, 64, 64, 1, 64, 1, 64), options)


def test_another_alignment_is_another_kernel(launched: tuple[list[list[Any]], list[Any]]) -> None:
    _, compiled = launched
    memory = torch.zeros(65, 64).half()
    aligned, shifted = memory.view(-1)[:4096], memory.view(-1)[1:4097]
    launch = a_launch()
    for tensors in ([aligned] * 9, [shifted, *[aligned] * 8], [aligned] * 8 + [shifted], [aligned] * 9, [shifted] * 9):
        launch(*tensors)
    assert len(compiled) == 4
    assert len({key for _, key in compiled}) == 4


def test_another_dtype_is_another_kernel(launched: tuple[list[list[Any]], list[Any]]) -> None:
    _, compiled = launched
    half, full = torch.zeros(64).half(), torch.zeros(64)
    launch = a_launch()
    for last in (half, full, half):
        launch(*[half] * 8, last)
    assert len({key for _, key in compiled}) == len(compiled) == 2


def test_numbers_are_part_of_a_launch_and_floats_are_not(launched: tuple[list[list[Any]], list[Any]]) -> None:
    """A learning rate may be another in each step."""
    launches, compiled = launched
    x, main, one = torch.zeros(64, 64).half(), torch.zeros(64, 64), torch.ones(1)
    state = ([x], [main], [main.clone()], [main.clone()], [main.clone()], [one])
    for rate in (1e-3, 2e-3):
        optim.adamw_(*state, one, torch.zeros(1), rate, 0.9, 0.999, 1e-8, 0.1)
    assert len(compiled) == 1
    assert [1e-3 in launches[0], 2e-3 in launches[1]] == [True, True]


def test_who_listens_to_launches_sees_each(launched: tuple[list[list[Any]], list[Any]]) -> None:
    launches, _ = launched
    heard: list[Any] = []
    hook = heard.append
    launch, x = a_launch(), torch.zeros(64).half()
    launch(*[x] * 9)
    chain = triton.knobs.runtime.launch_enter_hook
    chain.add(hook)
    try:
        by_triton = []
        original = Launch._by_triton
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "_by_triton", lambda self, *given: (by_triton.append(1), original(self, *given)))
            launch(*[x] * 9)
            launch(*[x] * 9)
    finally:
        chain.remove(hook)
    assert len(by_triton) == 2
    launch(*[x] * 9)
    assert len(launches) == 4


def test_a_launcher_keeps_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr("spu.kernels.kept._MOST", 3)
    monkeypatch.setattr(Launch, "__call__", lambda self, *variable: made.append(self._fixed))
    launcher = Launcher(product_kernel, {})
    for size in (1, 2, 1, 3, 4, 1):
        launcher((1,), (torch.zeros(1),), (size,))
    assert made == [(1,), (2,), (1,), (3,), (4,), (1,)]
    assert len(launcher._launches) <= 3


def test_tables_of_tensors_belong_to_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other stream waits for the copy that fills them, and none may be captured into a graph."""
    cpu = torch.device("cpu")
    one, same, other = optim._where(((16,),), cpu, 1), optim._where(((16,),), cpu, 1), optim._where(((16,),), cpu, 2)
    assert one is same
    assert one.addresses.data_ptr() != other.addresses.data_ptr()
    assert one.arrived.data_ptr() != other.arrived.data_ptr()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        optim._work((3,), torch.device("cuda:0"), 0)
