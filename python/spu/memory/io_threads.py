"""Threads that move bytes in the background, piece by piece."""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable

from spu.memory.store import StoreError

__all__ = ["IOThreads", "Request"]

PATIENCE_S = 60.0
"""Seconds without a finished piece after which `IOThreads.close` gives a thread up: a disk that does not answer."""


class Request:
    """A ticket: pieces 0, 1, ... of one read or write.

    Args:
        run: does piece k when called with k. It raises what goes wrong, as a `StoreError`.
        pieces: how many.
    """

    __slots__ = ("_done", "_failure", "_next", "_open", "_pid", "_pieces", "_run")

    def __init__(self, run: Callable[[int], None], pieces: int) -> None:
        self._run: Callable[[int], None] | None = run
        self._pieces = pieces
        self._next = 0  # pieces that a thread has taken
        self._open = pieces  # pieces that are not done
        self._failure = ""
        self._pid = os.getpid()
        self._done = threading.Event()
        if pieces == 0:
            self._finish()

    def wait(self) -> None:
        """Return when all pieces are done.

        Raises:
            StoreError: one failed, or this process was forked while it was in progress.
        """
        if not self._done.is_set() and self._pid != os.getpid():
            raise StoreError("a read or write in progress does not go on in a forked process; wait before the fork")
        self._done.wait()
        if self._failure:
            raise StoreError(self._failure)

    def _finish(self) -> None:
        self._run = None  # it holds the caller's tensor
        self._done.set()

    def _drop(self, failure: str) -> None:
        """Fail, and do not start the pieces that no thread has taken."""
        self._failure = self._failure or failure
        self._open -= self._pieces - self._next
        self._next = self._pieces
        if self._open == 0:
            self._finish()


class IOThreads:
    """A few threads that serve requests: reads in order, writes in order, and these two in turns, piece by piece.

    In order, because a caller asks for what it needs next first: shared in equal parts, two reads would both be late.
    In turns, so that a long write does not hold up a read that is waited for.

    After the first failure nothing is served any more. The threads are daemons, so that the end of the program does not
    wait for a long queue: a function at exit stops them after their present pieces.

    Args:
        name: of the store, for messages.
        threads: how many.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._pid = os.getpid()
        self._queues: tuple[deque[Request], deque[Request]] = (deque(), deque())
        self._turn = 0
        self._pieces_done = 0
        self._failure = ""
        self._stopping = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name=f"spu-io-{k}", daemon=True) for k in range(threads)]
        for thread in self._threads:
            thread.start()
        _RUNNING.add(self)

    def check(self) -> None:
        """Raise StoreError if requests cannot be served any more."""
        if self._pid != os.getpid():
            raise StoreError(
                f"{self._name}: this process was forked, and the threads that read and write are in its parent only"
            )
        if self._failure:
            raise StoreError(f"refused after an earlier failure: {self._failure}")
        if self._stopping:
            raise StoreError(f"{self._name} is closed")

    def submit(self, run: Callable[[int], None], pieces: int, *, write: bool = False) -> Request:
        """Queue a request and return it; ``run`` and ``pieces`` are those of `Request`."""
        self.check()
        request = Request(run, pieces)
        if pieces:
            with self._changed:
                self.check()
                self._queues[write].append(request)
                self._changed.notify(min(pieces, len(self._threads)))
        return request

    def _take(self) -> tuple[Request, int] | None:
        """Return the next piece and whose it is; None if there is none. Call with the lock held."""
        kind = self._turn if self._queues[self._turn] else 1 - self._turn
        queue = self._queues[kind]
        if not queue:
            return None
        self._turn = 1 - kind
        request = queue[0]
        piece = request._next
        request._next += 1
        if request._next == request._pieces:
            queue.popleft()
        return request, piece

    def _work(self) -> None:
        while True:
            with self._changed:
                while (taken := self._take()) is None:
                    if self._stopping:
                        return
                    self._changed.wait()
            request, piece = taken
            run, failure = request._run, ""
            assert run is not None
            try:
                run(piece)
            except BaseException as error:
                failure = str(error) if isinstance(error, StoreError) else f"{self._name}: {error!r}"
            with self._changed:
                self._pieces_done += 1
                request._open -= 1
                if failure:
                    self._fail(request, failure)
                elif request._open == 0:
                    request._finish()
            del request, taken, run  # nothing of the caller's is kept while this thread waits

    def fail(self, failure: str) -> str:
        """Refuse everything from now on, and return the reason: it was found elsewhere than in a request."""
        with self._changed:
            self._failure = self._failure or failure
            self._drop_queued(f"not done after an earlier failure: {self._failure}")
        return failure

    def _fail(self, request: Request, failure: str) -> None:
        """Refuse everything from now on; call with the lock held."""
        self._failure = self._failure or failure
        request._drop(failure)
        self._drop_queued(f"not done after an earlier failure: {self._failure}")

    def _drop_queued(self, failure: str) -> None:
        for queue in self._queues:
            for request in queue:
                request._drop(failure)
            queue.clear()

    def release(self) -> None:
        """Let the threads end when what is queued is done, without waiting for them.

        For the garbage collector: it runs in any thread at any time, also in one of these.
        """
        if self._pid == os.getpid():
            with self._changed:
                self._stopping = True
                self._changed.notify_all()

    def close(self, *, abandon: bool = False) -> bool:
        """Stop: finish what is queued, or only the present pieces if ``abandon``; return whether the threads ended.

        A thread that finishes nothing in `PATIENCE_S` seconds is given up, with a warning: it may sit in a call to a
        disk that does not answer, and what it reads into must not be freed.
        """
        if self._pid != os.getpid():
            return True
        with self._changed:
            self._stopping = True
            if abandon:
                self._drop_queued(f"{self._name} was closed before this was done")
            self._changed.notify_all()
        seen, since = -1, time.monotonic()
        for thread in self._threads:
            while thread.is_alive() and thread is not threading.current_thread():
                thread.join(0.5)
                if self._pieces_done != seen:
                    seen, since = self._pieces_done, time.monotonic()
                elif thread.is_alive() and time.monotonic() - since > PATIENCE_S:
                    warnings.warn(
                        f"{self._name} has not answered for {PATIENCE_S:.0f} s; its memory is not freed", stacklevel=3
                    )
                    return False
        return True


_RUNNING: weakref.WeakSet[IOThreads] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for threads in list(_RUNNING):
        threads.close(abandon=True)
