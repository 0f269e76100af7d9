"""A model to plan for without its weights: from a config, shapes alone, on the meta device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from spu.common.dtypes import DTYPES
from spu.common.errors import first_line
from spu.cost.count import model_costs
from spu.cost.head import rows_without_logits
from spu.engine.loss import cross_entropy
from spu.model.convert.decoder import empty_decoder
from spu.model.convert.internlm2 import MODEL_TYPE, internlm2_config
from spu.model.layers import Layer, model_layers
from spu.model.lora import LoraOptions, add_adapters
from spu.plan.layer_cost import LayerCost
from spu.settings import Settings

__all__ = ["blueprint", "config_names", "config_of", "costs_by_rows", "freeze_matrices", "read_config"]


def config_names() -> list[str]:
    """Return the names of the configs that come with spu."""
    folder = resources.files("spu") / "configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def read_config(source: str) -> dict[str, Any]:
    """Return the values of a config: one that comes with spu, by name, a JSON file, or a folder with a config.json.

    Raises:
        ValueError: none of these, or not a JSON object with a model_type.
    """
    name = source
    if source in config_names():
        text = (resources.files("spu") / "configs" / f"{source}.json").read_text(encoding="utf-8")
    else:
        file = Path(source)
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(
                f"--model {source}: no such file or folder with a config.json (nothing is downloaded: hf download NAME "
                f"--local-dir FOLDER); with spu come the configs {', '.join(config_names())}"
            )
        name, text = file.name, file.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--model {source}: {name} is not JSON ({error}); give a Hugging Face config") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"--model {source}: {name} has no model_type; give the config.json of a Hugging Face model")
    return values


def config_of(values: dict[str, Any], source: str) -> Any:
    """Return the transformers config of a config.json's values, InternLM2's included.

    Raises:
        ValueError: one of a model that transformers does not have, or that needs remote code.
    """
    from transformers import CONFIG_MAPPING

    kind = values["model_type"]
    if kind == MODEL_TYPE:
        return internlm2_config(values, source)
    if kind not in CONFIG_MAPPING:
        why = "it needs code of its own, which is not run" if "auto_map" in values else "transformers does not know it"
        raise ValueError(f"--model {source}: model_type {kind!r}: {why}; give a decoder that transformers has")
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # of its class's own checks
        raise ValueError(f"--model {source}: its config.json is not a {kind}'s: {first_line(error)}") from error


def blueprint(source: str, lora: LoraOptions | None = None) -> list[Layer]:
    """Return the layers of a decoder on the meta device: shapes and code, no weights.

    Args:
        source: as in `read_config`.
        lora: adapters that are trained, with everything else frozen.

    Raises:
        ValueError: not a config, or one of a model that transformers cannot make; no such layers to adapt.
    """
    config = config_of(read_config(source), source)
    try:
        model = empty_decoder(config)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"--model {source}: no causal decoder can be made from it: {first_line(error)}") from error
    if lora is not None:
        with torch.device("meta"):
            model = add_adapters(model, lora)
    return model_layers(model)


def freeze_matrices(layers: Sequence[Layer]) -> None:
    """Freeze every parameter but norms and biases: a training that takes about what one with adapters takes.

    Gradients go through all layers, but matrices have none of their own, no state, and are never written.
    """
    for layer in layers:
        for parameter in layer.module.parameters():
            parameter.requires_grad_(parameter.dim() < 2)


def costs_by_rows(
    layers: list[Layer], tokens: int, settings: Settings, device_type: str = "cpu"
) -> Callable[[int], tuple[list[LayerCost], LayerCost]]:
    """Return a function: rows of a microbatch -> costs of a decoder's layers and of its cross entropy.

    Every cost of a decoder is linear in the rows, so that two runs on fakes tell all others: of one row and of two, or
    of the first two whose loss is computed without logits.

    Args:
        layers: of `blueprint`.
        tokens: of a row.
        settings: of the training.
        device_type: of the device that runs the last layer.
    """
    first = rows_without_logits(layers[-1].module, cross_entropy, tokens, DTYPES[settings.precision]) or 1

    @lru_cache(maxsize=4)
    def counted(rows: int) -> list[LayerCost]:
        ids = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
        dtype = DTYPES[settings.precision]
        costs, loss = model_costs(
            layers, ids, dtype, fused=settings.fused, loss_fn=cross_entropy, targets=ids, device_type=device_type
        )
        assert loss is not None
        return [*costs, loss]

    def costs_of(rows: int) -> tuple[list[LayerCost], LayerCost]:
        start = first if rows >= first else 1
        if rows <= start + 1:
            every = counted(rows)
        else:
            pairs = zip(counted(start), counted(start + 1), strict=True)
            every = [_interpolated(one, two, rows - start) for one, two in pairs]
        return every[:-1], every[-1]

    return costs_of


def _interpolated(one: LayerCost, two: LayerCost, further: int) -> LayerCost:
    """Return the costs of so many rows more than ``one`` has, on the line through it and ``two``, of one row more."""

    def value(a: Any, b: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(value(x, y) for x, y in zip(a, b, strict=True))
        return a + (b - a) * further if type(a) is int else a

    fields = [field.name for field in dataclasses.fields(LayerCost)]
    return LayerCost(**{name: value(getattr(one, name), getattr(two, name)) for name in fields})
