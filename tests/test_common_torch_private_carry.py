"""A carried value's references, also where torch takes none of its own."""

from __future__ import annotations

import ctypes
import sys

from spu.common import torch_private as private


def test_a_carried_value_is_held_where_torch_takes_no_reference() -> None:
    """torch 2.11 gave back a reference that it had not taken: a value's last one, after some calls, and a crash."""
    value, kept = object(), dict[str, int]()

    def stash(name: str, given: object) -> None:
        before = kept.get(name)
        kept[name] = id(given)
        if before is not None:
            ctypes.pythonapi.Py_DecRef(ctypes.cast(before, ctypes.py_object))

    carry, held = private._owning(stash), sys.getrefcount(value)
    for _ in range(5):
        carry("a", value)
    assert sys.getrefcount(value) == held + 1
    carry("a", None)
    assert sys.getrefcount(value) == held


def test_each_name_holds_a_reference_of_its_own() -> None:
    value = object()
    held = sys.getrefcount(value)
    for name in ("spu test", "spu other", "spu test"):
        private.carry(name, value)
    assert private.carried("spu test") is value
    assert sys.getrefcount(value) == held + 2
    for name in ("spu test", "spu other"):
        private.carry(name, None)
    assert sys.getrefcount(value) == held
