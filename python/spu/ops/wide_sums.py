"""Backwards of torch whose CPU kernels add up 16-bit values in 16 bits: here they add in fp32, for main gradients.

A sum of ones in the storage type stops at 256 in bf16 and at 2048 in fp16. torch's CPU kernels sum that way, for each
thread, in the backward of ``layer_norm`` (weight and bias, even fp32 ones), ``embedding``, ``embedding_bag``,
``param[ids]``, ``take``, ``index_select`` (but for plain rows), fp16 convolutions (weight and bias), ``grid_sample``,
replication padding, adaptive pooling that enlarges, and pooling or ``unfold`` with windows that overlap hundreds of
times. Its CUDA kernels add in fp32.

A kernel of ours stands in front of each of these (``torch.library``'s way: it calls the one it found). It does more
than that only in a backward without a graph of its own, of 16-bit tensors, in a loss scale's scope or while some
parameter has a gradient sink. Then torch's kernel runs on operands widened to fp32, and a result of its own stays fp32:
a parameter with ``grad_dtype`` fp32 receives it unrounded, autograd rounds it once for everything else. Gradients that
need no such sum, as layer_norm's of its input, are torch's own to the bit.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spu.common.dtypes import HALVES
from spu.common.torch_private import has_onednn_sums

__all__ = ["Call", "install"]

_FEW_TERMS = (
    64  # a 16-bit sum of so few is off by a few units of its last place: pooling as models use it stays torch's
)

_CHUNK = 2**17  # elements that are widened at a time: they stay in a core's cache

Call = Callable[..., Any]  # a kernel of torch's
_Wide = Callable[..., Any]  # (that kernel, its arguments) -> its results, summed in fp32


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value


def _all_wide(call: Call, *args: Any) -> Any:
    return call(*map(_widened, args))


def _in_place(call: Call, self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run an op that adds into its first argument, which autograd has made of zeros and expects as the result."""
    wide = self.float()
    call(wide, *map(_widened, args), **kwargs)
    return self.copy_(wide)


