"""The model of a run: the default decoder, a Hugging Face config, or a folder with weights."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu.common.errors import first_line
from spu.common.heap import large_tensors_unmapped
from spu.common.out_of_memory import is_out_of_memory
from spu.cost.blueprint import config_of, read_config
from spu.model.convert.decoder import load_decoder
from spu.model.convert.internlm2 import MODEL_TYPE, load_internlm2
from spu.train.config import DEFAULT_MODEL

__all__ = [
    "check_positions",
    "default_config",
    "has_weights",
    "load_config",
    "make_model",
    "most_positions",
    "quiet_transformers",
]

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and notes out of the job's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own use of its old names


def default_config() -> Any:
    """Return the default model's config; a plain Llama where transformers has no InternLM3 (it is the same
    architecture).
    """
    import transformers

    config_class = getattr(transformers, "InternLM3Config", None) or transformers.LlamaConfig
    return config_class(**DEFAULT_MODEL)


def load_config(source: str | None) -> Any:
    """Return the Hugging Face config of ``source``: a folder with config.json, such a file, the name of a config that
    comes with spu, or None for the default.

    Raises:
        ValueError: missing, not a config, or one that needs remote code.
    """
    quiet_transformers()
    if source is None:
        return default_config()
    return config_of(read_config(source), source)


def most_positions(config: Any) -> int | None:
    """Return the most tokens that a sequence may have; None where rotary tables grow with it (dynamic NTK scaling)."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return None if rope.get("rope_type") == "dynamic" else getattr(config, "max_position_embeddings", None)


def check_positions(config: Any, seq: int, where: str = "") -> None:
    """Raise ValueError for sequences that are longer than the model may have them."""
    longest = most_positions(config)
    if longest is not None and seq > longest:
        raise ValueError(f"{where}--seq {seq} is longer than the model's {longest} positions: give {longest} or less")


def has_weights(source: str | None) -> bool:
    """Tell whether ``source`` is a folder with safetensors.

    Raises:
        ValueError: a folder whose only weights are pickled ones.
    """
    if source is None or not Path(source).is_dir():
        return False
    folder = Path(source)
    if any(folder.glob("*.safetensors")):
        return True
    if pickled := sorted(f.name for pattern in _PICKLED for f in folder.glob(pattern)):
        raise ValueError(f"--model {source}: {pickled[0]} is pickled and not read; convert the weights to safetensors")
    return False


def make_model(source: str | None, seed: int, *, later: bool = False) -> nn.Module:
    """Return a causal decoder in fp32, from weights or with random ones: a function of its arguments alone.

    Args:
        later: leave weights in their files, if that can be, until a trainer reads those of its stages.

    Raises:
        ValueError: nothing usable at ``source``; the text says what is wrong with it.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    if source is not None and has_weights(source):
        return _load(source, config, later)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"--model {source}: no causal decoder can be made from it: {first_line(error)}") from error


def _load(source: str, config: Any, later: bool) -> nn.Module:
    """Return the model of a folder with weights: tensor by tensor, or by transformers where that converts them."""
    try:
        with large_tensors_unmapped():
            if read_config(source)["model_type"] == MODEL_TYPE:
                return load_internlm2(Path(source), config, later=later)
            model = load_decoder(Path(source), config, later=later)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, ZeroDivisionError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"--model {source}: its weights cannot be read: {first_line(error)}") from error
    return model if model is not None else _load_converted(source, config)


def _load_converted(source: str, config: Any) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"--model {source}: its weights cannot be read: {first_line(error)}") from error
    model, info = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            some = ", ".join(str(key) for key in sorted(info[what], key=str)[:3])
            raise ValueError(
                f"--model {source}: {what.replace('_', ' ')} in its safetensors: {some}; give a whole model"
            )
    return model
