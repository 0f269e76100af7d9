"""The arithmetic of csrc/math, compiled for plain scalars on the host: what a CUDA kernel includes, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close_to_truth, assert_equal
from torch import Tensor

from spu.ops import masters, moments

CSRC = Path(__file__).resolve().parent.parent / "csrc"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not (CSRC / "math").is_dir(), reason="needs g++ and the sources in csrc/math"
)

SOURCE = """
#include "math/activation.h"
#include "math/adamw.h"
#include "math/codec.h"
#include "math/half.h"
#include "math/masters.h"
#include "math/moments.h"
#include "math/wire.h"
using namespace spu::math;
#define EXPORT extern "C" __attribute__((visibility("default")))
template <Act A> void forward(const float* z, float* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = activate<A, float>(z[i]);
}
template <Act A> void backward(const float* dy, const float* z, float* dz, long n) {
  for (long i = 0; i < n; ++i) dz[i] = activate_backward<A, float>(dy[i], z[i]);
}
EXPORT void activate_(int act, const float* z, float* y, long n) {
  void (*table[])(const float*, float*, long) = {forward<Act::none>, forward<Act::relu>, forward<Act::gelu>,
                                                 forward<Act::gelu_tanh>, forward<Act::silu>};
  table[act](z, y, n);
}
EXPORT void activate_backward_(int act, const float* dy, const float* z, float* dz, long n) {
  void (*table[])(const float*, const float*, float*, long) = {
      backward<Act::none>, backward<Act::relu>, backward<Act::gelu>, backward<Act::gelu_tanh>, backward<Act::silu>};
  table[act](dy, z, dz, n);
}
EXPORT void exp_(const float* x, float* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = spu::math::exp<float>(x[i]);
}
EXPORT void normal_(const float* x, float* cdf, float* pdf, long n) {
  for (long i = 0; i < n; ++i) {
    const Normal<float> v = normal<float>(x[i]);
    cdf[i] = v.cdf, pdf[i] = v.pdf;
  }
}
EXPORT void narrow(int bf16, const float* x, uint16_t* h, long n) {
  for (long i = 0; i < n; ++i) h[i] = (uint16_t)(bf16 ? float_to_bf16<float>(x[i]) : float_to_fp16<float>(x[i]));
}
EXPORT void widen(int bf16, const uint16_t* h, float* x, long n) {
  for (long i = 0; i < n; ++i) {
    const uint32_t u = h[i];
    x[i] = bf16 ? bf16_to_float<float>(u) : fp16_to_float<float>(u);
  }
}
EXPORT void encode(const float* x, float* scales, int8_t* codes, long blocks) {
  for (long b = 0; b < blocks; ++b) {
    float most = 0;
    for (int i = 0; i < kInt8Block; ++i) {
      const float a = abs(x[b * kInt8Block + i]);
      if (!(a <= most)) most = a != a ? a : most > a ? most : a;
      if (most != most) break;
    }
    scales[b] = int8_scale(most);
    for (int i = 0; i < kInt8Block; ++i) {
      const float v = x[b * kInt8Block + i];
      codes[b * kInt8Block + i] = int8_scale_codes(scales[b]) ? (int8_t)int8_code<float>(v, scales[b]) : 0;
    }
  }
}
EXPORT void adamw(float* p, const float* g, float* m, float* v, long n, float decay, float one_minus_b1, float b2,
                  float one_minus_b2, float step_size, float bias2_sqrt, float eps) {
  const AdamWStep k = {decay, one_minus_b1, b2, one_minus_b2, step_size, bias2_sqrt, eps};
  for (long i = 0; i < n; ++i) {
    const AdamWState<float> s = adamw_step<float>({p[i], m[i], v[i]}, g[i], k);
    p[i] = s.param, m[i] = s.m, v[i] = s.v;
  }
}
EXPORT void fp8(const float* x, uint8_t* codes, float* values, long n, int e4m3) {
  for (long i = 0; i < n; ++i) {
    const uint32_t code = e4m3 ? fp8_code<3, 7, float>(x[i], 1.0f, kE4m3Largest)
                               : fp8_code<2, 15, float>(x[i], 1.0f, kE5m2Largest);
    codes[i] = (uint8_t)code;
    values[i] = e4m3 ? fp8_value<3, 7, float>(code) : fp8_value<2, 15, float>(code);
  }
}
EXPORT void moment_codes(const float* x, const uint32_t* bits, uint8_t* codes, float* values, long n, int is_signed) {
  for (long i = 0; i < n; ++i) {
    const uint32_t code = is_signed ? moment_code<true, float>(x[i], 1.0f, bits[i])
                                    : moment_code<false, float>(x[i], 1.0f, bits[i]);
    codes[i] = (uint8_t)code;
    values[i] = is_signed ? moment_value<true, float>(code) : moment_value<false, float>(code);
  }
}
EXPORT void moment_bf16(const float* x, const uint32_t* bits, uint16_t* h, long n) {
  for (long i = 0; i < n; ++i) h[i] = (uint16_t)stochastic_bf16<float>(x[i], bits[i]);
}
EXPORT void noise(float step, uint32_t* bits, long n) {
  for (long i = 0; i < n; ++i) bits[i] = moment_noise<uint32_t>((uint32_t)i, moment_seed(step));
}
template <bool Fp16, int Bits>
void correct(const float* x, const uint32_t* noise, uint16_t* weight, int16_t* correction, float* back, long n) {
  for (long i = 0; i < n; ++i) {
    const Corrected<float> s = split<Fp16, Bits, float>(x[i], master_noise<uint32_t>(noise[i]));
    weight[i] = (uint16_t)s.weight;
    correction[i] = Bits == 16 ? (int16_t)s.correction : (int16_t)(int8_t)s.correction;
    back[i] = joined<Fp16, Bits, float>(weight[i], correction[i]);
  }
}
EXPORT void corrections(int bf16, int bits, const float* x, const uint32_t* noise, uint16_t* weight,
                        int16_t* correction, float* back, long n) {
  if (bf16) return (bits == 8 ? correct<false, 8> : correct<false, 16>)(x, noise, weight, correction, back, n);
  return (bits == 8 ? correct<true, 8> : correct<true, 16>)(x, noise, weight, correction, back, n);
}
EXPORT long moment_size(long numel) {
  return moment_bytes(numel);
}
EXPORT long wire_size(long numel, int codec) {
  return spu::wire::wire_bytes(numel, static_cast<spu::wire::Codec>(codec));
}
"""

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    torch.clone,
    F.relu,
    F.gelu,
    lambda z: F.gelu(z, approximate="tanh"),
    F.silu,
]


@pytest.fixture(scope="module", params=["plain", "fused"])
def math(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions above, without and with fused multiply-add."""
    folder = tmp_path_factory.mktemp("math")
    (folder / "math.cpp").write_text(SOURCE)
    fused = request.param == "fused"
    if fused and " fma " not in Path("/proc/cpuinfo").read_text().replace("\n", " "):
        pytest.skip("this CPU has no fused multiply-add")
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    command += [*(["-mfma"] if fused else []), f"-I{CSRC}", str(folder / "math.cpp"), "-o", str(folder / "m.so")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(folder / "m.so"))
    library.wire_size.restype = library.moment_size.restype = ctypes.c_long
    return library


