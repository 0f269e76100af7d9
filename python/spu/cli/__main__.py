"""``python -m spu.cli``: the ``spu`` command."""

from __future__ import annotations

from spu.cli.app import main

if __name__ == "__main__":
    main()
