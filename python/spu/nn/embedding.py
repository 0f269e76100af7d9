"""``Embedding``: nn.Embedding with a gradient that goes straight into the rows of the fp32 main gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spu.nn.fp32 import by_torch
from spu.ops import embedding
from spu.ops.plain import takes

__all__ = ["Embedding"]


class Embedding(nn.Embedding):
    """nn.Embedding on the fused op. Rows that are renormalised or rescaled, and sparse gradients, are torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """Look up input [...] -> [..., embedding_dim]."""
        if torch.jit.is_scripting():
            return F.embedding(
                input,
                self.weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )
        else:  # TorchScript compiles the branch that it takes, and no more
            if self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
                return super().forward(input)
            weight = self.weight
            if takes(input, weight) and by_torch(weight, (weight,), weight.dtype, 0, 1):
                return F.embedding(input, weight, self.padding_idx)
            return embedding(input, weight, self.padding_idx)
