"""Products by cuBLASLt, without a GPU: the simulated CUDA library (cuda_sim.py) asks a stand-in for it
(cuda_host/cublaslt_stub.cpp), which checks what it is asked for, tells it, and multiplies on the CPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_sim
import pytest
import torch
from activations import ACTIVATIONS
from numeric import assert_close_to_truth, assert_equal

from spu import kernels
from spu.kernels import library, multiply
from spu.kernels.config import Config
from spu.ops.sink import leave_to_norm

OPS = torch.ops.spu
HALVES = [torch.float16, torch.bfloat16]
CUDA_TYPES = {torch.float16: 2, torch.bfloat16: 14, torch.float32: 0}
# rows, out, in: one row, one of everything that an alignment of 16 bytes allows, a shape with more rows than columns
SHAPES = [(1, 16, 8), (5, 8, 24), (33, 40, 16)]
LIBRARY, LARGE = bytes([2]) * 30, bytes(30)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the stand-in, and a program that says what is found."""
    if torch.cuda.is_available():
        pytest.skip("the CUDA library here is the real one")
    if reason := cuda_sim.missing():
        pytest.skip(reason)
    made = tmp_path_factory.mktemp("cublaslt")
    host, flags = cuda_sim.ROOT / "tests/cuda_host", [*cuda_sim.FLAGS, "-O1"]
    shutil.copy2(cuda_sim.stand_in(), made)
    probe = ["g++", *flags, str(host / "cublaslt_probe.cpp"), str(cuda_sim.CUDA / "cublaslt.cpp"), "-ldl"]
    done = subprocess.run([*probe, "-o", str(made / "probe")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


class Stub:
    """What the stand-in was asked for, and what it answers."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.stub_calls.restype = ctypes.c_char_p

    def calls(self, name: str) -> list[dict[str, Any]]:
        lines = self._library.stub_calls().decode().splitlines()
        return [call for call in map(json.loads, lines) if call["call"] == name]

    def clear(self) -> None:
        self._library.stub_clear()

    def answer(self, heuristic: int = 0, count: int = 1, first: int = 0, workspace: int = 0, product: int = 0) -> None:
        self._library.stub_answer(heuristic, count, first, ctypes.c_size_t(workspace), product)


@pytest.fixture(scope="session")
def sim(folder: Path) -> tuple[ModuleType, Stub]:
    return cuda_sim.load(), Stub(cuda_sim.stand_in())


@pytest.fixture
def stub(sim: tuple[ModuleType, Stub]) -> Iterator[Stub]:
    """The stand-in, for all products."""
    module, found = sim
    assert module.cublaslt() == 130100
    module.set_tiles(0, LIBRARY)
    found.clear()
    yield found
    found.clear()
    module.set_tiles(0, LARGE)


def make(rows: int, out: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, w, dz = torch.randn(rows, inner), torch.randn(out, inner) / inner**0.5, torch.randn(rows, out)
    return x.to(dtype), w.to(dtype), dz.to(dtype), torch.randn(out).to(dtype)


def scalar(value: float) -> torch.Tensor:
    return torch.full((1,), value)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(stub: Stub, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, _, b = make(*shape, dtype)
    rows, out, inner = shape
    fused = {(True, True): 164, (True, False): 36, (False, True): 160, (False, False): 32}
    for bias in (b, None):
        truth = x.double() @ w.double().t() + (0 if bias is None else bias.double())
        plain = torch.nn.functional.linear(x, w, bias)
        for name, act in ACTIVATIONS.items():
            for keep in (True, False):
                stub.clear()
                y, z = OPS.linear.cuda(x, w, bias, name, keep)
                assert_close_to_truth(y, act(plain), act(truth), name=f"y ({name})")
                if keep:
                    assert_close_to_truth(z, plain, truth, name=f"z ({name})")
                (call,) = stub.calls("multiply")
                # its result is ours transposed; relu is not its own, which loses NaN, nor the gelu without tanh
                fallback = 1 if bias is None else 4
                expected = fused[bias is not None, keep] if name == "gelu_tanh" else fallback
                assert call["epilogue"] == expected, name
                assert call["shape"] == [out, rows, inner]
                assert call["types"] == [CUDA_TYPES[dtype]] * 3
                assert call["lds"] == [inner, inner, out]
                assert call["transposed"] == [1, 0]
                assert call["on_device"] == 0
                assert (call["alpha"], call["beta"]) == (1.0, 0.0)
                assert call["aux_ld"] == (out if expected >= 128 else 0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(stub: Stub, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, dz, _ = make(*shape, dtype)
    rows, out, inner = shape
    assert_close_to_truth(OPS.linear_dx.cuda(dz, w), dz @ w, dz.double() @ w.double(), name="dx")
    (call,) = stub.calls("multiply")
    assert (call["shape"], call["transposed"], call["lds"]) == ([inner, rows, out], [0, 0], [inner, out, inner])
    stub.clear()
    truth, plain = dz.double().t() @ x.double(), dz.float().t() @ x.float()
    main_grad, found_inf = torch.full(truth.shape, float("nan")), scalar(0.0)  # a store must not read it
    OPS.linear_dw_.cuda(dz, x, main_grad, scalar(0.125), found_inf, False)
    assert_close_to_truth(main_grad, plain * 0.125, truth * 0.125, eps=1e-6, name="stored")
    OPS.linear_dw_.cuda(dz, x, main_grad, scalar(0.5), found_inf, True)
    assert_close_to_truth(main_grad, plain * 0.625, truth * 0.625, eps=1e-6, name="added to")
    assert found_inf.item() == 0
    stored, added = stub.calls("multiply")
    assert (stored["alpha"], stored["beta"], added["alpha"], added["beta"]) == (0.125, 0.0, 0.5, 1.0)
    assert added["shape"] == [inner, out, rows]
    assert added["types"] == [CUDA_TYPES[dtype], CUDA_TYPES[dtype], 0]
    assert (added["transposed"], added["lds"]) == ([0, 1], [inner, out, inner])
    assert added["on_device"] == 1, "alpha is inv_scale, in device memory, and no host waits for it"
    assert len(stub.calls("heuristic")) <= 1, "one search serves the store and the sum"
    assert_close_to_truth(OPS.linear_dw.cuda(dz, x), dz.t() @ x, truth, name="dw without a sink")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_mlps_own_gradient(stub: Stub, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The derivative of the gelu with tanh is the library's; its sums, the bias's gradient in 16 bits, are not used."""
    saved, w, dy, _ = make(*shape, dtype)
    rows, out, inner = shape
    for name, act in ACTIVATIONS.items():
        if name == "none":
            continue
        z = saved.double().requires_grad_()
        (truth,) = torch.autograd.grad(act(z), z, dy.double() @ w.double())
        leaf = saved.clone().requires_grad_()
        (plain,) = torch.autograd.grad(act(leaf), leaf, dy @ w)
        stub.clear()
        dz, h, sums = OPS.mlp_dz.cuda(dy, w, saved, name, True, True)
        assert_close_to_truth(dz, plain, truth, name=f"dz ({name})")
        assert_close_to_truth(h, act(saved), act(saved.double()), name=f"h ({name})")
        assert ((sums.double() - dz.double().sum(0)).abs() <= rows * 2.0**-24 * dz.double().abs().sum(0)).all()
        (call,) = stub.calls("multiply")
        assert call["epilogue"] == (192 if name == "gelu_tanh" else 1)
        assert (call["shape"], call["transposed"], call["lds"]) == ([inner, rows, out], [0, 0], [inner, out, inner])
        assert call["aux_ld"] == (inner if name == "gelu_tanh" else 0)
        assert [t.numel() for t in OPS.mlp_dz.cuda(dy, w, saved, name, False, False)[1:]] == [0, 0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [8, 200])  # the operands are looked at, or the sums
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_found_inf_sees_any_element_and_is_never_reset(stub: Stub, bad: float, rows: int, dtype: torch.dtype) -> None:
    x, _, dz, _ = make(rows, 64, 40, dtype)
    for target, at in ((dz, (0, 0)), (dz, (rows - 1, 63)), (x, (rows // 2, 7))):
        main_grad, found_inf, good = torch.zeros(64, 40), scalar(0.0), target[at].item()
        target[at] = bad
        OPS.linear_dw_.cuda(dz, x, main_grad, scalar(1.0), found_inf, False)
        assert found_inf.item() == 1
        target[at] = good
        OPS.linear_dw_.cuda(dz, x, main_grad, scalar(1.0), found_inf, True)
        assert found_inf.item() == 1, "a later product must not clear the flag"
        assert not main_grad.isfinite().all(), "a sum with a good microbatch hides nothing"
    OPS.linear_dw_.cuda(dz, x, main_grad, scalar(1.0), found_inf.zero_(), False)
    assert found_inf.item() == 0
    assert main_grad.isfinite().all(), "a store forgets the last step"


def test_a_sum_that_overflows_is_found(stub: Stub) -> None:
    # fp32 holds the products of bf16 values one by one, but not their sum
    dz, x = torch.full((16, 8), 1e19).bfloat16(), torch.full((16, 8), 1e19).bfloat16()
    for at in range(2, 16):
        dz[at] = 0
    main_grad, found_inf = torch.zeros(8, 8), scalar(0.0)
    OPS.linear_dw_.cuda(dz, x, main_grad, scalar(1.0), found_inf, False)
    assert found_inf.item() == 0, "2e38 is finite"
    dz[:] = 1e19
    OPS.linear_dw_.cuda(dz, x, main_grad, scalar(1e-6), found_inf, False)
    assert found_inf.item() == 1, "the scale makes it no smaller: the sum comes first"


def test_algorithms_are_looked_for_once_for_each_layout(sim: tuple[ModuleType, Stub], stub: Stub) -> None:
    module, _ = sim
    x, w, _, b = make(7, 72, 56, torch.float16)
    before = module.cublaslt_plans()
    stub.answer(workspace=4096)
    for _ in range(3):
        OPS.linear.cuda(x, w, b, "gelu_tanh", True)
    asked = stub.calls("heuristic")[0]
    assert len(stub.calls("multiply")) == 3, "each with a workspace of the size that the search told"
    assert asked["workspace"] == 32 << 20
    assert asked["schemes"] == 2, "parts of a sum are kept in fp32, so that it is rounded once"
    assert set(asked["aligned"]) <= {16, 256}
    assert module.cublaslt_plans() - before <= 2, "two where an output lay less aligned"
    room = torch.empty(7 * 56 + 256).half()
    first = (-room.data_ptr() // 2) % 128
    for shift, told in ((0, 256), (8, 16)):
        moved = room[first + shift :][: 7 * 56].view(7, 56).copy_(x)
        stub.clear()
        OPS.linear.cuda(moved, w[:56], None, "none", False)
        assert stub.calls("heuristic")[-1]["aligned"][1] == told, "an algorithm for one alignment may not serve another"


@pytest.mark.parametrize("why", ["ragged", "unaligned", "fp32", "no algorithm", "not here", "none found"])
def test_what_it_does_not_take_goes_another_way(stub: Stub, why: str) -> None:
    sizes = {"no algorithm": (3, 24, 16), "not here": (3, 24, 24), "none found": (3, 24, 32)}
    rows, out, inner = sizes.get(why, (3, 12 if why == "ragged" else 16, 16))
    x, w, _, b = make(rows, out, inner, torch.float32 if why == "fp32" else torch.float16)
    if why == "unaligned":
        x = torch.empty(x.numel() + 1).half()[1:].view_as(x).copy_(x)
    stub.answer(heuristic=15 if why == "no algorithm" else 0, product=15 if why == "not here" else 0,
                count=0 if why == "none found" else 1)  # fmt: skip
    for _ in range(2):
        y, _ = OPS.linear.cuda(x, w, b, "silu", True)
        plain = torch.nn.functional.silu(torch.nn.functional.linear(x, w, b))
        truth = torch.nn.functional.silu(torch.nn.functional.linear(x.double(), w.double(), b.double()))
        assert_close_to_truth(y, plain, truth)
    searches, products = len(stub.calls("heuristic")), len(stub.calls("multiply"))
    assert searches in ((1, 2) if why in sizes else (0,)), "two where the outputs are not aligned alike"
    assert products == (searches if why == "not here" else 0), "what was refused once is not asked for again"


def test_the_second_algorithm_serves_where_the_first_does_not(stub: Stub) -> None:
    x, w, _, _ = make(3, 48, 48, torch.float16)
    stub.answer(count=2, first=15)
    OPS.linear.cuda(x, w, None, "none", False)
    assert [call["algorithm"] for call in stub.calls("multiply")] == [1]


def test_another_failure_is_told(stub: Stub) -> None:
    x, w, _, _ = make(3, 56, 48, torch.float16)
    stub.answer(product=7)
    with pytest.raises(RuntimeError, match="cuBLASLt's product failed: CUBLAS_STATUS_INVALID_VALUE"):
        OPS.linear.cuda(x, w, None, "none", False)


def test_strided_operands(stub: Stub) -> None:
    x, w, _, _ = make(6, 16, 24, torch.float16)
    wide = torch.randn(6, 48).half()
    for name, a, weight in (("rows apart", wide[:, :24], w), ("transposed weight", x, w.t().contiguous().t())):
        y, _ = OPS.linear.cuda(a, weight, None, "none", False)
        assert_close_to_truth(y, a @ weight.t(), a.double() @ weight.double().t(), name=name)
    apart = torch.randn(6, 32).half()[:, :16]
    main_grad, found_inf = torch.zeros(16, 24), scalar(0.0)
    OPS.linear_dw_.cuda(apart, x, main_grad, scalar(1.0), found_inf, False)
    assert_close_to_truth(main_grad, apart.float().t() @ x.float(), apart.double().t() @ x.double(), eps=1e-6)
    assert len(stub.calls("multiply")) == 3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layouts_that_no_other_kernel_has(sim: tuple[ModuleType, Stub], stub: Stub, dtype: torch.dtype) -> None:
    """Also where the tiles name no library: on a card a plain FMA takes many times a tensor core's time."""
    sim[0].set_tiles(0, LARGE)
    x, w, dz, _ = make(16, 24, 32, dtype)
    OPS.linear.cuda(x, w, None, "none", False), OPS.linear_dx.cuda(dz, w)
    OPS.linear_dw_.cuda(dz, x, torch.empty(24, 32), scalar(1.0), scalar(0.0), False)
    assert not stub.calls("multiply"), "laid out as a linear layer has them: the tiles' own"
    target, grads = torch.arange(16), torch.ones(16)
    losses, made = OPS.linear_ce_and_dz.cuda(x, w, target, grads, torch.empty(16, 24), -100)
    assert [call["types"][2] for call in stub.calls("multiply")] == [CUDA_TYPES[torch.float32]]
    expected = OPS.linear_ce_and_dz.reference(x, w, target, grads, torch.empty(16, 24), -100)
    torch.testing.assert_close(losses, expected[0])
    torch.testing.assert_close(made, expected[1])
    columns = x.t().contiguous().t()
    y, _ = OPS.linear.cuda(columns, w, None, "none", False)
    assert_close_to_truth(y, x @ w.t(), x.double() @ w.double().t())
    assert len(stub.calls("multiply")) == 2


def test_the_gate_of_the_second_product(stub: Stub) -> None:
    x, w_gate, _, _ = make(5, 16, 24, torch.float16)
    w_up = w_gate.flip(0).contiguous()
    gate, up = (x.double() @ w.double().t() for w in (w_gate, w_up))
    plain_gate, plain_up = x @ w_gate.t(), x @ w_up.t()
    act = torch.nn.functional.silu
    for keep in (True, False):
        h, kept_gate, kept_up = OPS.gated_linear.cuda(x, w_gate, w_up, "silu", keep)
        assert_close_to_truth(h, act(plain_gate) * plain_up, act(gate) * up, name="h")
        if keep:
            assert_close_to_truth(kept_gate, plain_gate, gate, name="gate")
            assert_close_to_truth(kept_up, plain_up, up, name="up")
    assert len(stub.calls("multiply")) == 4


@pytest.fixture
def in_kernels(sim: tuple[ModuleType, Stub], stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """The kind "cublaslt" of spu.kernels, by the simulated library on CPU tensors."""
    monkeypatch.setattr(library, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(library, "module", lambda: sim[0])
    multiply.plan.cache_clear()
    yield stub
    multiply.plan.cache_clear()


def test_the_kind_of_a_configuration(in_kernels: Stub) -> None:
    asked = Config("cublaslt")
    x, w, dz, b = make(9, 24, 16, torch.float16)
    truth = torch.nn.functional.linear(x.double(), w.double(), b.double())
    plain = torch.nn.functional.linear(x, w, b)
    for name in ("gelu_tanh", "silu", "none"):
        act = ACTIVATIONS[name]
        y, z = kernels.linear_fwd(x, w, b, name, True, config=asked)
        assert_close_to_truth(y, act(plain), act(truth), name=name)
        assert_close_to_truth(z, plain, truth, name=name)
    assert [call["epilogue"] for call in in_kernels.calls("multiply")] == [164, 4, 4]
    assert_equal(kernels.linear_dx(dz, w, config=asked), OPS.linear_dx.cuda(dz, w))
    assert_equal(kernels.linear_dw(dz, x, config=asked), OPS.linear_dw.cuda(dz, x))
    ours, theirs, one, found = torch.full((24, 16), 3.0), torch.full((24, 16), 3.0), scalar(0.5), scalar(0.0)
    for accumulate in (True, False):
        kernels.linear_dw_(dz, x, ours, one, found, accumulate, config=asked)
        OPS.linear_dw_.cuda(dz, x, theirs, one, found, accumulate)
        assert_equal(ours, theirs)
    alone, *nothing = kernels.mlp_dz(dz, w, x, "gelu_tanh", False, False, config=asked)  # others need a kernel of ours
    assert_equal(alone, OPS.mlp_dz.cuda(dz, w, x, "gelu_tanh", False, False)[0])
    assert [t.numel() for t in nothing] == [0, 0]
    assert in_kernels.calls("multiply")[-1]["epilogue"] == 192
    dz[3, 5] = float("inf")
    kernels.linear_dw_(dz, x, ours, one, found, True, config=asked)
    assert found.item() == 1
    leave_to_norm(found.zero_())
    kernels.linear_dw_(dz, x, ours, one, found, False, config=asked)
    assert found.item() == 0, "no pass for it"
    assert not ours.isfinite().all(), "the norm sees it"


def test_a_configuration_names_one_of_the_algorithms(in_kernels: Stub) -> None:
    x, w, _, _ = make(5, 64, 48, torch.float16)
    in_kernels.answer(count=3, first=15)  # of which the first does not run here
    for wanted in range(4):
        y, _ = kernels.linear_fwd(x, w, config=Config("cublaslt", algorithm=wanted))
        assert_close_to_truth(y, x @ w.t(), x.double() @ w.double().t())
    told = [call["algorithm"] for call in in_kernels.calls("multiply")]
    assert told == [1, 2, 2, 2], "the last one where there are fewer"


def test_the_kind_is_torchs_where_it_takes_no_such_product(in_kernels: Stub) -> None:
    for dtype, inner in ((torch.float32, 16), (torch.float16, 15)):
        _, w, dz, _ = make(9, 24, inner, dtype)
        assert_equal(kernels.linear_dx(dz, w, config=Config("cublaslt")), dz @ w)
    assert in_kernels.calls("multiply") == []


def test_the_function_of_the_module_checks_its_integers(sim: tuple[ModuleType, Stub]) -> None:
    module, _ = sim
    with pytest.raises(TypeError, match="takes 20 integers, got 2"):
        module.multiply(1, 2)
    with pytest.raises(ValueError, match="form, type, activation or algorithm is out of range"):
        module.multiply(0, 3, *[0] * 18)
    with pytest.raises(OverflowError):
        module.multiply(1 << 70, *[0] * 19)


def test_what_is_loaded_is_found_by_its_name_and_version(folder: Path) -> None:
    def told(*arguments: Path, version: str = "130100") -> str:
        environment = {**os.environ, "STUB_VERSION": version}
        command = [str(folder / "probe"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    stub = folder / "libcublasLt.so.13"
    assert told() == "absent: no cuBLASLt is loaded; torch with CUDA loads one"
    assert told(stub) == "version 130100"
    assert told(stub, version="120604") == "version 120604"
    for version in ("110900", "140000"):
        assert told(stub, version=version) == f"absent: the loaded cuBLASLt has version {version}; spu knows 12 to 13"
    # another version's name, by its path; one that is no cuBLASLt but for its name
    empty = folder / "empty.cpp"
    empty.write_text("int nothing;\n")
    subprocess.run(["g++", "-shared", "-fPIC", str(empty), "-o", str(folder / "libcublasLt.so.12.9")], check=True)
    assert told(folder / "libcublasLt.so.12.9") == "absent: the loaded cuBLASLt has no cublasLtGetVersion"
