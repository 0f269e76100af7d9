"""A training run, as `spu train` does it: configuration, data, loop, records, checkpoints, export."""
