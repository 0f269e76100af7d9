"""The command ``spu merge``: adapters into the model that they were trained on."""

from __future__ import annotations

from pathlib import Path

from spu.common.files import read_object
from spu.model.convert.internlm2 import MODEL_TYPE
from spu.model.lora import CONFIG
from spu.model.merge import merge_adapter
from spu.train.adapter import base_of, merge_run
from spu.train.model import has_weights
from spu.train.run_folder import find_folder

__all__ = ["merge_command"]


def merge_command(which: str, out: str, model: str | None, runs: str) -> None:
    """Merge and say where the model is.

    Args:
        which: a run, by its name or folder, or the folder of an adapter in peft's format.
        out: the new folder.
        model: the base model's folder, for an adapter.
        runs: the folder of all runs.

    Raises:
        ValueError: bad input; the text names it, and nothing was written.
    """
    if not out:
        raise ValueError("--out '' names no folder: give a new one")
    if (Path(which) / CONFIG).is_file() or model is not None:
        if model is None:
            raise ValueError(f"{which} is an adapter: give the model that it was trained on with --model FOLDER")
        if not has_weights(model):
            raise ValueError(f"--model {model} has no weights to add an adapter to: give a folder with safetensors")
        merge_adapter(base_of(model, 0), which, out)
    else:
        folder = find_folder(runs, which, "spu merge")
        config, _ = folder.read_config()
        folder.check_weights(config)
        merge_run(config, folder.path, out)
    print(f"written: {out}; {_loaded_with(out)}")


def _loaded_with(out: str) -> str:
    """Return how a merged model is loaded; transformers has no InternLM2 of its own, and runs the code beside it."""
    if read_object(Path(out) / "config.json").get("model_type") == MODEL_TYPE:
        return f"what loads its base model loads it; try it with: spu chat {out}"
    return f"load it with AutoModelForCausalLM.from_pretrained({out!r})"
