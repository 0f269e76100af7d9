"""Helpers of all launchers: the device's facts, each looked up once, and the compiler options of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import _allocation

from spu.kernels import table
from spu.kernels.config import Config

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
_INTERPRETED_PROGRAMS = 3  # of a persistent kernel on the CPU: more than one, so that programs share the tiles
_STOOD_FOR: list[tuple[tuple[int, int], int]] = []  # capability and processors of the GPU that CPU tensors stand for
_OF_GRAPHS: dict[int, Tensor] = {}
_INTERPRETED = Config()
_REGISTERS, _MOST_REGISTERS = 65536, 255  # of a multiprocessor, and of a thread
ALIGN_BYTES = 16  # of an address or row that tensor descriptors and wide loads take

# Contraction of a * b + c is pinned, since the compiler's default changes in 3.10: off in kernels that promise the bits
# of their reference (codecs, AdamW) and in the 16-bit products, whose multiplications are the tensor cores' own; on for
# fp32 products, which run on fused multiply-adds or at half the speed.
POINTWISE: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def options(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Return Triton's compile options of a product."""
    found = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": dtype == torch.float32}
    registers = _REGISTERS // (config.blocks * 32 * config.num_warps) // 8 * 8  # given out by eights
    return found | ({"maxnreg": registers} if config.blocks > 1 and registers <= _MOST_REGISTERS else {})


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up. (triton.cdiv takes 2 us on the host.)"""
    return -(-a // b)


@contextmanager
def standing_for(capability: tuple[int, int], processors: int) -> Iterator[None]:
    """Let CPU tensors stand for those of a GPU with so many multiprocessors, in all threads: for what is compiled ahead
    of time.
    """
    _STOOD_FOR.append((capability, processors))
    table.forget()  # the kept plans of CPU tensors are of another device
    try:
        yield
    finally:
        _STOOD_FOR.pop()
        table.forget()


def stands_for_a_gpu() -> bool:
    """Tell whether CPU tensors stand for those of a GPU now."""
    return bool(_STOOD_FOR)


@table.follows_tables
@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, or of the one that CPU tensors stand for."""
    if device.type != "cuda" and _STOOD_FOR:
        return _STOOD_FOR[-1][0]
    return torch.cuda.get_device_capability(device)


@table.follows_tables
@lru_cache(maxsize=64)
def programs_at_once(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    if device.type != "cuda":
        return _STOOD_FOR[-1][1] if _STOOD_FOR else _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def persistent_programs(tiles: int, config: Config, device: torch.device) -> int:
    """Return the programs that walk over so many tiles: as many as run at once, but no more than there are tiles."""
    return min(tiles, programs_at_once(device) * config.blocks)


def config_for(op: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int]) -> Config:
    """Return the table's configuration of a product (rows, columns, inner) on a device."""
    if device.type != "cuda" and not _STOOD_FOR:
        return _INTERPRETED
    return table.config_of(capability(device), op, dtype, shape)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda" if torch.cuda.is_initialized() else "cpu")


def capturing(device: torch.device) -> bool:
    """Tell whether launches on a device go into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_for_graphs(*tables: Tensor) -> None:
    """Keep tables of the launchers for good if a CUDA graph is captured: its replays read them, also when newer ones
    have taken their place in a cache.
    """
    if capturing(tables[0].device):
        for table_read in tables:
            _OF_GRAPHS[table_read.data_ptr()] = table_read


def for_alignment(config: Config, dtype: torch.dtype, strides: tuple[int, ...]) -> Config:
    """Return ``config``, or a smaller tile where rows do not start at multiples of 16 bytes.

    Elements are then loaded one by one, each with an address of its own, and those of a large tile do not fit the
    registers. ``strides`` are those of all operands and results, in elements.
    """
    if all(stride == 1 or stride * dtype.itemsize % ALIGN_BYTES == 0 for stride in strides):
        return config
    return _small(config)


@lru_cache(maxsize=256)
def _small(config: Config) -> Config:
    kind = config.kind if config.kind in ("split", "torch", "cublaslt") else "tile"
    sizes = min(config.block_m, 64), min(config.block_n, 64), min(config.block_k, 32)
    return Config(kind, *sizes, config.group_m, 8, min(config.num_stages, 3), config.split_k, half=config.half)


def can_describe(dtype: torch.dtype, strides: tuple[int, ...], aligned: bool) -> bool:
    """Tell whether tensor descriptors can load all operands, whose two strides each follow one another: one is 1, the
    other a multiple of 16 bytes.
    """
    if dtype == torch.float32 or not aligned:
        return False
    for first, second in zip(strides[::2], strides[1::2], strict=True):
        other = first if second == 1 else second if first == 1 else 0
        if other <= 0 or other * dtype.itemsize % ALIGN_BYTES:
            return False
    return True


@contextmanager
def descriptors_allowed() -> Iterator[None]:
    """Give kernels launched inside, which make tensor descriptors, their memory. Triton keeps one allocator a thread; a
    user's own is restored.
    """
    allocator = getattr(_allocation, "_allocator", None)
    previous = allocator.get() if isinstance(allocator, ContextVar) else None
    triton.set_allocator(_workspace)
    try:
        yield
    finally:
        if previous is not None:
            triton.set_allocator(previous)


def rows_of(x: Tensor) -> Tensor:
    """Return [..., K] as [rows, K]; also for K = 0, where reshape(-1, 0) is ambiguous."""
    if x.dim() == 2:
        return x
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return x.reshape(rows, x.shape[-1])


def check_activation(activation: str) -> None:
    """Raise ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")


def check_operands(names: str, *tensors: Tensor) -> None:
    """Raise unless all share a storage dtype and a device."""
    first = tensors[0]
    if first.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{names}: dtype {first.dtype} is not supported: use float16, bfloat16 or float32")
    for other in tensors[1:]:
        if other.dtype != first.dtype or other.device != first.device:
            raise ValueError(
                f"{names} must share dtype and device, but are "
                + ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
                + ": convert them with .to() first"
            )


def check_sink(main_grad: Tensor, inv_scale: Tensor, found_inf: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise unless main_grad is contiguous fp32 of ``shape`` beside ``like``, and the scalars fp32."""
    check_operands("main_grad, inv_scale and found_inf", main_grad, inv_scale, found_inf)
    if main_grad.shape != shape:
        raise ValueError(f"main_grad {tuple(main_grad.shape)} does not fit the gradient: need {shape}")
    if main_grad.dtype != torch.float32 or not main_grad.is_contiguous() or main_grad.device != like.device:
        raise ValueError(
            f"main_grad must be a contiguous float32 tensor on {like.device}, not {main_grad.dtype} "
            f"with strides {main_grad.stride()} on {main_grad.device}"
        )
