"""The CUDA kernels against fp64 truth, plain torch and the reference: the tests of the CPU kernels, run on them.

Without a GPU they run simulated (cuda_sim.py); with one, the same tests run on the device, on the installed spu._cuda.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import cuda_sim
import pytest
import test_cpu_kernels as suite
import test_cpu_wire_and_optimizer
import torch
from numeric import assert_close_to_truth, assert_equal
from test_cpu_kernels import (  # noqa: F401  (collected here again)
    test_a_sum_that_overflows_is_found,
    test_derivative_at_every_fp16_value,
    test_dz,
    test_found_inf_sees_any_element_and_is_never_reset,
    test_gradients,
    test_linear,
    test_linear_of_any_strides_is_bit_equal_to_contiguous,
    test_linear_of_leading_dimensions_and_expanded_tensors,
    test_no_rows_store_zeros_or_leave_alone,
    test_non_finite_values_stand_where_torch_has_them,
    test_padding_of_ragged_tiles_raises_no_alarm,
    test_unscale,
)
from test_cpu_wire_and_optimizer import (  # noqa: F401
    test_adamw_follows_torch,
    test_adamw_skips_on_found_inf_and_takes_strided_state,
    test_adamw_takes_weights_that_were_changed,
    test_conversions_of_every_fp16_and_bf16_value,
    test_grad_sqnorm,
    test_int8_special_blocks,
    test_narrow_moments_are_the_references,
    test_wire_is_the_references_byte_for_byte,
)

from spu import ops
from spu.kernels import config
from spu.ops import cuda_library, dispatch
from spu.ops.reference import fused as reference_fused

REAL = torch.cuda.is_available() and importlib.util.find_spec("spu._cuda") is not None
DEVICE = "cuda" if REAL else "cpu"


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The library, which registers the cuda overloads."""
    if REAL:
        assert ops.backends()["cuda"].available, ops.backends()["cuda"]
        return importlib.import_module("spu._cuda")
    if reason := cuda_sim.missing():
        pytest.skip(reason)
    return cuda_sim.load()


@pytest.fixture(scope="session")
def library(module: ModuleType) -> str:
    """The dispatch key of the overloads."""
    return "CUDA" if REAL else "CPU"


