"""The dtypes of a model that `SpuTrainer` has trained, and of what it saves, beside those of `transformers.Trainer`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from test_integrations_hf_trainer import Recorder, decoder, make  # noqa: E402

from spu.integrations import SpuTrainer  # noqa: E402
from spu.integrations.hf_dtypes import GivenDtypes, chosen_precision  # noqa: E402

pytestmark = pytest.mark.usefixtures("reference")

SAVED: dict[str, Any] = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2}


def dtypes_after(cls: type, folder: Path, model: nn.Module, **how: Any) -> tuple[Any, ...]:
    """Return the dtypes of the model's weights and buffers, of the saved ones, and what config.json says."""
    trainer = make(cls, folder, model=model, **SAVED, **how)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(folder / "end"))
    found: list[Any] = [{name: value.dtype for name, value in model.state_dict().items()}]
    for place in (folder / "checkpoint-2", folder / "end"):
        (file,) = place.glob("*model.safetensors")
        found.append({name: value.dtype for name, value in load_file(file).items()})
        if (place / "config.json").is_file():
            found.append(json.loads((place / "config.json").read_text(encoding="utf-8"))["dtype"])
    return tuple(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_a_model_and_its_files_have_the_dtypes_of_transformers_trainer(
    dtype: torch.dtype, how: dict[str, Any], tmp_path: Path
) -> None:
    """A bf16 model came back in fp32, and was saved so."""
    if dtype == torch.float16 and not how:
        pytest.skip("refused")
    expected = dtypes_after(transformers.Trainer, tmp_path / "a", decoder().to(dtype), **how)
    assert dtypes_after(SpuTrainer, tmp_path / "b", decoder().to(dtype), **how) == expected


def test_a_bf16_model_is_as_near_to_fp32_as_transformers_trainer_brings_it(tmp_path: Path) -> None:
    truth, theirs, ours = Recorder(), Recorder(), Recorder()
    model, same, wide = decoder().bfloat16(), decoder().bfloat16(), decoder().bfloat16().float()
    make(transformers.Trainer, tmp_path / "a", model=wide, recorder=truth).train()
    make(transformers.Trainer, tmp_path / "b", model=same, recorder=theirs).train()
    make(SpuTrainer, tmp_path / "c", model=model, recorder=ours).train()
    error, plain = (sum(abs(a - b) for a, b in zip(r.losses, truth.losses, strict=True)) for r in (ours, theirs))
    assert 0 < error <= 2 * plain + 2**-9 * sum(truth.losses)

    def far(other: nn.Module) -> float:
        pairs = zip(wide.parameters(), other.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    assert far(model) <= 4 * far(same)


def test_a_bf16_model_goes_on_from_its_masters(tmp_path: Path) -> None:
    whole, part = Recorder(), Recorder()
    first = make(SpuTrainer, tmp_path, model=decoder().bfloat16(), recorder=whole, save_strategy="steps", save_steps=3)
    first.train()
    second = make(SpuTrainer, tmp_path, model=decoder().bfloat16(), recorder=part)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert part.losses == whole.losses[3:]
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_frozen_weights_come_back_as_they_were(base: torch.dtype, how: dict[str, Any], tmp_path: Path) -> None:
    """An fp32 base came back rounded to the training's precision; a bf16 one in fp32."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(decoder().to(base), settings)
    before = copy.deepcopy(model)
    expected = dtypes_after(transformers.Trainer, tmp_path / "a", copy.deepcopy(model), **how)
    assert dtypes_after(SpuTrainer, tmp_path / "b", model, **how) == expected
    moved = 0
    for (name, now), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert now.requires_grad or torch.equal(now, old), name
        moved += not torch.equal(now, old)
    assert moved > 0


def test_what_would_not_be_trained_as_transformers_does_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fp64 weights.*call model.float\(\)"):
        make(SpuTrainer, tmp_path, model=decoder().double()).train()
    with pytest.raises(ValueError, match=r"fp16 weights and the arguments name no precision.*fp16=True"):
        make(SpuTrainer, tmp_path, model=decoder().half()).train()
    mostly = nn.Sequential(nn.Linear(9, 9).bfloat16(), nn.Linear(2, 2))
    assert chosen_precision(mostly, bf16=False, fp16=False) == "bf16"
    assert chosen_precision(mostly.float(), bf16=False, fp16=False) == "fp32"


def test_ties_stay_ties_and_only_what_is_rounded_is_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(requires_grad=False)
    model[1].weight = model[0].weight
    nn.init.constant_(model[2].weight, 0.25)
    nn.init.constant_(model[0].weight, 0.1)
    given = GivenDtypes(model, "bf16")
    state = given.state(copy.deepcopy(model).bfloat16().state_dict())
    assert state["0.weight"] is state["1.weight"]
    assert torch.equal(state["0.weight"], model[0].weight)
    assert set(given._kept) >= {"0.weight", "1.weight"}
    assert "2.weight" not in given._kept
