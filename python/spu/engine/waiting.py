"""Weights that stay on their device while an update of theirs waits: nobody may see the old values meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from spu.common.absent import absent, reads_as_nan
from spu.common.torch_private import parameters_of

__all__ = ["Waiting", "refuse_stand_ins"]


def refuse_stand_ins(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise RuntimeError where a parameter of a module is a stand-in: a hook before ``module.state_dict()``, whose
    result somebody may save. (A function of this module: a model with it can be pickled and copied.)
    """
    for name, parameter in parameters_of(module).items():
        several = parameter is not None and parameter.numel() > 1 and parameter.is_floating_point()
        if several and reads_as_nan(parameter.detach()):  # type: ignore[union-attr]
            raise RuntimeError(
                f"{prefix}{name} waits in a tier below for its update, so that its values are not here: call "
                "trainer.flush() before state_dict(), or take trainer.state_dict_for_model()"
            )


class Waiting:
    """Puts stand-ins in the place of weights between runs, and takes them back before the next one.

    Args:
        weights: by stage, those that stay on the device and that the stage's deferred update changes.
    """

    def __init__(self, weights: Mapping[int, Sequence[nn.Parameter]]) -> None:
        self._weights = weights
        self._real: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # (parameter, its tensor, its stand-in)

    def hidden_bytes(self, stages: Collection[int]) -> int:
        """Return the bytes of the weights of these stages that are hidden now, which stay on their device."""
        own = {id(parameter) for stage in stages for parameter in self._weights.get(stage, ())}
        return sum(real.untyped_storage().nbytes() for parameter, real, _ in self._real if id(parameter) in own)

    def hide(self, stages: Collection[int]) -> None:
        """Put stand-ins where the weights of these stages were."""
        hidden = {id(parameter) for parameter, _, _ in self._real}
        for parameter in (p for stage in stages for p in self._weights.get(stage, ()) if id(p) not in hidden):
            stand_in = absent(parameter.shape, parameter.dtype, parameter.device)
            self._real.append((parameter, parameter.data, stand_in))
            parameter.data = stand_in

    def changed(self) -> list[nn.Parameter]:
        """Return the hidden parameters that somebody has changed, who has changed a stand-in; put new ones there."""
        found = []
        for index, (parameter, real, stand_in) in enumerate(self._real):
            same = parameter.data_ptr() == stand_in.data_ptr()
            if parameter.numel() and not (same and reads_as_nan(parameter.detach())):
                parameter.data = absent(real.shape, real.dtype, real.device)
                self._real[index] = parameter, real, parameter.data
                found.append(parameter)
        return found

    def reveal(self) -> None:
        """Put the weights back."""
        for parameter, real, _ in self._real:
            parameter.data = real
        self._real.clear()
