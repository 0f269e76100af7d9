"""What torch's allocator took of a card: beside what a plan predicted, it tells what no plan counts."""

from __future__ import annotations

import torch

__all__ = ["card_memory"]


def card_memory(device: int = 0) -> dict[str, int]:
    """Return bytes and counts since the process began.

    ``peak_bytes``: of tensors. ``active_bytes``: with memory that nobody uses, but that the host has not seen a stream
    leave yet: far above the first, the host runs ahead of copies. ``split_bytes``: of gaps between tensors.
    ``reserved_bytes``: all of it. ``context_bytes``: what the card lacks beside it now: the driver's context, kernels,
    and other programs. ``alloc_retries``: how often the driver had no more, so that the card was waited for and gaps
    were given back; more than a few make steps slow. ``ooms``: how often that did not help.
    """
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "active_bytes": stats["active_bytes.all.peak"],
        "split_bytes": stats["inactive_split_bytes.all.peak"],
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "context_bytes": total - free - torch.cuda.memory_reserved(device),
        "alloc_retries": stats["num_alloc_retries"],
        "ooms": stats["num_ooms"],
    }
