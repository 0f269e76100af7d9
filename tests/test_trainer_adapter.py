"""Adapters of peft, trained in a pipeline: the losses, values and files of peft and plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from pipelines import devices

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

import spu  # noqa: E402
from spu import ModelParallelTrainer  # noqa: E402
from spu.common.absent import is_absent  # noqa: E402
from spu.memory.disk_store import DiskStore  # noqa: E402
from spu.model.convert.decoder import load_decoder, save_decoder  # noqa: E402
from spu.model.layers import DrawKey, model_layers  # noqa: E402

SMALL: dict[str, Any] = {**tiny_models.SMALL, "num_key_value_heads": 1, "attention_bias": True, "pad_token_id": None}
ROWS, STEPS, LR = 4, 2, 0.01
IDS = torch.randint(64, (ROWS, 9), generator=torch.Generator().manual_seed(5))
LABELS = IDS.clone()
LABELS[0, :4] = LABELS[2, 6:] = -100  # uneven counts, beside padding and a prompt

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora, biases": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_bias": True},
    "dora, whole modules": {"target_modules": ["down_proj"], "use_dora": True, "modules_to_save": ["lm_head", "norm"]},
    "tokens, embedding": {"target_modules": ["o_proj"], "trainable_token_indices": [1, 3]},
}


def decoder() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))


def adapted(config: dict[str, Any]) -> Any:
    options = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "init_lora_weights": False, **config}
    return peft.get_peft_model(decoder(), peft.LoraConfig(**options)).train()


def counted(labels: torch.Tensor) -> torch.Tensor:
    return (labels[:, 1:] != -100).sum()


def plain_losses(model: Any, microbatches: int = 2, autocast: torch.dtype | None = None) -> list[float]:
    """Train with peft and torch alone: the model's own loss, microbatch by microbatch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for ids, labels in zip(IDS.tensor_split(microbatches), LABELS.tensor_split(microbatches), strict=True):
            share = (counted(labels).double() / counted(LABELS)).float()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = model(input_ids=ids, labels=labels).loss * share
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def make(model: Any, ranks: int = 2, **settings: Any) -> ModelParallelTrainer:
    settings = {"precision": "fp32", "microbatches": 2, "optimizer": torch.optim.AdamW, "lr": LR} | settings
    return ModelParallelTrainer(model, devices(ranks), shift=True, **settings)


def losses_of(trainer: ModelParallelTrainer) -> list[float]:
    batch = transformers.BatchEncoding({"input_ids": IDS, "labels": LABELS})
    return [trainer.step(batch).loss for _ in range(STEPS)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("reference")
def test_a_pipeline_trains_adapters_as_peft_and_torch_do(kind: str, tmp_path: Path) -> None:
    plain = adapted(KINDS[kind])
    model = copy.deepcopy(plain)
    expected = plain_losses(plain)
    with make(model) as trainer:
        assert losses_of(trainer) == expected
        spu.save_adapter(trainer, tmp_path / "ours")
    plain.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    for name, parameter in plain.named_parameters():
        if name in frozen:
            assert frozen[name].grad is None, name
            assert torch.equal(frozen[name], parameter), name


@pytest.mark.parametrize("where", ["in two stages", "in two stages, tied", "below, on a disk"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_weights_that_wait_in_their_files_train_the_same_adapter(precision: str, where: str, tmp_path: Path) -> None:
    """A model was made whole in fp32 first: 31 GB of the 7B one, in a host of 32."""
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings="tied" in where)
    torch.manual_seed(0)
    save_decoder(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "base")
    options = peft.LoraConfig(r=3, **KINDS["lora"], init_lora_weights=False)
    settings: dict[str, Any] = {"precision": precision, "optimizer": None}
    if "disk" in where:
        settings |= {"ranks": 1, "residency": "streamed", "tiers": f"disk={tmp_path / 'spill'}:1GB"}
    found = []
    for later in (False, True):
        model = load_decoder(tmp_path / "base", config, later=later)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, options).train()
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert all(is_absent(p) == later for p in frozen)
        with make(model, **settings) as trainer:
            losses = losses_of(trainer)
            found.append((losses, trainer.state_dict_for_model(), [p.dtype for p in frozen]))
    (losses, state, dtypes), (theirs, other, others) = found
    assert losses == theirs
    assert dtypes == others
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("kind", ["dora, whole modules", "tokens, embedding"])
def test_adapters_made_of_weights_that_are_not_there_yet_are_refused(kind: str, tmp_path: Path) -> None:
    save_decoder(decoder(), tmp_path / "base")
    model: Any = load_decoder(tmp_path / "base", transformers.LlamaConfig(**SMALL), later=True)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, **KINDS[kind])).train()
    with make(model) as trainer, pytest.raises(ValueError, match="before the model's weights were read"):
        losses_of(trainer)