def at(t: Tensor) -> ctypes.c_void_p:
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def spread() -> Tensor:
    dense = torch.linspace(-12, 12, 200_001)
    wide = torch.cat((torch.logspace(-38, 38, 5001), torch.zeros(1)))
    return torch.cat((dense, wide, -wide))


@pytest.mark.parametrize("act", range(5))
def test_activations(math: ctypes.CDLL, act: int) -> None:
    z = spread()
    y = torch.empty_like(z)
    math.activate_(act, at(z), at(y), ctypes.c_long(z.numel()))
    function = ACTIVATIONS[act]
    finite = z.abs() < 1e30
    truth, plain = function(z.double()), function(z)
    near = z.abs() <= 12  # apart, so that large values do not set the bound of the small ones
    assert_close_to_truth(y[near], plain[near], truth[near])
    assert_close_to_truth(y[finite], plain[finite], truth[finite])
    # the *relative* error of the negative tail, which plain torch loses; exponents up to 17 are rounded there
    small = (z.abs() <= 5) & (z != 0)
    assert float(((y.double() - truth).abs() / truth.abs().clamp(min=1e-30))[small].max()) < 3e-6


@pytest.mark.parametrize("act", range(1, 5))
def test_derivatives(math: ctypes.CDLL, act: int) -> None:
    z = spread()
    z = z[z.abs() < 1e10]
    dy = torch.full_like(z, 3.0)
    leaf, plain_leaf = z.double().requires_grad_(), z.clone().requires_grad_()
    (truth,) = torch.autograd.grad(ACTIVATIONS[act](leaf), leaf, dy.double())
    (plain,) = torch.autograd.grad(ACTIVATIONS[act](plain_leaf), plain_leaf, dy)
    saved = F.relu(z) if act == 1 else z
    dz = torch.empty_like(z)
    math.activate_backward_(act, at(dy), at(saved), at(dz), ctypes.c_long(z.numel()))
    assert_close_to_truth(dz, plain, truth)


