"""A source of random numbers for one thread, in place of the process's default generators.

The dispatcher has a key that tensors never carry and that nothing else uses. Every random operator has a kernel under
it, all other operators fall through, so that a thread that includes the key pays nothing for them (a dispatch mode
makes it pay for each). Torch's own ``vmap`` meets random operators in the same way. The autograd engine hands the key
on to the threads that run a backward.

Code that saves and restores the state of the default generator (``torch.utils.checkpoint``, ``fork_rng``) calls
functions of ``torch.random``; while a source is in use these reach the source of the calling thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from spu.common import torch_private
from spu.common.torch_private import GENERIC_KEY, FakeTensor

__all__ = ["Source", "drawn_from"]


class Source(Protocol):
    """The generators of random operators."""

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator that replaces the device's default one."""

    def own(self, generator: torch.Generator) -> None:
        """Note that an operator is about to draw from a generator that its caller passed."""


class _Current(threading.local):
    source: Source | None = None


_CURRENT = _Current()
_ON_GPU: dict[int, Source] = {}  # by index: autograd runs a GPU's backward in a thread of its own
_LOCK = threading.Lock()
_users = 0  # number of entered contexts, on all threads
_real: tuple[Any, ...] = ()  # torch's default generators while stand-ins are in their place


def _source() -> Source | None:
    source = _CURRENT.source
    if source is None and _ON_GPU and torch_private.is_generic_key_included():  # else a thread of somebody's own
        source = _ON_GPU.get(torch.cuda.current_device())
    return source


class drawn_from:
    """While it lasts, random operators on this thread draw from ``source``.

    Args:
        source: their generators.
        gpu: also those of the autograd thread of the GPU with this index.
    """

    __slots__ = ("_before", "_gpu", "_included", "_source")

    def __init__(self, source: Source, gpu: int | None = None) -> None:
        self._source = source
        self._gpu = gpu

    def __enter__(self) -> None:
        if not _libraries:
            _register()
        self._included = torch_private.is_generic_key_included()
        torch_private.include_generic_key(True)
        self._before, _CURRENT.source = _CURRENT.source, self._source
        if self._gpu is not None:
            _ON_GPU[self._gpu] = self._source
        _stand_in(1)

    def __exit__(self, *error: object) -> None:
        _stand_in(-1)
        if self._gpu is not None:
            _ON_GPU.pop(self._gpu, None)
        _CURRENT.source = self._before
        torch_private.include_generic_key(self._included)


# The state of the default generators


class _Default:
    """Stands for a default generator: the calling thread's source, or else the real one."""

    def __init__(self, real: torch.Generator) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        source = _source()
        return getattr(self._real if source is None else source.generator(self._real.device), name)


def _stand_in(change: int) -> None:
    """Replace the default generators in `torch.random`, and torch.cuda's, by stand-ins while there are users."""
    global _users, _real
    with _LOCK:
        _users += change
        if change == 1 == _users:
            on_gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
            _real = (torch.random.default_generator, on_gpus)
            torch.random.default_generator = _Default(_real[0])  # type: ignore[assignment]
            if on_gpus:
                torch.cuda.default_generators = tuple(map(_Default, on_gpus))  # type: ignore[assignment]
        elif _users == 0:
            torch.random.default_generator, on_gpus = _real
            if on_gpus:
                torch.cuda.default_generators = on_gpus


def _after_fork() -> None:
    """Reset the stand-ins in a forked process: another thread may have been changing them."""
    global _LOCK, _users
    _LOCK = threading.Lock()
    if _users:
        _users = 1
        _stand_in(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# The kernels

_libraries: list[torch.library.Library] = []


def _register() -> None:
    with _LOCK:
        if _libraries:
            return
        fallback = torch.library.Library("_", "IMPL", GENERIC_KEY)
        fallback.fallback(torch.library.fallthrough_kernel, GENERIC_KEY)
        kernels = torch.library.Library("aten", "IMPL", GENERIC_KEY)
        for func in _random_operators():
            kernels.impl(func, _kernel(func), GENERIC_KEY)
        _libraries.extend((fallback, kernels))


def _random_operators() -> Iterator[Any]:
    """Yield the random operators that draw themselves, not those composed of others."""
    for full in torch_private.operator_names():
        space, _, name = full.partition("::")
        packet, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None) if space == "aten" else None
        if func is None or torch.Tag.nondeterministic_seeded not in func.tags:
            continue
        composed = torch_private.operator_has_kernel(full, "CompositeImplicitAutograd")
        if not composed and "backward" not in packet and packet not in _NO_DRAWS:
            yield func


