"""The order in which stages work: schedules as data, their validator and their simulator. Imports no torch."""

from __future__ import annotations

from spu.schedules.actions import (
    Action,
    Actions,
    ScheduleError,
    format_grid,
    parse_grid,
    peak_in_flight,
    peak_on_ranks,
    ranks_of,
    stage_count,
)
from spu.schedules.catalog import get, names, splits_backward, stage_ranks, stages_per_rank
from spu.schedules.gpipe import forward_only, gpipe
from spu.schedules.interleaved import interleaved
from spu.schedules.layer_outer import layer_outer
from spu.schedules.one_f_one_b import one_f_one_b
from spu.schedules.simulate import simulate
from spu.schedules.timeline import Span, Timeline
from spu.schedules.validate import validate
from spu.schedules.zero_bubble import zb, zbv

__all__ = [
    "Action",
    "Actions",
    "ScheduleError",
    "Span",
    "Timeline",
    "format_grid",
    "forward_only",
    "get",
    "gpipe",
    "interleaved",
    "layer_outer",
    "names",
    "one_f_one_b",
    "parse_grid",
    "peak_in_flight",
    "peak_on_ranks",
    "ranks_of",
    "simulate",
    "splits_backward",
    "stage_count",
    "stage_ranks",
    "stages_per_rank",
    "validate",
    "zb",
    "zbv",
]
