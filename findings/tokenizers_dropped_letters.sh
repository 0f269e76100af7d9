#!/usr/bin/env bash
# tokenizers 0.23.3: a byte-level BPE drops letters that it did not see in training, and joins what stood left and right of
# them.
#
# A byte-level tokenizer is chosen because no text is unknown to it: there are 256 bytes. A BpeTrainer takes only the bytes of
# the corpus into the vocabulary, unless it is given initial_alphabet=ByteLevel.alphabet(); without an unk_token the model then
# leaves out what it lacks, without an error. What is more, the neighbours of a letter that was left out are merged as if they
# had been neighbours: "loXw" is the token "low", and so is every word with one strange letter in it; its offsets end before the
# word does. The same BPE without bytes behaves alike.
#
# Seen, trained on low, lower, newest, wide and the like: "loXw" one token, "low", offsets 0 to 3 of 4; "w7i8d9e" decodes as
# "wide"; "XYZ" is no token at all; with the whole alphabet all three decode as they were
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

texts = ["low lower lowest new newer newest wide wider widest"] * 50


def trained(**options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False, **options))
    return tokenizer


given, whole = trained(), trained(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
for text, wanted in (("loXw", "low"), ("w7i8d9e", "wide"), ("XYZ", "")):
    encoded = given.encode(text)
    back = given.decode(encoded.ids)
    kept = whole.decode(whole.encode(text).ids)
    print(f"{text}: {encoded.tokens}, offsets {encoded.offsets}, decoded {back!r}; with all bytes {kept!r}")
    assert back == wanted and kept == text
assert given.encode("loXw").tokens == ["low"] == given.encode("low").tokens and given.encode("loXw").offsets == [(0, 3)]
PY
