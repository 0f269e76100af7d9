"""Out of memory: which errors say so, and giving back what a failed piece of work still holds."""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
import traceback
from collections.abc import Iterator

import torch

__all__ = ["forget_frames", "free_memory", "is_out_of_memory"]

_TEXTS = (
    "can't allocate memory",  # torch's allocator of CPU memory
    "not enough memory",  # the same on Windows, and torch's mapped files
    "cannot allocate memory",  # the system's words, in errors of libraries
    "std::bad_alloc",  # of C++, which torch's bindings turn into a RuntimeError
    "out of memory",  # of CUDA, where it is not torch's allocator that asked
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or what it was raised ``from``, says that a request for memory was refused.

    These are MemoryError, ``torch.OutOfMemoryError``, OSError with ENOMEM, and RuntimeError with the words of torch's
    CPU allocator, C++, CUDA or its libraries.
    """
    return any(map(_says_so, _with_causes(error)))


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # The class itself and torch's own for errors of a device; of ours only the cause counts: their texts quote others.
    if type(error) is not RuntimeError and not isinstance(error, torch.AcceleratorError):
        return False
    said = str(error).lower()
    return any(text in said for text in _TEXTS)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it was raised from, each once."""
    seen = list[BaseException]()
    following: BaseException | None = error
    while following is not None and all(following is not other for other in seen):
        seen.append(following)
        yield following
        following = following.__cause__


def forget_frames(error: BaseException) -> None:
    """Let go of what the functions that an error has left had in their variables: activations, among others.

    The error keeps its text and its traceback's lines. Functions that still run keep their variables.
    """
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [e for e in (one.__cause__, one.__context__) if e is not None and id(e) not in seen]


def free_memory() -> None:
    """Collect garbage, and return freed memory to the system: glibc keeps freed tensors below 32 MB, scattered, for
    itself, and torch what was freed on a GPU.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
