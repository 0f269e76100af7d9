"""Parametrisation over the backends that work here; the others are skipped with their reason."""

from __future__ import annotations

import pytest

from spu import ops


def available() -> list[object]:
    """One pytest parameter per backend."""
    found: list[object] = []
    for name, status in ops.backends().items():
        marks = () if status.available else pytest.mark.skip(reason=f"backend {name}: {status.reason}")
        found.append(pytest.param(name, marks=marks))
    return found


every_backend = pytest.mark.parametrize("backend", available())
