"""AdamW with masters of a 16-bit weight and a correction: equal to fp32 masters, right on average, saved, followed."""

from __future__ import annotations

import copy

import pytest
import torch
from backend_params import every_backend
from numeric import assert_equal
from test_optim import HYPER, parameters, random_grads, saved, set_grads, step_all
from torch import Tensor, nn

from spu import ops
from spu.ops import masters
from spu.optim.adamw import AdamW

HALVES = [torch.float16, torch.bfloat16]
FORMS = ["fp32", "16bit", "8bit"]
NARROW = FORMS[1:]
BACKENDS = ["reference", "cpu"]


def use(backend: str) -> object:
    if not ops.backends()[backend].available:
        pytest.skip(f"backend {backend} is not here")
    return ops.use_backend(backend)


def halves(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype))


def step_once(optimizer: AdamW, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    set_grads(params, grads)
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_corrections_train_as_fp32_masters_in_every_bit(dtype: torch.dtype, backend: str) -> None:
    """200 steps; in fp16 from values that stay above 2**-16."""
    exact = torch.randn(500).sign() * (torch.rand(500) + 0.5)
    wide, narrow = halves(exact, dtype), halves(exact, dtype)
    masters, corrections = AdamW([wide], lr=1e-3), AdamW([narrow], lr=1e-3, master="16bit")
    ties = 0
    with use(backend):
        for optimizer, param in ((masters, wide), (corrections, narrow)):
            optimizer.set_master(param, exact)
        for step in range(200):
            grad = torch.randn(500)
            step_once(masters, [wide], [grad])
            step_once(corrections, [narrow], [grad])
            assert_equal(corrections.master(narrow), masters.master(wide), f"masters after step {step}")
            ties += int((narrow != wide).sum())
    assert ties <= (0 if dtype == torch.float16 else 20), "a bf16 weight may differ in a tie: one in 2**17"
    assert bool((masters.master(wide) - exact).abs().max() > 0.01)
    assert set(corrections.state[narrow]) == {"step", "correction", "exp_avg", "exp_avg_sq"}
    assert corrections.state[narrow]["correction"].dtype == torch.int16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_8_bit_corrections_are_right_on_average(dtype: torch.dtype, backend: str) -> None:
    """Updates of a sixteenth of the master's unit: rounded to nearest, none of them would ever count."""
    start = torch.full((4096,), 1.5)
    unit = 2.0 ** (-18 if dtype == torch.float16 else -15)
    params = [halves(start, dtype) for _ in range(2)]
    optimizers = [AdamW([p], lr=unit / 16, betas=(0.0, 0.0), weight_decay=0.0, master="8bit") for p in params]
    with use(backend):
        for _ in range(64):
            for optimizer, param in zip(optimizers, params):
                step_once(optimizer, [param], [torch.ones(4096)])
    moved = (start - optimizers[0].master(params[0])).double() / unit
    # 4 units: each element takes one in each of 64 steps with a chance of 1/16
    assert abs(moved.mean().item() - 4) < 5 * (64 / 16 * 15 / 16 / 4096) ** 0.5
    assert 1.5 < moved.std().item() < 2.5
    assert_equal(moved.round(), moved, "whole units")
    for key, value in optimizers[0].state[params[0]].items():
        assert_equal(optimizers[1].state[params[1]][key], value, f"{key} of a second run")
    assert_equal(params[1].detach(), params[0].detach(), "a second run")


@every_backend
@pytest.mark.parametrize("master", NARROW)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_weight_that_is_written_is_followed(dtype: torch.dtype, master: str, backend: str) -> None:
    if backend in ("triton", "cuda"):
        pytest.skip("their kernels have fp32 masters")
    param = halves(torch.randn(300), dtype)
    optimizer = AdamW([param], lr=1e-2, master=master)
    with ops.use_backend(backend):
        for _ in range(3):
            step_once(optimizer, [param], [torch.randn(300)])
        before = optimizer.master(param).clone()
        param.data[:100].clamp_(-0.05, 0.05)
        param.data[100:200] = 0.0
        written, half = param.detach().double(), 0.5 * torch.finfo(dtype).eps
        followed = optimizer.master(param).double()
        assert_equal(followed[200:], before[200:].double(), "the others")
        assert bool(((followed - written).abs() <= half * written.abs() + 2.0**-25)[:200].all())
        optimizer.set_master(param, param)
        assert_equal(optimizer.master(param), param.detach().float(), "taken exactly")
        set_grads([param], [torch.zeros(300)])
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        assert_equal(param.detach().double(), written)


@pytest.mark.parametrize("moments", ["fp32", "int8"])
@pytest.mark.parametrize("master", NARROW)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_saved_state_continues_bit_for_bit(dtype: torch.dtype, master: str, moments: str) -> None:
    params = parameters(dtype)
    optimizer = AdamW(params, **HYPER, master=master, moments=moments)
    for _ in range(3):
        step_once(optimizer, params, random_grads())
    state = saved(optimizer.state_dict())
    others = [nn.Parameter(torch.zeros_like(p)) for p in params]
    loaded = AdamW(others, master=master, moments=moments)
    loaded.load_state_dict(state)
    for a, b in zip(params, others):  # the model's state, after the optimizer's
        b.data.copy_(a.data)
    # as a trainer's checkpoint has it: the fp32 master, split again
    again = [nn.Parameter(torch.zeros_like(p)) for p in params]
    split_again = AdamW(again, master=master, moments=moments)
    split_again.load_state_dict(state)
    for a, b in zip(params, again):
        split_again.set_master(b, optimizer.master(a))
    for _ in range(3):
        step_all((optimizer, params), (loaded, others), (split_again, again))
        for a, b, c in zip(params, others, again):
            for other, its in ((loaded, b), (split_again, c)):
                assert_equal(its.detach(), a.detach(), "parameter")
                for key, value in optimizer.state[a].items():
                    assert_equal(other.state[its][key], value, key)


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_state_goes_on_in_another_form(dtype: torch.dtype, before: str, after: str) -> None:
    exact = torch.randn(200).sign() * (torch.rand(200) + 0.5)
    param = halves(exact, dtype)
    optimizer = AdamW([param], lr=1e-3, master=before)
    optimizer.set_master(param, exact)
    for _ in range(3):
        step_once(optimizer, [param], [torch.randn(200)])
    other = nn.Parameter(param.detach().clone())
    loaded = AdamW([other], lr=1e-3, master=after)
    loaded.load_state_dict(saved(optimizer.state_dict()))
    assert_equal(loaded.master(other), optimizer.master(param), "before the next step")
    step_once(loaded, [other], [torch.zeros(200)])
    step_once(optimizer, [param], [torch.zeros(200)])
    assert set(loaded.state[other]) == {"step", "exp_avg", "exp_avg_sq", "master" if after == "fp32" else "correction"}
    unit = 2.0 ** (-17 if dtype == torch.float16 else -14)
    tolerance = 2 * unit if "8bit" in (before, after) else 0.0
    torch.testing.assert_close(loaded.master(other), optimizer.master(param), rtol=0, atol=tolerance)


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("master", FORMS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_the_layout_is_what_a_step_keeps_and_tensors_may_lie_in_other_memory(
    dtype: torch.dtype, master: str, moments: str
) -> None:
    def fresh() -> tuple[nn.Parameter, AdamW]:
        torch.manual_seed(4)
        param = nn.Parameter(torch.randn(7, 19).to(dtype))
        return param, AdamW([param], moments=moments, master=master)

    def step(param: nn.Parameter, optimizer: AdamW) -> None:
        torch.manual_seed(5)
        param.grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        param.grad = torch.randn(7, 19, dtype=param.grad_dtype)
        optimizer.step()

    (param, optimizer), (other, moved) = fresh(), fresh()
    layout = moved.state_layout(other)
    sizes = {key: size.numel() * kind.itemsize for key, (size, kind) in layout.items()}
    buffers = {key: torch.zeros(4 + size, dtype=torch.uint8) for key, size in sizes.items()}
    step(other, moved)
    step(param, optimizer)
    for _ in range(2):
        state = moved.state[other]
        assert {key: (value.shape, value.dtype) for key, value in state.items() if key != "step"} == layout
        for key, (size, kind) in layout.items():
            view = buffers[key][4 * (kind.itemsize < 8) :][: sizes[key]].view(kind).view(size)
            state[key] = view.copy_(state[key].clone())
        step(other, moved)
        step(param, optimizer)
        for key, value in optimizer.state[param].items():
            assert_equal(moved.state[other][key], value, key)
        assert all(moved.state[other][key].untyped_storage().data_ptr() == buffers[key].data_ptr() for key in layout)
    assert_equal(other.detach(), param.detach())


def test_a_master_is_put_into_the_tensor_that_is_there() -> None:
    for master, key in (("fp32", "master"), ("16bit", "correction")):
        param = halves(torch.randn(10), torch.bfloat16)
        optimizer = AdamW([param], master=master)
        optimizer.set_master(param, param)
        kept = optimizer.state[param][key]
        exact = torch.randn(10)
        optimizer.set_master(param, exact)
        assert optimizer.state[param][key] is kept
        assert_equal(optimizer.master(param), exact)


def test_wrong_forms_are_refused_by_name() -> None:
    param = halves(torch.randn(10), torch.float16)
    with pytest.raises(ValueError, match="master is '24bit': choose one of 'fp32', '16bit', '8bit'"):
        AdamW([param], master="24bit")
    optimizer = AdamW([param])
    optimizer.state[param]["correction"] = torch.zeros(7, dtype=torch.int16)
    set_grads([param], [torch.ones(10)])
    with pytest.raises(ValueError, match=r"state's correction is torch.int16 \(7,\), which is none of a parameter"):
        optimizer.step()


def test_a_copied_optimizer_keeps_its_form() -> None:
    param = halves(torch.randn(10), torch.float16)
    optimizer = AdamW([param], master="8bit")
    step_once(optimizer, [param], [torch.ones(10)])
    copied = copy.deepcopy(optimizer)
    (other,) = copied.param_groups[0]["params"]
    step_once(copied, [other], [torch.ones(10)])
    step_once(optimizer, [param], [torch.ones(10)])
    assert copied.master_form == "8bit"
    assert_equal(copied.state[other]["correction"], optimizer.state[param]["correction"])


@pytest.mark.parametrize("form", NARROW)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pieces_make_no_difference(dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do strides; a master of 16 bits is taken in fp32."""
    for values in (torch.randn(7, 11), torch.randn(11, 7).t(), torch.randn(3, 5, 4).half(), torch.randn(77)):
        whole = masters.split(values, dtype, form)
        value = masters.joined(*whole)
        with monkeypatch.context() as patched:
            patched.setattr(masters, "_PIECE", 8)
            pieces = masters.split(values, dtype, form)
            for own, expected in zip((*pieces, masters.joined(*pieces)), (*whole, value), strict=True):
                assert_equal(own, expected)
            strided = pieces[0].t().contiguous().t() if values.dim() == 2 else pieces[0]
            assert_equal(masters.joined(strided, pieces[1]), value)
