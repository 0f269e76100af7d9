"""Packing into host memory, unpacking from it, and copying lists in, on the devices that are here."""

from __future__ import annotations

import pytest
import torch
from backend_params import every_backend
from numeric import assert_equal

from spu import ops
from spu.ops import host

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@every_backend
def test_there_and_back(backend: str) -> None:
    device = "cpu" if backend == "cpu" else DEVICE
    x = torch.randn(3, 70, device=device).half()
    with ops.use_backend(backend):
        for codec in ops.CODECS:
            expected = ops.pack(x, codec)
            wire = ops.pack_to_host(x, codec)
            out = torch.empty_like(x)
            back = ops.unpack_from_host(wire, out, codec)
            if x.is_cuda:
                torch.cuda.synchronize()
            assert wire.device.type == "cpu"
            assert_equal(wire, expected.cpu(), codec)
            assert back is out
            assert_equal(out, ops.unpack(expected, x.shape, x.dtype, codec), codec)
            again = ops.pack_to_host(x, codec, wire.clone() if not x.is_cuda else wire, stores=False)
            if x.is_cuda:
                torch.cuda.synchronize()
            assert_equal(again, wire, codec)


@every_backend
def test_lists_are_converted_on_arrival(backend: str) -> None:
    device = "cpu" if backend == "cpu" else DEVICE
    sources = [torch.randn(n).to(dtype) for n, dtype in ((5, torch.float16), (0, torch.float32), (33, torch.float32))]
    types = (torch.float32, torch.float16, torch.bfloat16)
    targets = [torch.zeros(s.shape, dtype=t, device=device) for s, t in zip(sources, types)]
    with ops.use_backend(backend):
        ops.copy_in(sources, targets)
        ops.copy_in([], [])
    for source, target in zip(sources, targets):
        assert_equal(target.cpu(), source.to(target.dtype))


def test_what_does_not_fit_is_named() -> None:
    x = torch.randn(4).half()
    with pytest.raises(ValueError, match=r"uint8 of shape \(128,\) on the host.*got torch.uint8 \(3,"):
        ops.pack_to_host(x, "fp16", torch.empty(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="got torch.float32"):
        ops.unpack_from_host(torch.empty(128), x, "fp16")
    with pytest.raises(ValueError, match="int3"):
        ops.pack_to_host(x, "int3")
    with pytest.raises(ValueError, match="1 sources for 2 targets"):
        ops.copy_in([x], [x, x])
    with pytest.raises(ValueError, match=r"target 0 is \(4,\) on cpu, its source \(3,\)"):
        ops.copy_in([x[:3]], [x])


def test_the_way_is_the_tables_and_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:  # what the choice looks at
        is_cuda, device, dtype = True, torch.device("cuda:0"), torch.float16

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    for preferred, stores in (("cuda", True), ("triton", False), (None, False)):
        monkeypatch.setattr(host, "select_cuda", lambda *_, preferred=preferred: preferred)
        assert host._by_kernel("pack_", OnCuda, None) == stores  # type: ignore[arg-type]
    assert not host._by_kernel("pack_", OnCuda, False)  # type: ignore[arg-type]
    missing = ops.BackendStatus("cuda", False, "spu._cuda is not built", "build it")
    monkeypatch.setattr(host, "status_of", lambda name: missing)
    with pytest.raises(RuntimeError, match="stores=True needs the CUDA library: spu._cuda is not built"):
        host._by_kernel("pack_", OnCuda, True)  # type: ignore[arg-type]
    assert not host._by_kernel("pack_", torch.zeros(1), True), "on the CPU there is no link"
