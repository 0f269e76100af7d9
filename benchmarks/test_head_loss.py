"""A decoder's step with a vocabulary of 32,768 words: the loss without logits beside the plain one, and the peak bytes.

One trainer on one core; its steps take turns between the two ways. Compared is the processor time of the whole
process, which other programs on the machine do not add to; the ratio is the median over the rounds. The smaller size is
that of ``spu.engine.head_loss.WORTH_BYTES``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from goals import GOALS

from spu import ModelParallelTrainer
from spu.engine import head_loss
from spu.engine.counted import counted_bytes

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, LENGTH, ROUNDS = 32_768, 512, 256, 3
WAYS = {"without logits": 0, "plain": 1 << 60}


def decoder() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_a_decoder(precision: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.randint(VOCAB, (tokens // LENGTH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, int] = {}
    losses: dict[str, float] = {}
    with ModelParallelTrainer(decoder(), "cpu:0", precision=precision, microbatches=1, lr=0.0) as trainer:
        trainer.prepare(x, y)
        for way, worth in WAYS.items():
            monkeypatch.setattr(head_loss, "WORTH_BYTES", worth)
            with counted_bytes(trainer._prepared()) as found:
                losses[way] = trainer.step(x, y).loss
            peaks[way] = sum(found.values())
        for _ in range(ROUNDS):
            for way, worth in WAYS.items():
                monkeypatch.setattr(head_loss, "WORTH_BYTES", worth)
                begin = time.process_time()
                trainer.step(x, y)
                seconds[way].append(time.process_time() - begin)
    assert losses["without logits"] == pytest.approx(losses["plain"], rel=1e-3)
    ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds["without logits"]))
    logits = 4 * tokens * VOCAB
    GOALS.head(f"a step of a decoder, {precision}, {tokens} x {VOCAB} logits ({logits >> 20} MiB in fp32)")
    plain, without = (f"{statistics.median(seconds[way]):.2f} s" for way in ("plain", "without logits"))
    GOALS.note("plain; without logits", f"{plain}; {without}")
    GOALS.at_least("  without logits beside plain", ratio, 0.9, "x")
    GOALS.note("peak bytes, plain", f"{peaks['plain'] / 2**20:.0f} MiB")
    GOALS.note("  without logits", f"{peaks['without logits'] / 2**20:.0f} MiB")
