"""Talk to a trained model, through the tokenizer's chat template if it has one; answers are shown as they are drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spu.common.absent import is_absent
from spu.common.files import read_object
from spu.common.units import format_bytes, format_bytes_up
from spu.data.tokenizer import FileTokenizer, Tokenizer, make_tokenizer
from spu.devices.host import host_memory
from spu.model.adapter_base import read_base
from spu.model.deferred import bring
from spu.train.adapter import ADAPTER
from spu.train.model import has_weights, load_config, make_model
from spu.train.run_folder import FORMAT, RunFolder
from spu.train.sample import end_tokens

__all__ = ["Conversation", "Draw", "load_trained"]

_LOST = "�"  # stands for bytes that are no whole character yet


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn.

    Attributes:
        tokens: of an answer, at most.
        temperature: of the draws; 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that have this share of the probability together.
        seed: of the draws.
    """

    tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0


def load_trained(folder: Path) -> tuple[Any, Tokenizer]:
    """Return the model and tokenizer of a run, its adapter included, or of a model's folder.

    Weights are in fp32; where the memory that is free is too small for it, those of files stay in 16 bits.

    Raises:
        ValueError: neither of them, a run that has not ended, or no room for it; says what is missing.
    """
    source, seed, adapter = str(folder), 0, None
    if read_object(folder / "config.json").get("format") == FORMAT:
        config, _ = RunFolder(folder).read_config()
        if (folder / ADAPTER).exists():
            RunFolder(folder).check_weights(config)
            source, seed, adapter = config.model or "", config.seed, folder / ADAPTER
        elif (folder / "model").exists():
            source = str(folder / "model")
        else:
            raise ValueError(f"{folder} has no model yet: go on with spu train --resume {folder} to its end")
    elif not has_weights(source):
        raise ValueError(f"{folder}: no weights there: give a run, or a folder with a model's safetensors")
    named = source or None
    model: Any = make_model(named, seed, later=True)
    config = load_config(named)
    narrow = 4 * sum(p.numel() for p in model.parameters()) > _room()
    dtypes = {id(p): _narrow(config) for p in model.parameters() if is_absent(p)} if narrow else {}
    if narrow:
        _check_room(model, folder)
    if adapter is not None:
        model = _adapted(model, adapter)
    bring(model, dtypes=dtypes)
    beside = None if adapter is None else read_base(adapter)
    if beside is not None:
        beside.check_model(model, named or "the default model", rounded=narrow)
    vocabulary = config.get_text_config().vocab_size
    return model.eval(), make_tokenizer(named, vocabulary, weights=has_weights(named))


def _room() -> int:
    """Return the bytes of memory that weights may take; the rest is for the answer's keys and values."""
    return host_memory()[1] * 9 // 10


def _check_room(model: Any, folder: Path) -> None:
    """Raise ValueError if weights of files do not fit the free memory in 16 bits: the system would end the process."""
    needed = sum(p.numel() * (2 if is_absent(p) else p.element_size()) for p in model.parameters())
    free = _room() * 10 // 9
    if needed > free:
        raise ValueError(
            f"{folder}: the weights take {format_bytes_up(needed)} of memory in 16 bits, and {format_bytes(free)} are "
            "free: answers are drawn in memory alone; use a machine with more (spu merge writes one folder for it)"
        )


def _narrow(config: Any) -> torch.dtype:
    """Return the 16-bit dtype that a model's files have, or bf16."""
    return torch.float16 if getattr(config, "dtype", None) in (torch.float16, "float16") else torch.bfloat16