@pytest.fixture(autouse=True)
def on_cuda_kernels(library: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for tests in (suite, test_cpu_wire_and_optimizer):
        monkeypatch.setattr(tests, "OPS", cuda_sim.AsCpu(DEVICE))
    status = dispatch.cuda_library_status(library)
    monkeypatch.setitem(dispatch._LOADERS, "cuda", dispatch.Loader(lambda: status))
    return


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_dz(activation: str, dtype: torch.dtype) -> None:
    dh, gate, up = (torch.randn(7, 45).to(dtype) for _ in range(3))
    act = suite.ACTIVATIONS[activation]

    def derivative(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        g, u = (t.detach().clone().to(dtype).requires_grad_() for t in (gate, up))
        h = act(g) * u
        h.backward(dh.to(dtype))
        assert g.grad is not None
        assert u.grad is not None
        return g.grad, u.grad, h.detach()

    made = suite.OPS.gated_dz.cpu(dh, gate, up, activation)
    for name, ours, plain, truth in zip(("dgate", "dup", "h"), made, derivative(dtype), derivative(torch.float64)):
        assert_close_to_truth(ours, plain, truth, name=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_mlp_dz(activation: str, dtype: torch.dtype) -> None:
    dy, w_out, saved = torch.randn(2, 35, 21).to(dtype), torch.randn(21, 70).to(dtype) / 4, torch.randn(2, 35, 70)
    saved = saved.to(dtype)
    truth = reference_fused.mlp_dz(dy.double(), w_out.double(), saved.double(), activation, True, True)
    made = suite.OPS.mlp_dz.cpu(dy, w_out, saved, activation, True, True)
    plain = list(reference_fused.mlp_dz(dy, w_out, saved, activation, True, True))
    if dtype != torch.float32:  # tensor cores' product is rounded before the derivative, as plain torch's
        plain[0] = torch.ops.spu.linear_dz.reference(dy @ w_out, saved, activation)
        plain[2] = plain[0].float().sum((0, 1))
    for name, ours, theirs, true in zip(("dz", "h", "sums"), made, plain, truth):
        assert_close_to_truth(ours, theirs, true, eps=torch.finfo(dtype).eps * float(true.abs().max()), name=name)
    assert made[2].dtype == torch.float32
    assert [t.numel() for t in suite.OPS.mlp_dz.cpu(dy, w_out, saved, activation, False, False)[1:]] == [0, 0]


def test_adamw_over_more_tensors_than_one_launch_takes() -> None:
    # 48 tensors fit a launch; pieces of 16384 values, empty tensors among them
    sizes = [1, 0, 20_000, 16_384, *[3] * 60, 0, 33_000]
    hyper = (1e-2, 0.9, 0.99, 1e-8, 0.1)

    def state() -> list[list[torch.Tensor]]:
        torch.manual_seed(1)
        return [[torch.rand(n).to(t) for n in sizes] for t in (torch.half, *[torch.float] * 4)]

    steps = [suite.scalar(1.0 + i % 3) for i in range(len(sizes))]
    ours, expected = state(), state()
    for lists in (ours, expected):
        lists[0] = [master.half() for master in lists[2]]
    suite.OPS.adamw_.cpu(*ours, steps, suite.scalar(0.5), suite.scalar(0.0), *hyper)
    suite.OPS.adamw_.reference(*expected, steps, suite.scalar(0.5), suite.scalar(0.0), *hyper)
    for name, mine, theirs in zip(("param", "grad", "master", "exp_avg", "exp_avg_sq"), ours, expected):
        for i, (a, b) in enumerate(zip(mine, theirs)):
            assert torch.allclose(a.float(), b.float(), rtol=1e-3 if name == "param" else 2e-6, atol=1e-7), (name, i)
    square = suite.OPS.grad_sqnorm.cpu(ours[1])
    assert square.item() == pytest.approx(float(sum(g.double().square().sum() for g in ours[1])), rel=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(512, 70), (513, 70), (1300, 9), (33_000, 3)])
def test_sums_over_rows_in_parts(rows: int, columns: int) -> None:
    # a part has 512 rows, there are at most 64: one part, two, three with a short one, and 64 longer ones
    dz = torch.randn(rows, columns).half()
    truth, plain = dz.double().sum(0), dz.float().sum(0)
    assert_close_to_truth(suite.OPS.linear_db.cpu(dz), dz.sum(0), truth)
    main_grad, found_inf = torch.full((columns,), float("nan")), suite.scalar(0.0)
    suite.OPS.linear_db_.cpu(dz, main_grad, suite.scalar(0.25), found_inf, False)
    first = main_grad.clone()
    assert_close_to_truth(first, 0.25 * plain, 0.25 * truth, eps=1e-6 * rows**0.5)
    suite.OPS.linear_db_.cpu(dz, main_grad, suite.scalar(0.25), found_inf, True)
    assert_equal(main_grad, first + first, "the same sum twice, added up")
    assert found_inf.item() == 0
    dz[rows - 1, columns - 1] = float("inf")
    suite.OPS.linear_db_.cpu(dz, main_grad, suite.scalar(0.25), found_inf, True)
    assert found_inf.item() == 1


def test_unaligned_tensors_take_the_narrow_path() -> None:
    whole = torch.randn(2049).half()
    view = whole[1:]  # two bytes off
    for codec in test_cpu_wire_and_optimizer.CODECS:
        assert_equal(suite.OPS.pack.cpu(view, codec), suite.OPS.pack.cpu(view.clone(), codec), codec)
        wire = suite.OPS.pack.cpu(view, codec)
        shifted = torch.empty(len(wire) + 1, dtype=torch.uint8)[1:].copy_(wire)
        back = suite.OPS.unpack.cpu(shifted, [2048], torch.float16, codec)
        assert_equal(back, suite.OPS.unpack.cpu(wire, [2048], torch.float16, codec), codec)


def test_the_backend_serves_the_public_ops(library: str) -> None:
    x = torch.randn(6, 8, device=DEVICE).half().requires_grad_()
    w = torch.randn(4, 8, device=DEVICE).half().requires_grad_()
    with ops.use_backend("cuda"):
        y = ops.linear_act(x, w, None, "gelu")
    y.float().sum().backward()
    with ops.use_backend("reference"):
        expected = ops.linear_act(x.detach(), w.detach(), None, "gelu")
    assert_close_to_truth(y.detach(), expected, expected.double())
    assert x.grad is not None
    assert w.grad is not None
    assert w.grad.shape == w.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch.ops.spu.linear.cuda(torch.ones(2, 3), torch.ones(4, 5), None, "none", False), "3 features"),
        (lambda: torch.ops.spu.linear_dz.cuda(torch.ones(2), torch.ones(3), "gelu"), r"\[2\].*\[3\]"),
        (lambda: torch.ops.spu.linear_dz.cuda(torch.ones(2), torch.ones(2), "tanh"), "unknown activation 'tanh'"),
        (lambda: torch.ops.spu.pack.cuda(torch.ones(2), "int3"), "unknown codec 'int3'"),
        (lambda: torch.ops.spu.unpack.cuda(torch.ones(5).byte(), [2], torch.half, "fp16"), "has 128 bytes, got 5"),
        (lambda: torch.ops.spu.pack.cuda(torch.ones(2).double(), "fp16"), "got float64"),
    ],
)
def test_direct_callers_get_the_values_in_the_message(call: object, message: str) -> None:
    if REAL:
        pytest.skip("the tensors of this test are on the CPU, which the real library refuses first")
    with pytest.raises(Exception, match=message):
        call()  # type: ignore[operator]


