"""A model built in files: the same bits, no memory of its own, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import spu
from spu.memory import spill
from spu.memory.store import StoreError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(700, 512), nn.Linear(512, 1024), nn.LayerNorm(1024), nn.Linear(1024, 700))


def mapped(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor lies in a shared mapping of a file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, modes, *_ = line.split()
        start, end = (int(part, 16) for part in place.split("-"))
        if start <= address < end:
            return modes.endswith("s")
    raise AssertionError("an address of no mapping")


def test_a_model_has_the_same_bits_and_lies_in_files(tmp_path: Path) -> None:
    plain = model()
    with spu.spilled(tmp_path / "made"):
        spilled = model()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), spilled.state_dict().values()))
    assert mapped(spilled[1].weight)  # type: ignore[index]
    assert not mapped(spilled[2].weight)  # type: ignore[index]
    assert list((tmp_path / "made").iterdir()) == [], "the files have no names"
    loss = spilled(torch.arange(8)).square().sum()
    loss.backward()
    assert spilled[1].weight.grad is not None  # type: ignore[index]


def test_copies_to_another_dtype_and_clones_are_caught(tmp_path: Path) -> None:
    source = torch.randn(300, 2000)
    with spu.spilled(tmp_path):
        half, same, zeros, ones = source.half(), source.clone(), torch.zeros(600, 1000), torch.ones(600, 1000)
        turned, small, empty = source.t().double(), source[:1].half(), torch.empty(0, 9)
    for made in (half, same, zeros, ones):
        assert mapped(made)
    for made in (small, turned):
        assert not mapped(made)
    assert torch.equal(half, source.half())
    assert torch.equal(same, source)
    assert not zeros.any()
    assert bool((ones == 1).all())
    assert torch.equal(turned, source.t().double())
    assert turned.stride() == source.t().double().stride()
    assert empty.shape == (0, 9)
    half.mul_(2)  # may be written like any tensor
    assert torch.equal(half, source.half() * 2)


def test_an_order_of_memory_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    with spu.spilled(tmp_path):
        made = torch.empty(2, 64, 64, 64, memory_format=torch.channels_last)
        copied = torch.zeros(2, 64, 64, 64).to(memory_format=torch.channels_last).clone()
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert copied.is_contiguous(memory_format=torch.channels_last)


def test_tensors_without_elements_take_no_file(tmp_path: Path) -> None:
    with spu.spilled(tmp_path, least_bytes=0):
        empty, copied = torch.empty(0, 5), torch.zeros(0).half()
        layer = nn.Linear(3, 2)
    assert (empty.shape, copied.shape) == ((0, 5), (0,))
    assert mapped(layer.weight)


def test_a_view_keeps_the_file(tmp_path: Path) -> None:
    with spu.spilled(tmp_path):
        row = torch.ones(1 << 20)[5:9]
    assert row.tolist() == [1, 1, 1, 1]


def test_outside_of_the_block_nothing_is_caught(tmp_path: Path) -> None:
    with spu.spilled(tmp_path):
        pass
    assert not mapped(torch.zeros(1 << 20))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill.os, "posix_fallocate", full)
    with (
        pytest.raises(StoreError, match=r"4\.19 MB for a tensor of shape \(1048576,\) .* No space left"),
        spu.spilled(tmp_path),
    ):
        torch.zeros(1 << 20)


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"), spu.spilled(tmp_path / "file"):
        pass
