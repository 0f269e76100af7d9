#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3: a call with truncation=True is in what save_pretrained writes, and cuts other texts.
#
# tokenizer(text, truncation=True, max_length=3) asks for a text to be cut, once; the next call without it does not cut. But the cut is
# set in the tokenizer of the package tokenizers that works beneath, where it stays until a call sets another one, and
# save_pretrained writes it into tokenizer.json. Whoever reads that file with tokenizers (to prepare a corpus fast; servers and other
# languages do) has every document cut to the length of the last call before saving, and padded if that call padded,
# with nothing raised. transformers itself sets both anew in each call, so that the same folder gives whole texts there. So two tools
# that read one folder see different data. no_truncation() and no_padding() after Tokenizer.from_file are right.
#
# Seen, a text of 6 words, ids by tokenizers from a folder that was saved after: no call 6; truncation to 3 3; padding of a batch to 8 and
# truncation 8; by transformers from the same folders 6, 6, 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

text = "a b c d e f"


def lengths(name, call):
    """Return the text's ids by tokenizers, and by transformers, from a folder that was saved after the call."""
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    call(tokenizer)
    assert len(tokenizer(text).input_ids) == 6
    call(tokenizer)
    path = f"{sys.argv[1]}/{name.replace(' ', '_')}"
    tokenizer.save_pretrained(path)
    fast = Tokenizer.from_file(f"{path}/tokenizer.json")
    there = len(fast.encode(text).ids), len(AutoTokenizer.from_pretrained(path)(text).input_ids)
    fast.no_truncation()
    fast.no_padding()
    print(f"saved after {name}: tokenizers {there[0]}, transformers {there[1]}; switched off {len(fast.encode(text).ids)}")
    assert len(fast.encode(text).ids) == 6
    return there


none = lengths("no call", lambda tokenizer: None)
cut = lengths("truncation to 3", lambda tokenizer: tokenizer(text, truncation=True, max_length=3))
padded = lengths("padding to 8", lambda tokenizer: tokenizer([text, "a"], padding="max_length", max_length=8, truncation=True))
assert (none, cut, padded) == ((6, 6), (3, 6), (8, 6))
PY
