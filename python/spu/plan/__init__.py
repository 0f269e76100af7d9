"""Planning: layers on devices under budgets, predictions, the plan as a file, the pipeline as a picture."""

from __future__ import annotations

from spu.plan.make import make_plan
from spu.plan.memory import StageBytes, StageMemory, wire_bytes
from spu.plan.partition import partition
from spu.plan.plan import Plan, Predicted, StagePlan
from spu.plan.refusal import BudgetError
from spu.plan.show.curve import memory_curve
from spu.plan.show.picture import draw_timeline
from spu.plan.show.trace import write_trace

__all__ = [
    "BudgetError",
    "Plan",
    "Predicted",
    "StageBytes",
    "StageMemory",
    "StagePlan",
    "draw_timeline",
    "make_plan",
    "memory_curve",
    "partition",
    "wire_bytes",
    "write_trace",
]