def test_exp(math: ctypes.CDLL) -> None:
    x = torch.cat((torch.linspace(-87, 88.7, 300_001), torch.tensor([0.0, -0.0])))
    y = torch.empty_like(x)
    math.exp_(at(x), at(y), ctypes.c_long(x.numel()))
    error = (y.double() / x.double().exp() - 1).abs().max()
    assert float(error) < 2 * torch.finfo(torch.float32).eps
    ends = torch.tensor([89.0, 1e30, float("inf"), -104.0, -1e30, float("-inf"), float("nan"), -100.0])
    out = torch.empty_like(ends)
    math.exp_(at(ends), at(out), ctypes.c_long(ends.numel()))
    assert out[:3].isinf().all()
    assert out[3:6].abs().max() < 1e-44
    assert out[6].isnan()
    assert out[7].item() == pytest.approx(3.7835e-44, rel=0.05)  # subnormal


def test_normal_distribution_keeps_the_relative_error_of_its_tail(math: ctypes.CDLL) -> None:
    x = torch.linspace(-12, 12, 100_001)
    cdf, pdf = torch.empty_like(x), torch.empty_like(x)
    math.normal_(at(x), at(cdf), at(pdf), ctypes.c_long(x.numel()))
    truth = torch.special.erfc(-x.double() / 2**0.5) / 2
    relative = (cdf.double() / truth - 1).abs()
    # the argument -x^2/2 is itself rounded: its absolute error is a relative one of the result
    assert float((relative / (1 + x.double() ** 2 / 4)).max()) < 5e-7
    density = torch.exp(-(x.double() ** 2) / 2) / (2 * torch.pi) ** 0.5
    assert float(((pdf.double() / density - 1).abs() / (1 + x.double() ** 2 / 4)).max()) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_conversions(math: ctypes.CDLL, dtype: torch.dtype) -> None:
    bf16 = int(dtype == torch.bfloat16)
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    stored = every.view(dtype)
    wide = torch.empty(65536)
    math.widen(bf16, at(stored), at(wide), ctypes.c_long(65536))
    assert_equal(wide, stored.float(), "widened")
    finite = stored.float()[torch.isfinite(stored)]
    up = torch.nextafter(finite, torch.tensor(float("inf")))
    half_step = ((finite.double() + (every + 1).view(dtype).double()[torch.isfinite(stored)]) / 2).float()
    for values in (finite, up, half_step, torch.nextafter(half_step, torch.tensor(0.0)), wide):
        narrow = torch.empty(values.numel(), dtype=dtype)
        math.narrow(bf16, at(values), at(narrow), ctypes.c_long(values.numel()))
        assert_equal(narrow, values.to(dtype), "narrowed")


