"""adamw_, grad_sqnorm and grad_norm on every backend."""

from __future__ import annotations

import pytest
import torch
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from op_checks import assert_registered
from torch import Tensor

from spu import ops
from spu.ops.reference import optimizer as reference_optimizer
from spu.optim.adamw import AdamW, clip_coefficient

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def one_state(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    master = torch.randn(shape)
    param = master.to(dtype)
    return {
        "param": param,
        "grad": torch.randn(shape),
        "master": None if dtype == torch.float32 else master,
        "exp_avg": torch.randn(shape) / 10,
        "exp_avg_sq": torch.rand(shape) / 10,
        "step": torch.tensor([3.0]),
    }


def apply(state: dict[str, Tensor | None], *, clip: float = 1.0, found_inf: float = 0.0, **hyper: float) -> None:
    ops.adamw_(
        *([state[key]] for key in ("param", "grad", "master", "exp_avg", "exp_avg_sq", "step")),
        grad_scale=torch.tensor([clip]), found_inf=torch.tensor([found_inf]), **{**HYPER, **hyper},
    )  # fmt: skip


def copied(state: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    return {k: None if v is None else v.to(dtype or v.dtype, copy=True) for k, v in state.items()}


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(33, 17), (1,), (0,), (), (1000,)])
def test_against_the_formula_in_fp64(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = one_state(shape, dtype)
    plain, truth = copied(state), copied(state, torch.float64)
    for each in (plain, truth):
        target, kind = each["master"] if each["master"] is not None else each["param"], each["grad"].dtype
        clip = torch.tensor([0.5], dtype=kind)
        arguments = (each["grad"], each["exp_avg"], each["exp_avg_sq"], each["step"], clip, torch.zeros(1, dtype=kind))
        reference_optimizer.adamw_on_device(target, *arguments, *HYPER.values())
        each["target"] = target
    with ops.use_backend(backend):
        apply(state, clip=0.5)
    state["target"] = state["param"] if state["master"] is None else state["master"]
    for name in ("target", "exp_avg", "exp_avg_sq"):
        assert_close_to_truth(state[name], plain[name], truth[name], eps=4e-7, name=name)
    assert_equal(state["param"], state["target"].to(dtype), "16-bit copy")


@every_backend
@pytest.mark.parametrize(
    ("masters", "moments"), [("fp32", "fp32"), ("16bit", "int8"), ("8bit", "bf16"), (None, "fp32")]
)
def test_bf16_gradients_are_widened_exactly(backend: str, masters: str | None, moments: str) -> None:
    dtype = torch.float16 if masters else torch.float32
    parameters = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in (0, 1, 63, 64, 1000, 4096)]
    wide = [torch.randn(p.shape).to(torch.bfloat16).float() for p in parameters]
    results = []
    for kind in (torch.float32, torch.bfloat16):
        own = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
        optimizer = AdamW(own, lr=1e-2, master=masters or "fp32", moments=moments)
        for parameter, grad in zip(own, wide):
            parameter.grad_dtype = kind
            parameter.grad = grad.to(kind)
        with ops.use_backend(backend):
            optimizer.step(grad_scale=torch.tensor([0.3]), bf16_grads=True)
        states = [value for p in own for key, value in sorted(optimizer.state[p].items())]
        results.append([*(p.detach() for p in own), *states])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    parameters[1].grad_dtype = torch.bfloat16
    parameters[1].grad = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="has a torch.bfloat16 gradient"):
        AdamW(parameters).step()


