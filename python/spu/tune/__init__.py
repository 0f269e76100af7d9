"""``spu tune``: measure the kernels' configurations on the user's GPU, or whose products serve on the user's CPU."""
