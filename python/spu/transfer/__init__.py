"""Moving activations and gradients between devices, packed or as they are."""

from spu.transfer.link import Link as Link
from spu.transfer.side import side_for as side_for