_NO_DRAWS = (  # tagged as random, but draw nothing; the last one refuses to drop out
    "_fused_sdp_choice",
    "_nested_tensor_softmax_with_shape",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def _kernel(func: Any) -> Callable[..., Any]:
    arguments = [argument.name for argument in torch_private.schema_of(func).arguments]
    takes = "generator" in arguments
    place = arguments.index("generator") if takes else -1
    seeded = func if takes else _with_generator(func, arguments)
    dropout = arguments.index("dropout_p") if "dropout_p" in arguments else len(arguments)

    def draw(*args: Any, **kwargs: Any) -> Any:
        with torch_private.without_generic_key():
            if dropout < len(args) and args[dropout] == 0.0:  # fused attention, in every layer of most models
                return func(*args, **kwargs)
            source = _source()
            if source is None or _draws_nothing(func, args, kwargs):
                return func(*args, **kwargs)
            given = args[place] if 0 <= place < len(args) else kwargs.pop("generator", None)
            if given is not None and not _is_default(given):
                source.own(given)
                return func(*_put(args, place, given, kwargs), **kwargs)
            generator = source.generator(_device_of(args, kwargs))
            if func is torch.ops.aten.native_dropout.default:
                return _dropout(generator, *args, **kwargs)
            if func in _RRELU:
                return _rrelu(generator, func, *args, **kwargs)
            if seeded is None:
                return _from_default(generator, func, args, kwargs)
            return seeded(*_put(args, place, generator, kwargs), **kwargs)

    return draw


def _put(args: tuple[Any, ...], place: int, generator: torch.Generator, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    if 0 <= place < len(args):
        return (*args[:place], generator, *args[place + 1 :])
    kwargs["generator"] = generator
    return args


def _is_default(generator: torch.Generator) -> bool:
    on_gpus = _real[1] if _real else torch.cuda.default_generators
    return any(torch_private.generators_equal(generator, default) for default in (torch.default_generator, *on_gpus))


def _with_generator(func: Any, arguments: list[str]) -> Any:
    """Return the overload of the same operator that also takes a generator, or None."""
    packet = func.overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        if [
            a.name for a in torch_private.schema_of(other).arguments if a.name != "generator"
        ] == arguments and "generator" in [a.name for a in torch_private.schema_of(other).arguments]:
            kinds = [str(a.type) for a in torch_private.schema_of(other).arguments if a.name != "generator"]
            if kinds == [str(a.type) for a in torch_private.schema_of(func).arguments]:
                return other
    return None


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether a call draws nothing: on fake tensors, or fused attention with dropout 0."""
    if (
        torch_private.fake_mode_active()
        or torch.compiler.is_compiling()
        or any(isinstance(a, FakeTensor) or (isinstance(a, torch.Tensor) and a.is_meta) for a in args)
    ):
        return True
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        return True
    for position, argument in enumerate(torch_private.schema_of(func).arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return given == 0.0
    return False


def _device_of(args: Any, kwargs: Any) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device
    device = kwargs.get("device")
    return _indexed(torch.device(device) if device is not None else torch.get_default_device())


def _indexed(device: torch.device) -> torch.device:
    """Return a device as tensors on it name it: by another name it would have a second generator with the same seed,
    and so the same numbers.
    """
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _dropout(
    generator: torch.Generator, x: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False or p == 0.0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p, generator=generator)
    return x * keep * (1.0 / (1.0 - p) if p < 1.0 else 0.0), keep


_RRELU = (torch.ops.aten.rrelu_with_noise.default, torch.ops.aten.rrelu_with_noise_.default)


def _rrelu(
    generator: torch.Generator,
    func: Any,
    x: torch.Tensor,
    noise: torch.Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
) -> torch.Tensor:
    # Torch's own saves the noise for the backward before it has drawn it. A recomputation ends as soon as all is saved,
    # and would leave it undrawn.
    if not training:
        return func(x, noise, lower, upper, training)
    torch.ops.aten.rrelu_with_noise(x.detach(), noise, lower, upper, True, generator)
    return x.mul_(noise) if func is _RRELU[1] else x * noise


def _from_default(generator: torch.Generator, func: Any, args: Any, kwargs: Any) -> Any:
    # A fused kernel such as flash attention draws from the device's default generator alone. One stage worker owns a
    # GPU, so lending that generator the state races with nobody; the user finds it as it was. The CPU's is shared.
    device = generator.device
    if device.type != "cuda":
        raise RuntimeError(
            f"the random operator {func} takes no generator on {device}, so its draws could not be repeated; "
            "use an attention implementation without fused dropout, or set that dropout to 0"
        )
    default = (_real[1] or torch.cuda.default_generators)[device.index or 0]
    before = default.get_state()
    default.set_state(generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        generator.set_state(default.get_state())
        default.set_state(before)
