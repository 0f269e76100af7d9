"""Code of one's own around a `SpuTrainer`: what transformers would run or take is run, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_integrations_hf_trainer import SMALL, Recorder, Rows, assert_near, decoder, make  # noqa: E402

from spu.integrations import SpuTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("reference")
SHORT: dict[str, Any] = {"num_train_epochs": 1, "eval_strategy": "no"}


def both(first: type, second: type, folder: Path, callback: Any = None, **how: Any) -> None:
    """Train with two classes of trainers and compare all that they log, and the weights."""
    theirs, ours = Recorder(), Recorder()
    weights = []
    for cls, recorder, name in ((first, theirs, "a"), (second, ours, "b")):
        trainer = make(cls, folder / name, recorder=recorder, **how)
        if callback is not None:
            trainer.add_callback(callback)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert_near(ours, theirs, 1e-5)
    for (name, a), b in zip(weights[1].items(), weights[0].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def preparing(base: type, **fills: int) -> type:
    class Preparing(base):  # type: ignore[misc]
        def _prepare_inputs(self, inputs: Any) -> Any:
            given = dict(super()._prepare_inputs(inputs))
            return given | {key: given[key].index_fill(1, torch.tensor([1, 7]), value) for key, value in fills.items()}

    return Preparing


def counting(base: type, factor: int) -> type:
    class Counting(base):  # type: ignore[misc]
        def _get_num_items_in_batch(self, *arguments: Any, **keywords: Any) -> Any:
            return super()._get_num_items_in_batch(*arguments, **keywords) * factor

    return Counting


def test_a_subclass_prepares_the_inputs_of_training_and_evaluation(tmp_path: Path) -> None:
    """They were trained on, and evaluated, as the loader gave them."""
    both(preparing(transformers.Trainer, input_ids=5), preparing(SpuTrainer, input_ids=5), tmp_path)
    with pytest.raises(ValueError, match=r"Preparing counts 42 targets in an update, and 36 labels of it"):
        make(preparing(SpuTrainer, labels=-100), tmp_path, **SHORT).train()  # transformers divides by the 42


def test_another_number_of_items_is_refused(tmp_path: Path) -> None:
    """It was ignored: the loss was divided by the counted targets."""
    make(counting(SpuTrainer, 1), tmp_path, **SHORT).train()
    with pytest.raises(ValueError, match=r"Counting counts 84 targets in an update, and 42 labels of it are not -100"):
        make(counting(SpuTrainer, 2), tmp_path, **SHORT).train()


def test_a_function_set_on_the_trainer_itself_is_refused(tmp_path: Path) -> None:
    trainer = make(SpuTrainer, tmp_path, **SHORT)
    trainer.compute_loss = lambda *arguments, **keywords: 0
    with pytest.raises(TypeError, match=r"SpuTrainer.compute_loss would not be called"):
        trainer.train()


class SquaredForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Adds a term to the loss, in training."""

    def forward(self, input_ids: Any = None, labels: Any = None, **more: Any) -> Any:
        out = super().forward(input_ids, labels=labels, **more)
        if labels is not None and self.training:
            out.loss = out.loss + 1e-3 * out.logits.logsumexp(-1).square().mean()
        return out


@pytest.mark.parametrize("how", ["loss_function", "forward"])
def test_a_model_with_another_loss_is_refused(how: str, tmp_path: Path) -> None:
    """It was trained with the plain cross entropy, in silence."""
    torch.manual_seed(0)
    model = SquaredForCausalLM(transformers.LlamaConfig(**SMALL)) if how == "forward" else decoder()
    if how == "loss_function":
        plain = model.loss_function
        model.loss_function = lambda *given, **keywords: plain(*given, **keywords) * 0.999
    with pytest.raises(ValueError, match=r"loss is another than the mean cross entropy .*ModelParallelTrainer with"):
        make(SpuTrainer, tmp_path, model=model, **SHORT).train()
    assert model.lm_head.weight.grad is None


