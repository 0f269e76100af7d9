"""The ops: one schema each, several backends, one derivative. Knows nothing of stages, plans or trainers."""

from __future__ import annotations

from .codec import pack, unpack, wire_bytes
from .cross_entropy import linear_cross_entropy
from .dispatch import BackendStatus, backends, choose_backend, forced_backend, has_kernel, use_backend
from .gated import GATED_ACTIVATIONS, gated_mlp
from .linear import linear_act, linear_db_, linear_dw_, linear_dw_db_
from .optimizer import adamw_, grad_norm, grad_sqnorm, unscale_
from .reference import ACTIVATIONS
from .sink import BackwardScope, GradSink, attach_sink, current_scope, detach_sink, open_scope, sink_of
from .wire import CODECS

__all__ = [
    "ACTIVATIONS",
    "CODECS",
    "GATED_ACTIVATIONS",
    "BackendStatus",
    "BackwardScope",
    "GradSink",
    "adamw_",
    "attach_sink",
    "backends",
    "choose_backend",
    "current_scope",
    "detach_sink",
    "forced_backend",
    "gated_mlp",
    "grad_norm",
    "grad_sqnorm",
    "has_kernel",
    "linear_act",
    "linear_cross_entropy",
    "linear_db_",
    "linear_dw_",
    "linear_dw_db_",
    "open_scope",
    "pack",
    "sink_of",
    "unpack",
    "unscale_",
    "use_backend",
    "wire_bytes",
]
