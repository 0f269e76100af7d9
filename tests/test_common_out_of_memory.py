"""Errors that say that memory is short, as torch, Python and libraries really raise them, and what they let go of."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable

import pytest
import torch

from spu.common.out_of_memory import forget_frames, free_memory, is_out_of_memory
from spu.memory.store import StoreError


def raised(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("it did not fail")


def quoted(cause: BaseException, kind: type[Exception] = RuntimeError) -> BaseException:
    def call() -> None:
        raise kind(f"stage 0: {cause}") from cause

    return raised(call)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.empty(1 << 60),
        lambda: torch.ones(1 << 50, dtype=torch.float16).sum(),
        lambda: bytearray(1 << 62),
        lambda: [0] * (1 << 60),
    ],
)
def test_real_refusals_are_known(call: Callable[[], object]) -> None:
    error = raised(call)
    assert isinstance(error, MemoryError | RuntimeError)
    assert is_out_of_memory(error)
    assert is_out_of_memory(quoted(error, ValueError))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_refusals_of_devices_and_systems_are_known(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        ValueError("the texts are about an out of memory error"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        StoreError("the disk is full"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert not is_out_of_memory(quoted(error, ValueError))


def test_causes_in_a_circle_end() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert not is_out_of_memory(one)


def test_an_error_lets_go_of_the_variables_of_the_functions_it_left() -> None:
    seen = []

    def inner() -> None:
        activation = torch.ones(3)
        seen.append(weakref.ref(activation))
        raise MemoryError

    def outer() -> None:
        other = torch.ones(3)
        seen.append(weakref.ref(other))
        try:
            inner()
        except MemoryError as error:
            raise ValueError("outer") from error

    error = raised(outer)
    assert all(reference() is not None for reference in seen)
    forget_frames(error)
    free_memory()
    assert all(reference() is None for reference in seen)
    assert error.__traceback__ is not None  # the lines are still told
    assert str(error) == "outer"