def test_a_plan_that_does_not_fit_leaves_weights_in_their_files(tmp_path: Path) -> None:
    save_decoder(decoder(), tmp_path / "base")
    model: Any = load_decoder(tmp_path / "base", transformers.LlamaConfig(**SMALL), later=True)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, **KINDS["lora"])).train()
    small = spu.DeviceManager("cpu=1kB").get_devices("cpu")
    with ModelParallelTrainer(model, small, shift=True, precision="fp16") as trainer, pytest.raises(ValueError):
        losses_of(trainer)
    assert all(is_absent(p) and p.dtype == torch.float32 for p in model.parameters() if not p.requires_grad)
    with make(model, precision="fp32") as trainer:
        losses_of(trainer)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(model.get_input_embeddings().weight, weights["model.embed_tokens.weight"])


def others() -> dict[str, Any]:
    """Tuners of other kinds, and a head that was the embedding and is trained by itself."""
    return {
        "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "VeRA": peft.VeraConfig(target_modules=["q_proj"]),
        "tied": peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]),
    }


@pytest.mark.parametrize("kind", ["IA3", "VeRA", "tied"])
@pytest.mark.usefixtures("reference")
@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings")
def test_tuners_of_other_kinds_and_tied_models_train_too(kind: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=kind == "tied")
    plain = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(config), others()[kind]).train()
    model = copy.deepcopy(plain)
    expected = plain_losses(plain)
    with make(model) as trainer:
        assert losses_of(trainer) == expected


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_adapters_in_16_bits_stay_as_near_to_the_truth_as_autocast(precision: str, tmp_path: Path) -> None:
    """Adapters have fp32 masters; they are saved from these. The frozen weights have none, and no moments."""
    model = adapted(KINDS["lora"])
    truth, half = copy.deepcopy(model), copy.deepcopy(model)
    exact = plain_losses(truth)
    near = plain_losses(half, autocast=torch.float16 if precision == "fp16" else torch.bfloat16)
    with make(model, precision=precision, optimizer=None) as trainer:
        found = losses_of(trainer)
        held = {id(p) for optimizer in trainer._prepared().updater.optimizers for p in optimizer.state}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        spu.save_adapter(trainer, tmp_path / "adapter")
        trained = trainer.state_dict_for_model()
    error, plain = (sum(abs(a - b) for a, b in zip(losses, exact, strict=True)) for losses in (found, near))
    assert error <= 2 * plain + STEPS * 2**-9 * exact[0], (found, near, exact)
    again = peft.PeftModel.from_pretrained(decoder(), tmp_path / "adapter")
    for name, tensor in peft.get_peft_model_state_dict(again).items():
        key = name.replace(".weight", ".default.weight")
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, trained[key]), name


