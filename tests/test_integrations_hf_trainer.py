"""`SpuTrainer` beside `transformers.Trainer`: one script, the same losses, evaluations, checkpoints and callbacks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from spu.integrations import SpuTrainer  # noqa: E402
from spu.model.adapter_base import read_base  # noqa: E402

transformers.utils.logging.disable_progress_bar()  # its bars start a monitor thread that never ends
pytestmark = pytest.mark.usefixtures("reference")

SMALL: dict[str, Any] = {**tiny_models.SMALL, "max_position_embeddings": 32, "pad_token_id": 0}


def decoder(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **more))


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of 9 to 12 tokens, the first three of which are a prompt."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(1, 64, (count, 12), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index, : 12 - index % 4]
        labels = ids.clone()
        labels[:3] = -100
        return {"input_ids": ids, "labels": labels}


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def column(values: list[torch.Tensor], padding: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)

    return {
        "input_ids": column([row["input_ids"] for row in rows], 0),
        "labels": column([row["labels"] for row in rows], -100),
        "attention_mask": column([torch.ones_like(row["input_ids"]) for row in rows], 0),
    }


class Recorder(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.evals: list[float] = []
        self.rates: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(logs["grad_norm"])
            self.rates.append(logs["learning_rate"])
        if "eval_loss" in logs:
            self.evals.append(logs["eval_loss"])


def arguments(folder: Path, **more: Any) -> Any:
    """Seven batches of two rows an epoch, three of them an update; the last update of an epoch has one."""
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "lr_scheduler_type": "cosine",
            "max_grad_norm": 0.9,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
            **more,
        }
    )


def make(cls: type, folder: Path, model: Any = None, recorder: Any = None, **more: Any) -> Any:
    own = {name: more.pop(name) for name in ("spu", "compute_metrics", "model_init") if name in more}
    if "model_init" not in own:
        own["model"] = decoder() if model is None else model
    trainer = cls(
        args=arguments(folder, **more),
        data_collator=padded,
        train_dataset=Rows(14),
        eval_dataset=Rows(5),
        callbacks=[] if recorder is None else [recorder],
        **own,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def assert_near(ours: Recorder, theirs: Recorder, bound: float) -> None:
    assert len(ours.losses) == len(theirs.losses) > 0
    assert ours.rates == theirs.rates
    for name in ("losses", "norms", "evals"):
        torch.testing.assert_close(
            torch.tensor(getattr(ours, name)), torch.tensor(getattr(theirs, name)), rtol=bound, atol=0, msg=name
        )


TWO_STAGES = {"spu": {"devices": ["cpu:0", "cpu:1"], "microbatches": 2}}


@pytest.mark.parametrize(
    "how", [{}, {"gradient_accumulation_steps": 1, "gradient_checkpointing": True, "num_train_epochs": 1, **TWO_STAGES}]
)
def test_in_fp32_it_trains_as_transformers_trainer_does(how: dict[str, Any], tmp_path: Path) -> None:
    """Losses, norms, rates, evaluations and weights; what differs is the order of sums over microbatches."""
    theirs, ours = Recorder(), Recorder()
    plain_how = {name: value for name, value in how.items() if name != "spu"}
    plain = make(transformers.Trainer, tmp_path / "a", recorder=theirs, **plain_how)
    expected = plain.train()
    trainer = make(SpuTrainer, tmp_path / "b", recorder=ours, **how)
    result = trainer.train()
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=2e-7)
    assert_near(ours, theirs, 1e-5)
    assert result.training_loss == pytest.approx(expected.training_loss, rel=1e-6)
    for (name, a), b in zip(trainer.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_in_16_bits_it_is_as_near_to_fp32_as_autocast(tmp_path: Path) -> None:
    truth, theirs, ours = Recorder(), Recorder(), Recorder()
    keys: dict[str, Any] = {"num_train_epochs": 1}
    make(transformers.Trainer, tmp_path / "a", recorder=truth, **keys).train()
    half = make(transformers.Trainer, tmp_path / "b", recorder=theirs, bf16=True, **keys)
    half.train()
    trainer = make(SpuTrainer, tmp_path / "c", recorder=ours, fp16=True, **keys)
    trainer.evaluate()  # accelerate then gave the model a forward of its own, which no layers could be cut from
    ours.evals.clear()
    trainer.train()
    assert ours.evals == pytest.approx(truth.evals, rel=5e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(half.evaluate()["eval_loss"], rel=5e-3)
    error, plain = (sum(abs(a - b) for a, b in zip(r.losses, truth.losses, strict=True)) for r in (ours, theirs))
    assert 0 < error <= 2 * plain + 2**-9 * sum(truth.losses)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_it_goes_on_from_a_checkpoint_with_the_same_bits_and_loads_the_best(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "bf16": True}
    whole, part = Recorder(), Recorder()
    first = make(SpuTrainer, tmp_path, recorder=whole, load_best_model_at_end=True, **keys)
    first.train()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert saved.dtype == torch.float32
    second = make(SpuTrainer, tmp_path, recorder=part, **keys)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert part.losses == whole.losses[3:]
    assert part.norms == whole.norms[3:]
    best = min(whole.evals)
    assert first.state.best_metric == best
    again = transformers.AutoModelForCausalLM.from_pretrained(first.state.best_model_checkpoint)
    for name, tensor in again.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], tensor), name
    with pytest.raises(RuntimeError, match="has trained already"):
        first.train()
    foreign = tmp_path / "checkpoint-3" / "spu"
    foreign.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="was saved by another trainer"):
        make(SpuTrainer, tmp_path, **keys).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_many_stages_goes_on_in_one(tmp_path: Path) -> None:
    """The embedding's stage has no parameter without weight decay: its optimizer once had one group, the others two."""
    keys: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    (tmp_path / "spill").mkdir()
    streamed = {"residency": "streamed", "tiers": f"disk={tmp_path / 'spill'}:100MB"}
    whole, part = Recorder(), Recorder()
    make(SpuTrainer, tmp_path / "a", recorder=whole, **keys, spu=streamed).train()
    later = make(SpuTrainer, tmp_path / "b", recorder=part, **keys)
    later.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert part.losses == pytest.approx(whole.losses[3:], rel=1e-5)
    assert part.norms == pytest.approx(whole.norms[3:], rel=1e-5)


