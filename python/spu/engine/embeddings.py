"""Embeddings whose gradient or rows depend on which rows of a batch they see at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spu.engine.stage import Stage

__all__ = ["check_embeddings"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def check_embeddings(stages: Sequence[Stage]) -> None:
    """Check that embeddings are exact in microbatches; for a training that has several.

    Raises:
        ValueError: a trained embedding divides its gradient by how often an id occurs, which a microbatch counts among
            its own rows; or one with ``max_norm`` shares its weight with another kind of use, which in the whole batch
            reads rows that are all within the norm, and in a microbatch those of later ones as they were.
    """
    modules = {
        id(module): (f"{layer.name}.{name}" if name else str(layer.name), module)
        for stage in stages
        for layer in stage.layers
        for name, module in layer.module.named_modules()
    }
    for label, module in modules.values():
        if not isinstance(module, _EMBEDDINGS):
            continue
        if module.scale_grad_by_freq and module.weight.requires_grad:
            raise ValueError(
                f"embedding {label!r} has scale_grad_by_freq: a microbatch counts ids among its own rows alone, so the "
                "gradient would not be the whole batch's: train with microbatches=1, or without it"
            )
        if module.max_norm is None:
            continue
        for other_label, other in modules.values():
            if _holds(other, module.weight) and not _same_norm(other, module):
                raise ValueError(
                    f"embedding {label!r} has max_norm, and {other_label!r} uses its weight too: it would read rows "
                    "that only later microbatches bring within the norm: train with microbatches=1, or without max_norm"
                )


def _holds(module: nn.Module, weight: Tensor) -> bool:
    """Tell whether a module itself holds a parameter."""
    return any(parameter is weight for parameter in module.parameters(recurse=False))


def _same_norm(other: nn.Module, module: nn.Module) -> bool:
    """Tell whether a module brings the rows that it reads within the same norm."""
    return isinstance(other, _EMBEDDINGS) and (other.max_norm, other.norm_type) == (module.max_norm, module.norm_type)
