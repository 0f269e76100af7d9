"""Bytes by category, worked out by hand, and the wire format's own sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spu import ops
from spu.plan.memory import LayerNeeds, StageMemory, wire_bytes


def layer(name, params, saved, output, shared=0):
    return LayerNeeds(name, params, saved, shared, output, 1.0, 2.0)


LAYERS = [layer("a", 10, 1000, 100), layer("b", 20, 3000, 200, shared=50), layer("c", 30, 2000, 300, shared=70)]


def memory(**changes):
    usual = {
        "schedule": "1f1b",
        "stages": 2,
        "microbatches": 4,
        "precision": "fp16",
        "codecs": ["none"],
        "recompute": False,
    }
    return StageMemory(LAYERS, **{**usual, **changes})


def test_states_of_16_bit_training_are_18_bytes_per_parameter():
    held = memory().of(0, 0, 2)
    assert (held.param_bytes, held.main_grad_bytes, held.master_bytes, held.moment_bytes) == (60, 120, 120, 240)


def test_states_of_fp32_training_are_16_bytes_per_parameter_without_masters():
    held = memory(precision="fp32").of(0, 0, 2)
    assert (held.param_bytes, held.main_grad_bytes, held.master_bytes, held.moment_bytes) == (120, 120, 0, 240)


def test_activations_are_what_the_schedule_holds_in_flight():
    # Stage 0 holds two microbatches under 1f1b: what both layers save, less what they share, and the stage's output.
    assert memory().of(0, 0, 2).saved_bytes == 2 * (1000 + 3000 - 50 + 200)
    # gpipe holds all four.
    assert memory(schedule="gpipe").of(0, 0, 2).saved_bytes == 4 * (1000 + 3000 - 50 + 200)
    # The last stage holds one, and for the loss an fp32 copy of its fp16 output; nothing is shared across the boundary.
    assert memory().of(1, 2, 3).saved_bytes == 2000 + 2 * 300
    assert memory().of(1, 1, 3).saved_bytes == 3000 + 2000 - 70 + 2 * 300


def test_recompute_keeps_inputs_and_the_largest_layer():
    # In flight: b's input, which is a's output (a's own input is the user's batch), and the stage's output.
    assert memory(recompute=True).of(0, 0, 2).saved_bytes == 2 * (100 + 200) + 3000
    assert memory(recompute=True).of(1, 1, 3).saved_bytes == (100 + 200) + 2 * 300 + 3000
    assert memory(recompute=True).of(0, 0, 1).saved_bytes == 2 * 100 + 1000


def test_wires_are_two_buffers_per_boundary_and_direction():
    assert memory().of(0, 0, 2).wire_bytes == 2 * 2 * 200
    assert memory().of(1, 1, 3).wire_bytes == 2 * 2 * 100
    middle = memory(stages=3, codecs=["none", "int8"])
    assert middle.of(1, 1, 2).wire_bytes == 2 * 2 * (100 + wire_bytes(200, "fp16", "int8"))
    assert memory(stages=1, codecs=[]).of(0, 0, 3).wire_bytes == 0


def test_the_total_is_the_sum():
    held = memory().of(0, 0, 2)
    assert held.total_bytes == 60 + 120 + 120 + 240 + held.saved_bytes + held.wire_bytes
    assert memory().total(0, 0, 2) == held.total_bytes


@given(st.integers(0, 5000), st.sampled_from(["fp16", "bf16", "fp32"]), st.sampled_from(["fp16", "bf16", "int8"]))
@settings(max_examples=80)
def test_wire_sizes_are_those_of_the_codecs(count, precision, codec):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert wire_bytes(count * dtype.itemsize, precision, codec) == ops.wire_bytes((count,), dtype, codec)
    assert wire_bytes(count * dtype.itemsize, precision, "none") == count * dtype.itemsize


def test_an_unknown_codec_is_named():
    with pytest.raises(ValueError, match="unknown codec 'zip'; there are 'none', 'fp16', 'bf16', 'int8'"):
        wire_bytes(100, "fp16", "zip")
