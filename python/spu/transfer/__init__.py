"""Moving activations and gradients between devices, packed or as they are."""

from spu.transfer.link import Link as Link
