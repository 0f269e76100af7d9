"""Configurations of launches, the tables that hold them, and the classes of shapes in tables. Imports no triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

KINDS = ("tile", "persistent", "descriptor", "split", "torch", "cublaslt")
LIBRARY_OPS = ("linear", "linear_dx", "linear_dz_dx", "linear_dw", "mlp_dz")  # those that have the kind "cublaslt"
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
PRODUCTS = (
    "linear", "linear_dx", "linear_dz_dx", "linear_dw", "gated_linear", "gated_dh", "gated_dx", "mlp_dz", "linear_ce",
)  # fmt: skip
CLASSES = ("skinny", "deep", "small", "medium", "large")
_SKINNY_ROWS = 64
_TILE = 128  # the classes count tiles of this side, whatever tile is used in the end
_SMALL_TILES, _MEDIUM_TILES, _DEEP_INNER = 128, 1024, 8192


@dataclass(frozen=True)
class Config:
    """The configuration of one product's launch.

    Attributes:
        kind: "tile" one program a tile; "persistent" a program walks over tiles; "descriptor" persistent with tensor
            descriptors (TMA, sm_90 and later); "split" the inner dimension in ``split_k`` parts, added up in order by a
            second kernel; "torch" the product by torch (cuBLAS) and our epilogue after it; "cublaslt" by cuBLASLt with
            as much of the epilogue as it has (``library.py``), for ``LIBRARY_OPS`` and 16-bit operands, and like
            "torch" where there is none or it takes no such product. ``linear_dz_dx`` applies its derivative as a "tile"
            loads its operand; before every other kind in a pass of its own.
        block_m, block_n, block_k: rows, columns and inner extent of a tile.
        group_m: rows of tiles that are walked together, for the L2 cache.
        num_warps, num_stages: Triton's.
        split_k: parts of the inner dimension, for kind "split".
        blocks: programs of a persistent grid ("persistent", "descriptor") a multiprocessor; their registers are limited
            so that they fit. Where one multiplies, another does its epilogue.
        algorithm: of kind "cublaslt", which of those that it proposes for a product, 0 the one that it holds best.
        flat: kind "descriptor" of a product: the loops over tiles and over the inner dimension are one: the next
            tile's loads run beside a tile's epilogue.
        half: sums fp16 products in fp16 within an inner block (``accumulation.py``); no table asks for it.
    """

    kind: str = "tile"
    block_m: int = 64
    block_n: int = 64
    block_k: int = 32
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    blocks: int = 1
    flat: bool = False
    half: bool = False
    algorithm: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r} of a configuration: use one of {', '.join(KINDS)}")
        for name in ("block_m", "block_n", "block_k"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} is {value}: tiles have powers of two from 16 on")
        if self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks}: a multiprocessor has at least 1")


@dataclass(frozen=True)
class Entry:
    """One row of a table: the configuration, its time where it was measured, and for the ops that ask which backend is
    to serve a layer, the one that won and what forward and backward took by backend."""

    config: Config
    backend: str | None = None
    time_us: float | None = None
    layer_us: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table with its origin, "measured" or "derived"; ``facts`` are a measurement's device, versions and date."""

    arch: str
    origin: str
    entries: Mapping[str, Entry]
    facts: Mapping[str, str]


def arch_name(capability: tuple[int, int]) -> str:
    """Return "sm_90" for (9, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def shape_class(rows: int, columns: int, inner: int) -> str:
    """Return the class of a product [rows, inner] x [inner, columns]: one of ``CLASSES``."""
    if rows <= _SKINNY_ROWS:
        return "skinny"
    tiles = -(-rows // _TILE) * -(-columns // _TILE)
    if tiles <= _SMALL_TILES:
        return "deep" if inner >= _DEEP_INNER else "small"
    return "medium" if tiles <= _MEDIUM_TILES else "large"


def key_of(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Return a table's key, such as "linear/fp16/large"; ops that are no products have the class "any"."""
    name = shape_class(shape[0], shape[1], shape[2]) if op in PRODUCTS and len(shape) == 3 else "any"
    return f"{op}/{DTYPE_NAMES[dtype]}/{name}"