def test_int8_blocks(math: ctypes.CDLL) -> None:
    x = torch.randn(200, 64) * torch.logspace(-44, 38, 200)[:, None]
    x[7, 3], x[8, 63], x[9, 0] = float("nan"), float("inf"), float("-inf")
    x[10] = 0
    scales, codes = torch.empty(200), torch.empty(200, 64, dtype=torch.int8)
    math.encode(at(x), at(scales), at(codes), ctypes.c_long(200))
    absmax = x.abs().amax(1)
    expected = absmax / 127
    expected[expected < torch.finfo(torch.float32).tiny] = 0
    expected[~torch.isfinite(absmax)] = float("nan")
    assert_equal(scales, expected, "scales")
    usable = scales > 0
    wanted = (x[usable] / scales[usable, None]).round().clamp(-127, 127).to(torch.int8)
    assert_equal(codes[usable], wanted, "codes")
    assert not codes[~usable].any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_codes_and_values(math: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every finite fp16 value, what lies beside a tie, and values far outside."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = x[torch.isfinite(x)]
    x = torch.cat([x, x * (1 + 2.0**-20), x * (1 - 2.0**-20), torch.tensor([1e-30, -1e-42, 3e38, -3e38])])
    codes, values = torch.empty(x.shape, dtype=torch.uint8), torch.empty_like(x)
    math.fp8(at(x), at(codes), at(values), ctypes.c_long(x.numel()), int(dtype == torch.float8_e4m3fn))
    wanted = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    assert_equal(codes, wanted.view(torch.uint8), "codes")
    assert_equal(values, wanted.float(), "values")


@pytest.mark.parametrize("step", [1, 2, 1000])
def test_adamw(math: ctypes.CDLL, step: int) -> None:
    lr, b1, b2, eps, decay = 3e-3, 0.9, 0.999, 1e-8, 0.1
    g, start = torch.randn(5000) * torch.logspace(-9, 3, 5000), torch.randn(5000)
    m, v = torch.randn(5000), torch.rand(5000)
    results = []
    for dtype in (torch.float64, torch.float32):
        p = start.to(dtype, copy=True).requires_grad_()
        p.grad = g.to(dtype)
        optimizer = torch.optim.AdamW([p], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, foreach=False)
        state = {"step": torch.tensor(float(step - 1)), "exp_avg": m.to(dtype, copy=True)}
        optimizer.state[p] = {**state, "exp_avg_sq": v.to(dtype, copy=True)}
        optimizer.step()
        results.append((p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]))
    p, ours_m, ours_v = start.clone(), m.clone(), v.clone()
    constants = (1 - lr * decay, 1 - b1, b2, 1 - b2, lr / (1 - b1**step), (1 - b2**step) ** 0.5, eps)
    math.adamw(at(p), at(g), at(ours_m), at(ours_v), ctypes.c_long(5000), *map(ctypes.c_float, constants))
    for name, ours, truth, plain in zip(("param", "exp_avg", "exp_avg_sq"), (p, ours_m, ours_v), *results):
        assert_close_to_truth(ours, plain, truth, name=name)


def test_wire_size_is_pythons(math: ctypes.CDLL) -> None:
    from spu import ops

    for numel in (0, 1, 63, 64, 65, 1000, 4096):
        for code, name in enumerate(ops.CODECS):
            assert math.wire_size(ctypes.c_long(numel), code) == ops.wire_bytes((numel,), torch.float16, name)


