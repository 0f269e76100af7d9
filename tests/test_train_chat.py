"""Talking to trained models: the tokens are those of a plain loop, templates and room are kept, pipes work."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from chat_models import chat_tokenizer, tiny_llama
from small_runs import make_place, run, train

from spu.data.tokenizer import ByteTokenizer, FileTokenizer
from spu.train import chat
from spu.train.chat import Conversation, Draw, load_trained
from spu.train.model import quiet_transformers


def greedy(model, ids: list[int], tokens: int, ends: tuple[int, ...] = ()) -> list[int]:
    """Likeliest tokens, without a cache."""
    drawn: list[int] = []
    with torch.no_grad():
        while len(drawn) < tokens and not (drawn and drawn[-1] in ends):
            logits = model(input_ids=torch.tensor([ids + drawn]), use_cache=False).logits
            drawn.append(int(logits[0, -1].argmax()))
    return drawn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tokenizer that has a chat template."""
    tokenizer = chat_tokenizer()
    model = tiny_llama(len(tokenizer), positions=48)
    model.generation_config.eos_token_id = 5  # beside the tokenizer's own
    quiet_transformers()  # no thread of a progress bar
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_text_goes_on_as_a_loop_without_a_cache_does() -> None:
    model = tiny_llama(256)
    talk = Conversation(model, ByteTokenizer(), Draw(tokens=12, temperature=0))
    pieces: list[str] = []
    answer = talk.answer("hällo", pieces.append)
    assert "".join(pieces) == answer
    assert answer == ByteTokenizer().decode(greedy(model, list("hällo".encode()), 12))
    assert talk.messages == []


def test_draws_depend_on_the_seed_alone() -> None:
    model = tiny_llama(256)

    def drawn(**draw) -> str:
        torch.rand(3)
        before = torch.get_rng_state()
        answer = Conversation(model, ByteTokenizer(), Draw(tokens=20, **draw)).answer("a")
        assert torch.equal(torch.get_rng_state(), before)
        return answer

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1, top_p=1e-6) == drawn(temperature=0)


def test_a_chat_goes_through_the_template_and_ends_at_any_end(folder: Path) -> None:
    model, tokenizer = load_trained(folder)
    assert isinstance(tokenizer, FileTokenizer)
    talk = Conversation(model, tokenizer, Draw(tokens=8, temperature=0), system="be kind")
    first = talk.answer("hello")
    prompt = tokenizer.inner("<sys> be kind <user> hello <bot>", add_special_tokens=False)["input_ids"]
    drawn = greedy(model, prompt, 8, ends=(5, tokenizer.inner.eos_token_id))
    assert first == tokenizer.inner.decode(drawn, skip_special_tokens=True)
    assert talk.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    talk.answer("how are you")
    assert len(talk.messages) == 4
    for _ in range(6):
        talk.answer("how are you")
    assert len(talk.messages) < 14, "the oldest turns have no room"
    with pytest.raises(ValueError, match="has 6. tokens, which leaves no room for .* 48 positions"):
        talk.answer("you " * 60)
    with pytest.raises(ValueError, match="the message is empty"):
        talk.answer("")


def test_an_answer_is_as_long_as_the_positions_allow(folder: Path) -> None:
    """More tokens than a small model has positions are no error: the default is more."""
    model, tokenizer = load_trained(folder)
    assert isinstance(tokenizer, FileTokenizer)
    model.generation_config.eos_token_id, tokenizer.inner.eos_token_id = None, None
    text = "you " * 20
    prompt = tokenizer.inner(f"<user> {text} <bot>", add_special_tokens=False)["input_ids"]
    drawn = greedy(model, prompt, 48 - len(prompt))
    answer = Conversation(model, tokenizer, Draw(tokens=256, temperature=0)).answer(text)
    assert answer == tokenizer.inner.decode(drawn, skip_special_tokens=True)
    talk = Conversation(model, tokenizer, Draw(tokens=256, temperature=0))
    for _ in range(2):
        talk.answer("hello")
    assert len(talk.messages) == 2, "the first turn made way: the answer has half of the positions"


def test_the_command_answers_what_comes_through_a_pipe(folder: Path, monkeypatch, capsys) -> None:
    def said(*arguments: str, text: str = "hello\n", code: int = 0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert run("chat", *arguments) == code
        return capsys.readouterr()

    model, tokenizer = load_trained(folder)
    expected = Conversation(model, tokenizer, Draw(tokens=6, seed=3)).answer("hello")
    assert said(str(folder), "--max-tokens", "6", "--seed", "3").out == expected + "\n"
    assert "the message is empty" in said(str(folder), text="", code=2).err
    assert "no such run" in said("nobody", "--runs", str(folder), code=2).err
    (folder / "model.safetensors").unlink()
    assert "no weights there" in said(str(folder), code=2).err


def test_weights_that_have_no_room_in_fp32_stay_in_the_16_bits_of_their_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of a 7B model was trained within 32 GB, and could not be tried there."""
    peft = pytest.importorskip("peft")
    config = json.loads((folder / "config.json").read_text())
    whole, _ = load_trained(folder)
    monkeypatch.setattr(chat, "_room", lambda: 4 * sum(p.numel() for p in whole.parameters()) - 1)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        (folder / "config.json").write_text(json.dumps(config | {"dtype": name}))
        model, _ = load_trained(folder)
        assert {p.dtype for p in model.parameters()} == {dtype}
        for own, wide in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(own, wide.to(dtype))
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        assert adapted(torch.arange(4)[None]).logits.isfinite().all()


def test_weights_that_have_no_room_at_all_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system ended the process without a word: 15.5 GB of a 7B model in 6 GB."""
    whole, _ = load_trained(folder)
    needed = 2 * sum(p.numel() for p in whole.parameters())
    monkeypatch.setattr(chat, "bring", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr(chat, "_room", lambda: (needed - 1) * 9 // 10)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert run("chat", str(folder)) == 2
    said = capsys.readouterr().err
    assert f"{folder}: the weights take" in said
    assert "in 16 bits" in said


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_is_talked_to_by_its_name_with_its_adapter_if_it_has_one(
    tmp_path: Path, lora: bool, monkeypatch, capsys
) -> None:
    place = make_place(tmp_path)
    if lora:
        pytest.importorskip("peft")
    assert train(place, "r", "--steps", "2", *(("--lora", "2") if lora else ())) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick"))
    assert run("chat", "r", "--runs", str(place / "runs"), "--max-tokens", "5", "--temperature", "0") == 0
    model, _ = load_trained(place / "runs" / "r")
    assert hasattr(model, "peft_config") == lora
    expected = ByteTokenizer().decode(greedy(model, list(b"the quick"), 5))
    assert capsys.readouterr().out == expected + "\n"
