#!/usr/bin/env bash
# torch 2.13.0: torch.frombuffer keeps the object alive, but lets its memory go: a resize or a close frees it.
#
# Python's buffer protocol has a lock: while a memoryview or a NumPy array uses a bytearray or an mmap, resizing or
# closing it raises BufferError. torch.frombuffer takes a reference to the object and gives the buffer back at once. So
# `buffer.extend(...)` in a loop that reads packets, or `mapping.close()` at the end of a `with`, succeeds, and the tensor
# is left with freed or unmapped memory: other data, or a crash. The documentation says that the memory "will not be
# deallocated before the returned tensor goes out of scope". torch.frombuffer(memoryview(buffer), ...) keeps the lock.
# NumPy had the same fault for mmaps until 1.23 (numpy#9537).
#
# Seen: the bytearray lies elsewhere than the tensor after extend; the tensor's address is not mapped after close;
# numpy.frombuffer, and a memoryview in between, raise BufferError for both
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import ctypes
import mmap

import numpy
import torch


def mapped(address):
    """Whether this process has memory at an address."""
    spans = (line.split()[0].split("-") for line in open("/proc/self/maps"))
    return any(int(start, 16) <= address < int(end, 16) for start, end in spans)


def refused(change):
    try:
        change()
    except BufferError:
        return True
    return False


buffer = bytearray(b"x" * 100)
tensor = torch.frombuffer(buffer, dtype=torch.uint8)
buffer.extend(bytes(10_000_000))
now = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
print(f"bytearray at {now:#x}, tensor at {tensor.data_ptr():#x}")
assert now != tensor.data_ptr()

size = 64 << 20
mapping = mmap.mmap(-1, size)
tensor = torch.frombuffer(mapping, dtype=torch.uint8)
assert mapped(tensor.data_ptr())
mapping.close()
print("after close the tensor's memory is mapped:", mapped(tensor.data_ptr()))
assert not mapped(tensor.data_ptr())

for name, view in {
    "numpy.frombuffer": lambda source: numpy.frombuffer(source, numpy.uint8),
    "torch.frombuffer of a memoryview": lambda source: torch.frombuffer(memoryview(source), dtype=torch.uint8),
}.items():
    buffer, mapping = bytearray(b"x" * 100), mmap.mmap(-1, size)
    held = [view(buffer), view(mapping)]
    assert refused(lambda: buffer.extend(bytes(10_000_000))) and refused(mapping.close)
    print(name, "keeps the lock")
PY
