"""The ``spu`` command, also as ``python -m spu``, as torchrun starts it."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run ``spu``; Ctrl-C while its modules are imported ends it as later on, with one line."""
    try:
        from spu.cli.app import main as run
    except KeyboardInterrupt:
        print("spu: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
