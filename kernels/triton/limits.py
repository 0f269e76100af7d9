"""The limits that a kernel's machine code shows: the instruction mix of its hottest loop, and what that mix permits.

The hottest loop is the innermost backward branch with the most multiplications (of tensor cores, else of fp32); a
kernel without one counts as a whole. An estimate and no measurement: it knows issue slots and bytes, not latencies.

- A warp scheduler starts one instruction a cycle. Where the multiplications of a loop keep their units busy for fewer
  cycles than the loop has instructions, the units can only be busy for that share of the time: ``peak_share``.
- Memory gives its bandwidth to accesses of 16 bytes a thread: ``access_bytes`` are read from PTX.
- A multiprocessor must have latency x bandwidth bytes of loads under way to draw its share of the memory's bandwidth.
  ``bytes_in_flight`` is what a thread loads without waiting times the threads that fit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "IMMA")
# Multiply-adds of a 16-bit tensor-core instruction of one warp, m16n8k16, and of a warp scheduler's tensor core a cycle
# (the architectures' white papers; sm_86, 89 and 120 are GeForce GPUs, fp32 accumulation at half the rate).
_HMMA_PRODUCTS = {"16816": 2048, "1688": 1024}
_TENSOR_RATE = {75: 64, 80: 256, 86: 64, 89: 64, 90: 512, 100: 1024, 120: 64}
_FP16_SUMS_FASTER = (86, 89, 120)
_FP32_CYCLES = {75: 2, 80: 2}  # of a warp's fp32 instruction; 1 elsewhere
_KINDS = (
    ("tensor", _TENSOR),
    ("shared", ("LDS", "STS", "LDSM", "STSM", "ATOMS")),
    ("global", ("LDG", "STG", "LDGSTS", "LD", "ST", "UTMALDG", "UTMASTG", "UBLKCP", "RED", "ATOM", "ATOMG")),
    ("fp32", ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FADD2", "FMUL2", "FFMA2", "F2F", "F2FP", "HADD2")),
    ("special", ("MUFU",)),
)
_KIND_OF = {name: kind for kind, names in _KINDS for name in names}
_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_LOAD_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Limits:
    """Of one compiled kernel.

    Attributes:
        mix: share of the hottest loop's instructions by kind: tensor, shared, global, fp32, special, other.
        peak_share: of the multiplying units' rate that issue slots permit; 0 where nothing of note is multiplied,
            and 1 where the tensor cores are driven asynchronously (wgmma, tcgen05) by few instructions.
        load_bytes: that a thread loads in the loop (or the kernel), from global memory.
    """

    mix: dict[str, float]
    peak_share: float
    load_bytes: int


@dataclass(frozen=True)
class _Instruction:
    address: int
    name: str
    operands: str

    @property
    def stem(self) -> str:
        return self.name.split(".")[0]


def read(sass: str, arch: int) -> Limits:
    """Return the limits that a listing of ``cuobjdump -sass`` shows; ``arch`` 80 is sm_80."""
    code = [_Instruction(int(at, 16), name, rest) for at, name, rest in _LINE.findall(sass)]
    code = [one for one in code if one.stem != "NOP"]
    loop = _hottest(code)
    counts: dict[str, int] = dict.fromkeys([*(kind for kind, _ in _KINDS), "other"], 0)
    for one in loop:
        counts[_KIND_OF.get(one.stem, "other")] += 1
    total = max(1, len(loop))
    mix = {kind: round(count / total, 3) for kind, count in counts.items()}
    return Limits(mix, round(_peak_share(loop, arch), 3), sum(map(_loaded, loop)))


def access_bytes(ptx: str) -> tuple[int, int]:
    """Return the bytes of a thread's widest load and of its widest store in global memory, 0 where there is none."""
    widest = {"ld": 0, "st": 0}
    for kind, count, bits in _ACCESS.findall(ptx):
        widest[kind] = max(widest[kind], int(count or 1) * int(bits) // 8)
    return widest["ld"], widest["st"]


def _hottest(code: list[_Instruction]) -> list[_Instruction]:
    """Return the instructions of the innermost loop that multiplies most; all of them where no loop does."""
    best: list[_Instruction] = []
    most = 0.0
    for one in code:
        target = re.search(r"0x([0-9a-f]+)", one.operands) if one.stem == "BRA" else None
        if target is None or int(target[1], 16) >= one.address:
            continue
        loop = [other for other in code if int(target[1], 16) <= other.address <= one.address]
        weight = _products(loop) + (0.0 if not loop else 1e-6 / len(loop))  # of two with as many, the inner one
        if _products(loop) and weight > most:
            best, most = loop, weight
    return best or code


def _products(loop: list[_Instruction]) -> float:
    tensor = sum(one.stem in _TENSOR for one in loop)
    # Beside tensor cores fp32 does not count: an epilogue's would make the loop around theirs the hotter one.
    return 1000.0 * tensor if tensor else float(sum(one.stem in ("FFMA", "FFMA2") for one in loop))


def _peak_share(loop: list[_Instruction], arch: int) -> float:
    if any(one.stem in _TENSOR and one.stem != "HMMA" for one in loop):
        return 1.0
    busy = 0.0
    for one in loop:
        if one.stem == "HMMA":
            parts = one.name.split(".")
            faster = 2 if "F32" not in parts and arch in _FP16_SUMS_FASTER else 1
            busy += _HMMA_PRODUCTS.get(parts[1], 2048) / (faster * _TENSOR_RATE[arch])
    if not busy:
        multiplications = sum(one.stem in ("FFMA", "FFMA2") for one in loop)
        if multiplications < len(loop) / 4:
            return 0.0
        busy = multiplications * _FP32_CYCLES.get(arch, 1)
    return min(1.0, busy / max(1, len(loop)))


def _loaded(one: _Instruction) -> int:
    if one.stem not in ("LDG", "LDGSTS"):
        return 0
    parts = one.name.split(".")
    return next((size for part, size in _LOAD_BYTES.items() if part in parts), 4)
