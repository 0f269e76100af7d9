"""InternLM2's tokenizer without its remote code: a sentencepiece model, and ChatML marks in reserved places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from spu.common.files import read_object
from spu.data.sentencepiece import SentencePieces, fast_tokenizer, read_sentencepieces

__all__ = ["CHAT_TEMPLATE", "internlm2_tokenizer", "is_internlm2"]

_MODEL, _CONFIG, _TEMPLATE = "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"
_COPIED = (_MODEL, _CONFIG, _TEMPLATE, "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
_MARKS = {
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}
_RESERVED = "[UNUSED_TOKEN_"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_internlm2(folder: Path) -> bool:
    """Tell whether a folder has InternLM2's config beside a sentencepiece model."""
    return read_object(folder / "config.json").get("model_type") == "internlm2" and (folder / _MODEL).is_file()


def internlm2_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of an InternLM2 folder, of transformers; saved, it is the same files again.

    Raises:
        ValueError: a file is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    class InternLM2Tokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
            """Copy the files that it was read from, so that InternLM2's own code reads them, too."""
            target, copied = Path(save_directory), []
            for name in _COPIED:
                if (folder / name).is_file():
                    if (folder / name).resolve() != (target / name).resolve():
                        shutil.copyfile(folder / name, target / name)
                    copied.append(str(target / name))
            return tuple(copied)

    values = _values(folder / _CONFIG)
    model = read_sentencepieces(folder / _MODEL)
    marks = _marks(model, values)
    inner = fast_tokenizer(model, marks)
    bos, eos = (_text(values.get(key), default) for key, default in (("bos_token", "<s>"), ("eos_token", "</s>")))
    first, last = values.get("add_bos_token", True), values.get("add_eos_token", False)
    inner.post_processor = _ends(inner, bos if first else None, eos if last else None)
    template = folder / _TEMPLATE
    return InternLM2Tokenizer(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=eos,
        unk_token=_text(values.get("unk_token"), "<unk>"),
        pad_token=_text(values.get("pad_token"), eos),
        additional_special_tokens=[text for _, text in sorted(marks.items()) if text not in (bos, eos)],
        chat_template=template.read_text(encoding="utf-8")
        if template.is_file()
        else values.get("chat_template") or CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no JSON object; copy it again")
    return values


def _text(value: Any, default: str) -> str:
    """Return a special token's text, which a config gives as it is or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else default


def _marks(model: SentencePieces, values: dict[str, Any]) -> dict[int, str]:
    """Return the tokens whose text the config gives, by id; InternLM2's own where their places are still reserved."""
    marks = {}
    for key, value in (values.get("added_tokens_decoder") or {}).items():
        text = _text(value, "")
        if not (str(key).isdecimal() and int(key) < len(model.pieces) and text):
            raise ValueError(
                f"{_CONFIG}: added token {key!r} ({text!r}) is none of the {len(model.pieces)} tokens of {_MODEL}; "
                "copy both from one place"
            )
        if model.pieces[int(key)].text != text:
            marks[int(key)] = text
    for number, text in _MARKS.items():
        if len(model.pieces) > number and model.pieces[number].text.startswith(_RESERVED):
            marks.setdefault(number, text)
    return marks


def _ends(tokenizer: Any, bos: str | None, eos: str | None) -> Any:
    """Return a post-processor that puts tokens around a text."""
    from tokenizers import processors

    one = " ".join(filter(None, (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0")))
    two = " ".join(filter(None, (bos and f"{bos}:1", "$B:1", eos and f"{eos}:1")))
    ids = [(text, tokenizer.token_to_id(text)) for text in (bos, eos) if text is not None]
    return processors.TemplateProcessing(single=one, pair=f"{one} {two}", special_tokens=ids)
