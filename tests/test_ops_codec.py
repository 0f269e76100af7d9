"""pack and unpack: error bounds, layout, non-finite values, and what must be refused."""

from __future__ import annotations

import struct

import pytest
import torch
from backend_params import every_backend
from covering import covering
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_equal
from op_checks import assert_registered

from spu import ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CODECS = list(ops.CODECS)
SHAPES = [(), (1,), (64,), (65,), (0,), (3, 0, 2), (5, 7), (2, 3, 4, 5), (2, 1, 3, 1, 33)]


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.float().flatten()


BLOCKS = {"int8": (64, 127), "int4": (32, 7), "fp8_e4m3": (64, 448), "fp8_e5m2": (64, 57344)}  # size, largest code
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def nearest_code(ratio: torch.Tensor, codec: str) -> float:
    largest = BLOCKS[codec][1]
    ratio = ratio.clamp(-largest, largest)
    return float(ratio.to(FP8[codec])) if codec in FP8 else float(round(ratio.item()))  # Python rounds half to even


def by_hand(x: torch.Tensor, codec: str) -> torch.Tensor:
    """The format's own words, value by value: another program than the one under test."""
    if codec not in BLOCKS:
        return x.to({"fp16": torch.float16, "bf16": torch.bfloat16}[codec]).to(x.dtype)
    flat, out = wide(x).tolist(), []
    size, largest_code = BLOCKS[codec]
    for start in range(0, len(flat), size):
        block = flat[start : start + size]
        largest = torch.tensor(block).abs().amax()
        if not torch.isfinite(largest):
            out += [float("nan")] * len(block)
            continue
        scale = largest / largest_code
        if scale < torch.finfo(torch.float32).tiny:
            out += [0.0] * len(block)
            continue
        for value in block:
            out.append((torch.tensor(nearest_code(torch.tensor(value) / scale, codec)) * scale).item())
    return torch.tensor(out).to(x.dtype).reshape(x.shape)


@every_backend
@pytest.mark.parametrize(("dtype", "codec", "shape"), covering(DTYPES, CODECS, SHAPES))
def test_round_trip(backend: str, dtype: torch.dtype, codec: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    with ops.use_backend(backend):
        wire = ops.pack(x, codec)
        back, by_header = ops.unpack(wire, shape, dtype, codec), ops.unpack(wire, shape, dtype)
    assert wire.dtype == torch.uint8
    assert wire.shape == (ops.wire_bytes(shape, dtype, codec),)
    assert wire.shape[0] % 64 == 0
    assert_equal(back, by_hand(x, codec), f"{codec} of {shape}")
    assert_equal(by_header, back, "decoded by its header")


@every_backend
@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=150),
    codec=st.sampled_from(CODECS),
)
def test_any_fp32_values(backend: str, values: list[float], codec: str) -> None:
    x = torch.tensor(values)
    with ops.use_backend(backend):
        back = ops.unpack(ops.pack(x, codec), x.shape, x.dtype, codec)
    assert_equal(back, by_hand(x, codec), codec)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_error_is_at_most_half_a_step(backend: str, dtype: torch.dtype) -> None:
    x = (torch.randn(1000) * torch.logspace(-3, 3, 1000)).to(dtype)
    with ops.use_backend(backend):
        back = ops.unpack(ops.pack(x, "int8"), x.shape, torch.float32, "int8")
    padded = torch.nn.functional.pad(wide(x), (0, 24)).view(16, 64)
    step = (padded.abs().amax(1, keepdim=True) / 127).expand(16, 64).reshape(-1)[:1000]
    excess = (back - wide(x)).abs() - step * (0.5 + 1e-5)
    assert excess.max() <= 0, f"element {int(excess.argmax())} of 1000"


@every_backend
@pytest.mark.parametrize("codec", ["int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_makes_its_block_nan(backend: str, codec: str, bad: float) -> None:
    x = torch.randn(200)
    x[70] = bad
    with ops.use_backend(backend):
        back = ops.unpack(ops.pack(x, codec), x.shape, x.dtype, codec)
    assert back[64:128].isnan().all()
    assert torch.isfinite(back[:64]).all()
    assert torch.isfinite(back[128:]).all()


@every_backend
def test_int4_layout(backend: str) -> None:
    """Two values a byte, the first in the low bits, two's complement; 32 values a scale; an odd end is padded."""
    x = torch.tensor([7.0, -7.0, 1.0, -1.0, 3.4] + [0.0] * 27 + [14.0, float("nan"), 2.0])
    with ops.use_backend(backend):
        wire = ops.pack(x, "int4")
        back = ops.unpack(wire, (35,), torch.float32, "int4")
    assert wire[64:72].view(torch.float32)[0] == 1.0
    assert wire[64:72].view(torch.float32)[1].isnan()
    assert wire[128:131].tolist() == [0x97, 0xF1, 0x03]
    assert not wire[128 + 18 :].any()
    assert back[:5].tolist() == [7, -7, 1, -1, 3]
    assert back[32:].isnan().all()


@every_backend
def test_overflow_of_the_fp16_codec_is_seen(backend: str) -> None:
    with ops.use_backend(backend):
        back = ops.unpack(ops.pack(torch.tensor([1e6, 1.0]), "fp16"), (2,), torch.float32, "fp16")
    assert back.tolist() == [float("inf"), 1.0]


@every_backend
@pytest.mark.parametrize("codec", CODECS)
def test_strides_do_not_matter(backend: str, codec: str) -> None:
    x = torch.randn(7, 6, 5).transpose(0, 2)[:, ::2]
    with ops.use_backend(backend):
        assert_equal(ops.pack(x, codec), ops.pack(x.contiguous(), codec), "wire")


@every_backend
def test_wires_at_any_byte_offset_decode(backend: str) -> None:
    x = torch.randn(100)
    with ops.use_backend(backend):
        wire = ops.pack(x, "int8")
        shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), wire])[1:]
        assert_equal(ops.unpack(shifted, (100,), x.dtype, "int8"), ops.unpack(wire, (100,), x.dtype, "int8"), "x")


