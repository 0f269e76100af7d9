"""What users do to a model of transformers before and after `accelerate`: adapters, checkpointing, resizing, copies."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_close_to_truth

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import spu  # noqa: E402

transformers.utils.logging.disable_progress_bar()
IDS = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(1))


def decoder() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config).train()


def adapted(model: Any, **more: Any) -> Any:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **more)
    return peft.get_peft_model(model, config)


def checkpointed(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers' new name for it
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def resized(model: Any) -> Any:
    torch.manual_seed(3)
    model.resize_token_embeddings(80)
    return model


def second_adapter(model: Any) -> Any:
    torch.manual_seed(4)
    model.add_adapter("b", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("b")
    return model


def with_compiled_blocks(model: Any) -> Any:
    for layer in model.get_base_model().model.layers:
        layer.mlp.compile(backend="eager")
    return model


Change = Callable[[Any, Callable[[Any], Any]], Any]
CHANGES: dict[str, Change] = {
    "checkpointing after": lambda model, fuse: checkpointed(fuse(model)),
    "checkpointing before": lambda model, fuse: fuse(checkpointed(model)),
    "new tokens": lambda model, fuse: resized(fuse(model)),
    "a copy": lambda model, fuse: copy.deepcopy(fuse(model)),
    "compiled blocks": lambda model, fuse: with_compiled_blocks(fuse(adapted(model))),
    "adapters after": lambda model, fuse: adapted(fuse(model), use_dora=True),
    "adapters before": lambda model, fuse: fuse(adapted(model, modules_to_save=["lm_head"])),
    "adapters, checkpointing": lambda model, fuse: checkpointed(fuse(adapted(model))),
    "adapters, pickled": lambda model, fuse: pickle.loads(pickle.dumps(fuse(adapted(model)))),
    "adapters, new tokens": lambda model, fuse: (resized(model := fuse(adapted(model)).get_base_model()), model)[1],
    "two adapters": lambda model, fuse: second_adapter(fuse(adapted(model))),
    "restored": lambda model, fuse: spu.restore(fuse(adapted(model))),
}


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("change", CHANGES)
def test_an_accelerated_model_takes_what_the_plain_one_takes(change: str) -> None:
    expected, gradients = loss_and_gradients(CHANGES[change](decoder(), lambda model: model))
    loss, own = loss_and_gradients(CHANGES[change](decoder(), spu.accelerate))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()  # both are up to 6e-6 of it away from fp64's
        torch.testing.assert_close(own[name], gradient, rtol=0, atol=4e-6 * largest + 1e-9, msg=name)


def test_merged_and_unloaded_models_are_the_plain_ones() -> None:
    for end in ("merge_and_unload", "unload"):
        plain, ours = (
            getattr(fuse(adapted(decoder())), end)().eval() for fuse in (lambda model: model, spu.accelerate)
        )
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)


def test_an_adapted_model_in_16_bits_gets_our_attention() -> None:
    """Given a PeftModel, accelerate left torch's 16-bit attention, which is scalar code on a CPU."""
    model = adapted(decoder().half()).eval()
    twin = adapted(decoder().half()).eval()
    truth = adapted(decoder().half().double()).double().eval()
    spu.accelerate(model)
    if importlib.util.find_spec("spu._C") is not None:
        assert model.config._attn_implementation == "spu"
    with torch.no_grad():
        plain, exact = twin(IDS).logits, truth(IDS).logits
        assert_close_to_truth(model(IDS).logits, plain, exact, eps=2**-10 * exact.abs().max().item())
    assert spu.restore(model).config._attn_implementation == "sdpa"
