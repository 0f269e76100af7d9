"""Backwards of stages in threads of their own, as autograd runs those of a GPU, on a machine without one.

Of the calling thread's state such a thread has what torch hands on: dispatch keys, gradient mode, and objects that are
carried; no context variables, no thread-locals of Python's. (An operator of a CPU runs in the thread that calls
``backward``, so that no other test of the engine sees what is missing there.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from spu.common import torch_private
from spu.engine import stage
from spu.model import draws
from spu.ops import dispatch


class _Torch(ModuleType):
    """torch for the stages' module, with another ``autograd``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def device_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the threads in which backwards have run."""
    seen: list[str] = []
    own = threading.local()

    def backward(*args: Any, **kwargs: Any) -> None:
        card, source = threading.get_ident(), draws._CURRENT.source  # a rank has a card of its own
        included, grad = torch_private.is_generic_key_included(), torch.is_grad_enabled()
        backend, threads = torch_private.carried(dispatch._CARRIED), torch.get_num_threads()
        failed: list[BaseException] = []

        def run() -> None:
            own.card = card
            seen.append(threading.current_thread().name)
            torch.set_num_threads(threads)
            torch_private.include_generic_key(included)
            torch_private.carry(dispatch._CARRIED, backend)
            try:
                with torch.set_grad_enabled(grad):
                    torch.autograd.backward(*args, **kwargs)
            except BaseException as error:  # handed to the caller, as the engine does
                failed.append(error)

        if source is not None:
            draws._ON_GPU[card] = source
        try:
            thread = threading.Thread(target=run, name="autograd's")
            thread.start()
            thread.join()
        finally:
            draws._ON_GPU.pop(card, None)
        if failed:
            raise failed[0]

    other = _Torch("torch")
    other.autograd = SimpleNamespace(backward=backward)  # type: ignore[attr-defined]
    monkeypatch.setattr(stage, "torch", other)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(own, "card", -1))
    yield seen
    assert set(seen) == {"autograd's"}