class Limits(transformers.TrainerCallback):  # type: ignore[misc]
    """Changes gradients, after the clipping, by what is no factor."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        for parameter in model.parameters():
            parameter.grad.clamp_(-0.01, 0.01)


def test_callbacks_before_the_update_see_and_change_clipped_gradients(tmp_path: Path) -> None:
    """They saw gradients that were clipped after them."""
    two = {"devices": ["cpu:0", "cpu:1"], "microbatches": 2}
    both(transformers.Trainer, SpuTrainer, tmp_path, Limits(), max_grad_norm=0.2)
    both(transformers.Trainer, _with(two), tmp_path, Limits(), max_grad_norm=0.2)
    streamed = {"residency": "streamed", "tiers": f"disk={tmp_path}:100MB"}
    with pytest.raises(ValueError, match=r"Limits may read or change gradients .*residency='resident'"):
        both(transformers.Trainer, _with(streamed), tmp_path, Limits())


def _with(spu: dict[str, Any]) -> type:
    class With(SpuTrainer):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords, spu=spu)

    return With


class Forgets(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
        optimizer.state.clear()


class Ends(transformers.TrainerCallback):  # type: ignore[misc]
    def on_substep_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_epoch_stop = True


@pytest.mark.parametrize(
    ("callback", "error", "text"),
    [
        (Forgets, RuntimeError, r"moments are in the engine's optimizers"),
        (Ends, ValueError, r"the epoch ended after 1 of the batches of an update.*on_step_end"),
    ],
)
def test_callbacks_that_would_do_nothing_or_lose_batches_are_refused(
    callback: type, error: type[Exception], text: str, tmp_path: Path
) -> None:
    trainer = make(SpuTrainer, tmp_path, eval_strategy="no")
    trainer.add_callback(callback())
    with pytest.raises(error, match=text):
        trainer.train()


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, count: int) -> None:
        self.rows = Rows(count)

    def __iter__(self) -> Any:
        return iter([self.rows[index] for index in range(len(self.rows))])


def test_a_stream_that_ends_within_an_update_is_refused(tmp_path: Path) -> None:
    """Its last batches were dropped; transformers adds their gradients to the next epoch's first update."""

    def streamed(base: type, count: int) -> type:
        class Streamed(base):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **keywords: Any) -> None:
                super().__init__(*arguments, **keywords | {"train_dataset": Stream(count)})

        return Streamed

    steps: dict[str, Any] = {"max_steps": 4, "eval_strategy": "no"}
    both(streamed(transformers.Trainer, 12), streamed(SpuTrainer, 12), tmp_path, **steps)
    with pytest.raises(ValueError, match=r"the data ended after 2 of the 3 batches of an update"):
        make(streamed(SpuTrainer, 10), tmp_path, **steps).train()


def test_debugging_hooks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"TrainingArguments.debug=.*underflow_overflow.* is not possible"):
        make(SpuTrainer, tmp_path, debug="underflow_overflow")


class Averaging(transformers.TrainerCallback):  # type: ignore[misc]
    """Averages the model's weights at the end of every step, as torch's documentation does."""

    def __init__(self) -> None:
        self.averaged: Any = None

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        if self.averaged is None:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        else:
            self.averaged.update_parameters(model)


@pytest.mark.parametrize("residency", ["resident", "offloaded", "streamed"])
def test_a_callback_sees_the_weights_of_now(residency: str, tmp_path: Path) -> None:
    """Those of streamed and offloaded layers read as NaN until their next visit, and so did an average of them."""
    below = {} if residency == "resident" else {"tiers": f"disk={tmp_path}:1GB"}
    theirs, ours = Averaging(), Averaging()
    plain = make(transformers.Trainer, tmp_path / "a", **SHORT)
    plain.add_callback(theirs)
    plain.train()
    trainer = make(SpuTrainer, tmp_path / "b", spu={"residency": residency, **below}, **SHORT)
    trainer.add_callback(ours)
    trainer.train()
    for (name, a), b in zip(ours.averaged.named_parameters(), theirs.averaged.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    assert [type(c).__name__ for c in trainer.callback_handler.callbacks] == ["DefaultFlowCallback", "Averaging"]


def test_weights_of_streamed_layers_are_shown_to_the_users_callbacks_alone(tmp_path: Path) -> None:
    shown: list[int] = []

    class Counting(SpuTrainer):
        def _show_weights(self) -> None:
            shown.append(self.state.global_step)
            super()._show_weights()

    for callback in (None, Averaging()):
        trainer = make(Counting, tmp_path / "a", **SHORT)
        if callback is not None:
            trainer.add_callback(callback)
        trainer.train()
        assert shown == ([] if callback is None else [1, 2, 3])


def test_averages_of_16_bit_weights_are_made_of_the_exact_ones(tmp_path: Path) -> None:
    """An average that is kept in bf16 stands still where a step of it is less than half a unit in the last place."""
    seen: list[dict[str, torch.Tensor]] = []

    class Keeping(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            exact = trainer.state_dict_for_model()
            assert all(value.dtype == torch.float32 for value in exact.values())
            for name, parameter in model.named_parameters():
                assert parameter.dtype == torch.bfloat16
                assert torch.equal(exact[name].bfloat16(), parameter), name
            seen.append(exact)

    trainer = make(SpuTrainer, tmp_path, bf16=True, **SHORT)
    trainer.add_callback(Keeping())
    before = trainer.state_dict_for_model()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trainer.train()
    after = trainer.state_dict_for_model()
    assert all(torch.equal(value, after[name]) for name, value in seen[-1].items())


def test_gpt2_is_taken_once_it_says_what_it_is(tmp_path: Path) -> None:
    """transformers does not see by its name that it is a causal language model, and counts a target a row too many."""
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **still, bos_token_id=None, eos_token_id=None)

    def model() -> Any:
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)

    with pytest.raises(ValueError, match=r"counts the first label of each row.*model.loss_type = 'ForCausalLM'"):
        make(SpuTrainer, tmp_path, model=model(), **SHORT)
    runs = []
    for cls in (transformers.Trainer, SpuTrainer):
        told, recorder = model(), Recorder()
        told.loss_type = "ForCausalLM"
        make(cls, tmp_path, model=told, recorder=recorder, **SHORT).train()
        runs.append(recorder)
    assert_near(runs[1], runs[0], 1e-5)
