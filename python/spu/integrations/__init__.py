"""Adapters between `spu` and other libraries. Nothing here is imported until it is asked for."""
