"""The ``spu`` command: one module for each subcommand."""
