"""Adapters added into the weights that they adapt: tensor by tensor, so that memory holds little at a time.

The sums are peft's (``peft.tuners.lora``), in fp32: W + s B A, and for DoRA m (W + s B A) / |W + s B A|. They are
rounded once, to the dtype that the base model is stored in. peft itself adds in that dtype.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from spu.model.lora import CONFIG, read_adapter

__all__ = ["Base", "base_of_files", "merge_adapter"]

PART_BYTES = 100 << 20
_PREFIX = "base_model.model."
_UNREAD = ("rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters")
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
)
_OWN = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "lora_embedding_B",
)


@dataclass(frozen=True)
class Base:
    """A base model's tensors, made or read one by one.

    Attributes:
        source: where they are from, for messages.
        names: of all tensors.
        get: a tensor by its name.
        tied: embedding and head are one tensor.
        copy_rest: writes everything but weights (configuration, tokenizer) into a folder.
    """

    source: str
    names: Collection[str]
    get: Callable[[str], torch.Tensor]
    tied: bool
    copy_rest: Callable[[Path], None]


def base_of_files(folder: str | Path) -> Base:
    """Return the base model in a folder of safetensors.

    Raises:
        ValueError: there is none, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    place = Path(folder)
    files = sorted(place.glob("*.safetensors"))
    if not files or not (place / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: give a folder with config.json and safetensors")
    where: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy it again") from None

    def get(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as file:
            return file.get_tensor(name)

    def copy_rest(into: Path) -> None:
        for path in place.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
                shutil.copyfile(path, into / path.name)

    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    return Base(str(folder), where, get, bool(config.get("tie_word_embeddings", False)), copy_rest)


class _Adapter:
    """The tensors of an adapter by the module that they adapt, without the prefix of peft's names."""

    def __init__(self, folder: Path, base: Base) -> None:
        self.config, tensors = read_adapter(folder)
        used = [name for name in _UNREAD if self.config.get(name)]
        if used:
            raise ValueError(f"{folder / CONFIG} sets {used[0]}, which is not merged here: use peft's merge_and_unload")
        self.scale = self.config.get("lora_alpha", 8) / (
            math.sqrt(self.config["r"]) if self.config.get("use_rslora") else self.config["r"]
        )
        self.own: dict[str, dict[str, torch.Tensor]] = {}
        self.whole: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            path = name.removeprefix(_PREFIX)
            end = next((end for end in _OWN if path.endswith(f".{end}")), None)
            if end is None:
                self.whole[path] = tensor
            else:
                self.own.setdefault(path.removesuffix(f".{end}"), {})[end] = tensor
        self._check(folder, base)

    @property
    def targets(self) -> list[str]:
        biases = [f"{path}.bias" for path, own in self.own.items() if "lora_B.bias" in own]
        return [*(f"{path}.weight" for path in self.own), *biases, *self.whole]

    def _check(self, folder: Path, base: Base) -> None:
        missing = [name for name in self.targets if name not in base.names]
        ends = [name for name in self.targets if name.rpartition(".")[0].endswith(("embed_tokens", "lm_head", "wte"))]
        if base.tied and ends:
            raise ValueError(
                f"{folder} changes {ends[0]}, which is embedding and head at once in {base.source} "
                "(tie_word_embeddings): merged, it would change both. Untie them first, or keep the adapter beside"
            )
        if missing:
            raise ValueError(
                f"{folder} adapts {missing[0]}, which {base.source} does not have: give the model that it was "
                "trained on"
            )
        for path, own in self.own.items():
            weight = base.get(f"{path}.weight")
            shape = tuple(weight.shape)
            delta = self._delta_shape(path, own)
            if delta != shape:
                raise ValueError(
                    f"{folder} adapts {path}.weight of shape {delta}, which {base.source} has as {shape}: give the "
                    "model that it was trained on"
                )

    def _delta_shape(self, path: str, own: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        if "lora_embedding_A" in own and "lora_embedding_B" in own:
            return own["lora_embedding_A"].shape[1], own["lora_embedding_B"].shape[0]
        if "lora_A.weight" not in own or "lora_B.weight" not in own or own["lora_A.weight"].dim() != 2:
            return None
        shape = own["lora_B.weight"].shape[0], own["lora_A.weight"].shape[1]
        return shape[::-1] if self.config.get("fan_in_fan_out") else shape

    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a base tensor with what the adapter adds to it, in its own dtype."""
        if name in self.whole:
            return self.whole[name].to(tensor.dtype)
        path, _, kind = name.rpartition(".")
        own = self.own.get(path)
        if own is None:
            return tensor
        if kind == "bias" and "lora_B.bias" in own:
            return (tensor.float() + own["lora_B.bias"].float() * self.scale).to(tensor.dtype)
        return self._weight(tensor, own) if kind == "weight" else tensor

    def _weight(self, tensor: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "lora_embedding_A" in own:
            delta = (own["lora_embedding_B"].float() @ own["lora_embedding_A"].float()).T * self.scale
            return (tensor.float() + delta).to(tensor.dtype)
        turned = bool(self.config.get("fan_in_fan_out"))
        delta = own["lora_B.weight"].float() @ own["lora_A.weight"].float()
        delta = (delta.T if turned else delta) * self.scale
        weight = tensor.float() + delta
        if "lora_magnitude_vector" in own:
            norms = torch.linalg.norm(weight.T if turned else weight, dim=1)
            factor = (own["lora_magnitude_vector"].float() / norms).view(-1, 1)
            weight = (factor.T if turned else factor) * weight
        return weight.to(tensor.dtype)


def merge_adapter(base: Base, adapter: str | Path, out: str | Path, part_bytes: int = PART_BYTES) -> None:
    """Write a base model with an adapter merged into it, as transformers reads it.

    At a time, memory holds one part of the output, the adapter, and three fp32 copies of a tensor.

    Args:
        base: the model that the adapter was trained on.
        adapter: a folder in peft's format.
        out: the new folder; it appears when it is complete.
        part_bytes: of a file, at least one tensor each.

    Raises:
        ValueError: an adapter that is damaged or of another model, or ``out`` is there already; nothing was written.
    """
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{out} is there already: give a new folder")
    own = _Adapter(Path(adapter), base)
    new = place.with_name(f".{place.name}.spu-new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        base.copy_rest(new)
        _write_parts(new, ((name, own.merged(name, base.get(name))) for name in sorted(base.names)), part_bytes)
        if place.exists():
            place.rmdir()
        new.rename(place)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}: give a folder with room") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_parts(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], part_bytes: int) -> None:
    """Write tensors into files of about ``part_bytes``, and their index."""
    from safetensors.torch import save_file

    part: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    total = 0

    def flush() -> None:
        save_file(part, folder / f"part-{len(names)}", metadata={"format": "pt"})
        names.append(list(part))
        part.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if part and size + sum(t.numel() * t.element_size() for t in part.values()) > part_bytes:
            flush()
        part[name] = tensor.contiguous()
        total += size
    flush()
    if len(names) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, own in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        index |= dict.fromkeys(own, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