@every_backend
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("size", [1, 64, 200])
def test_a_gradient_whose_square_overflows_moves_nothing(backend: str, moments: str, size: int) -> None:
    """As in fp32, where the second moment is infinite. 8-bit moments became NaN, and the weights at the next step."""
    weights = torch.nn.Parameter(torch.randn(size))
    before = weights.detach().clone()
    optimizer = AdamW([weights], lr=0.1, moments=moments, weight_decay=0.0)
    with ops.use_backend(backend):
        for large in (True, False, False):
            weights.grad = torch.ones(size)
            weights.grad[size // 2] = 1e30 if large else 1.0
            optimizer.step()
    assert bool(weights.isfinite().all())
    assert weights[size // 2] == before[size // 2]
    if size == 200:  # blocks of 64 values have one scale
        assert bool((weights != before)[-8:].all())


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_changed_weights_are_taken_and_the_others_keep_their_low_bits(backend: str, dtype: torch.dtype) -> None:
    """The master's old value came back at the next update: a clamp, a load_state_dict, averaged weights were undone."""
    state = one_state((70, 3), dtype)
    state["master"].view(-1)[:3] = torch.tensor([1e-30, -70000.0, float("nan")])  # rounded to 0, to infinity in fp16
    state["param"].copy_(state["master"])
    state["param"].data[40:].clamp_(-0.1, 0.1)
    state["param"].data[3, 0] = 0.0
    followed = copied(state)
    changed = state["param"] != state["master"].to(dtype)
    assert 3 < changed.sum() < 100
    followed["master"] = torch.where(changed, state["param"].float(), state["master"])
    followed["param"] = followed["master"].to(dtype)
    with ops.use_backend(backend):
        apply(state)
        apply(followed)
    for name in ("param", "master", "exp_avg"):
        torch.testing.assert_close(state[name], followed[name], rtol=0, atol=0, equal_nan=True)
    assert state["param"][40:].abs().max() < 0.2


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("grad", [1.0, float("nan"), float("inf")])
def test_nothing_moves_when_found_inf_is_set(backend: str, dtype: torch.dtype, grad: float) -> None:
    state = one_state((50,), dtype)
    state["grad"].fill_(grad)
    before = copied(state)
    with ops.use_backend(backend):
        apply(state, found_inf=1.0)
    for name, value in state.items():
        if value is not None:
            assert_equal(value, before[name], name)


@every_backend
def test_strided_parameters(backend: str) -> None:
    strided = one_state((6, 5), torch.float32)
    plain = copied(strided)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        strided[name] = strided[name].t().contiguous().t()
    with ops.use_backend(backend):
        apply(strided)
        apply(plain)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(strided[name], plain[name])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_parameter_of_one_element_may_have_any_stride(backend: str, dtype: torch.dtype) -> None:
    """A strided view of one element is contiguous for torch, and its bits could not be compared with the master's."""
    strided = one_state((1,), dtype)
    plain = copied(strided)
    strided["param"] = torch.zeros(3, dtype=dtype)[::3].copy_(strided["param"])
    assert strided["param"].stride() == (3,)
    with ops.use_backend(backend):
        apply(strided)
        apply(plain)
    for name in ("param", "master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(strided[name], plain[name]), name


def test_the_two_reference_paths_agree() -> None:
    """The one for the CPU reads found_inf and the step on the host, the one for other devices does not."""
    state = one_state((40,), torch.float32)
    other = copied(state)
    with ops.use_backend("reference"):
        apply(state, clip=0.7)
    reference_optimizer.adamw_on_device(
        other["param"], other["grad"], other["exp_avg"], other["exp_avg_sq"], other["step"],
        torch.tensor([0.7]), torch.zeros(1), *HYPER.values(),
    )  # fmt: skip
    for name in ("param", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], other[name], rtol=1e-6, atol=1e-7)


@every_backend
def test_norms(backend: str) -> None:
    grads = [torch.randn(300, 20), torch.randn(7), torch.zeros(0), torch.tensor(2.0), torch.randn(8, 6).t()]
    truth = torch.cat([g.double().flatten() for g in grads]).norm()
    with ops.use_backend(backend):
        norm, square = ops.grad_norm(grads), ops.grad_sqnorm(iter(grads))
    assert norm.shape == square.shape == (1,)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double()[0], truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(square.double()[0], truth**2, rtol=1e-6, atol=0)
    with ops.use_backend(backend):
        assert ops.grad_norm([torch.tensor([float("nan"), 1.0])]).isnan()
        assert ops.grad_norm([torch.tensor([float("-inf"), 1.0])]).isinf()
        many = torch.full((1 << 20,), 1e-3)
        torch.testing.assert_close(ops.grad_sqnorm([many]).item(), 1.048576, rtol=1e-6, atol=0)
    assert ops.grad_norm([]).item() == 0
    assert square.dtype == ops.grad_sqnorm([]).dtype == torch.float64
    with pytest.raises(TypeError, match=r"torch.float16: main gradients are float32"):
        ops.grad_norm([torch.ones(3).half()])


@every_backend
@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30])
def test_norms_of_finite_gradients_are_finite(backend: str, size: float) -> None:
    """Squares in fp32 end at 1.8e19: the norm was inf, the step skipped, or clipped to nothing."""
    grads = [torch.full((33, 17), size), torch.full((5,), -size), torch.tensor(size)]
    truth = size * (33 * 17 + 6) ** 0.5
    with ops.use_backend(backend):
        square = ops.grad_sqnorm(grads)
        norm = ops.grad_norm([g / 64 for g in grads])
    torch.testing.assert_close(square.item(), truth**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.item(), truth / 64, rtol=1e-6, atol=0)
    coefficient = clip_coefficient(square, 1.0)
    assert coefficient.dtype == torch.float32
    torch.testing.assert_close(coefficient.item(), min(1 / truth, 1.0), rtol=1e-5, atol=1e-44)


