"""The ops: one schema each, several backends, one derivative. Knows nothing of stages, plans or trainers."""

from __future__ import annotations

from spu.common.codecs import CODECS
from spu.ops.attention import attention
from spu.ops.codec import is_finite_wire, pack, unpack, wire_bytes
from spu.ops.convert import same_weights
from spu.ops.cross_entropy import linear_cross_entropy
from spu.ops.dispatch import BackendStatus, backends, choose_backend, forced_backend, has_kernel, use_backend
from spu.ops.embedding import embedding, embedding_dw_
from spu.ops.gated import GATED_ACTIVATIONS, gated_mlp
from spu.ops.host import copy_in, pack_to_host, unpack_from_host
from spu.ops.linear import linear_act, linear_db_, linear_dw_, linear_dw_db_
from spu.ops.mlp import MLP_ACTIVATIONS, mlp
from spu.ops.norm import layer_norm, rms_norm
from spu.ops.optimizer import adamw_, grad_norm, grad_sqnorm, unscale_
from spu.ops.reference.linear import ACTIVATIONS
from spu.ops.rotary import rotary
from spu.ops.sink import BackwardScope, GradSink, MainGrad, attach_sink, current_scope, detach_sink, open_scope, sink_of

__all__ = [
    "ACTIVATIONS",
    "CODECS",
    "GATED_ACTIVATIONS",
    "MLP_ACTIVATIONS",
    "BackendStatus",
    "BackwardScope",
    "GradSink",
    "MainGrad",
    "adamw_",
    "attach_sink",
    "attention",
    "backends",
    "choose_backend",
    "copy_in",
    "current_scope",
    "detach_sink",
    "embedding",
    "embedding_dw_",
    "forced_backend",
    "gated_mlp",
    "grad_norm",
    "grad_sqnorm",
    "has_kernel",
    "is_finite_wire",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "linear_db_",
    "linear_dw_",
    "linear_dw_db_",
    "mlp",
    "open_scope",
    "pack",
    "pack_to_host",
    "rms_norm",
    "rotary",
    "same_weights",
    "sink_of",
    "unpack",
    "unpack_from_host",
    "unscale_",
    "use_backend",
    "wire_bytes",
]
