"""``torchrun -m spu train``: rank 0 leads, the others follow, and the run is that of one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from spu.cli.train import train_command
from spu.model.convert.decoder import save_decoder
from spu.train import ranks
from spu.train.config import RunOptions

CONFIG = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def run(folder: str, name: str, **settings: Any) -> str:
    """A run of six steps; returns what a bad input is told."""
    os.chdir(folder)
    given = {
        "model": "small.json", "data": ("text.txt",), "seq": 16, "batch": 8, "microbatches": 4, "steps": 6,
        "eval_every": 3, "save_every": 2, **settings,
    }  # fmt: skip
    try:
        train_command(given, RunOptions(name=name, sample=False))
    except ValueError as error:
        return str(error)
    return ""


def make_folder(place: Path) -> None:
    """Folders with weights, of which every process reads its own layers'; in "tied" the head has the embedding's."""
    torch.manual_seed(0)
    save_decoder(LlamaForCausalLM(LlamaConfig.from_dict(CONFIG)), place / "small")
    save_decoder(LlamaForCausalLM(LlamaConfig.from_dict(CONFIG | {"tie_word_embeddings": True})), place / "tied")


WHOLE: dict[str, Any] = {"model": "small"}
TIED: dict[str, Any] = {"model": "tied", "precision": "fp16", "steps": 3}
ADAPTED: dict[str, Any] = {"model": "small", "lora": 2, "lora_targets": "q_proj,down_proj", "steps": 2}


def run_with(folder: str, name: str, settings: dict[str, Any]) -> str:
    return run(folder, name, **settings)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: v for key, v in json.loads(line).items() if key != "tokens_per_s"} for line in lines]


def test_a_run_in_two_processes_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    (tmp_path / "text.txt").write_text("a line of the text that it learns\n" * 200)
    monkeypatch.chdir(tmp_path)
    for name, settings in (("two", WHOLE), ("two-lora", ADAPTED), ("two-tied", TIED)):
        assert in_ranks(2, run_with, str(tmp_path), name, settings, timeout_s=120) == ["", ""]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])  # a thread for each of its stages, too
    torch.set_num_threads(1)
    try:
        assert run(str(tmp_path), "one", devices="cpu:0,cpu:1", **WHOLE) == ""
        assert run(str(tmp_path), "one-lora", devices="cpu:0,cpu:1", **ADAPTED) == ""
        assert run(str(tmp_path), "one-tied", devices="cpu:0,cpu:1", **TIED) == ""
    finally:
        os.sched_setaffinity(0, cores)
    assert rows(tmp_path, "two") == rows(tmp_path, "one")
    assert rows(tmp_path, "two-lora") == rows(tmp_path, "one-lora")
    assert rows(tmp_path, "two-tied") == rows(tmp_path, "one-tied")
    runs = tmp_path / "runs"
    assert len(list(runs.iterdir())) == 6
    assert (runs / "two" / "summary.json").exists()
    for more in ("", "-tied"):
        for name in ("model/model.safetensors", "model/config.json", "checkpoint/tensors.safetensors"):
            assert (runs / f"two{more}" / name).read_bytes() == (runs / f"one{more}" / name).read_bytes()
    adapter = "adapter/adapter_model.safetensors"
    for kept in (adapter, "adapter/spu_base.json"):
        assert (runs / "two-lora" / kept).read_bytes() == (runs / "one-lora" / kept).read_bytes()


def test_bad_input_ends_every_process_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(CONFIG))
    first, second = in_ranks(2, run, str(tmp_path), "two", timeout_s=120)
    assert "text.txt" in first
    assert second == ""
    assert not (tmp_path / "runs").exists()


def lose_a_rank() -> str:
    """Rank 0 finds in its work that a rank is lost; return what becomes of one that listens."""
    try:
        with ranks.leading(20) as leads:
            if leads:
                raise ConnectionError("rank 0 exchanged gradients with ranks 1, 2, one of which no longer answers")
            ranks.follow(None)  # type: ignore[arg-type]
    except ConnectionError as error:
        return str(error)
    return "done"


def test_a_run_that_lost_a_process_is_no_end_for_the_others() -> None:
    """They ended as after a run's last step, with 0: torchrun on their machine began them no more."""
    assert in_ranks(2, lose_a_rank)[1].startswith("rank 0 has ended, or says nothing any more. torch: ")


def begin_elsewhere(folder: str) -> str:
    if dist.get_rank() == 1:
        exists = Path.exists
        ranks.platform.node = lambda: "other"  # type: ignore[assignment]
        Path.exists = lambda self: self.name == "config.json" or exists(self)  # type: ignore[method-assign, assignment]
    os.chdir(folder)
    try:
        train_command({"model": "small.json"}, RunOptions(name="one", resume="auto", sample=False))
    except ValueError as error:
        return str(error)
    return ""


def test_a_run_that_another_machine_has_begun_is_not_begun_again(tmp_path: Path) -> None:
    """torchrun gives ranks anew at a restart: another machine may be the first one then."""
    first, second = in_ranks(2, begin_elsewhere, str(tmp_path))
    assert first.startswith(
        "rank 1 (on other) has the run runs/one, and rank 0 has not: start other's process as rank 0"
    )
    assert second == ""
    assert list(tmp_path.iterdir()) == []
