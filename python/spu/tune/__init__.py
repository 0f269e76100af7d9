"""``spu tune``: measure the kernels' configurations on the user's GPU."""
