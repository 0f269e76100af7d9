"""`spu train --model DIR` with an InternLM2 checkpoint: what it leaves is one, with the trained weights.

Its sequences are longer than the positions from which on InternLM2 scales them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sentencepiece")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from internlm2 import CONFIG, forward, write_checkpoint
from safetensors.torch import load_file
from small_runs import run
from test_data_internlm2 import SENTENCES, make_folder

from spu.data.tokenizer import FileTokenizer


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_run_leaves_an_internlm2_checkpoint(tmp_path: Path) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    make_folder(source)
    vocabulary = len(FileTokenizer(source)._tokenizer)
    config = CONFIG | {"vocab_size": vocabulary}
    before = write_checkpoint(source, config)
    text.write_text("\n".join(SENTENCES * 20))
    arguments = ["train", "--model", source, "--data", text, "--out", tmp_path / "runs", "--name", "one"]
    arguments += ["--steps", 4, "--seq", 20, "--batch", 2, "--microbatches", 2, "--lr", 1e-2, "--precision", "fp32"]
    assert run(*arguments, "--no-sample") == 0
    folder = tmp_path / "runs" / "one" / "model"
    assert json.loads((folder / "config.json").read_text()) == config | {"torch_dtype": "float32"}
    for name in ("tokenizer.model", "tokenizer_config.json", "configuration_internlm2.py"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    after = read(folder)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    ids = FileTokenizer(folder).encode(text.read_bytes()[:400]).long()[None, :33]

    def loss(weights: dict[str, torch.Tensor]) -> float:
        weights = {name: tensor.float() for name, tensor in weights.items()}
        return F.cross_entropy(forward(weights, ids[:, :-1], config)[0], ids[0, 1:]).item()

    assert loss(after) < loss(before) - 0.5, "what was written is not what was trained"
