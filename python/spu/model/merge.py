"""Adapters added into the weights that they adapt: tensor by tensor, so that memory holds little at a time.

The sums are peft's (``peft.tuners.lora``), in fp32: W + s B A, and for DoRA m (W + s B A) / |W + s B A|. They are
rounded once, to the dtype that the base model is stored in. peft itself adds in that dtype.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from spu.common.errors import disk_errors
from spu.common.files import read_object
from spu.model.adapter_base import read_base
from spu.model.convert.decoder import empty_decoder
from spu.model.convert.internlm2 import MODEL_TYPE, Checkpoint, internlm2_config, layout_of
from spu.model.convert.layout import check, fill, write_tensor
from spu.model.convert.shards import Shards
from spu.model.lora import CONFIG, read_adapter

__all__ = ["Base", "base_of_files", "merge_adapter", "write_parts"]

PART_BYTES = 100 << 20
_PREFIX = "base_model.model."
_UNREAD = ("rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters")
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # beginnings of init_lora_weights in peft's configs
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


Changed = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Base:
    """A base model that adapters are added into.

    Attributes:
        source: where it is from, for messages.
        shapes: of its tensors, by their names in the model.
        tied: embedding and head are one tensor.
        save: writes the model into a folder, with every tensor as a function of its name and value changes it.
    """

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool
    save: Callable[[Path, Changed], None]


def base_of_files(folder: str | Path) -> Base:
    """Return the base model in a folder of safetensors.

    Raises:
        ValueError: there is none, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    place = Path(folder)
    if read_object(place / "config.json").get("model_type") == MODEL_TYPE:  # its tensors have other names and shapes
        return _base_of_internlm2(place)
    files = sorted(place.glob("*.safetensors"))
    if not files or not (place / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: give a folder with config.json and safetensors")
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy it again") from None

    def get(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as file:
            return file.get_tensor(name)

    def save(into: Path, changed: Changed) -> None:
        for path in place.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
                shutil.copyfile(path, into / path.name)
        write_parts(into, ((name, changed(name, get(name))) for name in sorted(where)))

    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    return Base(str(folder), shapes, bool(config.get("tie_word_embeddings", False)), save)


def _base_of_internlm2(folder: Path) -> Base:
    """Return an InternLM2 checkpoint under the names of a Llama; it is written back in its own form and dtype.

    Raises:
        ValueError: as `spu.model.convert.internlm2`.
    """
    shards = Shards(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = empty_decoder(internlm2_config(values, str(folder)))
    layout = layout_of(model)
    check(layout, shards, lambda name: name.endswith("rotary_emb.inv_freq") or name == "output.weight")
    form, parameters = Checkpoint.of(shards, layout), dict(model.named_parameters())
    dtype = form.dtype or torch.float32

    def save(into: Path, changed: Changed) -> None:
        def pieces(name: str) -> Iterator[torch.Tensor]:
            names = {run.parameter for run in layout[name].runs}
            own = {key: torch.empty(parameters[key].shape, dtype=dtype, device="cpu") for key in names}
            fill({name: layout[name]}, shards, own)
            return write_tensor(layout[name], {key: changed(key, tensor) for key, tensor in own.items()})

        form.write(into, layout, pieces, dtype)

    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    return Base(str(folder), shapes, "lm_head.weight" not in parameters, save)


class _Adapter:
    """The tensors of an adapter by the module that they adapt, without the prefix of peft's names."""

    def __init__(self, folder: Path, base: Base) -> None:
        self.config, tensors = read_adapter(folder)
        self._beside, self._source = read_base(folder), base.source
        used = [name for name in _UNREAD if self.config.get(name)]
        if used:
            raise ValueError(f"{folder / CONFIG} sets {used[0]}, which is not merged here: use peft's merge_and_unload")
        first = self.config.get("init_lora_weights")
        if isinstance(first, str) and first.lower().startswith(_CHANGE_THE_BASE):
            raise ValueError(
                f"{folder / CONFIG} sets init_lora_weights={first!r}, which took a part out of the base weights: added "
                "to whole ones, that part would be there twice. Use peft's merge_and_unload on the trained model, or "
                "save it as a plain LoRA (save_pretrained's path_initial_model_for_weight_conversion)"
            )
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
        missing = [name for name in self.targets if name not in base.shapes]
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
            shape = base.shapes[f"{path}.weight"]
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
        """Return a base tensor with what the adapter adds to it, in its own dtype.

        Raises:
            ValueError: it is another one than the adapter was trained beside.
        """
        if self._beside is not None:
            self._beside.check(name, tensor, self._source)
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


def merge_adapter(base: Base, adapter: str | Path, out: str | Path) -> None:
    """Write a base model with an adapter merged into it, as transformers reads it.

    At a time, memory holds one part of the output, the adapter, and three fp32 copies of a tensor.

    Args:
        base: the model that the adapter was trained on.
        adapter: a folder in peft's format.
        out: the new folder; it appears when it is complete.

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
        base.save(new, own.merged)
        if place.exists():
            place.rmdir()
        new.rename(place)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}: give a folder with room") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_parts(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], part_bytes: int = PART_BYTES) -> None:
    """Write tensors into files of about ``part_bytes``, at least one in each, and their index.

    Raises:
        OSError: a file cannot be written.
    """
    from safetensors.torch import save_file

    part: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    total = 0

    def flush() -> None:
        file = folder / f"part-{len(names)}"
        with disk_errors(file):
            save_file(part, file, metadata={"format": "pt"})
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
