"""Doing it: stages, workers, channels, and the engine that runs a schedule on them."""
