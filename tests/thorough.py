"""Whether everything is tried: `make test-all`. The suite leaves out what other commands or cases of it repeat."""

from __future__ import annotations

import os

__all__ = ["ALL"]

ALL = os.environ.get("SPU_TEST_ALL", "0") not in ("", "0")
