"""What an adapter was trained beside lies with it, in whatever precision that was; other weights are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from test_trainer_adapter import KINDS, SMALL, decoder, losses_of, make  # noqa: E402

import spu  # noqa: E402
from spu.model.adapter_base import BASE, base_values, read_base, write_base  # noqa: E402
from spu.model.convert.decoder import load_decoder, save_decoder  # noqa: E402


def with_adapters(model: Any, kind: str = "lora") -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=3, **KINDS[kind])).train()


@pytest.mark.parametrize("where", ["in two stages", "below, on a disk", "in two stages, closed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_weights_of_a_training_are_told_from_others(precision: str, where: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL)
    save_decoder(decoder(), tmp_path / "base")
    model = with_adapters(load_decoder(tmp_path / "base", config, later=True))
    settings: dict[str, Any] = {"precision": precision, "optimizer": None}
    if "disk" in where:
        settings |= {"ranks": 1, "residency": "streamed", "tiers": f"disk={tmp_path / 'spill'}:1GB"}
    with make(model, **settings) as trainer:
        losses_of(trainer)
        if "closed" in where:
            trainer.close()
        spu.save_adapter(trainer, tmp_path / "adapter")
    beside = read_base(tmp_path / "adapter")
    assert beside is not None
    base = decoder()
    assert beside._known.keys() == dict(base.named_parameters()).keys()
    assert {dtype for dtype, *_ in beside._known.values()} == {spu.common.dtypes.DTYPES[precision]}
    beside.check_model(with_adapters(base), "here")
    base.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"than those of here: model\.layers\.1\.mlp\.up_proj\.weight differs"):
        beside.check_model(with_adapters(base), "here")


def test_values_are_compared_in_the_precision_of_the_training(tmp_path: Path) -> None:
    base = decoder()
    for folder, dtype in (("wide", torch.float32), ("narrow", torch.bfloat16)):
        (tmp_path / folder).mkdir()
        write_base(tmp_path / folder, base_values(with_adapters(decoder().to(dtype))))
    wide, narrow = read_base(tmp_path / "wide"), read_base(tmp_path / "narrow")
    assert wide is not None
    assert narrow is not None
    narrow.check_model(with_adapters(decoder()), "here")
    base.bfloat16()
    narrow.check_model(with_adapters(base), "here")
    with pytest.raises(ValueError, match="differs"):
        wide.check_model(with_adapters(base), "here")
    wide.check_model(with_adapters(base), "here", rounded=True)
    base.model.norm.weight.data += 1
    wide.check_model(with_adapters(base), "here", rounded=True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight differs"):
        narrow.check_model(with_adapters(base), "here", rounded=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_frozen_weights_as_the_base_model_does(kind: str) -> None:
    shapes = {name: list(parameter.shape) for name, parameter in decoder().named_parameters()}
    found = base_values(with_adapters(decoder(), kind))
    known = {name: own["shape"] for name, own in found.items() if name in shapes}
    assert known == {name: shapes[name] for name in known}
    assert shapes.keys() - known.keys() <= {"model.embed_tokens.weight"}  # in part trained: "tokens, embedding"


@pytest.mark.parametrize("text", ["{", "[]", '{"frozen": [1]}', '{"frozen": {"a": {"dtype": "int3"}}}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    assert read_base(tmp_path) is None
    (tmp_path / BASE).write_text(text)
    with pytest.raises(ValueError, match=rf"{BASE} cannot be read"):
        read_base(tmp_path)
