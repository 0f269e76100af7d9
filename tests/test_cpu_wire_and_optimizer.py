"""The C++ wire formats and optimizer ops by their overloads torch.ops.spu.*.cpu, against truth, torch, the reference.

Runs on every instruction set, like test_cpu_kernels.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numeric import assert_close_to_truth, assert_equal
from test_cpu_kernels import DTYPES, OPS, scalar
from torch import Tensor

import spu.ops  # noqa: F401  (defines the schemas; must not load another spu._C first)
from spu.ops.masters import joined, split
from spu.ops.moments import load_moment, new_moment

CODECS = ("fp16", "bf16", "int8", "int4", "fp8_e4m3", "fp8_e5m2")


def test_conversions_of_every_fp16_and_bf16_value() -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for codec, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        stored = every.view(dtype)
        wire = OPS.pack.cpu(stored, codec)
        assert_equal(OPS.unpack.cpu(wire, [65536], torch.float32, codec), stored.float(), f"{codec} widened")
        same = OPS.unpack.cpu(wire, [65536], dtype, codec)
        finite = ~stored.isnan()
        assert_equal(same.view(torch.int16)[finite], every[finite], f"{codec} copied")
        # rounding: every value, the midpoint to its neighbour, and one fp32 step to either side of that
        wide = stored.float()[torch.isfinite(stored)]
        next_up = (stored.view(torch.int16) + 1).view(dtype).float()[torch.isfinite(stored)]
        middle = ((wide.double() + next_up.double()) / 2).float()
        infinity = torch.tensor(float("inf"))
        odd = torch.tensor([65519.9, 65520.0, 1e38, 3.4e38, 1e-45, -1e-40, float("inf"), float("nan"), -0.0])
        for values in (wide, middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity), odd):
            packed = OPS.pack.cpu(values, codec)
            back = OPS.unpack.cpu(packed, [values.numel()], dtype, codec)
            assert_equal(back, values.to(dtype), f"fp32 to {codec}")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wire_is_the_references_byte_for_byte(codec: str, dtype: torch.dtype) -> None:
    for shape in ((), (0,), (1,), (63,), (64,), (65,), (3, 0, 2), (2, 3, 4, 5, 6), (300, 129)):
        x = torch.randn(shape)
        x = (x * torch.logspace(-6, 4, x.numel()).view(shape)).to(dtype)
        wire = OPS.pack.cpu(x, codec)
        assert_equal(wire, OPS.pack.reference(x, codec), f"wire of {shape}")
        for out in DTYPES:
            args = (wire, list(shape), out, codec)
            assert_equal(OPS.unpack.cpu(*args), OPS.unpack.reference(*args), f"unpacked {shape}")
    strided = torch.randn(7, 10).to(dtype).t()
    assert_equal(OPS.pack.cpu(strided, codec), OPS.pack.cpu(strided.contiguous(), codec), "a strided tensor's wire")


@pytest.mark.parametrize("codec", CODECS)
def test_a_wire_at_an_odd_address(codec: str) -> None:
    x = torch.randn(130)
    wire = OPS.pack.cpu(x, codec)
    shifted = torch.empty(wire.numel() + 1, dtype=torch.uint8)[1:].copy_(wire)
    expected = OPS.unpack.cpu(wire, [130], torch.float32, codec)
    assert_equal(OPS.unpack.cpu(shifted, [130], torch.float32, codec), expected)


def test_int8_special_blocks() -> None:
    x = torch.randn(6 * 64)
    x[3] = float("nan")
    x[64 + 5] = float("inf")
    x[128:192] = 0
    x[192:256] = torch.randn(64) * 1e-39  # a subnormal scale
    x[256] = 3.4e38
    wire = OPS.pack.cpu(x, "int8")
    assert_equal(wire, OPS.pack.reference(x, "int8"))
    back = OPS.unpack.cpu(wire, [384], torch.float32, "int8").view(6, 64)
    assert bool(back[:2].isnan().all())
    assert_equal(back[2:4], torch.zeros(2, 64))
    blocks = x.view(6, 64)[4:]
    assert bool(((back[4:] - blocks).abs() <= blocks.abs().amax(1, keepdim=True) / 127 * 0.5001).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_follows_torch(dtype: torch.dtype) -> None:
    start = torch.randn(257, 67)
    hyper: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    truth_p, plain_p = start.double().requires_grad_(), start.clone().requires_grad_()
    truth, plain = torch.optim.AdamW([truth_p], foreach=False, **hyper), torch.optim.AdamW([plain_p], **hyper)
    master = start.clone()
    param = master.to(dtype) if dtype != torch.float32 else master
    m, v, clip = torch.zeros_like(start), torch.zeros_like(start), 0.5
    for step in range(1, 6):
        g = torch.randn_like(start) * 10.0 ** (step - 4)
        truth_p.grad, plain_p.grad = g.double() * clip, g * clip
        truth.step()
        plain.step()
        held = [] if dtype == torch.float32 else [master]
        OPS.adamw_.cpu(
            [param], [g], held, [m], [v], [scalar(step)], scalar(clip), scalar(0.0), 1e-2, 0.9, 0.99, 1e-8, 0.1
        )  # fmt: skip
        state, plain_state = truth.state[truth_p], plain.state[plain_p]
        assert_close_to_truth(master, plain_p.detach(), truth_p.detach(), name=f"parameter after step {step}")
        assert_close_to_truth(m, plain_state["exp_avg"], state["exp_avg"], name="exp_avg")
        assert_close_to_truth(v, plain_state["exp_avg_sq"], state["exp_avg_sq"], name="exp_avg_sq")
        assert_equal(param, master.to(dtype), "the 16-bit copy")


@pytest.mark.parametrize("beta2", [0.0, 0.999, 1 - 1e-7])
def test_adamw_divides_as_a_division_does(beta2: float) -> None:
    """A root is divided by its bias correction without a division: as exact, also where it is 0, inf or NaN."""
    special = torch.tensor([0.0, float("inf"), float("nan"), 1e-45])
    for step in (1.0, 2.0, 1000.0):
        p, m, v = torch.ones(4100), torch.ones(4100), torch.cat([torch.logspace(-45, 38, 4096), special])
        hyper = (scalar(0.0), 0.1, 0.9, beta2, 1e-8, 0.0)
        OPS.adamw_.cpu([p], [torch.zeros(4100)], [], [m], [v], [scalar(step)], scalar(1.0), *hyper)
        size, correction = scalar(0.1 / (1 - 0.9**step)), scalar((1 - beta2**step) ** 0.5)
        expected = 1 - m * size / (v.sqrt() / correction + scalar(1e-8))
        torch.testing.assert_close(p, expected, rtol=3e-7, atol=2e-7, equal_nan=True)


def test_adamw_skips_on_found_inf_and_takes_strided_state() -> None:
    def state() -> list[Tensor]:
        torch.manual_seed(5)
        return [torch.randn(6, 9).half(), torch.randn(6, 9), torch.randn(6, 9), torch.randn(6, 9), torch.rand(6, 9)]

    def lists(tensors: list[Tensor]) -> list[list[Tensor]]:
        return [[tensor] for tensor in tensors]

    rest = ([scalar(3.0)], scalar(1.0))
    hyper = (1e-2, 0.9, 0.99, 1e-8, 0.1)
    before, after = state(), state()
    OPS.adamw_.cpu(*lists(after), *rest, scalar(1.0), *hyper)
    for name, a, b in zip(("param", "grad", "master", "exp_avg", "exp_avg_sq"), after, before):
        assert_equal(a, b, f"{name} of a skipped step")
    OPS.adamw_.cpu(*lists(after), *rest, scalar(0.0), *hyper)
    strided = [t.t().contiguous().t() for t in before]
    OPS.adamw_.cpu(*lists(strided), *rest, scalar(0.0), *hyper)
    for name, a, b in zip(("param", "grad", "master", "exp_avg", "exp_avg_sq"), strided, after):
        assert_equal(a, b, f"{name}, strided")
    assert not torch.equal(after[2], before[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adamw_takes_weights_that_were_changed(dtype: torch.dtype) -> None:
    master, grad = torch.randn(1003), torch.randn(1003)
    param = master.to(dtype)
    param.data[500:600] = 0.25
    expected = master.clone()
    expected[500:600] = 0.25
    taken = expected.to(dtype)
    for weight, held in ((param, master), (taken, expected)):
        moments = [torch.zeros(1003)], [torch.zeros(1003)]
        OPS.adamw_.cpu(
            [weight], [grad], [held], *moments, [scalar(1)], scalar(1.0), scalar(0.0), 1e-3, 0.9, 0.99, 1e-8, 0.0
        )  # fmt: skip
    assert_equal(master, expected, "master")
    assert_equal(param, taken, "parameter")


@pytest.mark.parametrize("moments", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_narrow_moments_are_the_references(moments: str, dtype: torch.dtype) -> None:
    """The same noise on every backend: only where fp32 arithmetic differs by a unit may a code differ by one."""
    sizes = [0, 1, 63, 64, 65, 20_000]
    states = []
    for op in (OPS.adamw_.cpu, OPS.adamw_.reference):
        torch.manual_seed(3)
        masters = [torch.randn(n) for n in sizes]
        params = [master.to(dtype) for master in masters] if dtype == torch.float16 else masters
        held = masters if dtype == torch.float16 else []
        m, v = ([new_moment((n,), moments, torch.device("cpu")) for n in sizes] for _ in range(2))
        for step in (1.0, 2.0, 3.0):
            grads = [torch.randn(n) * torch.logspace(-6, 2, n) for n in sizes]
            steps = [scalar(step) for _ in sizes]
            op(params, grads, held, m, v, steps, scalar(0.5), scalar(0.0), 1e-2, 0.9, 0.999, 1e-8, 0.1)
        before = [moment.clone() for moment in (*m, *v)]
        op(params, grads, held, m, v, steps, scalar(0.5), scalar(1.0), 1e-2, 0.9, 0.999, 1e-8, 0.1)
        for old, new in zip(before, (*m, *v)):
            assert_equal(new, old, "a moment of a skipped step")
        states.append((masters, m, v))
    for name, ours, theirs in zip(("master", "exp_avg", "exp_avg_sq"), *states):
        for n, a, b in zip(sizes, ours, theirs):
            if name != "master":
                # scales, in front, may differ by a unit
                different = int((a[len(a) - n :] != b[len(b) - n :]).sum())
                assert different <= 4 + n // 1000, (name, n, different)
                a, b = (load_moment(one, (n,), signed=name == "exp_avg") for one in (a, b))
            assert torch.allclose(a, b, rtol=0.13 if name != "master" else 1e-5, atol=1e-6), (name, n)


SIZES = [0, 1, 63, 64, 65, 20_003]


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("form", ["16bit", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_corrections_are_the_references_in_every_bit(dtype: torch.dtype, form: str, moments: str) -> None:
    """With gradients that are powers of 2, beta1 3/4 and beta2 0 no backend rounds a moment or a root.

    (torch's own square root is not always the nearest value.)
    """
    start = [torch.randn(n) * torch.logspace(-9, 6, n) for n in SIZES]
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 65568.0, 1e-40, -1e-10])
    start[-1][100:110] = odd
    states = []
    for op in (OPS.adamw_.cpu, OPS.adamw_.reference):
        torch.manual_seed(7)
        params, held = map(list, zip(*(split(values, dtype, form) for values in start)))
        written = torch.randint(-32768, 32768, (5000,), dtype=torch.int64).to(torch.int16)  # NaN and infinity too
        params[-1].view(torch.int16)[-5000:] = written
        m, v = ([new_moment((n,), moments, torch.device("cpu")) for n in SIZES] for _ in range(2))
        for step in (1.0, 2.0, 3.0, 4.0):
            signs = [torch.randint(0, 2, (n,)) * 2.0 - 1 for n in SIZES]
            grads = [sign * 2.0 ** torch.randint(-4, 4, sign.shape) for sign in signs]
            if step == 4.0:
                grads[-1][7:9] = torch.tensor([torch.nan, torch.inf])
            steps = [scalar(step) for _ in SIZES]
            op(params, grads, held, m, v, steps, scalar(0.5), scalar(0.0), 1e-2, 0.75, 0.0, 1e-8, 0.1)
        before = [tensor.clone() for tensor in (*params, *held, *m, *v)]
        op(params, grads, held, m, v, steps, scalar(0.5), scalar(1.0), 1e-2, 0.75, 0.0, 1e-8, 0.1)
        for old, new in zip(before, (*params, *held, *m, *v)):
            assert_equal(new, old, "after a skipped step")
        states.append((params, held, m, v))
    for name, ours, theirs in zip(("parameter", "correction", "exp_avg", "exp_avg_sq"), *states):
        for a, b in zip(ours, theirs):
            assert_equal(a, b, name)
    moved = (joined(states[0][0][-1], states[0][1][-1]) - start[-1]).abs()[1000:10_000]
    assert bool((moved > 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_corrections_equal_fp32_masters(dtype: torch.dtype) -> None:
    start = torch.randn(3_001).sign() * (torch.rand(3_001) + 0.1)
    master, weight = start.clone(), start.to(dtype)
    param, correction = split(start, dtype, "16bit")
    m, v, other_m, other_v = (torch.zeros(3_001) for _ in range(4))
    hyper = (scalar(1.0), scalar(0.0), 1e-4, 0.9, 0.999, 1e-8, 0.1)
    for step in range(1, 51):
        grad = torch.randn(3_001)
        OPS.adamw_.cpu([weight], [grad], [master], [m], [v], [scalar(step)], *hyper)
        OPS.adamw_.cpu([param], [grad], [correction], [other_m], [other_v], [scalar(step)], *hyper)
        assert_equal(joined(param, correction), master, f"master after step {step}")
    assert not torch.equal(master, start)
    assert_equal(param[master.to(dtype) == param], weight[master.to(dtype) == param])
    assert int((param != weight).sum()) <= (0 if dtype == torch.float16 else 3), "ties only"


def test_grad_sqnorm() -> None:
    for shape in ((0,), (1,), (7, 13), (200_001,)):
        g = torch.randn(shape)
        truth = g.double().square().sum().view(1)
        assert_close_to_truth(OPS.grad_sqnorm.cpu([g]).float(), g.square().sum().view(1), truth)
    big = torch.full((3,), 1e15)
    assert OPS.grad_sqnorm.cpu([big]).item() == pytest.approx(3e30)
    assert OPS.grad_sqnorm.cpu([big * 1e15, big * 1e-42]).item() == pytest.approx(3e60)
    assert OPS.grad_sqnorm.cpu([big * 1e-42]).item() == pytest.approx(3e-54, rel=1e-6)
    assert OPS.grad_sqnorm.cpu([big, torch.tensor([1.0, float("nan")])]).isnan().item()
    assert_equal(OPS.grad_sqnorm.cpu([torch.arange(12.0).view(3, 4).t()]), scalar(506.0).double(), "strided")