def _adapted(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{adapter} needs a package: pip install peft; or merge it with spu merge") from error
    return PeftModel.from_pretrained(model, str(adapter))


@dataclass
class Conversation:
    """Messages to a model and its answers.

    With a chat template the conversation so far goes before each message, its oldest turns left out where they have no
    room. Without one each message is a text that the model goes on with.

    Attributes:
        model: a decoder of transformers.
        tokenizer: the model's.
        draw: how answers are drawn.
        system: the first message of a chat, or None.
        messages: so far, in the form of chat templates.
    """

    model: Any
    tokenizer: Tokenizer
    draw: Draw = field(default_factory=Draw)
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return isinstance(self.tokenizer, FileTokenizer) and bool(self.tokenizer.inner.chat_template)

    def answer(self, text: str, show: Callable[[str], object] = lambda piece: None) -> str:
        """Return the answer to a message, and remember both.

        Args:
            text: the message.
            show: takes the answer piece by piece, as it is drawn.

        Raises:
            ValueError: the message is empty, or has no room in the model's positions.
        """
        if not text:
            raise ValueError("the message is empty: give the model some text")
        asked = [*self.messages, {"role": "user", "content": text}] if self.templated else []
        prompt, asked = self._with_room(text, asked)
        shown = _Shown(self._decode, show, skip=prompt.shape[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.draw.seed + len(self.messages))
            self._generate(prompt, end_tokens(self.model, self.tokenizer), shown)
        answer = shown.end()
        if self.templated:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _generate(self, prompt: torch.Tensor, ends: list[int], shown: _Shown) -> None:
        from transformers import GenerationConfig

        drawn = self.draw.temperature > 0
        sampling = {"temperature": self.draw.temperature, "top_p": self.draw.top_p, "top_k": 0} if drawn else {}
        self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=shown,
            generation_config=GenerationConfig(
                do_sample=drawn,
                max_new_tokens=min(self.draw.tokens, self._room(prompt.shape[1])),
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                **sampling,
            ),
        )

    def _with_room(self, text: str, asked: list[dict[str, str]]) -> tuple[torch.Tensor, list[dict[str, str]]]:
        """Return the prompt [1, tokens], and the messages in it; the oldest turns are left out for lack of room."""
        while True:
            ids = self._encode_chat(asked) if asked else self.tokenizer.encode(text.encode())
            room = self._room(len(ids))
            # Half of the positions is all that turns make way for; below, the answer has what the message leaves.
            if room >= min(self.draw.tokens, (len(ids) + room) // 2) or (len(asked) < 3 and room > 0):
                return ids.long()[None], asked
            if len(asked) < 3:
                raise ValueError(
                    f"the message has {len(ids)} tokens, which leaves no room for an answer in the model's "
                    f"{len(ids) + room} positions: give a shorter one"
                )
            asked = asked[2:]

    def _room(self, taken: int) -> int:
        """Return how many of the model's positions are left."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return sys.maxsize if positions is None else int(positions) - taken

    def _encode_chat(self, messages: list[dict[str, str]]) -> torch.Tensor:
        assert isinstance(self.tokenizer, FileTokenizer)
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = self.tokenizer.inner.apply_chat_template([*first, *messages], tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(str(text).encode())

    def _decode(self, ids: list[int]) -> str:
        if isinstance(self.tokenizer, FileTokenizer):
            return str(self.tokenizer.inner.decode(ids, skip_special_tokens=True))
        return self.tokenizer.decode(ids)


class _Shown:
    """What ``generate`` hands its tokens to: text, as far as it ends in whole characters.

    Args:
        decode: ids -> text.
        show: takes the next piece.
        skip: tokens of the prompt, which come first.
    """

    def __init__(self, decode: Callable[[list[int]], str], show: Callable[[str], object], skip: int) -> None:
        self._decode, self._show, self._skip = decode, show, skip
        self._ids: list[int] = []
        self._text = ""

    def put(self, ids: torch.Tensor) -> None:
        new = ids.flatten().tolist()
        skipped = min(self._skip, len(new))
        self._skip -= skipped
        self._ids += new[skipped:]
        text = self._decode(self._ids)
        if not text.endswith(_LOST):
            self._add(text)

    def end(self) -> str:
        """Show what is left, and return the whole answer."""
        self._add(self._decode(self._ids))
        return self._text

    def _add(self, text: str) -> None:
        if text.startswith(self._text) and len(text) > len(self._text):
            self._show(text[len(self._text) :])
        self._text = text
