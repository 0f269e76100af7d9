"""Configurations for architectures that nobody has measured yet, worked out from their limits. Imports no triton.

A tile must fit the shared memory (stages x (rows + columns) x inner x 2 bytes), its accumulators the registers
(rows x columns / threads <= 128 a thread, for the two accumulators of a gated product together; half of it where
operands lie in registers too), and there should be more tiles than multiprocessors. Two programs of 128 x 128 and three
stages fit a multiprocessor of sm_90 and sm_100.

A derivative applied on load is recomputed for every column of tiles, some 30 instructions an element: with 128
columns about twice the tensor cores' time for the element. A pass of its own reads and writes 6 bytes an element, a few
percent of a product over thousands of columns. So ``linear_dz_dx`` applies it on load where launches are what costs
(few rows, few tiles) and before the product elsewhere.
"""

from __future__ import annotations

from spu.kernels.config import CLASSES, PRODUCTS, Config, Entry, Table

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Shared memory that a block may have, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# rows, columns, inner, warps, stages by class: for GPUs with 99 KB a block, and for those with more.
_NARROW = {
    "skinny": (32, 64, 128, 4, 3),
    "deep": (128, 128, 32, 8, 4),
    "small": (64, 64, 64, 8, 4),
    "medium": (128, 64, 64, 8, 3),
    "large": (128, 128, 32, 8, 4),
}
_WIDE = {
    "skinny": (32, 64, 128, 4, 4),
    "deep": (128, 128, 64, 8, 4),
    "small": (64, 64, 64, 4, 4),
    "medium": (128, 128, 64, 8, 3),
    "large": (128, 256, 64, 8, 4),
}
_SPLITS = {"skinny": 4, "deep": 8}
_DESCRIPTORS_FROM = 90
_LARGE_DESCRIBED = (90, 100)  # whose accumulators leave room: wgmma and tcgen05 take operands from shared memory
_FLATTENED = 90  # where the compiler's one loop keeps a product in flight beside the next loads
_DESCRIBED = ("gated_linear", "gated_dh", "gated_dx", "mlp_dz", "linear_ce")
_WALKED = ("linear", "linear_dx", "linear_dw")
# On sm_90, until somebody measures: cuBLAS's products use what Triton's compiler has no words for (a tile's epilogue
# beside the next one's products), and an epilogue of ours after them costs a few percent.
_BY_LIBRARY = {"linear": ("medium", "large"), "linear_dx": ("medium", "large")}


def nearest(arch: int) -> int:
    """Return the newest known architecture up to ``arch`` (sm_87 is 87), or the oldest one."""
    return max((known for known in ARCHITECTURES if known <= arch), default=ARCHITECTURES[0])


def config(arch: int, op: str, dtype: str, shape_class: str) -> Config:
    """Return the derived configuration of one product."""
    on_load = op == "linear_dz_dx" and shape_class in ("skinny", "small")
    product = "linear_dx" if op == "linear_dz_dx" and not on_load else op
    if arch == 90 and dtype != "fp32" and shape_class in _BY_LIBRARY.get(product, ()):
        return Config("cublaslt")
    return of_triton(arch, op, dtype, shape_class)


def of_triton(arch: int, op: str, dtype: str, shape_class: str) -> Config:
    """Return the derived configuration of one product by a kernel of ours, where the architecture has tensor cores for
    it.
    """
    if arch < 80:  # Triton has no tensor-core product there: cuBLAS's, with our epilogue
        return Config("torch")
    on_load = op == "linear_dz_dx" and shape_class in ("skinny", "small")
    before = op == "linear_dz_dx" and not on_load  # in a pass before the product; a "tile" would apply it on load
    op = "linear_dx" if before else op
    if dtype == "fp32":  # multiplied as fp32, on the ordinary units; descriptors load 16 bits only
        kind = "persistent" if op in _WALKED and shape_class in ("medium", "large") else "tile"
        stages = 3 if op == "gated_linear" and arch == 80 else 2  # of two the compiler there takes all 255 registers
        return _split(Config(kind, 64, 64, 16 if on_load else 32, 8, 8, stages), op, shape_class)
    narrow = SHARED_BYTES[arch] < 128 << 10
    rows, columns, inner, warps, stages = (_NARROW if narrow else _WIDE)[shape_class]
    if arch < _DESCRIPTORS_FROM:  # beside the accumulators of a wider tile its loads' addresses do not fit
        columns = min(columns, 128)
    if arch in _LARGE_DESCRIBED and op in _DESCRIBED and shape_class in ("medium", "large"):
        columns = 128 if op == "gated_linear" else columns  # two accumulators and two weight tiles
        return Config("descriptor", rows, columns, inner, 8, warps, stages, blocks=_blocks(arch, op, rows, columns))
    if op == "gated_linear":
        columns, stages = min(columns, 64), min(stages, 3)
        if narrow and shape_class == "skinny":  # three operands: of a longer tile one program of 4 warps fits, not two
            inner = 64
    if on_load:  # the left operand's derivative is worked out in registers
        return Config("tile", min(rows, 64), min(columns, 128), 32, 8, 8, 3)
    if op == "linear_ce":  # exponentials beside the accumulators
        columns = min(columns, 128)
        if shape_class == "small":
            warps = 8 if arch == 100 else 4
    if op in ("gated_linear", "linear_ce") or shape_class in ("skinny", "deep"):
        return _split(Config("tile", rows, columns, inner, 8, warps, stages), op, shape_class)
    if op in ("gated_dh", "gated_dx", "mlp_dz"):
        return Config("tile", rows, min(columns, 128), inner, 8, warps, stages)
    # Programs that walk over tiles, where there are many: with descriptors where the hardware has them.
    kind = "tile" if shape_class == "small" else "descriptor" if arch >= _DESCRIPTORS_FROM else "persistent"
    if kind == "persistent" and narrow and shape_class == "medium" and not before:
        kind = "tile"  # 120 registers, two fit a multiprocessor; a program that walks takes up to 180
    two = arch in _LARGE_DESCRIBED or shape_class == "medium"  # of sm_120's large tiles the sums alone are too many
    blocks = _blocks(arch, op, rows, columns) if kind == "descriptor" and two else 1
    flat = kind == "descriptor" and arch == _FLATTENED and blocks == 1
    return Config(kind, rows, columns, inner, 8, warps, stages, blocks=blocks, flat=flat)


def _blocks(arch: int, op: str, rows: int, columns: int) -> int:
    """Return how many programs of 3 stages share a multiprocessor: with one alone, its tensor cores wait for each
    epilogue. On sm_100 exponentials beside sums that come from the tensor cores' memory take more than 128 registers.
    """
    alone = ("gated_linear", "gated_dh", "mlp_dz", "linear_ce" if arch == 100 else "")
    return 2 if rows * columns <= 128 * 128 and op not in alone else 1


def _split(tile: Config, op: str, shape_class: str) -> Config:
    if shape_class not in _SPLITS or op not in ("linear", "linear_dx", "linear_dw"):
        return tile
    sizes = (tile.block_m, tile.block_n, tile.block_k, tile.group_m, tile.num_warps, tile.num_stages)
    return Config("split", *sizes, split_k=_SPLITS[shape_class])


def table(arch: int) -> Table:
    """Return the whole derived table of an architecture."""
    entries = {
        f"{op}/{dtype}/{shape_class}": Entry(config(arch, op, dtype, shape_class))
        for op in PRODUCTS
        for dtype in ("fp16", "bf16", "fp32")
        for shape_class in CLASSES
    }
    return Table(f"sm_{arch}", "derived", entries, {"note": "worked out, never measured: run `spu tune`"})