@every_backend
@pytest.mark.parametrize("codec", CODECS)
def test_header_and_padding_bytes(backend: str, codec: str) -> None:
    x = torch.randn(3, 23).bfloat16()
    with ops.use_backend(backend):
        data = bytes(ops.pack(x, codec).tolist())
    block, code = BLOCKS.get(codec, (0, 0))[0], CODECS.index(codec)
    assert data[:64] == struct.pack("<4sBBBBIIqqqqqq", b"SPUW", 1, code, 1, 2, block, 0, 69, 3, 23, 0, 0, 0)
    if codec in BLOCKS:
        payload, scales = (35, 3) if codec == "int4" else (69, 2)
        assert len(data) == 64 + 64 + (payload + 63) // 64 * 64
        assert not any(data[64 + 4 * scales : 128])
        assert not any(data[128 + payload :])
    else:
        assert len(data) == 64 + 192
        assert not any(data[64 + 138 :])


def test_every_backend_writes_the_same_bytes() -> None:
    names = [name for name, status in ops.backends().items() if status.available]
    for dtype in DTYPES:
        x = (torch.randn(999) * torch.logspace(-6, 4, 999)).to(dtype)
        for codec in CODECS:
            wires = []
            for name in names:
                with ops.use_backend(name):
                    wires.append(ops.pack(x, codec))
            for name, wire in zip(names, wires):
                assert_equal(wire, wires[0], f"{codec} of {dtype} by {name}")


def test_with_a_codec_given_garbage_is_not_looked_at() -> None:
    garbage = torch.full((ops.wire_bytes((5, 7), torch.float16, "int8"),), 255, dtype=torch.uint8)
    assert ops.unpack(garbage, (5, 7), torch.float16, "int8").shape == (5, 7)


def test_wrong_wires_are_named() -> None:
    wire = ops.pack(torch.randn(5, 7), "int8")
    with pytest.raises(ValueError, match=r"holds a tensor of shape \(5, 7\), not \(7, 5\)"):
        ops.unpack(wire, (7, 5), torch.float32)
    with pytest.raises(ValueError, match=r"packed from torch.float32, not torch.float16"):
        ops.unpack(wire, (5, 7), torch.float16)
    with pytest.raises(ValueError, match=r"has 192 bytes, but \(5, 7\) torch.float32 in codec 'fp16' takes 192|bytes"):
        ops.unpack(wire[:-1], (5, 7), torch.float32, "int8")
    with pytest.raises(ValueError, match="not a wire: it starts with"):
        ops.unpack(torch.zeros_like(wire), (5, 7), torch.float32)
    newer = wire.clone()
    newer[4] = 9
    with pytest.raises(ValueError, match="wire version 9"):
        ops.unpack(newer, (5, 7), torch.float32)
    corrupt = wire.clone()
    corrupt[8] = 3
    with pytest.raises(ValueError, match=r"corrupt wire header.*block 3"):
        ops.unpack(corrupt, (5, 7), torch.float32)
    with pytest.raises(TypeError, match=r"flat uint8 tensor, got torch.float32 of shape \(3,\)"):
        ops.unpack(torch.zeros(3), (3,), torch.float32, "int8")
    with pytest.raises(ValueError, match="not a wire: 3 bytes"):
        ops.unpack(wire[:3], (5, 7), torch.float32)


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(ValueError, match="unknown codec 'zip': use one of 'fp16', 'bf16', 'int8', 'int4'"):
        ops.pack(torch.zeros(3), "zip")
    with pytest.raises(TypeError, match=r"cannot pack torch\.float64"):
        ops.pack(torch.zeros(3, dtype=torch.float64), "fp16")
    with pytest.raises(ValueError, match="6 dimensions"):
        ops.pack(torch.zeros(1, 1, 1, 1, 1, 1), "fp16")


@every_backend
def test_opcheck(backend: str) -> None:
    assert_registered(
        backend,
        ("pack", torch.randn(3, 50), "int8"),
        ("pack", torch.randn(3, 5).half(), "bf16"),
        ("pack", torch.randn(3, 5).half(), "int4"),
        ("unpack", ops.pack(torch.randn(3, 50), "fp8_e5m2"), (3, 50), torch.float16, "fp8_e5m2"),
        ("unpack", ops.pack(torch.randn(3, 50), "int8"), (3, 50), torch.float32, "int8"),
    )
