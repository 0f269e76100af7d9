"""The proof that a model's own loss is what the engine computes: the mean over targets of a causal language model.

The model runs once on a few tokens, with labels, as `transformers.Trainer` calls it. A ``loss_function`` that was set,
a forward that adds a term, a loss that is smoothed give another value, or another gradient of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from spu.common.dtypes import HALVES
from spu.common.errors import first_line
from spu.common.out_of_memory import is_out_of_memory
from spu.common.quiet import hushed
from spu.engine.labels import IGNORED, shifted
from spu.model.stand_in import hooks_off
from spu.model.untouched import untouched

__all__ = ["check_loss"]

ROWS, TOKENS = 2, 6


def check_loss(model: Any, *, counted: bool) -> None:
    """Compare a causal language model's loss with the mean cross entropy of its logits, each target the next token.

    Args:
        model: of transformers, or a ``PeftModel``; neither it nor the random draws are changed.
        counted: it is given ``num_items_in_batch``.

    Raises:
        ValueError: its loss is another, or cannot be asked for.
    """
    name = type(model).__name__
    with hushed(), hooks_off(model), untouched(model, values=True), torch.inference_mode(False):
        model.train()  # a term may be added in training alone
        try:
            _compare(name, model, counted)
        except Exception as error:
            if isinstance(error, ValueError) or is_out_of_memory(error):  # a ValueError names what it is already
                raise
            why = first_line(error)
            raise ValueError(f"{name} cannot be asked for its loss on a few tokens: {why}; {_ADVICE}") from error


_ADVICE = "use spu.ModelParallelTrainer with loss_fn=, or spu.accelerate(model) with transformers.Trainer"


def _compare(name: str, model: Any, counted: bool) -> None:
    embedding = model.get_input_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    device = next(embedding.parameters()).device
    ids = (torch.arange(1, ROWS * TOKENS + 1, device=device) % vocabulary).view(ROWS, TOKENS)
    labels = ids.clone()
    labels[0, :3] = IGNORED
    targets = shifted(labels)
    number = (targets != IGNORED).sum()
    given = {"num_items_in_batch": number * 2} if counted else {}  # also what it divides by
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **given)
    loss, logits = (out.get(key) if isinstance(out, dict) else None for key in ("loss", "logits"))
    if not isinstance(loss, torch.Tensor) or not isinstance(logits, torch.Tensor):
        raise ValueError(f"{name} returns no loss and logits for labels: {_ADVICE}")
    ours = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")
    ours = ours / number / (2 if counted else 1)
    near = 2e-2 if logits.dtype in HALVES else 1e-5
    if not torch.isclose(loss.float(), ours, rtol=near, atol=0) or not _same_gradients(loss, ours, logits, near):
        raise ValueError(
            f"{name}'s loss is another than the mean cross entropy of its next tokens, which the engine computes "
            f"({loss.item():.6g} beside {ours.item():.6g} on a few tokens; a loss_function or a forward of its own, a "
            f"router's loss?): {_ADVICE}"
        )


def _same_gradients(loss: torch.Tensor, ours: torch.Tensor, logits: torch.Tensor, near: float) -> bool:
    if not logits.requires_grad:
        return True
    theirs = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0]
    if theirs is None:  # it has made logits of its own
        return True
    own = torch.autograd.grad(ours, logits)[0]
    return bool((theirs - own).float().norm() <= 10 * near * own.float().norm())
