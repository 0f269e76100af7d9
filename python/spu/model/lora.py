"""LoRA adapters (arXiv:2106.09685): put into a decoder by peft, written and read in peft's own format.

peft's layers are ordinary modules within the model's, so they train like any others. What is here is what a run needs
around them: options checked before anything is made, files replaced only by complete ones, and errors that name the
file and the fix.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spu.common.errors import disk_errors, first_line
from spu.model.adapter_base import write_base
from spu.model.layers import is_adapted

__all__ = ["CONFIG", "WEIGHTS", "LoraOptions", "add_adapters", "check_adapted", "read_adapter", "write_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head


@dataclass(frozen=True)
class LoraOptions:
    """The adapters of a run.

    Attributes:
        rank: columns of A, rows of B.
        alpha: B A is scaled by alpha / rank (``rslora``: alpha / sqrt(rank), arXiv:2312.03732); None: twice the rank.
        dropout: share of a layer's inputs that its adapter does not see in training.
        targets: names of layers, or the ends of their names, such as ``q_proj``; none: all linear layers of the blocks.
        kind: lora, rslora or dora, which trains the columns' norms too (arXiv:2402.09353).
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    kind: str = "lora"

    def config(self) -> Any:
        """Return the ``peft.LoraConfig``."""
        peft = _peft()
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets) or ALL_LINEAR,
            use_rslora=self.kind == "rslora",
            use_dora=self.kind == "dora",
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModuleNotFoundError("adapters need peft: pip install 'peft>=0.18'", name="peft") from error
    return peft


def add_adapters(model: nn.Module, options: LoraOptions, seed: int = 0) -> Any:
    """Put adapters into a decoder, in place, and freeze everything else.

    Args:
        model: of transformers, on any device (also "meta").
        options: what adapters.
        seed: decides their first values alone: A random, B zero, so that the model's outputs are what they were.

    Returns:
        The ``PeftModel``.

    Raises:
        ValueError: a target that is no linear layer of the model; the text lists those that are.
    """
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    names = [name for name, _ in model.named_modules()]
    for target in options.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"no layer of {type(model).__name__} is named {target!r}: there are {', '.join(linear)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = _peft().get_peft_model(model, options.config())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{type(model).__name__} cannot have these adapters: {first_line(error)}") from error
    return adapted.train(model.training)


def check_adapted(model: Any) -> Any:
    """Return the model if it is a ``PeftModel``; raise TypeError if not."""
    if not (isinstance(model, nn.Module) and is_adapted(model)):
        raise TypeError(f"a {type(model).__name__} has no adapters: give a peft.PeftModel (peft.get_peft_model)")
    return model


def write_adapter(
    model: Any, state: Mapping[str, torch.Tensor], folder: Path, base: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a ``PeftModel``'s adapters as its ``save_pretrained`` does; an older adapter there stays until the end.

    Args:
        model: the ``PeftModel``.
        state: its state, with the values to write.
        folder: gets adapter_config.json, adapter_model.safetensors and spu_base.json.
        base: what is kept of the frozen weights, as `spu.model.adapter_base.base_values` returns it.

    Raises:
        ValueError: the folder holds something else, or cannot be written.
    """
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and holds no adapter: give another folder")
    new, old = folder.with_name(f".{folder.name}.spu-new"), folder.with_name(f".{folder.name}.spu-old")
    try:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)
        with disk_errors(new):
            model.save_pretrained(new, state_dict=dict(state))
        write_base(new, base)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"the adapter cannot be written to {folder}: {error}: give a folder with room") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return an adapter's configuration and its tensors, which are mapped from the file.

    Raises:
        ValueError: a file is missing or damaged, it is no LoRA, or its rank is not positive; the text names it.
    """
    from safetensors import SafetensorError, safe_open

    place = Path(folder)
    if not (place / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: give a folder that PeftModel.save_pretrained or spu train wrote")
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{place / CONFIG} cannot be read ({error}): give a whole adapter") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{place / CONFIG} is of peft_type {kind!r}: only LORA is read here; merge it with peft")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ValueError(f"{place / CONFIG} has rank r = {config.get('r')!r}: an adapter's is 1 or more")
    if not (place / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: give a whole adapter, in safetensors")
    try:
        with safe_open(place / WEIGHTS, framework="pt") as file:
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{place / WEIGHTS} is damaged ({error}): copy or train it again") from None
