"""linear_cross_entropy: loss and gradients against truth on every backend, chunks, sinks, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from op_checks import assert_registered
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import spu
from spu import ops
from spu.ops import cross_entropy
from spu.ops.reference import fused as reference_fused
from spu.ops.sink import BackwardScope, open_scope
from spu.precision import LossScaler, MainGrads


def plain(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """In the precision of the operands, but for the loss itself: what a model's head does."""
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), target.flatten(), ignore_index=ignore_index)


def operands(rows: int = 37, k: int = 24, v: int = 101, ignored: int = 5, **options: Any) -> tuple[Tensor, ...]:
    target = torch.randint(v, (rows,))
    target[torch.randperm(rows)[:ignored]] = -100
    return torch.randn(rows, k).to(**options), (2 * torch.randn(v, k) / k**0.5).to(**options), target


def with_grads(function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    loss = function(hidden, weight, target)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


def shared(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """The loss whose value and gradients its backward makes."""
    share = cross_entropy.cross_entropy_share(hidden, weight, target, 1.0, ignore_index)
    assert share is not None
    assert share.isnan()
    return share


def twice(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """The loss whose backward makes the logits again."""
    return ops.linear_cross_entropy(hidden, weight, target, ignore_index, keep=False)


FORMS = {"forward": ops.linear_cross_entropy, "twice": twice, "backward": shared}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", 4000)
    monkeypatch.setattr(reference_fused, "_CHUNK_BYTES", 4000)


@every_backend
@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_bound(backend: str, form: Callable[..., Tensor], dtype: torch.dtype, small_chunks: None) -> None:
    given = operands(200, 64, 333, dtype=dtype)
    with ops.use_backend(backend):
        ours = with_grads(form, *given)
    torchs = with_grads(plain, *given)
    truth = with_grads(plain, given[0].double(), given[1].double(), given[2])
    for name, *three in zip(("loss", "hidden", "weight"), ours, torchs, truth):
        assert_close_to_truth(*three, name=name)
    assert ours[0].dtype == torch.float32


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", 700)  # two rows
    hidden, weight, target = operands(5, 3, 40, 1, dtype=torch.float64)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: ops.linear_cross_entropy(h, w, target), leaves)


@every_backend
def test_leading_dimensions_and_strides(backend: str) -> None:
    hidden, weight, target = operands(36)
    with ops.use_backend(backend):
        flat = with_grads(ops.linear_cross_entropy, hidden, weight, target)
        cube = with_grads(ops.linear_cross_entropy, hidden.view(4, 9, -1), weight, target.view(4, 9))
        strided = with_grads(ops.linear_cross_entropy, hidden.t().contiguous().t(), weight.t().contiguous().t(), target)
    assert_equal(cube[1].view_as(flat[1]), flat[1], "hidden")
    for a, b in zip(strided, flat):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_backend
@every_form
def test_no_target_counts(backend: str, form: Callable[..., Tensor]) -> None:
    hidden, weight, target = operands(8, ignored=8)
    with ops.use_backend(backend):
        loss, *grads = with_grads(form, hidden, weight, target)
        empty = with_grads(form, hidden[:0], weight, target[:0])
    assert loss.isnan()
    assert empty[0].isnan()
    for grad in (*grads, *empty[1:]):
        assert_equal(grad, torch.zeros_like(grad), "gradient of nothing")


@every_backend
def test_another_ignored_index_and_extreme_logits(backend: str) -> None:
    hidden, weight, target = operands(ignored=0)
    target[::3] = 7
    with ops.use_backend(backend):
        loss = ops.linear_cross_entropy(hidden * 1000, weight, target, ignore_index=7)
    torch.testing.assert_close(loss, plain(hidden * 1000, weight, target, 7), rtol=1e-5, atol=1e-4)


@every_backend
@every_form
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_hidden(backend: str, form: Callable[..., Tensor], bad: float) -> None:
    hidden, weight, target = operands(ignored=0)
    hidden[2, 3] = bad
    with ops.use_backend(backend):
        loss, dhidden, dweight = with_grads(form, hidden, weight, target)
    assert loss.isnan()
    assert dhidden[2].isnan().all()
    assert torch.isfinite(dhidden[[0, 1, 3]]).all()
    assert dweight.isnan().any()


@every_backend
@every_form
@pytest.mark.parametrize("scale", [1.0, 2.0**15])
def test_the_loss_scale_lets_no_gradient_vanish(
    backend: str, form: Callable[..., Tensor], scale: float, small_chunks: None
) -> None:
    """With 4,096 rows and 1,024 words a word that is nobody's target gets 2e-7 a row: fp16's last bits, unscaled. A
    gradient that the forward has made, or would have, is not rounded at that size.
    """
    hidden, weight, target = operands(4096, 8, 1024, 0, dtype=torch.float16)
    weight, target = nn.Parameter(weight / 8), target % 16
    truth = with_grads(plain, hidden.double(), weight.detach().double(), target)[2][16:]
    scaler = LossScaler(init_scale=scale)
    cross_entropy._CHUNK_BYTES["cpu"] = reference_fused._CHUNK_BYTES = 1 << 22  # several chunks into one buffer
    with MainGrads([weight]) as grads, ops.use_backend(backend):
        scaler.begin_step()
        grads.begin_step()
        scaler.scale(form(hidden, weight, target)).backward()
    assert scaler.found_inf().item() == 0
    assert weight.grad.dtype == torch.float32
    error = (weight.grad[16:].double() - truth).norm() / truth.norm()
    assert (error < 2e-3) == (scale > 1 or form is not shared), float(error)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_error_is_that_of_no_scale(backend: str, dtype: torch.dtype) -> None:
    """From gradients of the loss of 2^-30 to 2^30 the sums are right, where a plain one in fp16 is 0 or inf."""
    hidden, weight, target = operands(128, 32, 211, 40, dtype=dtype)
    truth = with_grads(plain, hidden.double(), weight.double(), target)[2]
    errors = []
    for power in (-30, 0, 11, 24, 30):
        scaler, leaf = LossScaler(init_scale=2.0**power), nn.Parameter(weight.clone())
        with MainGrads([leaf]) as grads, ops.use_backend(backend):
            scaler.begin_step()
            grads.begin_step()
            scaler.scale(ops.linear_cross_entropy(hidden, leaf, target)).backward()
        assert scaler.found_inf().item() == 0
        errors.append(float((leaf.grad.double() - truth).norm() / truth.norm()))
    assert max(errors) <= 1.01 * min(errors) <= 1e-2


@every_backend
@every_form
@pytest.mark.parametrize("given", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_found(backend: str, form: Callable[..., Tensor], given: float) -> None:
    """It shows where plain torch's does: in rows that count, and in the weight."""
    hidden, weight, target = operands()
    found = []
    for function in (form, plain):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        with ops.use_backend(backend):
            loss = function(*leaves, target)
            found.append(torch.autograd.grad(loss, leaves, torch.tensor(given)))
    for ours, torchs in zip(*found, strict=True):
        assert_equal(ours.isfinite(), torchs.isfinite(), "finite")
    leaf, flag = nn.Parameter(weight), torch.zeros(1)
    with MainGrads([leaf]) as grads, ops.use_backend(backend):
        grads.begin_step()
        loss = open_scope(form(hidden, leaf, target), BackwardScope(torch.ones(1), torch.ones(1), flag))
        loss.backward(torch.tensor(given))
    assert flag.item() == 1


@every_backend
def test_an_overflow_is_found(backend: str) -> None:
    """The weight's sum does not overflow; the gradient of hidden does, in fp16, as plain torch's."""
    hidden, weight, target = operands(dtype=torch.float16)
    weight, scaler = nn.Parameter(weight), LossScaler(init_scale=2.0**30)
    before = nn.Parameter(torch.eye(24, dtype=torch.float16))
    with MainGrads([weight, before]) as grads, ops.use_backend(backend):
        scaler.begin_step()
        grads.begin_step()
        scaler.scale(ops.linear_cross_entropy(ops.linear_act(hidden, before), weight, target)).backward()
    assert scaler.found_inf().item() == 1
    assert weight.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an op returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@every_form
@pytest.mark.parametrize("backend", ["reference", None])
def test_logits_never_exist_whole(backend: str | None, form: Callable[..., Tensor], small_chunks: None) -> None:
    given = operands(64, 8, 500)
    with ops.use_backend(backend), Largest() as found:
        with_grads(form, *given)
    assert found.elements == 8 * 500  # the weight's own gradient; the logits would be 64 * 500


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_is_kept_is_bounded_and_changes_nothing(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands(70, 24, 101, dtype=dtype)
    row, found = 101 * dtype.itemsize, []
    saved: list[Tensor] = []
    for chunk in (1, 33 * row, 70 * row):  # 24 rows by the weight's bytes, 33 and all by the chunk's
        monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", chunk)
        saved.clear()
        with ops.use_backend(backend), saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            found.append(with_grads(ops.linear_cross_entropy, *given))
        assert [t.shape for t in saved if t.shape[-1:] == (101,)] == [(max(24, chunk // row), 101)]
    found.append(with_grads(twice, *given))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_graph_that_is_kept_gives_the_same_again_and_a_checkpoint_too() -> None:
    given = operands()
    expected = with_grads(ops.linear_cross_entropy, *given)
    hidden, weight = (t.clone().requires_grad_() for t in given[:2])
    loss = ops.linear_cross_entropy(hidden, weight, given[2])
    for factor in (1.0, 4.0):
        grads = torch.autograd.grad(loss, [hidden, weight], torch.tensor(factor), retain_graph=True)
        for a, b in zip(grads, expected[1:], strict=True):
            assert_equal(a, b * factor, "gradient")
    again = with_grads(lambda *all: checkpoint(ops.linear_cross_entropy, *all, use_reentrant=False), *given)
    for a, b in zip(again, expected, strict=True):
        assert_equal(a, b, "checkpoint")
    hidden.data.mul_(1)
    weight.detach().mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_operand_alone_takes_a_gradient() -> None:
    given = operands()
    expected = with_grads(ops.linear_cross_entropy, *given)
    for place in (0, 1):
        tensors = [t.clone().requires_grad_(i == place) for i, t in enumerate(given[:2])]
        ops.linear_cross_entropy(*tensors, given[2]).backward()
        assert_equal(tensors[place].grad, expected[1 + place], "gradient")
        assert tensors[1 - place].grad is None


def test_a_gradient_of_the_users_own_is_unscaled_beside_it() -> None:
    """A GradScaler's sink brings a scaled ``grad`` that lies there to its true scale, by the scale alone."""
    hidden, weight, target = operands()
    expected = with_grads(ops.linear_cross_entropy, hidden, weight, target)[2]
    weight, scaler = nn.Parameter(weight), spu.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for gradient in (None, torch.full_like(weight, 3 * 1024.0)):
        weight.grad = gradient
        scaler.scale(ops.linear_cross_entropy(hidden, weight, target)).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weight.grad, expected + 3, rtol=1e-5, atol=1e-6)


def test_autocast() -> None:
    hidden, weight, target = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, dhidden, dweight = with_grads(ops.linear_cross_entropy, hidden, weight, target)
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32,) * 3
    expected = with_grads(ops.linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), target)
    assert_equal(loss, expected[0], "loss")
    for ours, rounded in ((dhidden, expected[1]), (dweight, expected[2])):
        assert_equal(ours.bfloat16(), rounded, "an fp32 operand's gradient is not rounded to 16 bits")
        assert not torch.equal(ours, rounded.float())


@every_backend
def test_opcheck(backend: str) -> None:
    hidden, weight, target = operands(6, 4, 11, 2)
    lse = torch.logsumexp(hidden @ weight.t(), 1)
    given = (hidden.detach(), weight.detach(), target)
    assert_registered(
        backend,
        ("linear_ce", hidden.requires_grad_(), weight.requires_grad_(), target, -100),
        ("linear_ce_and_dz", *given, torch.rand(6), torch.empty(6, 11), -100),
        ("linear_ce_and_dz_", *given, torch.rand(6), torch.empty(6, 11), torch.empty(6, 11), -100),
        ("linear_ce_dz", *given, lse.detach(), torch.rand(6), -100),
    )


@pytest.mark.leaks_threads  # the compiler's
def test_compiles_whole(small_chunks: None) -> None:
    given = operands()
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_grads(compiled, *given), with_grads(ops.linear_cross_entropy, *given)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_named() -> None:
    hidden, weight, target = operands()
    with pytest.raises(ValueError, match=r"target 101 is neither in \[0, 101\) nor ignore_index -100"):
        ops.linear_cross_entropy(hidden, weight, torch.full_like(target, 101))
    with pytest.raises(ValueError, match="target -1 is neither"):
        ops.linear_cross_entropy(hidden, weight, torch.full_like(target, -1))
    with pytest.raises(TypeError, match=r"target is torch.int32: convert it with .long"):
        ops.linear_cross_entropy(hidden, weight, target.int())
    with pytest.raises(ValueError, match=r"target \(36,\) must have the leading dimensions"):
        ops.linear_cross_entropy(hidden, weight, target[1:])
    with pytest.raises(ValueError, match=r"does not fit weight \(24, 101\)"):
        ops.linear_cross_entropy(hidden, weight.t(), target)
    with pytest.raises(TypeError, match=r"hidden is torch.float16 and weight torch.float32"):
        ops.linear_cross_entropy(hidden.half(), weight, target)


def test_its_weight_gradient_is_never_put_off(small_chunks: None) -> None:
    """Put off, all pieces of the logits' gradient were kept until the weight gradient: as much as the logits whole."""
    hidden, weight, target = operands(ignored=0)
    expected = with_grads(plain, hidden.double(), weight.double(), target)[2]
    weight, deferred = nn.Parameter(weight), []
    one = [torch.full((1,), value) for value in (1.0, 1.0, 0.0)]
    scope = BackwardScope(one[0], one[1], one[2], deferred=deferred, plain=True)
    with MainGrads([weight]) as grads:
        grads.begin_step()
        x = hidden.clone().requires_grad_()
        loss = ops.linear_cross_entropy(F.linear(x, torch.eye(24)), weight, target)
        open_scope(loss, scope).backward()
    assert deferred == []
    assert x.grad is not None
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-4, atol=1e-6)


@every_backend
def test_a_share_takes_its_factor_and_makes_the_logits_once(backend: str, small_chunks: None) -> None:
    given = operands(70)
    made: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(function).split(".")[1]
            made.extend([name] if name in ("linear_ce", "linear_ce_dz", "linear_ce_and_dz") else [])
            return function(*args, **(kwargs or {}))

    factor = torch.tensor(0.25)
    with ops.use_backend(backend):
        expected = with_grads(lambda *given: ops.linear_cross_entropy(*given) * factor, *given)
        by_number = with_grads(lambda *given: cross_entropy.cross_entropy_share(*given, 0.25), *given)
        nothing = with_grads(lambda *given: cross_entropy.cross_entropy_share(*given, torch.zeros(())), *given)
        with Products():
            by_tensor = with_grads(lambda *given: cross_entropy.cross_entropy_share(*given, factor), *given)
    chunks = -(-70 // (4000 // (8 * 101)))
    assert made == ["linear_ce_and_dz"] * chunks
    for name, a, b, c in zip(("share", "hidden", "weight"), by_number, by_tensor, expected):
        assert_equal(a, b, name)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
    assert not any(value.any() for value in nothing)


def test_a_share_is_left_to_others_where_no_backward_will_come() -> None:
    given = operands(4)
    assert cross_entropy.cross_entropy_share(*given, 1.0) is None
    with torch.no_grad():
        assert cross_entropy.cross_entropy_share(given[0].requires_grad_(), *given[1:], 1.0) is None
