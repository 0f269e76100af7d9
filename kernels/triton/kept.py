"""Launches that keep what Triton compiled for them.

Triton's own way to a launch binds the arguments by name, specialises each of them, makes a text of the options and
looks the kernel up by it: 8 to 45 us on the host, beside kernels of 5. Here the kernel that the first launch compiled
is kept with its grid and its fixed arguments, under the little that a later call can still change: which of the tensors
begin at multiples of 16 bytes, and their dtypes. Its launcher is then called with all arguments in their places.

The first launch of each kind, every launch while somebody listens to launches (a profiler's hooks), and those of
interpreted kernels go Triton's own way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

_ALIGN_BYTES = 16  # what Triton specialises a pointer by
_MOST = 4096  # launches that a launcher keeps: shapes come and go

_RUNTIME = knobs.runtime


def _watched() -> bool:
    """Tell whether somebody wants to see each launch with its arguments."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Launch:
    """A kernel on a grid, with its fixed arguments.

    Args:
        kernel: a ``triton.jit`` function.
        grid: one to three numbers.
        fixed: the arguments after the variable ones, in the kernel's order: numbers, and what it is compiled for.
        options: the arguments after those, by name, and Triton's compile options.

    A launch belongs to one device: keep one for each.
    """

    __slots__ = ("_fixed", "_grid", "_kept", "_kernel", "_options", "_whole")

    def __init__(self, kernel: Any, grid: tuple[int, ...], fixed: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._kernel, self._grid, self._fixed, self._options = kernel, grid, fixed, options
        self._whole = (*grid, 1, 1)[:3]
        self._kept: dict[Any, Any] = {}

    def __call__(self, *variable: Any) -> None:
        """Launch on the current device's current stream.

        Args:
            variable: the kernel's first arguments: tensors, and floats.
        """
        bits, dtypes = 0, []
        for value in variable:
            if value.__class__ is float:
                dtypes.append(float)
            else:
                bits |= value.data_ptr()
                dtypes.append(value.dtype)
        key = tuple(dtypes) if bits % _ALIGN_BYTES == 0 else (*dtypes, *_alignment(variable))
        kept = self._kept.get(key)
        if kept is None or _watched():
            self._by_triton(key, variable)
            return
        run, stream, device, function, packed, tail = kept
        run(*self._whole, stream(device), function, packed, None, None, None, *variable, *tail)

    def _by_triton(self, key: Any, variable: tuple[Any, ...]) -> None:
        compiled = self._kernel[self._grid](*variable, *self._fixed, **self._options)
        if not isinstance(compiled, CompiledKernel) or self._kernel.pre_run_hooks:
            return  # interpreted, or compiled somewhere else at the moment
        device = driver.active.get_current_device()
        names = self._kernel.arg_names[len(variable) + len(self._fixed) :]
        tail = (*self._fixed, *(self._options[name] for name in names))
        self._kept[key] = (
            compiled.run, driver.active.get_current_stream, device, compiled.function, compiled.packed_metadata, tail,
        )  # fmt: skip


def _alignment(variable: tuple[Any, ...]) -> list[bool]:
    return [isinstance(value, Tensor) and value.data_ptr() % _ALIGN_BYTES == 0 for value in variable]


class Launcher:
    """A kernel whose launches differ in grid and fixed arguments; each is kept.

    Args:
        kernel: a ``triton.jit`` function.
        options: what launches get that are given nothing else: Triton's compile options.
    """

    __slots__ = ("_kernel", "_launches", "_options")

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self._kernel, self._options = kernel, options
        self._launches: dict[Any, Launch] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        variable: tuple[Any, ...],
        fixed: tuple[Any, ...],
        options: dict[str, Any] | None = None,
    ) -> None:
        """Launch on the current device's current stream; the arguments as for `Launch`. The same dict of options is
        meant to come again: it must not be changed.
        """
        given = self._options if options is None else options
        key = (variable[0].device, grid, fixed, id(given))
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) >= _MOST:
                self._launches.clear()
            # The launch holds the dict, so that its id is no other's.
            launch = self._launches[key] = Launch(self._kernel, grid, fixed, given)
        launch(*variable)
