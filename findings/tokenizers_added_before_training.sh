#!/usr/bin/env bash
# tokenizers 0.23.3: special tokens that are added before training share their ids with tokens of the vocabulary.
#
# add_special_tokens() on a new tokenizer numbers the tokens from 0, as its vocabulary is empty. Training then fills the
# vocabulary, numbers it from 0 as well, and leaves the added ones as they are: <s> and the first letter are both 0. An encoded
# text holds the same id for both; decoded, the letter is <s>, or is left out with the special tokens. vocab_size was kept to
# and get_vocab_size() counts both, so nothing looks wrong. The file is right: once saved and loaded, the added tokens come
# after the vocabulary. So the process that trained the tokenizer and encoded the corpus has other ids than all that load it.
# Special tokens given to the trainer are numbered first, and right.
#
# Seen, <s> and </s> added, then 20 tokens trained: "<s> d e </s>" is 0 0 1 1, decoded "" without special tokens; after saving
# and loading 20 0 1 21; 22 tokens have 20 ids; BPE, WordPiece, Unigram and WordLevel alike
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

texts = ["low lower lowest new newer newest wide wider widest"] * 50
kinds = {
    "BPE": (models.BPE(), trainers.BpeTrainer(vocab_size=20, show_progress=False)),
    "WordPiece": (models.WordPiece(), trainers.WordPieceTrainer(vocab_size=30, show_progress=False)),
    "Unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=30, show_progress=False)),
    "WordLevel": (models.WordLevel(), trainers.WordLevelTrainer(vocab_size=30, show_progress=False)),
}
for name, (model, trainer) in kinds.items():
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    loaded = Tokenizer.from_str(tokenizer.to_str()).get_vocab()
    print(f"{name}: {len(ids)} tokens, {len(set(ids.values()))} ids; loaded {len(set(loaded.values()))} ids", end="")
    print(f"; <s>, </s> {ids['<s>'], ids['</s>']}, loaded {loaded['<s>'], loaded['</s>']}")
    assert len(ids) == len(loaded) == len(set(loaded.values())) == len(set(ids.values())) + 2
    assert ids["</s>"] <= 2 and (loaded["<s>"], loaded["</s>"]) == (len(loaded) - 2, len(loaded) - 1)
    if name == "BPE":
        text = "<s> d e </s>"
        encoded, again = tokenizer.encode(text).ids, Tokenizer.from_str(tokenizer.to_str()).encode(text).ids
        print("  ", encoded, "decoded", repr(tokenizer.decode(encoded)), "loaded", again)
        assert encoded == [0, 0, 1, 1] and tokenizer.decode(encoded) == "" and again == [20, 0, 1, 21]
PY
