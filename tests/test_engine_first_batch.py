"""First batches and models that would train as nobody meant; batches in other forms; an epoch's short last batch."""

from __future__ import annotations

import warnings
from collections import UserDict
from typing import Any

import pytest
import torch
from tiny_models import SMALL
from torch import nn

transformers = pytest.importorskip("transformers")

from spu import ModelParallelTrainer  # noqa: E402

IDS = torch.randint(64, (8, 9), generator=torch.Generator().manual_seed(0))


def decoder(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL, **more))


def make(model: Any, **settings: Any) -> ModelParallelTrainer:
    settings = {"precision": "fp32", "microbatches": 4, "lr": 0.01, **settings}
    return ModelParallelTrainer(model, ["cpu:0", "cpu:1"], **settings)


@pytest.mark.parametrize("form", ["tensor", "dict", "masked"])
def test_labels_that_are_the_inputs_are_refused(form: str) -> None:
    """The model learned to repeat its input, and the loss fell nicely."""
    labels = IDS.clone()
    if form == "masked":
        labels[:, 6:] = -100
    with make(decoder().train()) as trainer:
        with pytest.raises(
            ValueError, match=r"targets equal input_ids: .*shift=True.*inputs ids\[:, :-1\] and targets"
        ):
            trainer.step({"input_ids": IDS} if form == "dict" else IDS, labels)
        trainer.step(IDS[:, :-1], IDS[:, 1:])


def test_packed_rows_that_a_model_lets_see_each_other_are_refused_before_it_is_touched() -> None:
    config = transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, dropout=0.0, pad_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    packed = {"input_ids": IDS, "position_ids": torch.arange(9).repeat(8, 1)}
    packed["position_ids"][5, 4:] -= 4
    with make(model, precision="fp16") as trainer:
        with pytest.raises(ValueError, match="layer 0 of this model would let documents .* --pack off"):
            trainer.prepare(packed, IDS.roll(-1, 1))
        assert trainer.plan is None
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_repeated_tokens_and_losses_of_ones_own_are_no_mistake() -> None:
    same = torch.full((8, 9), 3)
    with make(decoder().train()) as trainer:
        trainer.step(same, same)
    own = lambda logits, ids: nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # noqa: E731
    with make(decoder().train(), loss_fn=own) as trainer:
        trainer.step(IDS, IDS)


def test_dropout_that_from_pretrained_left_off_is_said() -> None:
    with pytest.warns(UserWarning, match=r"in evaluation mode.*Call model.train\(\)"):
        make(decoder(attention_dropout=0.1).eval()).prepare(IDS[:, :-1], IDS[:, 1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(decoder(attention_dropout=0.1).train()).prepare(IDS[:, :-1], IDS[:, 1:])
        make(decoder().eval()).prepare(IDS[:, :-1], IDS[:, 1:])


def test_a_batch_encoding_is_a_dict() -> None:
    inputs = {"input_ids": IDS[:, :-1], "attention_mask": torch.ones(8, 8, dtype=torch.long)}
    with make(decoder().train()) as plain, make(decoder().train()) as other:
        for wrapped in (transformers.BatchEncoding(inputs), UserDict(inputs)):
            assert other.step(wrapped, IDS[:, 1:]).loss == plain.step(inputs, IDS[:, 1:]).loss
            assert other.evaluate(wrapped, IDS[:, 1:]) == plain.evaluate(inputs, IDS[:, 1:])


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb", "zbv", "layer_outer"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_short_batch_trains_as_the_plain_model_does(schedule: str, rows: int) -> None:
    """It was refused, and then where it came first: fewer rows than microbatches. A resumed epoch may begin so."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)
    plain, trained = model(), model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with make(trained, schedule=schedule, accumulate=2, optimizer=torch.optim.SGD, lr=0.1) as trainer:
        for count in (rows, 8, rows):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x[:count]), y[:count]).backward()
            optimizer.step()
            trainer.step(x[:count], y[:count])
        state = trainer.state_dict_for_model()
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_an_optimizer_that_was_made_already_is_refused_with_its_class() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"an SGD that was made already; .*optimizer=SGD, lr=..., or functools.partial"):
        make([layer], optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))


def test_a_model_with_adapters_trains_as_the_model_within_it() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        model = decoder().train()
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))

    outer, inner = adapted(), adapted()
    with make(outer) as first, make(inner.get_base_model()) as second:
        for _ in range(2):
            assert first.step(IDS[:, :-1], IDS[:, 1:]).loss == second.step(IDS[:, :-1], IDS[:, 1:]).loss
    for config in (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        with pytest.raises(ValueError, match="adds prompts to the input outside the model's layers: use LoRA"):
            make(peft.get_peft_model(decoder(), config))
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1)
    with pytest.raises(ValueError, match="ADALORA adds a term to the loss outside the model's layers: use LoRA"):
        make(peft.get_peft_model(decoder(), config))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("Rwkv", "RwkvForCausalLM cannot be run without its layers.*a list of layers of your own"),
        ("CTRL", "CTRLLMHeadModel cannot be run in parts.*spu.accelerate"),
    ],
)
def test_decoders_that_cannot_be_cut_are_refused_with_another_way(kind: str, text: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    with pytest.raises(ValueError, match=text):
        make(transformers.AutoModelForCausalLM.from_config(config))


def test_classifiers_are_refused_with_another_way() -> None:
    """They were told to be loaded as a language model."""
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, pad_token_id=0))
    with pytest.raises(ValueError, match="another head than a language model's.*a list of layers of your own"):
        make(model)
