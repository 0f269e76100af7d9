"""Stages in processes of their own, on one machine or several: torchrun and torch.distributed.pipelining run them."""
