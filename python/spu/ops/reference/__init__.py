"""The definition of every op in plain torch, on any device."""
