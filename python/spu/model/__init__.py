"""A model as a flat list of layers, their random draws and their recompute; models to plan for without weights."""
