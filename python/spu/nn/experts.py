"""The experts of transformers' mixtures, all of a layer as one op.

transformers keeps their weights in two parameters with a first dimension of experts, and computes them one by one
(``experts_implementation="eager"``), sorted and by torch's grouped products ("grouped_mm"), or each row by itself
("batched_mm"): always with torch's own products. Here the products are the library's, in 16 bits and fp32 on a CPU.
Every other call, and experts that the op does not know (biases, clamped gates, other layouts), run as they did.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spu.common.dtypes import STORAGE
from spu.common.torch_private import buffers_of, children_of, parameters_of, unset_fake_temporarily
from spu.nn.blocks import MIXINS, FusedBlock, activation_of, from_library, watched_globally
from spu.nn.table import ExpertsBlock
from spu.ops import GATED_ACTIVATIONS, choose_backend
from spu.ops.experts import ExpertsForm, gated_experts
from spu.ops.linear import compute_dtype
from spu.ops.plain import takes

__all__ = ["FusedExperts", "experts_block", "multiplies_by_ours"]

# Of transformers' own, which compute the same; another name is a choice of the user's, and is left alone.
_SERVED = frozenset((None, "eager", "grouped_mm", "batched_mm"))


class FusedExperts(FusedBlock):
    """The experts of a layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute hidden_states [T, C], top_k_index [T, K], top_k_weights [T, K] -> [T, C]."""
        y = None
        if len(args) == 3 and not kwargs and not torch.compiler.is_compiling():
            y = _fused(self, *args)
        return self.spu_plain.forward(self, *args, **kwargs) if y is None else y


MIXINS[ExpertsBlock] = FusedExperts


def _fused(experts: FusedExperts, x: Any, ids: Any, scores: Any) -> Tensor | None:
    """Compute experts by one op; None where it does not serve."""
    block = experts.spu_block
    assert isinstance(block, ExpertsBlock)
    if not _serves(experts, block):
        return None
    w_gate_up, w_down = getattr(experts, block.gate_up), getattr(experts, block.down)
    tensors = x, ids, scores, w_gate_up, w_down
    if not all(isinstance(t, Tensor) for t in tensors) or not takes(*tensors):
        return None
    computed = compute_dtype(x, experts.spu_dtype) or x.dtype
    if experts.spu_dtype is None and computed == x.dtype and not w_gate_up.dtype == w_down.dtype == computed:
        return None  # torch says what is wrong
    if not _fits(x, ids, scores, w_gate_up, w_down) or choose_backend(x, computed) != "cpu":
        return None
    activation = str(activation_of(getattr(experts, block.activation)))
    return gated_experts(x, ids, scores, w_gate_up, w_down, ExpertsForm(computed, "cpu", activation))


def _fits(x: Tensor, ids: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> bool:
    """Tell whether the op takes tensors of these shapes, dtypes and devices."""
    floats = x, scores, w_gate_up, w_down
    return (
        all(t.dtype in STORAGE for t in floats)
        and all(t.device == x.device for t in (ids, *floats))
        and x.dim() == ids.dim() == 2
        and x.numel() > 0
        and ids.dtype == torch.int64
        and ids.shape == scores.shape == (x.shape[0], ids.shape[1])
        and ids.shape[1] > 0
        and w_gate_up.dim() == w_down.dim() == 3
        and w_gate_up.shape == (w_down.shape[0], 2 * w_down.shape[2], x.shape[1])
        and w_down.shape[1] == x.shape[1]
        and w_down.numel() > 0
    )


def multiplies_by_ours(module: nn.Module) -> bool:
    """Tell whether a module's experts are multiplied by this library's products on a CPU, in a plain call."""
    if not isinstance(module, FusedExperts):
        return False
    block = module.spu_block
    assert isinstance(block, ExpertsBlock)
    return _serves(module, block) and choose_backend(getattr(module, block.down), module.spu_dtype) == "cpu"


def _serves(experts: FusedExperts, block: ExpertsBlock) -> bool:
    """Tell whether the op knows all that a module is to compute now."""
    return (
        activation_of(getattr(experts, block.activation)) in GATED_ACTIVATIONS
        and not watched_globally()
        and not getattr(experts, "_is_expert_parallel", False)
        and getattr(experts.config, "_experts_implementation", None) in _SERVED
    )


def experts_block(module: nn.Module) -> ExpertsBlock | None:
    """Return the names of experts' parts; None where a module is none, or computes anything else.

    The class's own forward says so: it is run once, one expert after the other, on small and large values and with a
    small function for the activation, and must agree in every bit. So must its gate, which the other ways call.
    """
    cls, block = type(module), ExpertsBlock()
    if issubclass(cls, FusedBlock) or not from_library(cls) or not hasattr(cls, "_apply_gate"):
        return None
    if set(parameters_of(module)) != {block.gate_up, block.down} or buffers_of(module):
        return None
    said = (module.__dict__.get(name) for name in ("has_gate", "is_concatenated", "has_bias", "is_transposed"))
    if set(children_of(module)) != {block.activation} or list(said) != [True, True, False, False]:
        return None
    if module.__dict__.get("has_post_expert_norm", False):
        return None
    probe: Any = cls.__new__(cls)
    nn.Module.__init__(probe)
    vars(probe).update({name: value for name, value in vars(module).items() if name not in vars(probe)})
    with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, w_gate_up, w_down = (
            torch.arange(n, dtype=torch.float32, device="cpu").mul(1.7).sin().mul(size)
            for n, size in ((24, 30.0), (3 * 4 * 4, 30.0), (3 * 4 * 2, 1.0))
        )
        x[:4] /= 1000
        x, w_gate_up, w_down = x.view(6, 4), w_gate_up.view(3, 4, 4), w_down.view(3, 4, 2)
        ids = torch.tensor([[0, 1], [1, 0], [2, 0], [0, 2], [2, 0], [1, 2]], device="cpu")
        scores = torch.linspace(0.1, 0.9, 12, device="cpu", dtype=torch.float32).view(6, 2)
        config = SimpleNamespace(_experts_implementation="eager")
        vars(probe).update({"config": config, "num_experts": 3, block.activation: _act})
        vars(probe).update({block.gate_up: w_gate_up, block.down: w_down, "intermediate_dim": 2, "hidden_dim": 4})
        up = F.linear(x, w_gate_up[0])
        try:
            gated, found = probe._apply_gate(up), cls.forward(probe, x.clone(), ids, scores)
        except Exception:  # whatever it has instead
            return None
        expected = torch.zeros_like(x)
        for e in range(3):
            place, token = torch.where(ids.t() == e)
            gate, up_ = F.linear(x[token], w_gate_up[e]).chunk(2, dim=-1)
            y = F.linear(_act(gate) * up_, w_down[e]) * scores[token, place, None]
            expected.index_add_(0, token, y)
        gate, up_ = up.chunk(2, dim=-1)
        same = isinstance(found, Tensor) and torch.equal(found, expected) and torch.equal(gated, _act(gate) * up_)
    return block if same else None


def _act(x: Tensor) -> Tensor:
    return x * 0.7 + 0.1