@pytest.mark.usefixtures("reference")
def test_dropout_of_adapters_draws_the_same_on_any_number_of_stages() -> None:
    model = adapted({"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.5})
    plain = copy.deepcopy(model)
    layers = model_layers(plain)
    expected = torch.zeros(())
    for index, (ids, labels) in enumerate(zip(IDS.tensor_split(2), LABELS.tensor_split(2), strict=True)):
        hidden: Any = {"input_ids": ids}
        for layer in layers:
            hidden = layer.run(hidden, {"input_ids": ids}, DrawKey(0, 0, index))
        mean = torch.nn.functional.cross_entropy(hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        expected += mean.detach() * (counted(labels).double() / counted(LABELS)).float()
    losses = []
    for ranks in (1, 2):
        with make(copy.deepcopy(model), ranks) as trainer:
            losses.append(losses_of(trainer))
    assert losses[0] == losses[1]
    torch.testing.assert_close(torch.tensor(losses[0][0]), expected, rtol=1e-6, atol=0)
    assert losses[0] != plain_losses(copy.deepcopy(model).eval())


@pytest.mark.usefixtures("reference")
def test_frozen_weights_stream_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their regions are written when they are filled, and never again; bytes that move are as planned."""
    moved: dict[str, int] = {"read": 0, "write": 0}
    written: set[int] = set()

    def counting(what: str) -> None:
        plain = getattr(DiskStore, what)

        def method(self: DiskStore, region: Any, data: torch.Tensor) -> Any:
            moved[what] += data.numel()
            if what == "write":
                written.add(region)
            return plain(self, region, data)

        monkeypatch.setattr(DiskStore, what, method)

    for what in moved:
        counting(what)
    model, other = adapted(KINDS["lora"]), adapted(KINDS["lora"])
    keys = {"optimizer": None, "precision": "bf16"}
    with make(other, 1, **keys) as resident:
        expected = losses_of(resident)
    with make(model, 1, **keys, residency="streamed", tiers=f"disk={tmp_path}:1GB") as trainer:
        batch = {"input_ids": IDS, "labels": LABELS}
        losses = [trainer.step(batch).loss for _ in range(STEPS)]
        moved.update(read=0, write=0)
        written.clear()
        trainer.step(batch)
        assert trainer.plan is not None
        streaming = trainer.plan.streaming
        assert streaming is not None
        units = trainer._prepared().updater.streaming.units.values()  # type: ignore[union-attr]
        frozen = {unit.frozen.region for unit in units if unit.frozen is not None}
        assert len(frozen) == len(units)
        assert written
        assert not written & frozen
        padding = 4096 * len(units)  # of adapters' regions, which the plan counts with the frozen weights
        assert 0 <= moved["read"] - streaming.disk_read_bytes <= 2 * padding  # forward and backward
        assert 0 <= moved["write"] - streaming.disk_written_bytes <= padding
    assert losses == expected


def test_a_short_last_batch_of_labels_trains_and_is_evaluated() -> None:
    model = adapted(KINDS["lora"])
    plain = copy.deepcopy(model).eval()
    with make(model) as trainer:
        expected = plain(input_ids=IDS[:1], labels=LABELS[:1]).loss.item()
        one = transformers.BatchEncoding({"input_ids": IDS[:1], "labels": LABELS[:1]})
        assert trainer.evaluate(one) == pytest.approx(expected, rel=1e-6)
        assert trainer.step(one).loss == pytest.approx(expected, rel=1e-6)


def test_a_model_without_adapters_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    model = adapted({"target_modules": ["q_proj"]})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with make(model) as trainer:
        with pytest.raises(RuntimeError, match="no trained state yet"):
            spu.save_adapter(trainer, tmp_path / "early")
        trainer.prepare(IDS, LABELS)
        with pytest.raises(ValueError, match="mine is there and holds no adapter: give another folder"):
            spu.save_adapter(trainer, tmp_path / "mine")
        for _ in range(2):  # the second one replaces the first
            spu.save_adapter(trainer, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "mine"]
    with make(decoder()) as bare:
        bare.prepare(IDS, LABELS)
        with pytest.raises(TypeError, match=r"a LlamaForCausalLM has no adapters: give a peft.PeftModel"):
            spu.save_adapter(bare, tmp_path / "no")
