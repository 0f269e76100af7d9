"""What travels with the few values that the processes exchange at the end of each step: so that none trains apart.

A batch is one number: a sum of its bytes in which every place counts otherwise. Of a large tensor every k-th element is
read, in each row: a sum costs the host 0.1 ms a megabyte.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from spu.common.raw import bytes_of
from spu.common.torch_private import pytree

__all__ = ["BATCH", "FACTOR", "RATES", "check_told", "digest", "rates_digest"]

BATCH, FACTOR, RATES = "batch", "learning rate from lr_schedule", "setting of an optimizer (lr, betas, ...)"

_MOST = 2**20  # elements that are read of a tensor
_ROW = 64  # values of 8 bytes
_FEW = 2**18  # bytes up to which each value has a factor of its own: a few ops less
_ODD = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / the golden ratio, as torch's int64 holds it
_BITS = 52  # what fp64 holds of an integer


def digest(batch: Any) -> torch.Tensor:
    """Return a number for a batch: fp64, 0-dimensional, a whole number, on a device of the batch's.

    Nothing waits for a device.
    """
    leaves = pytree.tree_leaves(batch)
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    plain = [leaf for leaf in leaves if isinstance(leaf, (bool, int, float, str))]
    form = [(tuple(t.shape), str(t.dtype)) for t in tensors]
    total = torch.tensor(zlib.crc32(repr((form, plain)).encode()), device="cpu")
    flat: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        flat.setdefault(tensor.device, []).append(_read(tensor))
    for own in flat.values():
        each = _mixed(_sum(own))
        total = total.to(each.device, non_blocking=True) * _ODD + each
    return (total >> (64 - _BITS)).to(torch.float64)


def rates_digest(groups: Iterable[Mapping[str, Any]]) -> float:
    """Return a number for the settings of optimizers' groups that are plain values."""
    plain = [[(k, w) for k, v in sorted(group.items()) if _is_plain(w := _read_here(v))] for group in groups]
    return float(zlib.crc32(repr(plain).encode()))


def check_told(told: Sequence[Mapping[str, float]], places: Sequence[int], hints: Mapping[str, str]) -> None:
    """Raise ValueError if the processes have told one another different things.

    Args:
        told: by rank; each name is compared that all have.
        places: in the pipeline, by rank: optimizers are alike at one place.
        hints: what helps, by name.
    """
    for name in told[0]:
        for rank, own in enumerate(told):
            first = places.index(places[rank]) if name == RATES else 0
            if own[name] != told[first][name]:
                values = f": {own[name]:g}, not {told[first][name]:g}" if name == FACTOR else ""
                hint = f", {hints[name]}" if name in hints else ""
                raise ValueError(
                    f"rank {rank} has another {name} than rank {first} in this step{values}; nothing was updated. "
                    f"Every process must have the same one{hint}"
                )


def _read_here(value: Any) -> Any:
    """Return a number for a tensor of one on the CPU; reading another one would wait for its device."""
    return (
        value.item() if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() == 0 else value
    )


def _is_plain(value: Any) -> bool:
    every = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(each, (bool, int, float, str, type(None))) for each in every)


def _read(tensor: torch.Tensor) -> torch.Tensor:
    """Return what is read of a tensor, as bytes."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.numel() > _MOST:
        step, first = -(-tensor.numel() // _MOST), min(1, tensor.dim() - 1)
        longest = max(range(first, tensor.dim()), key=tensor.shape.__getitem__)
        tensor = tensor[(slice(None),) * longest + (slice(None, None, step),)]
    return bytes_of(tensor.resolve_conj().resolve_neg())


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return a sum of bytes, int64, 0-dimensional, on their device."""
    size = sum(map(len, parts))
    missing = -size % (8 if size <= _FEW else 8 * _ROW)
    values = torch.cat([*parts, parts[0].new_zeros(missing)]).view(torch.int64)
    if size <= _FEW:  # by its size alone: a batch has the same number on every device
        return (values * _factors(len(values), values.device)).sum()
    values = values.view(-1, _ROW)
    sums = torch.cat([values.sum(0), values.sum(1)])
    return (_mixed(sums) * _factors(len(sums), sums.device)).sum()


@lru_cache(maxsize=16)
def _factors(count: int, device: torch.device) -> torch.Tensor:
    """Return an odd number for each place, int64 [count]."""
    return _mixed(torch.arange(1, count + 1, device=device)) | 1


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """Return int64 values whose high bits depend on every bit of them."""
    values = values * _ODD
    return (values ^ (values >> 32)) * _ODD
