"""`spu train --lora` and `spu merge`: a run of adapters, gone on with, merged, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("typer")

from internlm2 import write_checkpoint  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from small_runs import run as spu  # noqa: E402
from tiny_models import BYTES  # noqa: E402

from spu.model.adapter_base import base_values, write_base  # noqa: E402
from spu.model.lora import LoraOptions, add_adapters, write_adapter  # noqa: E402
from spu.model.merge import merge_adapter, write_parts  # noqa: E402
from spu.train.adapter import base_of  # noqa: E402
from spu.train.chat import load_trained  # noqa: E402
from spu.train.config import TrainConfig  # noqa: E402
from spu.train.model import make_model  # noqa: E402

transformers.utils.logging.disable_progress_bar()  # its bars start a monitor thread that never ends


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in 16 bits, a text, and a run of two steps in runs/run."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BYTES)).bfloat16()
    model.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.bytes").write_text("bytes")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    assert train(folder, "run", "--lora", 3, "--lora-kind", "dora") == 0
    return folder


def train(folder: Path, name: str, *more: object, steps: int = 2) -> int:
    where = ("--model", folder / "base", "--data", folder / "text.txt", "--out", folder / "runs", "--name", name)
    how = ("--devices", "cpu", "--precision", "bf16", "--batch", 2, "--seq", 8, "--microbatches", 1, "--no-sample")
    return spu("train", *where, *how, "--steps", steps, "--evals", 1, "--lr-schedule", "constant", *more)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_run_leaves_an_adapter_that_peft_loads_and_no_second_model(place: Path) -> None:
    run = place / "runs" / "run"
    assert not (run / "model").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    model = peft.PeftModel.from_pretrained(base, run / "adapter")
    assert model.peft_config["default"].use_dora
    found = peft.get_peft_model_state_dict(model)
    assert found.keys() == adapter(run).keys()
    assert len(found) == 2 * 7 * 3
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)
    with safe_open(run / "checkpoint" / "tensors.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("model:")]  # noqa: SIM118  it is no dict
    assert all(".lora_" in name for name in names)
    assert len(names) == len(found)


def test_going_on_gives_the_same_bits(place: Path) -> None:
    assert train(place, "whole", "--lora", 3, "--lora-kind", "dora", steps=4) == 0
    assert spu("train", "--resume", "run", "--out", place / "runs", "--steps", 4, "--no-sample") == 0
    whole, parts = adapter(place / "runs" / "whole"), adapter(place / "runs" / "run")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_run_is_what_peft_merges(place: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """In fp32 the same bits; in 16 bits our sums are rounded once, peft's more often."""
    base = place / "base"
    if dtype is torch.float32:
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    trained = place / "runs" / "run" / "adapter"
    assert spu("merge", trained, "--model", base, "--out", tmp_path / "ours") == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours = load(tmp_path / "ours", dtype=dtype)
    theirs = peft.PeftModel.from_pretrained(load(base, dtype=dtype), trained).merge_and_unload()
    truth = peft.PeftModel.from_pretrained(load(base, dtype=torch.float32), trained).merge_and_unload()
    exact = truth.state_dict()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype == dtype
        if dtype is torch.float32:
            assert torch.equal(a, b), name
        else:
            assert torch.equal(a, exact[name].to(dtype)), name
    if dtype is torch.float32:
        assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_of_a_config_alone_is_merged_with_its_tokenizer(place: Path, tmp_path: Path, tied: bool) -> None:
    config, trained = tmp_path / "tiny.json", tmp_path / "adapter"
    shutil.copytree(place / "runs" / "run" / "adapter", trained)
    (trained / "spu_base.json").unlink()  # of other weights, which serve here
    config.write_text(json.dumps({**BYTES, "tie_word_embeddings": tied}))
    merge_adapter(base_of(str(config), seed=7), trained, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.bytes").exists()
    theirs = peft.PeftModel.from_pretrained(make_model(str(config), 7), trained).merge_and_unload()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert torch.equal(logits(ours), logits(theirs))


def test_parts_hold_little_at_a_time_and_their_index_names_them(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for index in range(20):
            made = torch.full((100,), float(index))
            alive.append(weakref.ref(made))
            yield f"t{index:02}", made
            del made
            most = max(most, sum(each() is not None for each in alive))

    write_parts(tmp_path, tensors(), part_bytes=1000)
    parts = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert parts["metadata"]["total_size"] == 20 * 400
    assert len(set(parts["weight_map"].values())) == 10
    assert most <= 3
    for name, file in parts["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], torch.full((100,), float(name[1:])))


def test_an_internlm2_checkpoint_is_merged_in_its_own_form(place: Path, tmp_path: Path) -> None:
    base, trained = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, shards=2)
    model = add_adapters(make_model(str(base), 0), LoraOptions(rank=2), seed=1)
    model.save_pretrained(trained)
    write_base(trained, base_values(model))
    tensors = load_file(trained / "adapter_model.safetensors")
    save_file(
        {name: torch.randn_like(tensor) for name, tensor in tensors.items()}, trained / "adapter_model.safetensors"
    )
    assert spu("merge", trained, "--model", base, "--out", tmp_path / "merged") == 0
    ours = make_model(str(tmp_path / "merged"), 0)
    theirs = peft.PeftModel.from_pretrained(make_model(str(base), 0), trained).merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=2**-8, atol=1e-6, msg=name)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in base.iterdir()}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--lora", 0), "--lora 0"),
        (("--lora-alpha", 8), "--lora-alpha 8.0 is of adapters, and there are none: give --lora RANK"),
        (("--lora", 2, "--lora-targets", "c_attn"), "no layer of LlamaForCausalLM is named 'c_attn'"),
    ],
)
def test_bad_options_write_nothing(
    place: Path, options: tuple[object, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, "bad", *options) == 2
    assert text in capsys.readouterr().err
    assert not (place / "runs" / "bad").exists()


def spoilt(place: Path, folder: Path, how: str) -> tuple[Path, Path]:
    """Return an adapter and a model that do not belong together, or one that is damaged."""
    base, own = folder / "base", folder / "adapter"
    shutil.copytree(place / "base", base)
    shutil.copytree(place / "runs" / "run" / "adapter", own)
    values = json.loads((own / "adapter_config.json").read_text())
    if how == "other names":
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2)).save_pretrained(base)
    elif how == "other sizes":
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**BYTES, "hidden_size": 32}))
        other.save_pretrained(base)
    elif how == "patterns":
        (own / "adapter_config.json").write_text(json.dumps({**values, "rank_pattern": {"q_proj": 8}}))
    elif how == "cut weights":
        weights = (own / "adapter_model.safetensors").read_bytes()
        (own / "adapter_model.safetensors").write_bytes(weights[:-100])
    elif how == "damaged base":
        (base / "model.safetensors").write_bytes(b"\xff" * 100)
    return own, base


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("other names", "which {base} does not have: give the model that it was trained on"),
        ("other sizes", "adapts model.layers.0.mlp.down_proj.weight of shape (16, 32), which {base} has as (32, 32)"),
        ("patterns", "sets rank_pattern, which is not merged here: use peft's merge_and_unload"),
        ("cut weights", "adapter_model.safetensors is damaged"),
        ("damaged base", "model.safetensors is damaged"),
    ],
)
def test_what_cannot_be_merged_is_named_and_nothing_written(
    place: Path, tmp_path: Path, how: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own, base = spoilt(place, tmp_path, how)
    before = sorted(tmp_path.rglob("*"))
    assert spu("merge", own, "--model", base, "--out", tmp_path / "merged") == 2
    assert text.format(base=base) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_merging_wants_a_base_a_new_folder_and_a_run_with_adapters(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "runs" / "run"
    assert spu("merge", run / "adapter", "--out", place / "new") == 2
    assert "give the model that it was trained on with --model FOLDER" in capsys.readouterr().err
    assert spu("merge", run, "--out", place / "base") == 2
    assert "base is there already: give a new folder" in capsys.readouterr().err
    assert spu("merge", "nowhere", "--runs", place / "runs", "--out", place / "new") == 2
    assert not (place / "new").exists()
    assert TrainConfig(lora=2).lora_kind == "lora"


def copied(place: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A run and its base model, elsewhere, and what its config.json has."""
    own, base = tmp_path / "runs" / "run", tmp_path / "base"
    shutil.copytree(place / "runs" / "run", own)
    shutil.copytree(place / "base", base)
    record = json.loads((own / "config.json").read_text())
    record["settings"]["model"] = str(base)
    (own / "config.json").write_text(json.dumps(record))
    return own, base, record


def test_an_adapter_is_added_to_no_weights_but_those_it_was_trained_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config alone makes random weights: of a run that began from a config, or of nobody."""
    own, base, record = copied(place, tmp_path)
    assert record["weights"]
    (base / "model.safetensors").unlink()
    for model in (base, base / "config.json", "internlm2-1.8b"):
        assert spu("merge", own / "adapter", "--model", model, "--out", tmp_path / "new") == 2
        assert f"--model {model} has no weights" in capsys.readouterr().err
    assert spu("merge", own, "--out", tmp_path / "new") == 2
    assert f"began from the weights in {base}, which are gone" in capsys.readouterr().err
    with pytest.raises(ValueError, match="which are gone"):
        load_trained(own)
    shutil.copy(place / "base" / "model.safetensors", base)
    (own / "config.json").write_text(json.dumps({**record, "weights": False}))
    assert spu("merge", own, "--out", tmp_path / "new") == 2
    assert f"began from random weights, and {base} has weights now" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_added_to_no_other_weights_of_the_same_shapes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another training of the same base, or another seed: the merged model was of neither."""
    own, base, _ = copied(place, tmp_path)
    weights = load_file(base / "model.safetensors")
    changed = "model.layers.1.self_attn.k_proj.weight"
    weights[changed] = weights[changed].flip(0)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    said = f"adapter was trained beside other weights than those of {base}: {changed} differs"
    for which in ([own], [own / "adapter", "--model", base]):
        assert spu("merge", *which, "--out", tmp_path / "new") == 2
        assert said in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir() if "new" in path.name] == []
    with pytest.raises(ValueError, match=said):
        load_trained(own)
    (own / "adapter" / "spu_base.json").unlink()
    load_trained(own)
    assert spu("merge", own, "--out", tmp_path / "new") == 0


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_took_its_part_out_of_the_base_is_not_added_to_the_whole_one(
    place: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """That part would be there twice. What peft has converted to a plain LoRA is merged."""
    load, base = transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "base"
    load(place / "base", dtype=torch.float32).save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=kind)
    model = peft.get_peft_model(load(base), config)
    model.peft_config["default"].init_lora_weights = True  # what is saved first is read as it is
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = kind
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.1
    model.save_pretrained(tmp_path / "own")
    before = sorted(tmp_path.rglob("*"))
    assert spu("merge", tmp_path / "own", "--model", base, "--out", tmp_path / "merged") == 2
    assert f"sets init_lora_weights='{kind}', which took a part out of the base" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    wanted = logits(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    assert spu("merge", tmp_path / "plain", "--model", base, "--out", tmp_path / "merged") == 0
    torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
def test_a_disk_that_takes_no_merged_model_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was a traceback of safetensors, whose errors are no OSError."""
    import resource

    base, run = place / "base", place / "runs" / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))  # more than what peft writes before the weights
    try:
        ended = spu("merge", run, "--out", place / "full")
        model = add_adapters(make_model(str(base), 0), LoraOptions(rank=64), seed=1)
        with pytest.raises(ValueError, match=r"full-adapter: \[Errno 27\] .*give a folder with room"):
            write_adapter(model, model.state_dict(), place / "full-adapter", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "File too large" in said[0]
    assert said[0].endswith(": give a folder with room")
    assert not [left for left in place.iterdir() if "full" in left.name]