def test_adapters_of_peft_train_and_are_saved_by_themselves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(decoder(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    twin = copy.deepcopy(model)
    theirs, ours = Recorder(), Recorder()
    keys: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6, "weight_decay": 0.0}
    make(transformers.Trainer, tmp_path / "a", model=twin, recorder=theirs, **keys).train()
    make(SpuTrainer, tmp_path / "b", model=model, recorder=ours, **keys).train()
    assert_near(ours, theirs, 1e-5)
    names = {path.name for path in (tmp_path / "b" / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "spu", "trainer_state.json"} <= names
    beside = read_base(tmp_path / "b" / "checkpoint-6")
    assert beside is not None
    beside.check_model(twin, "the twin")
    assert "model.safetensors" not in names
    loaded = peft.PeftModel.from_pretrained(decoder(), tmp_path / "b" / "checkpoint-6")
    for name, tensor in peft.get_peft_model_state_dict(loaded).items():
        assert torch.equal(tensor, peft.get_peft_model_state_dict(model)[name]), name


def test_metrics_see_logits_and_streamed_weights_too(tmp_path: Path) -> None:
    shapes: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"mean": float(prediction.predictions.mean())}

    streamed = {"residency": "streamed", "tiers": f"disk={tmp_path}:1GB"}
    keys: dict[str, Any] = {"compute_metrics": metrics, "num_train_epochs": 1}
    theirs, ours = Recorder(), Recorder()
    plain = make(transformers.Trainer, tmp_path / "a", recorder=theirs, **keys)
    plain.train()
    trainer = make(SpuTrainer, tmp_path / "b", recorder=ours, spu=streamed, **keys)
    trainer.train()
    assert_near(ours, theirs, 1e-5)
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]
    assert trainer.state.log_history[-2]["eval_mean"] == pytest.approx(
        plain.state.log_history[-2]["eval_mean"], rel=1e-3
    )


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"label_smoothing_factor": 0.1}, r"TrainingArguments.label_smoothing_factor=0.1 is not possible"),
        ({"optim": "sgd"}, r"optim='sgd' is not possible with SpuTrainer: use adamw_torch"),
        ({"torch_compile": True}, "torch_compile=True is not possible"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is not possible"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not possible.*repeated with less"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True is not possible"),
    ],
)
def test_arguments_that_would_not_be_done_are_refused(how: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        make(SpuTrainer, tmp_path, **how)


def test_code_of_ones_own_that_would_not_run_is_refused(tmp_path: Path) -> None:
    class Own(SpuTrainer):
        def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
            raise AssertionError

    with pytest.raises(TypeError, match=r"Own.compute_loss would not be called: .*ModelParallelTrainer with loss_fn="):
        make(Own, tmp_path)
    with pytest.raises(ValueError, match="SpuTrainer takes no compute_loss_func"):
        SpuTrainer(decoder(), arguments(tmp_path), compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match="SpuTrainer takes no compute_loss_func"):  # by its place
        SpuTrainer(decoder(), arguments(tmp_path, eval_strategy="no"), *[None] * 5, lambda *_: None)
    with pytest.raises(ValueError, match="SpuTrainer takes no optimizers"):
        model = decoder()
        SpuTrainer(model, arguments(tmp_path), optimizers=(torch.optim.SGD(model.parameters()), None))
    config = transformers.LlamaConfig(**SMALL, num_labels=3)
    with pytest.raises(ValueError, match=r"trains causal language models, and LlamaForSequenceClassification's loss"):
        make(SpuTrainer, tmp_path, model=transformers.LlamaForSequenceClassification(config))
