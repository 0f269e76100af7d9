"""String arguments of the compiled ops leave nothing behind: see csrc/torch/text.h."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch

from spu.ops import choose_backend

pytest.importorskip("spu._C", reason="spu._C is not built here")

OPS = torch.ops.spu
CALLS = 2000


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def in_use() -> int:
    """Bytes of the C library's heap that are in use."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later")
    library.mallinfo2.restype = _MallInfo
    gc.collect()
    return int(library.mallinfo2().uordblks)


def calls() -> dict[str, Callable[[], object]]:
    choose_backend(torch.zeros(1))
    x, w, h = (torch.randn(*size).half() for size in ((4, 8), (6, 8), (4, 6)))
    wire = OPS.pack.cpu(x, "int8")
    return {
        "linear": lambda: OPS.linear.cpu(x, w, None, "gelu", True),
        "linear_dz": lambda: OPS.linear_dz.cpu(h, h, "gelu"),
        "gated_linear": lambda: OPS.gated_linear.cpu(x, w, w, "silu", True),
        "gated_dz": lambda: OPS.gated_dz.cpu(h, h, h, "silu"),
        "gated_dh": lambda: OPS.gated_dh.cpu(x, w.t(), h, h, "silu"),
        "mlp_dz": lambda: OPS.mlp_dz.cpu(x, w.t(), h, "relu", True, True),
        "pack": lambda: OPS.pack.cpu(x, "int8"),
        "unpack": lambda: OPS.unpack.cpu(wire, [4, 8], torch.float16, "int8"),
    }


NAMES = ("linear", "linear_dz", "gated_linear", "gated_dz", "gated_dh", "mlp_dz", "pack", "unpack")


@pytest.mark.parametrize("name", NAMES)
def test_a_call_leaves_nothing_on_the_heap(name: str) -> None:
    call = calls()[name]
    for _ in range(50):
        call()
    before = in_use()
    for _ in range(CALLS):
        call()
    assert (in_use() - before) / CALLS < 12  # a string is 48 bytes


def test_names_are_read_whole() -> None:
    """One longer than a short string's own place, empty ones, and those that are no names."""
    x = torch.zeros(2, 2)
    for name in ("", "gelu_tanh_of_a_name_that_is_longer_than_any", "gelu\0", "GELU"):
        with pytest.raises(ValueError, match="unknown activation"):
            OPS.linear.cpu(x, x, None, name, False)
    OPS.linear.cpu(x, x, None, "gelu_tanh", False)
