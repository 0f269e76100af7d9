"""What only a GPU can run: the matrix products on tensor cores, their epilogues, and streams."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from activations import ACTIVATIONS
from numeric import assert_close_to_truth, assert_equal, tensor_core_limit
from torch.nn.functional import scaled_dot_product_attention as sdpa

from spu import ops
from spu.nn.documents import by_documents, document_lengths

pytestmark = pytest.mark.gpu
OPS = torch.ops.spu
# rows, out, in: less than a tile, one tile, several with ragged edges, and, last, enough of them for the large tile;
# out and in are multiples of 8, as TMA needs
SHAPES = [(1, 8, 8), (128, 128, 64), (200, 264, 136), (1000, 512, 384), (17, 1032, 72), (2041, 1160, 136)]


@pytest.fixture(autouse=True)
def library() -> None:
    status = ops.backends()["cuda"]
    if not status.available:
        pytest.skip(f"backend cuda: {status.reason}")


def make(rows: int, out: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("bf16 has no tensor cores below sm_80")
    x, w = torch.randn(rows, inner), torch.randn(out, inner) / inner**0.5
    return x.cuda().to(dtype), w.cuda().to(dtype), torch.randn(rows, out).cuda().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, _ = make(*shape, dtype)
    b = torch.randn(shape[1]).cuda().to(dtype)
    for bias in (b, None):
        truth_z = x.double() @ w.double().t() + (0 if bias is None else bias.double())
        plain_z = torch.nn.functional.linear(x, w, bias)
        for name, act in ACTIVATIONS.items():
            y, z = OPS.linear.cuda(x, w, bias, name, True)
            assert_close_to_truth(z, plain_z, truth_z, name=f"z ({name})")
            assert_close_to_truth(y, act(plain_z), act(truth_z), name=f"y ({name})")
            assert_equal(OPS.linear.cuda(x, w, bias, name, False)[0], y, "y without preact")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, dz = make(*shape, dtype)
    assert_close_to_truth(OPS.linear_dx.cuda(dz, w), dz @ w, dz.double() @ w.double(), name="dx")
    truth = dz.double().t() @ x.double()
    assert_close_to_truth(OPS.linear_dw.cuda(dz, x), dz.t() @ x, truth, name="dw")
    inv_scale, found_inf = torch.full((1,), 0.125).cuda(), torch.zeros(1).cuda()
    main_grad = torch.full(truth.shape, float("nan")).cuda()  # a store must not read it
    OPS.linear_dw_.cuda(dz, x, main_grad, inv_scale, found_inf, False)
    plain, limit = (dz.float().t() @ x.float()) * 0.125, tensor_core_limit(dz.t(), x) * 0.125
    assert_close_to_truth(main_grad, plain, truth * 0.125, limit=limit, name="main_grad, stored")
    OPS.linear_dw_.cuda(dz, x, main_grad, inv_scale, found_inf, True)
    assert_close_to_truth(main_grad, 2 * plain, truth * 0.25, limit=2 * limit, name="main_grad, added to")
    assert found_inf.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gate_of_the_second_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w_gate, _ = make(*shape, dtype)
    w_up = w_gate.flip(0).contiguous()
    gate, up = (x.double() @ w.double().t() for w in (w_gate, w_up))
    plain_gate, plain_up = (torch.nn.functional.linear(x, w) for w in (w_gate, w_up))
    for name in ("silu", "gelu", "gelu_tanh"):
        act = ACTIVATIONS[name]
        h, kept_gate, kept_up = OPS.gated_linear.cuda(x, w_gate, w_up, name, True)
        assert_close_to_truth(h, act(plain_gate) * plain_up, act(gate) * up, name=f"h ({name})")
        assert_close_to_truth(kept_gate, plain_gate, gate, name="gate")
        assert_close_to_truth(kept_up, plain_up, up, name="up")
        assert_equal(OPS.gated_linear.cuda(x, w_gate, w_up, name, False)[0], h, "h without what a backward needs")


def test_both_tiles_of_every_form() -> None:
    from spu import _cuda  # type: ignore[attr-defined]
    from spu.ops import cuda_library

    major, minor = torch.cuda.get_device_capability()
    chosen = cuda_library.packed_tiles((major, minor))
    x, w, dz = make(300, 264, 136, torch.float16)
    truth = x.double() @ w.double().t(), dz.double() @ w.double()
    try:
        for tile in (0, 1):
            _cuda.set_tiles(10 * major + minor, bytes([tile]) * len(chosen))
            assert_close_to_truth(OPS.linear.cuda(x, w, None, "none", False)[0], x @ w.t(), truth[0], name=f"y, {tile}")
            assert_close_to_truth(OPS.linear_dx.cuda(dz, w), dz @ w, truth[1], name=f"dx, tile {tile}")
    finally:
        _cuda.set_tiles(10 * major + minor, chosen)


def test_host_memory_is_reached_both_ways() -> None:
    x = torch.randn(300, 70).half().cuda()
    for codec in ops.CODECS:
        expected = ops.pack(x, codec).cpu()
        for stores in (True, False):
            wire, out = ops.pack_to_host(x, codec, stores=stores), torch.zeros_like(x)
            torch.cuda.synchronize()
            assert_equal(wire, expected, f"{codec}, stores={stores}")
            ops.unpack_from_host(wire, out, codec, stores=stores)
            assert_equal(out, ops.unpack(expected.cuda(), x.shape, x.dtype, codec), f"{codec}, loads={stores}")
    sources = [torch.randn(n).to(t).pin_memory() for n, t in ((5, torch.float16), (70_000, torch.float32))]
    for stores in (True, False):
        targets = [torch.zeros(s.shape, dtype=torch.bfloat16, device="cuda") for s in sources]
        ops.copy_in(sources, targets, stores=stores)
        for source, target in zip(sources, targets):
            assert_equal(target.cpu(), source.bfloat16(), f"stores={stores}")
    with pytest.raises(Exception, match="pinned host memory"):
        OPS.pack_.cuda(x, codec, torch.empty_like(expected))


def by_library(module: ModuleType, chosen: bool) -> None:
    """Let cuBLASLt serve every product, or what serves them else."""
    from spu.ops import cuda_library

    major, minor = torch.cuda.get_device_capability()
    tiles = cuda_library.packed_tiles((major, minor))
    module.set_tiles(10 * major + minor, bytes([2]) * len(tiles) if chosen else tiles)


@pytest.fixture
def cublaslt() -> Iterator[ModuleType]:
    """cuBLASLt for all products that it takes."""
    from spu import _cuda  # type: ignore[attr-defined]

    assert isinstance(_cuda.cublaslt(), int), _cuda.cublaslt()
    by_library(_cuda, True)
    yield _cuda
    by_library(_cuda, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_by_cublaslt(cublaslt: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    before = cublaslt.cublaslt_plans()
    test_forward(shape, dtype)
    test_gradients(shape, dtype)
    assert cublaslt.cublaslt_plans() >= before + 4, "plain, gelu with and without what it was taken of, gradients"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [32, 2048])  # the operands are looked at, or the sums
def test_overflows_by_cublaslt(cublaslt: ModuleType, rows: int, dtype: torch.dtype) -> None:
    x, _, dz = make(rows, 264, 136, dtype)
    main_grad, one, found_inf = torch.zeros(264, 136).cuda(), torch.ones(1).cuda(), torch.zeros(1).cuda()
    good = dz.clone()
    dz[rows - 1, 263] = float("inf")
    OPS.linear_dw_.cuda(dz, x, main_grad, one, found_inf, False)
    assert found_inf.item() == 1
    OPS.linear_dw_.cuda(good, x, main_grad, one, found_inf, True)
    assert found_inf.item() == 1
    assert not main_grad.isfinite().all(), "a sum with a good microbatch hides nothing"
    OPS.linear_dw_.cuda(good, x, main_grad, one, found_inf.zero_(), False)
    assert found_inf.item() == 0
    assert main_grad.isfinite().all(), "a store must not read what was there"


def test_cublaslt_in_a_graph(cublaslt: ModuleType) -> None:
    x, w, dz = make(512, 1024, 512, torch.float16)
    main_grad, scale, found_inf = torch.zeros(1024, 512).cuda(), torch.ones(1).cuda(), torch.zeros(1).cuda()

    def work() -> torch.Tensor:
        OPS.linear_dw_.cuda(dz, x, main_grad, scale, found_inf, True)
        return OPS.linear.cuda(x, w, None, "gelu_tanh", True)[0]

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = work()
    main_grad.zero_()
    scale.fill_(0.5)
    graph.replay()
    graph.replay()
    assert_equal(y, expected)
    plain, limit = dz.float().t() @ x.float(), tensor_core_limit(dz.t(), x)
    assert_close_to_truth(main_grad, plain, dz.double().t() @ x.double(), limit=limit, name="2 x 0.5, the scale of now")


@pytest.mark.parametrize("at", [(0, 0), (199, 263), (77, 130)])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_found_inf_sees_any_element_and_is_never_reset(bad: float, at: tuple[int, int]) -> None:
    x, _, dz = make(200, 264, 136, torch.float16)
    main_grad, one, found_inf = torch.zeros(264, 136).cuda(), torch.ones(1).cuda(), torch.zeros(1).cuda()
    good = dz.clone()
    dz[at] = bad
    OPS.linear_dw_.cuda(dz, x, main_grad, one, found_inf, False)
    assert found_inf.item() == 1
    OPS.linear_dw_.cuda(good, x, main_grad, one, found_inf, False)
    assert found_inf.item() == 1, "a later product must not clear the flag"


def test_products_follow_torchs_current_stream() -> None:
    x, w, _ = make(1000, 512, 384, torch.float16)
    expected = OPS.linear.cuda(x, w, None, "gelu", False)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)  # still waiting when the product is launched
        y = OPS.linear.cuda(late, w, None, "gelu", False)[0]
    stream.synchronize()
    assert_equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_documents_of_a_row_are_read_from_its_mask_and_computed_by_themselves(dtype: torch.dtype) -> None:
    lengths = [[500, 1, 523], [1024]]
    rows = [torch.block_diag(*(torch.ones(n, n).tril() for n in own)) for own in lengths]
    mask = torch.stack(rows)[:, None].bool().cuda()
    assert document_lengths(mask, 1024) == lengths
    q, k, v = (torch.randn(2, 8, 1024, 128).cuda().to(dtype) for _ in range(3))
    apart = by_documents(q, k, v, lengths, lambda *own: sdpa(*own[:3], is_causal=own[3]).transpose(1, 2))
    masked, truth = (sdpa(*(x.to(wide) for x in (q, k, v)), mask).transpose(1, 2) for wide in (dtype, torch.float64))
    assert_close_to_truth(apart, masked, truth)
