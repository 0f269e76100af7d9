"""How fast data becomes batches, and how much memory that takes.

python benchmarks/data.py [--mb 100] [--tokenizer-mb 8]

Documents of Python's own source, as JSON Lines: read, tokenised, packed in rows of 2048, with bytes as tokens and with
a byte-level BPE whose words are split as Llama 3's. The same tokenizer by itself, called as fast as its package allows,
stands beside it. Speeds are for a core: by the process's own time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spu.data.corpus import make_corpus
from spu.data.tokenizer import ByteTokenizer, FileTokenizer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def sources() -> Iterator[str]:
    while True:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            yield path.read_text(encoding="utf-8", errors="ignore")


def write_documents(path: Path, size: int) -> list[str]:
    """Write ``size`` bytes of documents, whose lengths are log-normal around 1,800 characters."""
    draw, documents, total = random.Random(0), [], 0
    for text in sources():
        while len(text) > 1 and total < size:
            length = int(draw.lognormvariate(7.5, 1)) + 2
            length = len(text) if len(text) < length + 2 else length  # a document of one byte has nothing to learn
            documents.append(text[:length])
            text, total = text[length:], total + length
        if total >= size:
            break
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return documents


def write_tokenizer(folder: Path, documents: list[str]) -> None:
    inner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        documents[:2000],
        trainers.BpeTrainer(
            vocab_size=32_000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>").save_pretrained(folder)


def anonymous_bytes() -> int:
    """The process's memory that is not a file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(name: str, path: Path, tokenizer: ByteTokenizer | FileTokenizer) -> None:
    tokenizer.encode(b"first use")
    start, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, used = time.perf_counter(), time.process_time()
    corpus = make_corpus(str(path), tokenizer, 2048, lambda text: None)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    done.set()
    watcher.join()
    size, more = path.stat().st_size / 1e6, (peak[0] - start) / 1e6
    print(f"{name}: {size:.0f} MB, {size / used:.1f} MB/s a core, {size / wall:.1f} MB/s, {more:.0f} MB more memory")
    times = []
    for step in range(50):
        begin = time.perf_counter()
        corpus.batch(0, step, 8, 2048)
        times.append(time.perf_counter() - begin)
    print(f"  a batch of 8 x 2048: {sorted(times)[25] * 1e3:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=100, help="of documents, for bytes")
    parser.add_argument("--tokenizer-mb", type=int, default=8, help="of documents, for the tokenizer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["SPU_CACHE"] = str(folder / "cache")
        write_documents(folder / "bytes.jsonl", given.mb * 10**6)
        measure("bytes", folder / "bytes.jsonl", ByteTokenizer())
        documents = write_documents(folder / "bpe.jsonl", given.tokenizer_mb * 10**6)
        write_tokenizer(folder, documents)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        used = time.process_time()
        for start in range(0, len(documents), 64):
            tokenizer.encode_batch_fast(documents[start : start + 64], add_special_tokens=False)
        used = time.process_time() - used
        size = sum(len(document.encode()) for document in documents) / 1e6
        print(f"the tokenizer by itself: {size / used:.1f} MB/s a core")
        measure("byte-level BPE", folder / "bpe.jsonl", FileTokenizer(folder))


if __name__ == "__main__":
    main()
