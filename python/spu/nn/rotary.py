"""Attention modules of transformers with ``spu.ops.rotary`` in place of their own rotary positions.

Their forward stays the one that runs: a copy of it, whose global ``apply_rotary_pos_emb`` is ours. Ours calls theirs
for whatever the op does not take. The copy sees the other globals of its module as they were when it was made, at the
first call; the module itself is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from math import prod
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spu.common.dtypes import STORAGE
from spu.common.torch_private import buffers_of, children_of, parameters_of, unset_fake_temporarily
from spu.nn.blocks import MIXINS, FusedBlock, from_library
from spu.nn.table import RotaryBlock
from spu.ops import choose_backend, has_kernel, rotary
from spu.ops.plain import takes
from spu.ops.rotary import torch_rotary

__all__ = ["PROJECTIONS", "FusedRotary", "rotary_block"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NAME = "apply_rotary_pos_emb"
_Function = Callable[..., Any]


class FusedRotary(FusedBlock):
    """An attention module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain class's forward."""
        block = self.spu_block
        assert isinstance(block, RotaryBlock)
        if torch.compiler.is_compiling():  # Dynamo takes the copy's globals for the module's
            return self.spu_plain.forward(self, *args, **kwargs)
        return _fused_forward(self.spu_plain, block.interleaved)(self, *args, **kwargs)  # type: ignore[arg-type]


MIXINS[RotaryBlock] = FusedRotary


def rotary_block(module: nn.Module) -> RotaryBlock | None:
    """Return how an attention module of transformers turns queries and keys; None where the op cannot.

    Its function is run once on small values in fp16, bf16 and fp32, and must agree with the op's formula in every bit.
    """
    cls = type(module)
    if issubclass(cls, FusedBlock) or not from_library(cls) or not cls.__name__.endswith("Attention"):
        return None
    user = _user(cls.forward)
    theirs = None if user is None else user.__globals__.get(_NAME)
    if not callable(theirs):
        return None
    interleaved = _form(theirs)
    return None if interleaved is None else RotaryBlock(interleaved, _is_whole(module, theirs))


def _user(function: Any) -> FunctionType | None:
    """Return the function that uses the global: this one, or one that it wraps."""
    while isinstance(function, FunctionType):
        if _NAME in function.__code__.co_names:
            return function
        function = getattr(function, "__wrapped__", None)
    return None


@lru_cache(maxsize=256)
def _form(theirs: _Function) -> bool | None:
    """Return whether pairs are neighbours; None where it is another function."""
    forms = [False, True]
    with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        wave = torch.arange(2 * 3 * 5 * 8, dtype=torch.float32, device="cpu").mul(1.7).sin()
        for dtype in STORAGE:
            q, k = wave.view(2, 3, 5, 8).to(dtype), wave.view(2, 3, 5, 8)[:, :1].neg().to(dtype)
            cos, sin = wave[:80].view(2, 5, 8).to(dtype), wave[80:160].view(2, 5, 8).to(dtype)
            try:
                found = theirs(q, k, cos, sin)
                forms = [form for form in forms if _same(found, torch_rotary(q, k, cos, sin, form))]
            except Exception:  # whatever it wants instead
                return None
    return forms[0] if forms else None


def _is_whole(module: nn.Module, theirs: _Function) -> bool:
    """Tell whether an attention module's forward is q, k and v, the turn, a causal attention, and o.

    It is run on small values, with small matrices in place of its layers, and must agree in every bit.
    """
    if set(children_of(module)) != set(PROJECTIONS) or parameters_of(module) or buffers_of(module):
        return False
    options = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        # A stand-in for the configuration: its own would change the model's attention.
        config = SimpleNamespace(**{**vars(options["config"]), "_attn_implementation": "sdpa"})
        head_dim, groups, scaling = options["head_dim"], options["num_key_value_groups"], options["scaling"]
        probe = type(module).__new__(type(module))
        nn.Module.__init__(probe)
        vars(probe).update(options, config=config, training=False)
        with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            # Large values too: some models cut queries and keys off.
            for dtype, size in (*((dtype, 1.0) for dtype in STORAGE), (torch.float32, 1e3)):
                vars(probe).update(_small_projections(head_dim, groups, dtype))
                x, cos, sin = _wave(2, 5, 6).mul(size).to(dtype), *_wave(2, 2, 5, head_dim).to(dtype)
                found = type(module).forward(
                    probe, hidden_states=x, attention_mask=None, position_embeddings=(cos, sin)
                )
                q, k, v = (vars(probe)[name](x).view(2, 5, -1, head_dim).transpose(1, 2) for name in PROJECTIONS[:3])
                q, k = theirs(q, k, cos, sin)
                out, _ = sdpa_attention_forward(probe, q, k, v, None, dropout=0.0, scaling=scaling)
                if not torch.equal(found[0], vars(probe)["o_proj"](out.reshape(2, 5, -1))):
                    return False
    except Exception:  # whatever it has instead, or wants beside
        return False
    return True


def _small_projections(head_dim: int, groups: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return functions in place of an attention's layers, for rows of six and one head of keys."""
    heads = groups * head_dim
    shapes = (heads, 6), (head_dim, 6), (head_dim, 6), (6, heads)
    weights = [_wave(*shape).mul(0.3 + 0.1 * i).to(dtype) for i, shape in enumerate(shapes)]
    return {name: partial(_affine, w) for name, w in zip(PROJECTIONS, weights, strict=True)}


def _affine(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight, weight[:, 0])


def _wave(*shape: int) -> Tensor:
    return torch.arange(prod(shape), dtype=torch.float32, device="cpu").mul(1.7).sin().view(shape)


def _same(found: Any, expected: tuple[Tensor, Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(isinstance(a, Tensor) and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@lru_cache(maxsize=256)
def _fused_forward(plain: type[nn.Module], interleaved: bool) -> _Function:
    return _with_rotary(plain.forward, interleaved)


def _with_rotary(function: Any, interleaved: bool) -> _Function:
    """Return a copy of a function, or of what it wraps, that calls the op."""
    if _NAME in function.__code__.co_names:
        theirs = function.__globals__[_NAME]
        return _copy(function, {**function.__globals__, _NAME: _turning(theirs, interleaved)}, function.__closure__)
    inner = function.__wrapped__
    fused = _with_rotary(inner, interleaved)
    cells = tuple(CellType(fused) if cell.cell_contents is inner else cell for cell in function.__closure__ or ())
    return _copy(function, function.__globals__, cells)


def _copy(function: Any, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> _Function:
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _turning(theirs: _Function, interleaved: bool) -> _Function:
    @wraps(theirs)
    def turn(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 4 and not kwargs and _takes(*args):
            return rotary(*args, interleaved=interleaved)
        return theirs(*args, **kwargs)

    return turn


def _takes(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    if torch.compiler.is_compiling() or not takes(q, k, cos, sin) or q.dtype not in STORAGE:
        return False
    fits = (
        q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.device == k.device == cos.device == sin.device
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and q.shape[0] == k.shape[0]
        and q.shape[2:] == k.shape[2:] == cos.shape[1:]
        and cos.shape[0] in (1, q.shape[0])
        and not (cos.requires_grad or sin.requires_grad)
    )
    if not fits:
        return False
    backend = choose_backend(q)
    return backend != "reference" and has_kernel("rotary", backend)
