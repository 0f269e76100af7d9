"""The end of a run takes no more memory than its training, and leaves what transformers loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from chat_models import TEMPLATE, chat_tokenizer, tiny_llama
from safetensors.torch import load_file

from spu import ModelParallelTrainer
from spu.data.tokenizer import ByteTokenizer, make_tokenizer
from spu.train.export import save_model, take_exact
from spu.train.model import make_model, quiet_transformers

PEAK = """
import resource, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from spu import ModelParallelTrainer
from spu.common.out_of_memory import free_memory
from spu.train.export import save_model, take_exact
from spu.data.tokenizer import ByteTokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.manual_seed(0)
config = LlamaConfig(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=3,
                     num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
model = LlamaForCausalLM(config).train()
parameters = sum(p.numel() for p in model.parameters())
model.save_pretrained(Path(sys.argv[1]) / "before")  # what it loads
trainer = ModelParallelTrainer(model, ["cpu:0", "cpu:1"], precision="bf16", microbatches=2, lr=1e-3)
ids = torch.randint(8192, (2, 8))
for _ in range(2):
    trainer.step(ids, ids.roll(-1, 1))
trained = peak()
take_exact(model, trainer)
del trainer
free_memory()
save_model(model, ByteTokenizer(), Path(sys.argv[1]) / "model")
print((peak() - trained) / parameters)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_the_end_of_a_run_stays_within_what_training_took(tmp_path: Path) -> None:
    """It held a second fp32 model and a copy of the whole state beside the trainer: 8 bytes a parameter more."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.0, "bytes a parameter"


@pytest.mark.parametrize(("tied", "precision"), [(True, "fp16"), (False, "bf16")])
def test_what_is_taken_out_of_a_trainer_are_its_exact_values(tied: bool, precision: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    quiet_transformers()  # its progress bar is a thread
    model = tiny_llama(256, tied=tied).train()
    trainer = ModelParallelTrainer(model, ["cpu:0", "cpu:1"], precision=precision, microbatches=2, lr=1e-3)
    ids = torch.randint(256, (2, 8))
    for _ in range(2):
        trainer.step(ids, ids.roll(-1, 1))
    exact = trainer.state_dict_for_model()
    take_exact(model, trainer)
    save_model(model, ByteTokenizer(), tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert set(exact) - set(saved) == ({"lm_head.weight"} if tied else set())
    for name, value in saved.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model(input_ids=ids).logits.sum().backward()
    assert LlamaForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.float32


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_what_is_exported_is_what_transformers_loads(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits to the last bit, ties, dtype, generation config, tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = chat_tokenizer()
    source = tiny_llama(len(tokenizer), tied=tied)
    source.generation_config.update(eos_token_id=[1, 5], do_sample=True, temperature=0.3)
    quiet_transformers()
    source.to(torch.float16).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")

    model = make_model(str(tmp_path / "source"), 0).train()
    ids = torch.randint(len(tokenizer), (2, 8))
    trainer = ModelParallelTrainer(model, ["cpu:0"], precision="bf16", microbatches=2, lr=1e-2)
    trainer.step(ids, ids.roll(-1, 1))
    take_exact(model, trainer)
    folder = tmp_path / "model"
    save_model(model, make_tokenizer(str(tmp_path / "source"), len(tokenizer), weights=True), folder, dtype=dtype)

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.dtype, loaded.config.dtype) == (dtype, dtype)
    model.set_attn_implementation(loaded.config._attn_implementation)  # training has put ours in its place
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        assert not torch.equal(loaded.model.norm.weight.float(), source.model.norm.weight.float())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    generation = loaded.generation_config
    assert (generation.eos_token_id, generation.do_sample, generation.temperature) == ([1, 5], True, 0.3)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
