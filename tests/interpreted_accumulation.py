"""fp16 accumulation: its bound, where it is used, and when it is given up; run interpreted.

Cases of test_triton_kernels.py, run by it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from interpreted_products import config, operands
from numeric import assert_equal

from spu import kernels
from spu.kernels import accumulation
from spu.kernels.config import Config


@pytest.mark.parametrize("kind", ["tile", "descriptor", "split"])
def test_fp16_accumulation_keeps_its_bound(kind: str) -> None:
    x, w, _, _ = operands((40, 72, 200), torch.float16)
    one = config(kind, block_k=64)
    y, _ = kernels.linear_fwd(x, w, config=dataclasses.replace(one, half=True))
    full, _ = kernels.linear_fwd(x, w, config=one)
    truth, sizes = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    bound = 64 / 16 * 2.0**-11 * sizes + 2.0**-11 * truth.abs() + 1e-6
    assert ((y - truth).abs() <= bound).all()
    assert not torch.equal(y, full), "nothing was summed in fp16"


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> dict[object, accumulation.Watch]:
    """Without those of earlier tests."""
    monkeypatch.setattr(accumulation, "_WATCHES", {})
    return accumulation._WATCHES


def test_fp16_accumulation_is_used_where_it_is_asked_for_alone(watches: dict[object, accumulation.Watch]) -> None:
    x, w, _, _ = operands((40, 72, 200), torch.float16)
    plain = kernels.linear_fwd(x, w)[0]
    assert not watches, "off by default"
    with kernels.fp16_accumulation():
        for _ in range(2):  # the second call reads the first one's check
            assert not torch.equal(kernels.linear_fwd(x, w)[0], plain)
        with kernels.fp16_accumulation(enabled=False):
            assert_equal(kernels.linear_fwd(x, w)[0], plain)
        main = torch.empty(72, 200)
        kernels.linear_dw_(torch.randn(40, 72).half(), x, main, torch.ones(1), torch.zeros(1), False)
        wide = x.float(), w.float()
        assert_equal(kernels.linear_fwd(*wide)[0], kernels.linear_fwd(*wide, config=Config())[0])
    assert_equal(kernels.linear_fwd(x, w)[0], plain)
    assert [watch.usable for watch in watches.values()] == [True], "one product was watched, the forward's"


def test_fp16_accumulation_of_nothing(watches: dict[object, accumulation.Watch]) -> None:
    """There is no row to compare: a batch without tokens is no reason to fail, nor for a check."""
    with kernels.fp16_accumulation():
        for m, n, k in ((0, 5, 4), (3, 0, 4), (3, 5, 0)):
            x, w = torch.randn(m, k).half(), torch.randn(n, k).half()
            assert_equal(kernels.linear_fwd(x, w)[0], torch.zeros(m, n).half())
            assert kernels.linear_dx(torch.randn(m, n).half(), w).shape == (m, k)


def test_fp16_accumulation_gives_up_where_partial_sums_overflow(watches: dict[object, accumulation.Watch]) -> None:
    """A block's sum of 288,000 is infinite in fp16, though the whole is not; the input gradient of it as well."""
    x, w = torch.full((40, 64), 30.0).half(), torch.full((8, 64), 300.0).half()
    w[:, 32:] = -290.0
    plain = kernels.linear_fwd(x, w)[0]
    with kernels.fp16_accumulation():
        assert not kernels.linear_fwd(x, w)[0].isfinite().any()
        with pytest.warns(RuntimeWarning, match=r"off for linear by \[64, 8\]"):
            kernels.linear_fwd(x, w)
        assert_equal(kernels.linear_fwd(x, w)[0], plain)
        assert kernels.linear_dx(torch.ones(40, 8).half(), w)[0].isfinite().all()
    assert [watch.usable for watch in watches.values()] == [False, True]
