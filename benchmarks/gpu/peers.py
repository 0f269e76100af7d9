"""Steps of others that ``cases.py`` times: Megatron-LM's gradient sums, attention by each of SDPA's kernels, and of
packed rows by a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def megatron_step(x: Tensor, dy: Tensor, layer: nn.Linear, microbatches: int) -> Callable[[], object]:
    """Forward and backward of linear + gelu with fp16 weights, whose gradients are added to fp32 ones after each
    microbatch, as Megatron-LM does without its fused kernel, and unscaled once, with a check, as its optimizer does.
    """
    mains = [torch.zeros(p.shape, device=p.device) for p in layer.parameters()]
    scale, found = torch.full((), 1024.0, device=x.device), torch.zeros(1, device=x.device)
    inverse = scale.reciprocal()

    def step() -> None:
        for main in mains:
            main.zero_()
        for _ in range(microbatches):
            (scale * (F.gelu(layer(x), approximate="tanh") * dy).sum().float()).backward()
            for main, parameter in zip(mains, layer.parameters()):
                assert parameter.grad is not None
                main.add_(parameter.grad)
                parameter.grad = None
        torch._amp_foreach_non_finite_check_and_unscale_(mains, found, inverse)

    return step


def attention_step(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, peer: str) -> Callable[[], object]:
    """Forward and backward of causal attention by "spu attention", "SDPA flash" or "SDPA cuDNN".

    Args:
        q, k, v, dy: [batch, tokens, heads, head_dim].
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from spu import ops

    backends = {"SDPA flash": [SDPBackend.FLASH_ATTENTION], "SDPA cuDNN": [SDPBackend.CUDNN_ATTENTION]}

    def forward() -> Tensor:
        if peer == "spu attention":
            return ops.attention(q, k, v, causal=True)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backends[peer]):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    def step() -> None:
        q.grad = k.grad = v.grad = None
        forward().backward(dy)

    return step


def packed_attention_step(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, peer: str) -> Callable[[], object]:
    """Forward and backward of attention over rows of eleven documents, by "spu documents" or by "SDPA mask".

    Args:
        q, k, v, dy: [batch, tokens, heads, head_dim].
    """
    from spu.nn.documents import by_documents, document_lengths

    lengths = [len(part) for part in torch.arange(q.shape[1]).tensor_split(11) if len(part)]
    places = torch.cat([torch.arange(n, device=q.device) for n in lengths])
    owner = torch.repeat_interleave(torch.tensor(lengths, device=q.device))
    seen = (owner[:, None] == owner) & (places[:, None] >= places)
    mask = seen.expand(len(q), 1, -1, -1)
    read = document_lengths(mask, q.shape[2] * q.shape[3])
    if q.is_cuda and read != [lengths] * len(q):
        raise RuntimeError(f"documents of {lengths} tokens were read as {read} from their mask")

    def alone(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    def forward() -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        if peer == "spu documents":
            return by_documents(query, key, value, [lengths] * len(q), alone)
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)

    def step() -> None:
        q.grad = k.grad = v.grad = None
        forward().backward(dy)

    return step