def _accumulating(call: Call, self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do as ``_in_place`` where the op is told to add: by its fourth argument, ``accumulate``."""
    adds = kwargs.get("accumulate", args[2] if len(args) > 2 else False)
    return _in_place(call, self, *args, **kwargs) if adds else call(self, *args, **kwargs)


def _terms(size: Sequence[int], step: Sequence[int]) -> int:
    """Return how many windows share an element, at most."""
    return math.prod(-(-k // s) for k, s in zip(size, step, strict=True))


def _if_many(count: Callable[..., int]) -> _Wide:
    def run(call: Call, *args: Any) -> Any:
        return _all_wide(call, *args) if count(*args) > _FEW_TERMS else call(*args)

    return run


def _pool_terms(grad: Tensor, x: Tensor, size: list[int], stride: list[int], *_: Any) -> int:
    return _terms(size, stride or size)


def _adaptive_terms(grad: Tensor, x: Tensor, *_: Any) -> int:
    return _terms(grad.shape[1:], x.shape[1:])


def _layer_norm(
    call: Call,
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: list[bool],
) -> Any:
    dx = call(dy, x, shape, mean, rstd, weight, bias, [mask[0], False, False])[0]
    if not (mask[1] or mask[2]):
        return dx, None, None
    n, sums = math.prod(shape), [False, mask[1], mask[2]]
    parts = [*(t.reshape(-1, n) for t in (dy, x)), *(t.reshape(-1, 1) for t in (mean, rstd))]
    flat = [None if t is None else t.reshape(n).float() for t in (weight, bias)]
    dw, db = (torch.zeros(n, dtype=torch.float32, device="cpu") for _ in "wb")
    for dy_, x_, mean_, rstd_ in zip(*(part.split(max(1, _CHUNK // n)) for part in parts), strict=True):
        wide = x_.float()
        if mean_.dtype in HALVES:
            mean_, rstd_ = _unrounded(wide, rstd_)
        _, dw_, db_ = call(dy_.float(), wide, [n], mean_, rstd_, *flat, sums)
        dw += dw_ if mask[1] else 0
        db += db_ if mask[2] else 0
    return dx, dw.view(shape) if mask[1] else None, db.view(shape) if mask[2] else None


def _unrounded(x: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return layer_norm's mean and 1 / sqrt(variance + eps) of rows in fp32. Rows may share the error of rounded ones,
    and then their sum has it too.

    The backward is not told eps; but every row says between which bounds it is, by its rounded value.
    """
    _, mean, exact = torch.native_layer_norm(x, x.shape[1:], None, None, 0.0)
    variance, error = exact.square().reciprocal(), torch.finfo(rstd.dtype).eps
    sums = rstd.float().square().reciprocal()
    least, most = (sums * (1 - error) - variance).amax(), (sums * (1 + error) - variance).amin()
    return mean, (variance + (least.clamp(min=0) + most) / 2).rsqrt()


def _batch_norm(
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    train: bool,
    eps: float,
    mask: list[bool],
) -> Any:
    """Form the mean in fp32: torch sums in fp32 here, but over a mean that it has rounded to 16 bits."""
    given = dy, x, weight, running_mean, running_var, mean, invstd, train, eps
    if not train or mean is None or mean.dtype not in HALVES or not (mask[1] or mask[2]):
        return call(*given, mask)
    dx = call(*given, [mask[0], False, False])[0]
    wide = x.float()
    variance, exact = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    scale = (variance + eps).rsqrt()
    args = dy.float(), wide, _widened(weight), _widened(running_mean), _widened(running_var), exact, scale, train, eps
    return dx, *call(*args, [False, mask[1], mask[2]])[1:]


def _convolution(call: Call, dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    """Sum in fp32 where torch does not: oneDNN's kernels do, but torch's own, for processors without such a kernel, sum
    in 16 bits.
    """
    *options, mask = args
    if not (mask[1] or mask[2]) or _has_onednn(x.dtype):
        return call(dy, x, weight, *options, mask)
    dx = call(dy, x, weight, *options, [mask[0], False, False])[0]
    return dx, *call(dy.float(), x.float(), weight.float(), *options, [False, mask[1], mask[2]])[1:]


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[attr-defined]
        return False
    return has_onednn_sums(dtype)


_KERNELS: dict[str, _Wide] = {
    "native_layer_norm_backward": _layer_norm,
    "native_batch_norm_backward": _batch_norm,
    "convolution_backward": _convolution,
    "embedding_dense_backward": _all_wide,
    "_embedding_bag_dense_backward": _all_wide,
    "_index_put_impl_": _accumulating,
    "put_": _accumulating,
    "index_add_": _in_place,
    "grid_sampler_2d_backward": _all_wide,
    "grid_sampler_3d_backward": _all_wide,
    "replication_pad1d_backward": _all_wide,
    "replication_pad2d_backward": _all_wide,
    "replication_pad3d_backward": _all_wide,
    "_adaptive_avg_pool2d_backward": _if_many(_adaptive_terms),
    "_adaptive_avg_pool3d_backward": _if_many(_adaptive_terms),
    "adaptive_max_pool2d_backward": _if_many(_adaptive_terms),
    "adaptive_max_pool3d_backward": _if_many(_adaptive_terms),
    "avg_pool2d_backward": _if_many(_pool_terms),
    "avg_pool3d_backward": _if_many(_pool_terms),
    "max_pool2d_with_indices_backward": _if_many(_pool_terms),
    "max_pool3d_with_indices_backward": _if_many(_pool_terms),
    "unfold_backward": _if_many(lambda grad, sizes, dim, size, step: _terms([size], [step])),
    "col2im": _if_many(lambda columns, out, size, dilation, pad, step: _terms(size, step)),
}

_LIBRARY = torch.library.Library("aten", "IMPL")
_INSTALLED = False
_LOCK = threading.Lock()


def install(wanted: Callable[[], bool]) -> None:
    """Register the kernels, once in a process.

    Args:
        wanted: whether the backward that runs now, on this thread, makes main gradients.
    """
    global _INSTALLED
    if _INSTALLED:
        return
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is being replaced
        if not _INSTALLED:
            for name, wide in _KERNELS.items():
                _stand_in_front(name, wide, wanted)
            _INSTALLED = True


def _stand_in_front(name: str, wide: _Wide, wanted: Callable[[], bool]) -> None:
    found = torch.library.get_kernel(getattr(torch.ops.aten, name).default, "CPU")

    def kernel(keys: torch.DispatchKeySet, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = partial(found.call_boxed, keys)
        # With gradients enabled it is a forward that a checkpoint repeats, or a backward to be differentiated.
        if first.dtype in HALVES and not torch.is_grad_enabled() and wanted():
            return wide(call, first, *args, **kwargs)
        return call(first, *args, **kwargs)

    _LIBRARY.impl(name, kernel, "CPU", with_keyset=True)
