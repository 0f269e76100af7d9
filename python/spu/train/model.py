"""The model of a run: the default decoder, a Hugging Face config, or a folder with weights."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from spu.cost.blueprint import read_config
from spu.train.config import BYTE_VOCABULARY, DEFAULT_MODEL

__all__ = [
    "ByteTokenizer",
    "FileTokenizer",
    "Tokenizer",
    "default_config",
    "has_weights",
    "load_config",
    "make_model",
    "make_tokenizer",
    "quiet_transformers",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
_BYTES_FILE = "tokenizer.bytes"  # beside weights that were trained on bytes
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str

    def encode(self, text: bytes) -> torch.Tensor: ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """Every byte is a token."""

    name = "bytes"

    def encode(self, text: bytes) -> torch.Tensor:
        """Return the bytes as uint8 [bytes]."""
        return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < BYTE_VOCABULARY).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Note beside a model that its tokens are bytes."""
        (folder / _BYTES_FILE).write_text("Every byte is a token.\n", encoding="utf-8")


class FileTokenizer:
    """The tokenizer whose files lie beside a model's weights."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.name = f"tokenizer of {folder}"
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)

    def encode(self, text: bytes) -> torch.Tensor:
        """Return the tokens of UTF-8 text as int32 [tokens]."""
        ids = self._tokenizer(text.decode("utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int32)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files beside a model."""
        self._tokenizer.save_pretrained(folder)


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and notes out of the job's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


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
    values = read_config(source)
    from transformers import CONFIG_MAPPING

    kind = values["model_type"]
    if kind not in CONFIG_MAPPING:
        why = "it needs code of its own, which is not run" if "auto_map" in values else "transformers does not know it"
        raise ValueError(f"--model {source}: model_type {kind!r}: {why}; give a decoder that transformers has")
    return CONFIG_MAPPING[kind].from_dict(values)


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


def make_model(source: str | None, seed: int) -> nn.Module:
    """Return a causal decoder in fp32, from weights or with random ones: a function of its arguments alone.

    Raises:
        ValueError: nothing usable at ``source``; the text says what is wrong with it.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    if has_weights(source):
        return _load(str(source), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(
                f"--model {source}: no causal decoder can be made from it: {_first_line(error)}"
            ) from error


def _load(source: str, config: Any) -> nn.Module:
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
        raise ValueError(f"--model {source}: its weights cannot be read: {_first_line(error)}") from error
    model, info = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            some = ", ".join(str(key) for key in sorted(info[what], key=str)[:3])
            raise ValueError(
                f"--model {source}: {what.replace('_', ' ')} in its safetensors: {some}; give a whole model"
            )
    return model


def make_tokenizer(source: str | None, config: Any) -> Tokenizer:
    """Return the tokenizer beside a model's files, else bytes: for a config alone, or weights that were trained on
    bytes.

    Raises:
        ValueError: weights that were not, without a tokenizer; bytes do not fit the model's vocabulary; or the
            tokenizer's files cannot be read.
    """
    folder = Path(source) if source else None
    if folder and folder.is_dir() and any((folder / name).exists() for name in _TOKENIZER_FILES):
        try:
            return FileTokenizer(folder)
        except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
            raise ValueError(f"--model {source}: its tokenizer cannot be read: {_first_line(error)}") from error
    vocabulary = config.get_text_config().vocab_size
    on_bytes = vocabulary == BYTE_VOCABULARY or (folder is not None and (folder / _BYTES_FILE).exists())
    if has_weights(source) and not on_bytes:
        raise ValueError(
            f"--model {source}: weights for {vocabulary} tokens, and no tokenizer beside them: put its tokenizer.json "
            f"there, or an empty file {_BYTES_FILE} if they are to be trained on bytes"
        )
    if vocabulary < BYTE_VOCABULARY:
        raise ValueError(
            f"--model {source}: a vocabulary of {vocabulary} cannot hold bytes: give vocab_size {BYTE_VOCABULARY} or "
            "more, or a tokenizer beside the config"
        )
    return ByteTokenizer()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
