"""The gradients of a vocabulary projection from those of its logits (test_ops_cross_entropy.py has the op's tests)."""

from __future__ import annotations

import pytest
import torch
from backend_params import every_backend
from numeric import assert_equal

from spu import ops
from spu.ops import logit_gradients


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_plain_gradient_of_16_bits_is_made_some_words_at_a_time(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = torch.randn(40, 24).to(dtype), torch.randn(1001, 24).to(dtype).requires_grad_()
    target, found = torch.randint(1001, (40,)), []
    for words in (1001, 100):
        monkeypatch.setattr(logit_gradients, "_SUM_BYTES", 4 * 24 * words)
        with ops.use_backend(backend):
            found += torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, target), weight)
    assert_equal(found[1], found[0], "by 100 words")
