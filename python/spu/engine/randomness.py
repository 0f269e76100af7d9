"""Random draws that depend on where they happen in the model, not on when or on which device thread.

PyTorch's default CPU generator is one per process: two pipeline stages that draw dropout masks from it race, and a
recomputed layer draws a different mask than the first time. Here every layer of every microbatch of every step draws
from a generator of its own, seeded by (run seed, step, microbatch, layer name). The draws are then the same for every
split into stages, every schedule and every recompute mode, and the plain model reproduces them by entering the same
context around the same layer.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LayerRandomness", "layer_seed"]

_aten = torch.ops.aten


def layer_seed(run_seed: int, step: int, microbatch: int, layer_name: str) -> int:
    """A 63-bit seed for one layer of one microbatch of one step; the same on every machine and Python version."""
    key = f"{run_seed}\0{step}\0{microbatch}\0{layer_name}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class LayerRandomness(TorchDispatchMode):
    """Context, local to the calling thread, in which every random operator draws from a generator of its own.

    Args:
        run_seed: the seed of the whole run.
        step: index of the optimizer step, from 0.
        microbatch: index of the microbatch in the step, counted over all accumulation rounds.
        layer_name: the layer's name in the model.

    Attributes:
        draws: how many random operators have run inside; 0 says that the layer does not need this context.
    """

    def __init__(self, run_seed: int, step: int, microbatch: int, layer_name: str) -> None:
        super().__init__()
        self._seed = layer_seed(run_seed, step, microbatch, layer_name)
        self._generators: dict[torch.device, torch.Generator] = {}
        self.draws = 0

    def _generator(self, device: torch.device) -> torch.Generator:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device=device)
            generator.manual_seed(self._seed)
        return generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _without_dropout(func, args, kwargs):
            return func(*args, **kwargs)
        self.draws += 1
        device = _device_of(args, kwargs)
        if func is _aten.native_dropout.default:
            return self._dropout(device, *args, **kwargs)
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs = {**kwargs, "generator": self._generator(device)}
            return func(*args, **kwargs)
        seeded = getattr(func.overloadpacket, "generator", None)
        if seeded is not None:
            return seeded(*args, generator=self._generator(device), **kwargs)
        return self._from_device_generator(device, func, args, kwargs)

    def _dropout(
        self, device: torch.device, x: torch.Tensor, p: float, train: bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if train is False or p == 0.0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p, generator=self._generator(device))
        return x * keep * (1.0 / (1.0 - p) if p < 1.0 else 0.0), keep

    def _from_device_generator(self, device: torch.device, func: Any, args: Any, kwargs: Any) -> Any:
        # A fused kernel such as flash attention takes its state from the device's default generator. One stage worker
        # owns the device, so seeding that generator here races with nobody. The CPU's default generator is shared.
        if device.type != "cuda":
            raise RuntimeError(
                f"the random operator {func} takes no generator on {device}, so its draws could not be repeated; "
                "use an attention implementation without fused dropout, or set that dropout to 0"
            )
        generator = torch.cuda.default_generators[device.index or 0]
        generator.manual_seed((self._seed + self.draws) % 2**63)
        return func(*args, **kwargs)


def _without_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is a fused attention that is called with dropout 0: marked as random, it draws nothing then."""
    for position, argument in enumerate(func._schema.arguments):
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
    return torch.device(device) if device is not None else torch.get_default_device()