def test_what_does_not_fit_is_named() -> None:
    state = one_state((3,), torch.float16)
    with pytest.raises(TypeError, match=r"parameter 0 is torch.float16: give it an fp32 master"):
        apply({**state, "master": None})
    with pytest.raises(TypeError, match=r"grad 0 is torch.float16"):
        apply({**state, "grad": torch.ones(3).half()})
    with pytest.raises(ValueError, match=r"exp_avg 0 is \(4,\) on cpu, but its parameter is \(3,\) on cpu"):
        apply({**state, "exp_avg": torch.ones(4)})
    with pytest.raises(TypeError, match=r"parameter 0 is torch.float64"):
        apply({**state, "param": torch.ones(3).double()})


@every_backend
def test_opcheck(backend: str) -> None:
    state = one_state((5, 3), torch.float16)
    control = torch.ones(1), torch.zeros(1)
    assert_registered(
        backend,
        ("adamw_", *([value] for value in state.values()), *control, *HYPER.values()),
        ("grad_sqnorm", [torch.randn(5, 3), torch.randn(4)]),
        ("unscale_", torch.randn(5).half(), torch.zeros(5), *control, True),
    )


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("step", torch.tensor([3]), "step 0 must be float32 of one element, got torch.int64"),
        ("step", torch.ones(2), r"step 0 must be float32 of one element, got torch.float32 \(2,\)"),
        ("step", torch.ones(1, device="meta"), "step 0 is on meta, but its parameter is on cpu"),
        ("grad_scale", torch.ones(1, dtype=torch.float64), "grad_scale must be float32 of one element"),
        ("found_inf", torch.tensor([False]), "found_inf must be float32 of one element"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_changes(name: str, value: Tensor, error: str) -> None:
    state = one_state((4,), torch.float32)
    before = copied(state)
    scalars = {"grad_scale": torch.ones(1), "found_inf": torch.zeros(1)}
    (state if name == "step" else scalars)[name] = value
    rows = ([state[key]] for key in ("param", "grad", "master", "exp_avg", "exp_avg_sq", "step"))
    with pytest.raises((TypeError, ValueError), match=error):
        ops.adamw_(*rows, **scalars, **HYPER)
    for key in ("param", "exp_avg", "exp_avg_sq"):
        assert_equal(state[key], before[key], key)
