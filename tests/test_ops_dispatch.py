"""Choice of the backend: forced works or raises, automatic falls back and says so once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from numeric import assert_equal
from torch import nn
from torch.utils.checkpoint import checkpoint

from spu import ops
from spu.common import torch_private
from spu.ops import dispatch, schema

CPU_WORKS = ops.backends()["cpu"].available
needs_cpu_backend = pytest.mark.skipif(not CPU_WORKS, reason=ops.backends()["cpu"].reason)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where spu._C was not built."""
    status = ops.BackendStatus("cpu", False, "spu._C cannot be imported: not built", "build it")
    monkeypatch.setitem(dispatch._LOADERS, "cpu", dispatch.Loader(lambda: status))
    monkeypatch.setattr(dispatch, "_AUTOMATIC", {})


def test_reference_is_always_there_and_the_rest_explains_itself() -> None:
    found = ops.backends()
    assert set(found) == set(schema.BACKENDS)
    assert found["reference"].available
    for name, status in found.items():
        assert status.name == name
        assert status.available or (status.reason and status.fix)


def test_automatic_choice_without_the_extension_falls_back_and_says_so_once(without_extension: None) -> None:
    x = torch.ones(2, 3)
    with pytest.warns(RuntimeWarning, match=r"not built.*build it"):
        ops.linear_act(x, torch.ones(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.linear_act(x, torch.ones(4, 3))


def test_a_forced_backend_that_is_missing_raises_with_reason_and_fix(without_extension: None) -> None:
    with (
        pytest.raises(RuntimeError, match=r"'cpu' was asked for but is unavailable: .*not built.*Fix: build it"),
        ops.use_backend("cpu"),
    ):
        pass


def test_an_unknown_name_is_listed_against_the_known_ones() -> None:
    with (
        pytest.raises(ValueError, match="unknown backend 'gpu': use one of 'reference', 'cpu', 'triton', 'cuda'"),
        ops.use_backend("gpu"),
    ):
        pass


@needs_cpu_backend
def test_automatic_choice_by_device_and_dtype() -> None:
    assert ops.choose_backend(torch.ones(1)) == "cpu"
    assert ops.choose_backend(torch.ones(1).half()) == "cpu"
    assert ops.choose_backend(torch.ones(1).double()) == "reference"
    assert ops.choose_backend(torch.ones(1, device="meta")) == "reference"


@needs_cpu_backend
def test_a_forced_backend_refuses_what_it_cannot_do() -> None:
    with ops.use_backend("cpu"):
        with pytest.raises(TypeError, match=r"'cpu' was forced but does not compute in torch.float64"):
            ops.linear_act(torch.ones(2, 3).double(), torch.ones(4, 3).double())
        with pytest.raises(ValueError, match=r"'cpu' was forced but the tensor is on 'meta'"):
            ops.linear_act(torch.ones(2, 3, device="meta"), torch.ones(4, 3, device="meta"))


def as_if_working(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """These backends of CUDA devices work here."""
    for name in names:
        status = ops.BackendStatus(name, True, device_types=("cuda",))
        monkeypatch.setitem(dispatch._LOADERS, name, dispatch.Loader(lambda status=status: status))
    monkeypatch.setattr(dispatch, "_AUTOMATIC", {})
    dispatch.select_cuda.cache_clear()


def test_cuda_tensors_get_the_first_backend_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_working(monkeypatch, "triton")
    assert dispatch._automatic("cuda", torch.float16) == dispatch.cuda_candidates(torch.float16)[0]
    assert dispatch._automatic("cuda", torch.float64) == "reference"


def test_without_a_cuda_backend_the_reason_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in dispatch.CUDA_BACKENDS:
        status = ops.BackendStatus(name, False, f"no {name}", "install it", ("cuda",))
        monkeypatch.setitem(dispatch._LOADERS, name, dispatch.Loader(lambda status=status: status))
    with pytest.warns(RuntimeWarning, match=r"no .*install it"):
        assert dispatch._automatic("cuda", torch.float16) == "reference"


def test_a_triton_that_cannot_launch_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C compiler its first launch raised, in the middle of a step."""
    backend = pytest.importorskip("spu.kernels.backend")
    if backend.interpreted():
        pytest.skip("interpreted kernels need no launcher")

    class NoCompiler:
        @property
        def active(self) -> object:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "driver", NoCompiler())
    status = dispatch._load_triton()
    assert not status.available
    assert status.reason == "triton cannot build its launcher: RuntimeError: Failed to find C compiler."
    assert "gcc python3-dev" in status.fix


def test_a_table_names_the_backend_by_op_dtype_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pytest.importorskip("spu.kernels.table")  # absent where spu runs in place, without being installed
    config = pytest.importorskip("spu.kernels.config")

    as_if_working(monkeypatch, *dispatch.CUDA_BACKENDS)
    rows = {
        "linear/fp16/large": config.Entry(config.Config(), "triton"),
        "linear/fp16/skinny": config.Entry(config.Config()),
    }
    monkeypatch.setattr(table, "tables", lambda capability: (config.Table("sm_90", "measured", rows, {}),))
    assert dispatch.select_cuda("linear", torch.float16, (9, 0), (8192, 8192, 8192)) == "triton"
    assert dispatch.select_cuda("linear", torch.float16, (9, 0), (16, 8192, 8192)) is None
    assert dispatch.select_cuda("linear", torch.float64, (9, 0), (8192, 8192, 8192)) is None
    dispatch.select_cuda.cache_clear()


def test_use_backend_nests_and_restores() -> None:
    before = ops.forced_backend()
    with ops.use_backend("reference"):
        with ops.use_backend(None):
            assert ops.forced_backend() == "reference"
        assert ops.forced_backend() == "reference"
    assert ops.forced_backend() == before


def test_an_override_belongs_to_its_thread() -> None:
    seen: list[str | None] = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch._FORCED.name))
        thread.start()
        thread.join()
    assert seen == [None]


def test_autograds_own_threads_have_the_override_of_the_backward() -> None:
    """A GPU's backward runs in a thread of autograd's, which torch gives what the calling thread carries. Layers that
    were run again there, and hooks, took the automatic backend.
    """
    seen: list[str | None] = []

    def autograds(own: object) -> None:
        torch_private.carry(dispatch._CARRIED, own)
        seen.append(ops.forced_backend())
        with ops.use_backend("reference"):  # what is forced inside ends there
            pass
        seen.append(ops.choose_backend(torch.ones(1)))
        torch_private.carry(dispatch._CARRIED, None)

    for name in ("reference", "cpu") if CPU_WORKS else ("reference",):
        with ops.use_backend("reference"), ops.use_backend(name):
            thread = threading.Thread(target=autograds, args=(torch_private.carried(dispatch._CARRIED),))
            thread.start()
            thread.join()
            assert seen[-2:] == [name, name]
    assert torch_private.carried(dispatch._CARRIED) is None
    assert dispatch._FORCING == []


@pytest.mark.gpu
def test_a_layer_that_is_run_again_on_a_gpu_has_the_override() -> None:
    seen: list[str | None] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(ops.forced_backend())
        return x.sin()

    with ops.use_backend("reference"):
        y = checkpoint(layer, torch.ones(2, device="cuda", requires_grad=True), use_reentrant=False)
        y.sum().backward()
    assert seen == ["reference", "reference"]


@needs_cpu_backend
def test_a_backward_uses_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def spy(name: str):
        real = schema.overload("linear_dw", name)
        return lambda *arguments: used.append(name) or real(*arguments)

    for name in ("reference", "cpu"):
        monkeypatch.setitem(schema._OVERLOADS, ("linear_dw", name), spy(name))
    for name, other in (("reference", "cpu"), ("cpu", "reference")):
        with ops.use_backend(name):
            y = ops.linear_act(torch.ones(2, 3), nn.Parameter(torch.randn(4, 3)))
        with ops.use_backend(other):
            y.sum().backward()
    assert used == ["reference", "cpu"]


def test_the_environment_forces_a_backend() -> None:
    code = "import torch; from spu import ops; print(ops.choose_backend(torch.ones(1)))"
    done = python(code, SPU_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr


def test_an_unknown_name_in_the_environment_is_refused_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FROM_ENVIRONMENT", "tpu")
    with pytest.raises(
        ValueError, match="SPU_BACKEND names an unknown backend 'tpu': use one of 'reference', 'cpu', 'triton', 'cuda'"
    ):
        ops.linear_act(torch.ones(2, 3), torch.ones(4, 3))


@needs_cpu_backend
def test_kernels_may_be_loaded_before_the_schemas() -> None:
    code = (
        "import torch; import spu._C; from spu import ops; "
        "print(ops.choose_backend(torch.ones(1)), ops.linear_act(torch.ones(1, 2), torch.ones(1, 2)).item())"
    )
    done = python(code)
    assert done.stdout.strip() == "cpu 2.0", done.stderr


def test_every_op_has_every_overload_with_one_schema() -> None:
    for name, text in schema.SCHEMAS.items():
        for backend in schema.BACKENDS:
            found = str(schema.overload(name, backend)._schema)
            assert found.startswith(f"spu::{name}.{backend}(")
            assert found.count("Tensor") == text.count("Tensor"), found


@pytest.mark.leaks_threads  # Dynamo's progress monitor
def test_compiled_code_follows_use_backend() -> None:
    """The override is guarded on: a graph made under one backend is not used under another."""
    chosen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        chosen.extend(str(node.target) for node in graph.graph.nodes if "spu" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda x, w: ops.linear_act(x, w), fullgraph=True, backend=backend)
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with ops.use_backend("reference"):
        first = compiled(x, w)
    second = compiled(x, w)
    assert chosen[0] == "spu.linear.reference"
    assert chosen[-1] == f"spu.linear.{ops.choose_backend(x)}"
    torch.testing.assert_close(first, second)
    assert_equal(first, torch.nn.functional.linear(x, w), "y")


@needs_cpu_backend
def test_other_threads_run_python_while_a_kernel_computes() -> None:
    """Two stages on one CPU are two threads of one interpreter."""
    count, stop = [0], threading.Event()

    def spin() -> None:
        while not stop.is_set():
            count[0] += 1

    x, weight = torch.ones(256, 1024).half(), torch.ones(2048, 1024).half()
    linear = schema.overload("linear", ops.choose_backend(x))
    thread = threading.Thread(target=spin)
    thread.start()
    try:
        during = []
        for _ in range(3):
            before = count[0]
            linear(x, weight, None, "none", False)
            during.append(count[0] - before)
    finally:
        stop.set()
        thread.join()
    assert max(during) > 100, during  # tens of thousands; none if the interpreter's lock were held
