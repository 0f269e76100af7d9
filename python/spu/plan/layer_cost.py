"""The cost of one layer: the numbers that planning rests on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerCost"]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The cost of one layer, or of the loss, for one microbatch, in the precision and the form of the training."""

    name: str
    """The layer's name."""

    param_count: int = 0
    """Number of parameters; those that an earlier layer has too are left out (see ``ties``)."""

    trained_count: int = 0
    """How many of them are trained, and so have main gradients, masters and moments."""

    own_bytes: int = 0
    """Bytes that the forward leaves behind for the backward, the layer's input and output not counted."""

    input_bytes: int = 0
    """Bytes of what comes from the layer before."""

    output_bytes: int = 0
    """Bytes of what goes to the next layer."""

    input_saved: bool = False
    """Whether the backward needs the input."""

    output_saved: bool = False
    """Whether the backward needs the output."""

    forward_extra_bytes: int = 0
    """The most bytes that the forward takes beyond those that it leaves behind, while it runs."""

    backward_extra_bytes: int = 0
    """The most bytes that the backward takes beyond those that the forward has left behind, while it runs."""

    split_extra_bytes: int = 0
    """The same of a backward that leaves weight gradients for later, whose operands then stay."""

    deferred_bytes: int = 0
    """Bytes that deferred weight gradients keep beside ``own_bytes``, between input gradient and weight gradients."""

    left_bytes: int = 0
    """All bytes that deferred weight gradients keep in that time, the layer's input not counted."""

    left_input: bool = False
    """Whether deferred weight gradients keep the input, too."""

    forward_flops: int = 0
    """FLOPs (2 per multiply-add) of matrix products, convolutions and attention in the forward."""

    backward_flops: int = 0
    """The same of the backward: gradients of the input and of the parameters."""

    deferred_flops: int = 0
    """FLOPs, among ``backward_flops``, of weight gradients that can be deferred."""

    forward_traffic_bytes: int = 0
    """Bytes that all other operators of the forward read and write."""

    backward_traffic_bytes: int = 0
    """The same of the backward."""

    ties: tuple[tuple[int, int, int], ...] = ()
    """Parameters that earlier layers have too: (index of the last of those layers, parameters, trained ones) each."""

    basis: str = "counted"
    """What the numbers rest on: "counted" on fake tensors, "measured" on real ones where the layer reads values, or
    "bound": the layer could not be run, and the sizes of its parameters and its input bound it."""

    @property
    def weight_share(self) -> float:
        """The share of the backward's time that deferrable weight gradients take."""
        return self.deferred_flops / self.backward_flops if self.backward_flops else 0.0

    def extra_bytes(self, deferred: bool = False) -> int:
        """Return the most bytes of workspace of an action, where weight gradients are ``deferred`` or are not."""
        return max(self.forward_extra_bytes, self.backward_extra(deferred))

    def backward_extra(self, deferred: bool) -> int:
        """Return the most bytes that the backward takes beyond what the forward has left behind."""
        return max(self.backward_extra_bytes, self.split_extra_bytes if deferred else 0)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> tuple[float, float]:
        """Return (forward, backward) seconds: FLOPs at ``flops_per_s`` and traffic at ``bytes_per_s``."""
        return (
            self.forward_flops / flops_per_s + self.forward_traffic_bytes / bytes_per_s,
            self.backward_flops / flops_per_s + self.backward_traffic_bytes / bytes_per_s,
        )
