"""A model as a flat list of named layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from spu.common import torch_private
from spu.model.kept import Park
from spu.model.randomness import KeptGenerators, LayerRandomness
from spu.model.replay import Habits, run_twice
from spu.model.traced import traced_layers
from spu.precision.dtypes import is_mixed, products_in

__all__ = ["DrawKey", "Layer", "has_order", "is_adapted", "layers_by_tracing", "model_layers", "parts_as_layers"]


@dataclass(frozen=True)
class DrawKey:
    """The place of a layer's run in the training; with the layer's name it decides every random draw.

    Attributes:
        kept: has the generators of a microbatch that is captured; None: each layer makes its own.
    """

    run_seed: int
    step: int
    microbatch: int
    kept: KeptGenerators | None = field(default=None, compare=False)


@dataclass
class Layer:
    """One indivisible piece of the model.

    Attributes:
        name: unique in the model.
        module: called as ``module(x)``, or as ``module(x, inputs)`` if ``wants_inputs``.
        wants_inputs: the module also reads the microbatch's own inputs (masks, positions).
        parameter_names: local parameter and buffer name -> name in the user's model, for checkpoints.
        products: the 16-bit dtype that matrix products cast their operands to; None: as they are.
    """

    name: str
    module: nn.Module
    wants_inputs: bool = False
    parameter_names: dict[str, str] = field(default_factory=dict)
    products: torch.dtype | None = None
    _habits: Habits = field(default_factory=Habits, init=False)
    _unknown: tuple[torch.Generator, DrawKey] | None = field(default=None, init=False)
    _mixed: bool | None = field(default=None, init=False)

    def run(
        self,
        x: Any,
        inputs: Any,
        key: DrawKey,
        on_own: Callable[[torch.Generator], None] | None = None,
        within: LayerRandomness | None = None,
    ) -> Any:
        """Call the module, with random draws that depend on ``key`` and the layer's name alone.

        Args:
            x, inputs: the module's arguments.
            key: decides its draws from default generators.
            on_own: called with a generator of the layer's own before it is drawn from.
            within: the context in use, which is made this layer's; None: one is entered.

        Raises:
            RuntimeError: it draws from a generator whose state no checkpoint could hold.
        """

        def own(generator: torch.Generator) -> None:
            self._check_own(generator, key)
            if on_own is not None:
                on_own(generator)

        if within is not None:
            within.layer(self.name, own)
            with self.in_precision(x):
                return self._call(x, inputs)
        draws = LayerRandomness(key.run_seed, key.step, key.microbatch, self.name, on_own=own, kept=key.kept)
        with draws, self.in_precision(x):
            return self._call(x, inputs)

    def in_precision(self, x: Any) -> AbstractContextManager[None]:
        """Return the context of the layer's work on ``x``: its products are in ``products``."""
        if self.products is None:
            return nullcontext()
        if self._mixed is None:
            self._mixed = is_mixed(self.module, self.products)
        return products_in(self.products, self._mixed, x)

    def _call(self, x: Any, inputs: Any) -> Any:
        return self.module(x, inputs) if self.wants_inputs else self.module(x)

    def run_checkpointed(self, x: Any, inputs: Any, key: DrawKey, park: Park | None = None) -> Any:
        """Run as :meth:`run`, but keep only the layer's input for the backward, which recomputes the layer.

        Args:
            x, inputs, key: as for :meth:`run`.
            park: takes the input away until then; None: it is kept where it is.

        Raises:
            RuntimeError: it cannot be recomputed: it changes its input, or a large buffer, in some microbatches only.
        """

        def run(given: Any, own: Callable[[torch.Generator], None]) -> Any:
            return self.run(given, inputs, key, own)

        return run_twice(self.module, self.name, x, run, self._habits, park)

    def _check_own(self, generator: torch.Generator, key: DrawKey) -> None:
        if any(torch_private.generators_equal(generator, known) for _, known in self.named_generators()):
            return
        # One that is made and seeded in the forward needs no checkpoint: no later run uses it.
        unknown = self._unknown
        if unknown is not None and torch_private.generators_equal(unknown[0], generator) and unknown[1] != key:
            raise RuntimeError(
                f"layer {self.name!r} draws from a generator (generator=) that is no attribute of its modules, so that "
                "no checkpoint could hold its state: keep it in one, as self.generator = torch.Generator()"
            )
        self._unknown = (generator, key)

    def named_generators(self) -> Iterator[tuple[str, torch.Generator]]:
        """Yield the generators that the layer's modules have as attributes, by name."""
        for path, module in self.module.named_modules():
            for name, value in vars(module).items():
                if _is_generator(type(value)):  # type: ignore[arg-type]  # mypy takes no type for hashable
                    yield ".".join(filter(None, (self.name, path, name))), value

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters by their name in the user's model, one that is used twice under both names."""
        for local, parameter in self.module.named_parameters(remove_duplicate=False):
            yield self.name_of(local), parameter

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield buffers that belong to the model's state (persistent ones), by their name in the user's model."""
        persistent = self.module.state_dict(keep_vars=True)
        for local, buffer in self.module.named_buffers(remove_duplicate=False):
            if local in persistent:
                yield self.name_of(local), buffer

    def name_of(self, local: str) -> str:
        """Return the name in the user's model of a local parameter or buffer."""
        return self.parameter_names.get(local, f"{self.name}.{local}")


