"""Triton's interpreter at more than twice its speed, for the processes that run kernels in it: the same results.

Triton makes its language run on NumPy by exchanging the members of `triton.language`, at each launch and once more at
each call of one kernel by another, and lists all members each time. Here they are listed once in a process, and
exchanged once a launch. Integer overflow is not looked for, as in a kernel that is compiled: indices here are small.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

__all__ = ["prepare"]

PARTS = ("_patch_builtin", "_patch_attr", "_patch_lang", "_get_np_dtype", "interpreter_builder", "InterpretedFunction")


def prepare() -> None:
    """Change the interpreter of this process; one that is not made of the parts that are known is left as it is."""
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, part) for part in PARTS):
        return
    called: set[Any] = set()
    arrays: dict[str, Any] = {}
    array_of = interpreter._get_np_dtype

    @functools.cache  # asked for first while nothing in the package is exchanged: these are Triton's own
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [(name, one) for name, one in inspect.getmembers(package) if interpreter.tl.core.is_builtin(one)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(package):
            interpreter._patch_attr(package, name, member, builder, scope)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The launch has exchanged `triton.language`. What the language's own functions name besides, of
        # `triton.language.core`, Triton never changes back: it stays from the first call on.
        if self.fn not in called:
            called.add(self.fn)
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def array_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in arrays:
            arrays[name] = array_of(kind)
        return arrays[name]

    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = array_dtype
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
