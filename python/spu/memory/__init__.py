"""Where a layer's state lies while it is trained, and how it comes to the device that computes with it."""
