"""Weights that stay in their files until a trainer knows which of them its process has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spu.common.absent import absent, is_absent
from spu.common.heap import LARGE_BYTES, large_tensors_unmapped
from spu.common.torch_private import parameters_of

__all__ = ["Reading", "bring", "brought", "defer", "fill_meta", "with_any_values"]

_ANY, _FEW = 1 << 26, 1 << 20  # values that parameters share at most; where those of one layer after another do
_APART = 64  # values from the first one of a parameter to that of the next

Fill = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class _Source:
    state: dict[str, Tensor]
    fill: Fill

    @torch.no_grad()
    def read(self, wanted: Callable[[Tensor], bool]) -> None:
        self.fill({name: tensor.detach() for name, tensor in self.state.items() if wanted(tensor)})


_SOURCES: WeakKeyDictionary[nn.Module, _Source] = WeakKeyDictionary()


def fill_meta(model: nn.Module, make: Callable[[torch.Size, torch.dtype], Tensor]) -> None:
    """Replace each parameter on the meta device by what is made for its shape and dtype; what is tied stays tied."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old ones too, so that no other takes an id
    for module in model.modules():
        for name, old in parameters_of(module).items():
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                made[id(old)] = old, nn.Parameter(make(old.shape, old.dtype), requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)][1])


def defer(model: nn.Module, fill: Fill) -> None:
    """Put stand-ins (`spu.common.absent`) in the place of a model's parameters on the meta device, until `bring`.

    Args:
        model: on the CPU otherwise; what is tied stays tied.
        fill: writes values into tensors, given by their names in the model's state.
    """
    fill_meta(model, absent)
    _SOURCES[model] = _Source(model.state_dict(keep_vars=True), fill)


@contextmanager
def with_any_values(model: nn.Module, *, everywhere: bool = False) -> Iterator[None]:
    """Give deferred parameters some values while the block runs, for what is true of a model whatever its weights are.

    They are views of one small memory, each from another place on; the rows of a larger one overlap in it.

    Args:
        model: whose.
        everywhere: all plain parameters get some that hold floating-point numbers, also those that have values.
    """
    waiting = [p for p in model.parameters() if is_absent(p) or (everywhere and _is_plain(p))]
    rows = [p.shape[0] if p.dim() > 1 else 1 for p in waiting]
    inner = [p.numel() // count for p, count in zip(waiting, rows, strict=True)]
    most = _FEW if everywhere else _ANY
    size = max([min(most, p.numel()) for p in waiting] + inner, default=0)
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(size + _APART * len(waiting), generator=draws, dtype=torch.float32, device="cpu") / 20
    made: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # parameters of one kind share it
    before = [(p, p.data) for p in waiting]
    try:
        for place, parameter in enumerate(waiting):
            strides = list(torch.empty(parameter.shape, device="meta", dtype=torch.float32).stride())
            if parameter.numel() > size:
                strides[0] = (size - inner[place]) // rows[place]
            kind = parameter.device, parameter.dtype
            if kind not in made:
                made[kind] = values.to(*kind)
            parameter.data = made[kind].as_strided(parameter.shape, strides, _APART * place)
        yield
    finally:
        for parameter, stand_in in before:
            parameter.data = stand_in


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.numel() > 0


class Reading:
    """The values of parameters that have memory already; made by `brought`.

    Memory that nothing was written to takes no room yet. So parameters may move first, to a device or into a store, and
    their values are never anywhere else than where they stay.
    """

    def __init__(self, sources: Collection[_Source]) -> None:
        self._sources = sources
        waiting = (t for source in sources for t in source.state.values() if is_absent(t))
        self.waiting = {id(tensor): tensor for tensor in waiting}

    def read_trained(self) -> None:
        """Read trained parameters where they are."""
        self._read(trained=True)

    def read_rest(self, give: Callable[[Tensor, Tensor], object]) -> None:
        """Read all that have no values yet: what is frozen where it is, what is trained into memory of its own.

        Args:
            give: takes a trained parameter and its value (fp32), one after the other.
        """
        self._read(trained=False)
        for source in self._sources:
            for tensor in source.state.values():
                if self.waiting.pop(id(tensor), None) is not None:
                    value = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
                    source.fill({other: value for other, tied in source.state.items() if tied is tensor})
                    give(tensor, value)

    def _read(self, *, trained: bool) -> None:
        keys = {key for key, tensor in self.waiting.items() if tensor.requires_grad == trained}
        for source in self._sources:
            source.read(lambda tensor: id(tensor) in keys)
        for key in keys:
            del self.waiting[key]


@contextmanager
def brought(model: nn.Module, dtypes: Mapping[int, torch.dtype] | None) -> Iterator[Reading]:
    """Give deferred parameters memory without values; if the block fails, they are deferred as before.

    Args:
        model: has a deferred model in it, or none.
        dtypes: as in `bring`; None: nothing is done.

    Yields:
        What reads the values.
    """
    sources = _sources_in(model) if dtypes is not None else {}
    reading = Reading(sources.values())
    before = [(tensor, tensor.data) for tensor in reading.waiting.values()]
    try:
        for source in sources.values():
            source.read(lambda tensor: id(tensor) not in reading.waiting)  # buffers
            with large_tensors_unmapped():
                _reserve(source, None, dtypes)
        yield reading
    except BaseException:
        for tensor, stand_in in before:
            tensor.data = stand_in
        _SOURCES.update(sources)
        raise


@torch.no_grad()
def bring(
    model: nn.Module, wanted: Collection[int] | None = None, dtypes: Mapping[int, torch.dtype] | None = None
) -> None:
    """Read deferred parameters; the others can be read no more.

    Args:
        model: has a deferred model in it, or none.
        wanted: ids of parameters; None: all.
        dtypes: of parameters that are to have another one than now, by id.

    Raises:
        ValueError: a file is damaged, or of another model; or a parameter was made from values that were not there
            yet, such as the norms of DoRA; the text names it.
    """
    for source in _sources_in(model).values():
        _reserve(source, wanted, dtypes)
        source.read(lambda tensor: not is_absent(tensor))


def _sources_in(model: nn.Module) -> dict[nn.Module, _Source]:
    """Take out the sources of what is deferred in a model."""
    sources = {module: _SOURCES[module] for module in model.modules() if module in _SOURCES}
    if sources:
        _check_others(model, {id(t) for source in sources.values() for t in source.state.values()})
    for module in sources:
        del _SOURCES[module]
    return sources


def _reserve(source: _Source, wanted: Collection[int] | None, dtypes: Mapping[int, torch.dtype] | None) -> None:
    for tensor in source.state.values():
        if is_absent(tensor) and (wanted is None or id(tensor) in wanted):
            made = torch.empty(tensor.shape, dtype=(dtypes or {}).get(id(tensor), tensor.dtype), device="cpu")
            tensor.data = made if made.nbytes > LARGE_BYTES else made.zero_()  # what is large is zero, and untouched


def _check_others(model: nn.Module, deferred: Collection[int]) -> None:
    """Raise ValueError if a parameter that is not deferred has a NaN, as what is computed from stand-ins has."""
    for name, parameter in model.named_parameters():
        if id(parameter) not in deferred and not parameter.is_meta and bool(parameter.isnan().any()):
            raise ValueError(
                f"{name} has values that are not numbers: it was made before the model's weights were read from their "
                "files. Load the model without later=True, then put the adapters into it"
            )
