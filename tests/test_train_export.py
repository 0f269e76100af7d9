"""The end of a run takes no more memory than its training, and leaves what transformers loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from chat_models import TEMPLATE, chat_tokenizer, tiny_llama

from spu import ModelParallelTrainer
from spu.data.tokenizer import make_tokenizer
from spu.train.export import save_model, take_exact
from spu.train.model import make_model, quiet_transformers

PEAK = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from spu import ModelParallelTrainer
from spu.common.out_of_memory import free_memory
from spu.train.export import save_model, take_exact
from spu.data.tokenizer import ByteTokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.manual_seed(0)
config = LlamaConfig(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=3,
                     num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=sys.argv[2] == "tied")
model = LlamaForCausalLM(config).train()
parameters = sum(p.numel() for p in model.parameters())
model.save_pretrained(Path(sys.argv[1]) / "before")  # what it loads
trainer = ModelParallelTrainer(model, ["cpu:0", "cpu:1"], precision=sys.argv[3], microbatches=2, lr=1e-3)
ids = torch.randint(8192, (2, 8))
for _ in range(2):
    trainer.step(ids, ids.roll(-1, 1))
trained = peak()
exact = trainer.state_dict_for_model() if sys.argv[4] == "values" else None
take_exact(model, trainer)
del trainer
free_memory()
save_model(model, ByteTokenizer(), Path(sys.argv[1]) / "model")
print((peak() - trained) / parameters)
if exact is not None:
    saved = load_file(Path(sys.argv[1]) / "model" / "model.safetensors")
    assert set(exact) - set(saved) == ({"lm_head.weight"} if sys.argv[2] == "tied" else set())
    for name, value in saved.items():
        assert value.dtype == torch.float32 and torch.equal(value, exact[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (sys.argv[2] == "tied")
    model(input_ids=ids).logits.sum().backward()
    assert LlamaForCausalLM.from_pretrained(Path(sys.argv[1]) / "model").dtype == torch.float32
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize(("ties", "precision", "what"), [("tied", "fp16", "values"), ("untied", "bf16", "memory")])
def test_the_end_of_a_run_stays_within_what_training_took(ties: str, precision: str, what: str, tmp_path: Path) -> None:
    """It held a second fp32 model and a copy of the whole state beside the trainer: 8 bytes a parameter more."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), ties, precision, what], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    if what == "memory":
        assert float(done.stdout.split()[-1]) < 1.0, "bytes a parameter"


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