@lru_cache(maxsize=4096)
def _is_generator(kind: type) -> bool:
    """Tell whether objects of a type are generators. By type, once: torch's isinstance for it is Python, and was asked
    of every attribute of every module in every step (4 ms of the default job's).
    """
    return issubclass(kind, torch.Generator)


def has_order(model: Any) -> bool:
    """Tell whether a model's layers have a known order; any other module's is found by tracing it on a batch."""
    if isinstance(model, nn.Sequential):
        return not _has_own_forward(model)
    if not isinstance(model, nn.Module) or isinstance(model, nn.ModuleList) or is_adapted(model):
        return True
    if not _is_hugging_face(model):
        return False
    # With neither, it is an encoder classifier.
    planned = getattr(model.config, "base_model_pp_plan", None)
    return bool(planned) or model.get_output_embeddings() is not None  # type: ignore[operator]


def _has_own_forward(model: nn.Sequential) -> bool:
    """Tell whether a sequence does something else than call its layers in order."""
    cls = type(model)
    return "forward" in vars(model) or (cls.forward is not nn.Sequential.forward and not hasattr(cls, "spu_plain"))


def layers_by_tracing(model: nn.Module, inputs: Any) -> list[Layer]:
    """Return the layers of a module that is neither a list of them nor a decoder; ``inputs``: a batch.

    Raises:
        ValueError: it cannot be cut exactly.
    """
    return _named(traced_layers(model, inputs))


def model_layers(model: Any) -> list[Layer]:
    """Return the layers of an ``nn.Sequential``, a list of modules, or a Hugging Face decoder.

    Raises:
        ValueError: an empty model.
        TypeError: no module, or a sequence with a forward of its own.
    """
    if isinstance(model, nn.Sequential):
        if _has_own_forward(model):
            raise TypeError(
                f"{type(model).__name__} is an nn.Sequential with a forward of its own: its layers are found by "
                "tracing it on a batch"
            )
        # not named_children(), which leaves out the second use of a shared module
        return _named(torch_private.children_of(model).items())
    if isinstance(model, (list, tuple, nn.ModuleList)):
        return parts_as_layers(list(model))
    if isinstance(model, nn.Module) and is_adapted(model):
        from spu.model import huggingface

        return model_layers(huggingface.adapted_base(model))
    if isinstance(model, nn.Module) and _is_hugging_face(model):
        from spu.model import huggingface

        return _named(huggingface.decoder_layers(model))
    raise TypeError(
        f"a {type(model).__name__} is no nn.Module; pass an nn.Sequential, a list of layers, a Hugging Face decoder, "
        "or another module"
    )


def parts_as_layers(parts: Sequence[nn.Module]) -> list[Layer]:
    """Return modules as layers, named by their index."""
    for index, part in enumerate(parts):
        if not isinstance(part, nn.Module):
            raise TypeError(f"layer {index} is a {type(part).__name__}, not an nn.Module")
    return _named((str(index), part) for index, part in enumerate(parts))


def _named(pairs: Any) -> list[Layer]:
    layers = []
    for name, module in pairs:
        names: Callable[[], dict[str, str]] | None = getattr(module, "parameter_names", None)
        layers.append(
            Layer(name, module, bool(getattr(module, "wants_inputs", False)), names() if callable(names) else {})
        )
    if not layers:
        raise ValueError("the model has no layers; pass at least one")
    return layers


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a model is a PeftModel, without importing peft."""
    return type(model).__module__.partition(".")[0] == "peft" and hasattr(model, "get_base_model")


def _is_hugging_face(model: nn.Module) -> bool:
    if not hasattr(model, "config"):
        return False
    from spu.model import huggingface

    return huggingface.is_decoder(model)