def coded(math: ctypes.CDLL, x: Tensor, bits: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes, values, words = torch.empty(x.shape, dtype=torch.uint8), torch.empty_like(x), bits.int()
    math.moment_codes(at(x), at(words), at(codes), at(values), ctypes.c_long(x.numel()), int(signed))
    return codes, values


@pytest.mark.parametrize("signed", [True, False], ids=["first", "second"])
def test_moment_codes_of_every_fp16_value_and_every_noise(math: ctypes.CDLL, signed: bool) -> None:
    half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = half[half.abs() <= 1] if signed else half[(half >= 0) & (half <= 1)]
    x = torch.cat((x, x * 2.0**-10))  # down to where codes end, and below
    bits = torch.randint(0, 1 << 16, x.shape)
    codes, values = coded(math, x, bits, signed)
    assert_equal(codes, moments._codes(x, bits, signed).to(torch.uint8), "codes")
    wire = torch.cat((torch.ones(1), torch.zeros(15))).view(torch.uint8)
    every = torch.arange(256, dtype=torch.uint8)
    for block in every.view(4, 64):  # the decoding of all 256 codes, a block of values at a time
        decoded = moments.load_moment(torch.cat((wire, block)), (64,), signed=signed)
        _, again = coded(math, decoded, torch.zeros(64), signed)
        assert_equal(again, decoded, "a value that has a code keeps it")
    largest = 2.0 ** -(3 if signed else 4)
    normal = x.abs() >= 2.0**-15
    assert float(((values - x).abs() / x.abs())[normal].max()) <= largest
    assert bool((values[x == 0] == 0).all())
    assert signed or bool((values[x > 0] > 0).all()), "a root of 0 would be divided by"
    noise = torch.arange(1 << 16)
    for point in (1.0, 0.7, 0.126, 3e-3, 2.5e-5, *([1e-5] if signed else [])):
        for sign in (1, -1) if signed else (1,):
            value = torch.full((1 << 16,), sign * point)
            mean = coded(math, value, noise, signed)[1].double().mean().item()
            assert mean == pytest.approx(sign * point, rel=1e-4 if point > 2e-5 else 2e-2), "right on average"


def test_bf16_rounded_with_every_noise(math: ctypes.CDLL) -> None:
    noise = torch.arange(1 << 16)
    words = noise.int()
    for value in (1.0, 1.0 + 2.0**-9, -3.3, 1e-39, 3.4e38, float("inf"), float("nan")):
        x, stored = torch.full((1 << 16,), value), torch.empty(1 << 16, dtype=torch.bfloat16)
        math.moment_bf16(at(x), at(words), at(stored), ctypes.c_long(1 << 16))
        assert_equal(stored, moments.stored_moment(x, "bf16", noise, signed=True))
        if abs(value) < 1e38:
            assert stored.double().mean().item() == pytest.approx(x[0].double().item(), rel=1e-5)
        assert bool((stored.isfinite() == x.isfinite()).all())


@pytest.mark.parametrize("form", masters.MASTERS[1:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_corrections_are_pythons(math: ctypes.CDLL, dtype: torch.dtype, form: str) -> None:
    every = torch.arange(-(1 << 31), 1 << 31, 49_999)
    dense = torch.cat((torch.arange(0x36000000, 0x39000000, 1009), torch.arange(0x477F0000, 0x47810000, 3)))
    x = torch.cat((every, dense, dense - (1 << 31))).to(torch.int32).view(torch.float32)
    noise = torch.randint(0, 1 << 32, x.shape)
    weight, wide = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape, dtype=torch.int16)
    words = noise.to(torch.uint32)  # kept alive
    back, bits = torch.empty_like(x), 8 * masters.correction_dtype(form).itemsize
    bf16, count = int(dtype == torch.bfloat16), ctypes.c_long(x.numel())
    math.corrections(bf16, bits, at(x), at(words), at(weight), at(wide), at(back), count)
    expected, rest = masters.split(x, dtype, form, masters.master_noise(noise))
    assert_equal(weight, expected, "weight")
    assert_equal(weight.signbit(), expected.signbit(), "sign")
    assert_equal(wide.to(rest.dtype), rest, "correction")
    assert_equal(back, masters.joined(expected, rest), "joined")


def test_noise_and_sizes_are_pythons(math: ctypes.CDLL) -> None:
    for step in (1.0, 77_777.0):
        bits = torch.empty(10_000, dtype=torch.int32)
        math.noise(ctypes.c_float(step), at(bits), ctypes.c_long(10_000))
        wanted = moments.noise(10_000, torch.tensor([step]))
        assert_equal(bits.long() & 0xFFFFFFFF, wanted)
        for share in (wanted & 0xFFFF, wanted >> 16):  # uniform, and unlike its neighbours
            assert float(share.double().mean() / 65536) == pytest.approx(0.5, abs=0.02)
            assert abs(float(torch.corrcoef(torch.stack((share[1:], share[:-1])).double())[0, 1])) < 0.05
    for numel in (0, 1, 64, 65, 1023, 1025):
        assert math.moment_size(ctypes.c_long(numel)) == moments.moment_bytes(numel)
