"""The candidates and calls of ``spu tune``: configurations by op, dtype and shape class, and each op as a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from spu.kernels.config import LIBRARY_OPS, Config
from spu.kernels.derive import SHARED_BYTES

__all__ = ["REPRESENTATIVE", "call_of", "candidates"]

# rows, columns, inner of the shape that stands for its class
REPRESENTATIVE = {
    "skinny": (16, 4096, 4096),
    "deep": (1024, 1024, 16384),
    "small": (512, 2048, 2048),
    "medium": (2048, 4096, 4096),
    "large": (8192, 8192, 4096),
}
# rows, columns, inner, warps, stages
_TILES = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
)
_SKINNY_TILES = ((64, 64, 64, 4, 4), (32, 64, 128, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 4))
_FP32_TILES = ((64, 64, 32, 8, 2), (128, 64, 16, 8, 2), (32, 64, 32, 4, 2))
_SPLITS = (4, 8)
_ALGORITHMS = 3  # of cuBLASLt's proposals: its first is its guess, not its measurement


def candidates(op: str, dtype: torch.dtype, shape_class: str, arch: int) -> list[Config]:
    """Return the configurations to try: tiles that fit the shared memory, in the kinds that the op and the GPU support.

    Args:
        arch: 80 for sm_80.
    """
    wide = dtype == torch.float32
    found = [Config("torch")]
    if op in LIBRARY_OPS and not wide:
        found += [Config("cublaslt", algorithm=place) for place in range(_ALGORITHMS)]
    if arch < 80:
        return found
    for tile in _FP32_TILES if wide else _SKINNY_TILES if shape_class == "skinny" else _TILES:
        rows, columns, inner, warps, stages = tile
        config = Config("tile", rows, columns, inner, 8, warps, stages)
        two_accumulators_fit = op != "gated_linear" or rows * columns <= 128 * 128
        if two_accumulators_fit and _shared_bytes(op, config, dtype) <= SHARED_BYTES[_known(arch)]:
            found += _kinds(op, config, shape_class, arch, wide)
    return found


def _known(arch: int) -> int:
    return max(known for known in SHARED_BYTES if known <= arch)


def _shared_bytes(op: str, tile: Config, dtype: torch.dtype) -> int:
    operands = tile.block_m + tile.block_n * (2 if op == "gated_linear" else 1)
    return operands * tile.block_k * dtype.itemsize * tile.num_stages


def _kinds(op: str, tile: Config, shape_class: str, arch: int, wide: bool) -> list[Config]:
    kinds = [tile]
    product, described = op in ("linear", "linear_dx", "linear_dz_dx", "linear_dw"), arch >= 90 and not wide
    if product and shape_class in ("skinny", "deep"):
        kinds += [dataclasses.replace(tile, kind="split", split_k=parts) for parts in _SPLITS]
    elif product or (described and shape_class not in ("skinny", "deep")):
        walking = dataclasses.replace(tile, kind="descriptor" if described else "persistent")
        kinds.append(walking)
        if described and _two_fit(op, walking, arch, wide):  # one way or the other, loads run beside an epilogue
            kinds.append(dataclasses.replace(walking, blocks=2))
        elif described and product:
            kinds.append(dataclasses.replace(walking, flat=True))
    return kinds


def _two_fit(op: str, tile: Config, arch: int, wide: bool) -> bool:
    """Tell whether the shared memory and the registers of a multiprocessor have room for two programs."""
    shared = _shared_bytes(op, tile, torch.float32 if wide else torch.float16) + (1 << 10)
    accumulators = tile.block_m * tile.block_n * (2 if op == "gated_linear" else 1)
    return 2 * shared <= SHARED_BYTES[_known(arch)] and accumulators <= 128 * 128


def call_of(
    op: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device
) -> Callable[[Config], object]:
    """Return the op at one shape (rows, columns, inner) as a function of its configuration. On the CPU: any values."""
    from spu import kernels

    m, n, k = shape
    fill = torch.randn if device.type == "cuda" else torch.empty  # what is compiled from does not read its operands

    def random(*size: int) -> Tensor:
        values = fill(size, device=device, dtype=torch.float32 if device.type == "cuda" else dtype)
        return (values / size[-1] ** 0.5).to(dtype) if device.type == "cuda" else values

    left, right, bias = random(m, k), random(n, k), random(n)
    if op == "linear":
        return lambda config: kernels.linear_fwd(left, right, bias, "gelu", True, config=config)
    if op == "linear_dx":
        weight = random(k, n)
        return lambda config: kernels.linear_dx(left, weight, config=config)
    if op == "linear_dz_dx":
        weight, saved = random(k, n), random(m, k)
        return lambda config: kernels.linear_dz_dx(left, saved, weight, "gelu", config=config)
    if op == "linear_dw":  # rows and columns are the weight's, inner the tokens
        dz, x = random(k, m), random(k, n)
        main, sums = torch.zeros(m, n, device=device), torch.zeros(m, device=device)
        one, found = torch.ones(1, device=device), torch.zeros(1, device=device)
        return lambda config: kernels.linear_dw_(dz, x, main, one, found, True, sums, config=config)
    if op == "gated_linear":
        up = random(n, k)
        return lambda config: kernels.gated_linear(left, right, up, "silu", config=config)
    if op == "gated_dh":
        weight, gate = random(k, n), random(m, n)
        return lambda config: kernels.gated_dh(left, weight, gate, gate, "silu", config=config)
    if op == "mlp_dz":
        weight, saved = random(k, n), random(m, n)
        return lambda config: kernels.mlp_dz(left, weight, saved, "gelu_tanh", True, True, config=config)
    if op == "gated_dx":
        weight = random(k, n)
        return lambda config: kernels.gated_dx(left, left, weight, weight, config=config)
    target = torch.randint(0, n, (m,), device=device)
    rows, logits = torch.ones(m, device=device), torch.empty(m, n, device=device)
    return lambda config: kernels.linear_ce_and_dz(left, right, target, rows, logits, -100, config=config)
