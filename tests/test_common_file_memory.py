"""Large writes to a file's mapping go to the file, and give what a copy gives."""

from __future__ import annotations

import gc
import mmap
import tempfile
from pathlib import Path

import pytest
import torch

from spu.common import file_memory
from spu.common.file_memory import LEAST_BYTES, backed, copy_in


class _Owner:
    """Keeps a mapping."""

    def __init__(self, folder: Path, size: int) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.file.truncate(size)
        self.memory = torch.frombuffer(memoryview(mmap.mmap(self.file.fileno(), size)), dtype=torch.uint8)
        backed(self, self.memory.data_ptr(), size, self.file.fileno())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_written_is_what_a_copy_gives_in_memory_and_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    size, at = 8 * LEAST_BYTES, 4096 + 64
    owner = _Owner(tmp_path, size)
    count = 2 * LEAST_BYTES // dtype.itemsize + 7
    place = owner.memory[at:][: count * dtype.itemsize].view(dtype)
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    owner.memory[at - 1] = 9  # the page is there already
    copy_in(place, values)
    assert torch.equal(place, values.to(dtype))
    owner.file.seek(at)
    assert owner.file.read(place.nbytes) == values.to(dtype).view(torch.uint8).numpy().tobytes()
    place[3] = 5  # and the other way
    owner.file.seek(at + 3 * dtype.itemsize)
    assert owner.file.read(dtype.itemsize) == torch.tensor([5], dtype=dtype).view(torch.uint8).numpy().tobytes()
    assert owner.memory[at - 1] == 9
    assert not owner.memory[at + place.nbytes :].any()


def test_small_other_and_turned_tensors_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_memory.os, "pwrite", lambda *_: pytest.fail("written to the file"))
    owner = _Owner(tmp_path, 4 * LEAST_BYTES)
    floats = owner.memory.view(torch.float32)
    copy_in(floats[:8], torch.arange(8.0))
    assert torch.equal(floats[:8], torch.arange(8.0))
    square = floats[: 1 << 20].view(1 << 10, 1 << 10)
    values = torch.randn(1 << 10, 1 << 10)
    copy_in(square, values.t())
    copy_in(square.t(), values)
    assert torch.equal(square, values.t())
    own = torch.zeros(1 << 20)
    copy_in(own, torch.ones(1 << 20))
    copy_in(own, torch.tensor(2.0))
    assert bool((own == 2).all())


def test_a_mapping_is_forgotten_with_its_owner(tmp_path: Path) -> None:
    owner = _Owner(tmp_path, LEAST_BYTES)
    memory = owner.memory
    assert file_memory._place(memory) is not None
    del owner
    gc.collect()
    assert file_memory._place(memory) is None
