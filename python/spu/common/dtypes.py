"""The floating-point dtypes that spu trains in, and their names in settings and files."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "HALVES", "NAMES", "STORAGE"]

HALVES = (torch.float16, torch.bfloat16)
STORAGE = (*HALVES, torch.float32)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