def test_gated_linear_is_the_references_up_to_rounding() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x, gate, up = (torch.randn(*size).to(dtype) for size in ((2, 5, 40), (24, 40), (24, 40)))
        truth = torch.nn.functional.silu(x.double() @ gate.double().t()) * (x.double() @ up.double().t())
        plain = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
        h, kept_gate, kept_up = suite.OPS.gated_linear.cpu(x, gate, up, "silu", True)
        assert_close_to_truth(h, plain, truth, name="h")
        assert_close_to_truth(kept_gate, x @ gate.t(), x.double() @ gate.double().t(), name="gate")
        assert_close_to_truth(kept_up, x @ up.t(), x.double() @ up.double().t(), name="up")
        lone, *nothing = suite.OPS.gated_linear.cpu(x, gate, up, "silu", False)
        assert_equal(lone, h)
        assert [kept.numel() for kept in nothing] == [0, 0]


def test_packing_into_memory_that_is_there() -> None:
    """Simulated, host memory serves as what the kernels of a device see of pinned memory."""
    x = torch.randn(7, 45).half()
    for codec in test_cpu_wire_and_optimizer.CODECS:
        expected = suite.OPS.pack.cpu(x, codec)
        wire = torch.full_like(expected, 77).pin_memory() if REAL else torch.full_like(expected, 77)
        torch.ops.spu.pack_.cuda(x.to(DEVICE), codec, wire)
        if REAL:
            torch.cuda.synchronize()
        assert_equal(wire, expected, codec)
        for out in (torch.empty_like(x), torch.empty(45, 7).half().t()):
            there = out.to(DEVICE)
            torch.ops.spu.unpack_.cuda(wire, codec, there)
            assert_equal(there.cpu(), suite.OPS.unpack.cpu(expected, [7, 45], torch.float16, codec), codec)


def test_a_given_wire_that_starts_anywhere_is_refused() -> None:
    """A kernel's 4-byte store at another address would be an error that no later call survives."""
    x = torch.randn(64, device=DEVICE)
    length = len(torch.ops.spu.pack.cuda(x, "int8"))
    for first in (1, 2, 3):
        memory = torch.zeros(length + first, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(Exception, match="pack_: wire does not start at a multiple of 4 bytes"):
            torch.ops.spu.pack_.cuda(x, "int8", memory[first:])
        with pytest.raises(Exception, match="unpack_: wire does not start at a multiple of 4 bytes"):
            torch.ops.spu.unpack_.cuda(memory[first:], "int8", torch.empty_like(x))
        assert not memory.any()


def test_shape_classes_are_pythons_and_tiles_are_checked(module: ModuleType) -> None:
    for shape in ((1, 8, 8), (64, 9999, 9), (65, 128, 8192), (65, 128, 8191), (2048, 1024, 64), (2049, 1024, 9000),
                  (4096, 4096, 1), (4097, 4096, 1), (8192, 8192, 4096)):  # fmt: skip
        assert config.CLASSES[module.shape_class(*shape)] == config.shape_class(*shape), shape
    tiles = cuda_library.packed_tiles((8, 6))
    module.set_tiles(86, tiles)
    for capability, wrong in ((86, tiles[:-1]), (86, bytes([3]) * len(tiles)), (256, tiles), (-1, tiles)):
        with pytest.raises(ValueError, match="out of range"):
            module.set_tiles(capability, wrong)


def test_a_list_is_copied_in_and_converted() -> None:
    types = (torch.float16, torch.bfloat16, torch.float32)
    sources = [torch.randn(n).to(types[i % 3]) for i, n in enumerate([1, 0, 20_000, 5, *[3] * 60, 16_384])]
    if REAL:
        sources = [source.pin_memory() for source in sources]
    targets = [torch.zeros(len(s), dtype=types[i // 3 % 3], device=DEVICE) for i, s in enumerate(sources)]
    torch.ops.spu.copy_in_.cuda(sources, targets)
    for i, (source, target) in enumerate(zip(sources, targets)):
        assert_equal(target.cpu(), source.to(target.dtype), f"tensor {i}")
