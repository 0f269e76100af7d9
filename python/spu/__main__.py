"""``python -m spu``: the ``spu`` command, as torchrun starts it."""

from __future__ import annotations

from spu.cli.app import main

if __name__ == "__main__":
    main()
