"""Bytes by category, worked out by hand, and the wire format's own sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spu import ops
from spu.plan.layer_cost import LayerCost
from spu.plan.memory import Boundary, StageMemory, pinned_bytes, wire_bytes


def layer(name, params, own, inputs, output, **changes):
    sizes = {"own_bytes": own, "input_bytes": inputs, "output_bytes": output}
    return LayerCost(name=name, param_count=params, trained_count=params, **sizes, **changes)


LAYERS = [
    layer("a", 10, 1000, 8, 100, input_saved=True, output_saved=True, backward_extra_bytes=11),
    layer("b", 20, 3000, 100, 200, input_saved=True, forward_extra_bytes=7),
    layer("c", 30, 2000, 200, 300, backward_extra_bytes=40),
]
LOSS = layer("loss", 0, 600, 300, 4, forward_extra_bytes=5, backward_extra_bytes=90)
SHARED, COPIED = Boundary("none", False), Boundary("none", True)


def memory(*boundaries, in_flight=(2, 1), **changes):
    usual = {"in_flight": in_flight, "boundaries": boundaries or [SHARED], "precision": "fp16"}
    return StageMemory(LAYERS, LOSS, **{**usual, **changes})


def test_states_of_16_bit_training_are_18_bytes_per_parameter():
    held = memory().of(0, 0, 2)
    assert (held.param_bytes, held.main_grad_bytes, held.master_bytes, held.moment_bytes) == (60, 120, 120, 240)
    assert held.state_bytes == 18 * 30


def test_states_of_fp32_training_are_16_bytes_per_parameter_without_masters():
    held = memory(precision="fp32").of(0, 0, 2)
    assert (held.param_bytes, held.main_grad_bytes, held.master_bytes, held.moment_bytes) == (120, 120, 0, 240)


def test_parameters_that_are_not_trained_are_weights_alone():
    frozen = LayerCost(name="frozen", param_count=10)
    held = StageMemory([frozen], LOSS, in_flight=[1], boundaries=[], precision="fp16").of(0, 0, 1)
    assert held.state_bytes == 20


def test_a_parameter_of_two_layers_is_counted_once_and_has_a_weight_and_a_gradient_in_another_stage():
    tied = layer("d", 5, 0, 0, 0, ties=((0, 10, 10),))
    held = StageMemory([*LAYERS, tied], LOSS, in_flight=(1, 1), boundaries=[SHARED], precision="fp16")
    assert held.of(0, 0, 4).state_bytes == 18 * (10 + 20 + 30 + 5)
    assert held.of(1, 1, 4).state_bytes == 18 * (20 + 30 + 5) + 6 * 10


def test_activations_are_what_the_schedule_holds_in_flight():
    # What both layers leave behind, the tensor between them (both save it, once), and the stage's output.
    assert memory().of(0, 0, 2).saved_bytes == 2 * (1000 + 3000 + 100 + 200)
    assert memory(in_flight=(4, 1)).of(0, 0, 2).saved_bytes == 4 * (1000 + 3000 + 100 + 200)
    # The last stage adds the loss; the logits are not saved by either side.
    assert memory().of(1, 2, 3).saved_bytes == 2000 + 600
    assert memory().of(1, 1, 3).saved_bytes == 3000 + 2000 + 600


def test_a_stage_that_gets_a_copy_keeps_its_input_where_it_is_saved():
    assert memory(COPIED).of(1, 1, 3).saved_bytes == 3000 + 2000 + 600 + 100
    assert memory(COPIED).of(1, 2, 3).saved_bytes == 2000 + 600


def test_recompute_keeps_inputs_and_one_layer_at_a_time():
    # In flight: b's input and the stage's output (a's own input is the user's batch).
    both = memory().of(0, 0, 2, recompute=(0, 1))
    assert both.saved_bytes == 2 * (100 + 200)
    assert both.workspace_bytes == 3000 + 7  # running it again is a forward, too
    one = memory().of(0, 0, 2, recompute=(0,))
    assert one.saved_bytes == 2 * (3000 + 100 + 200)
    assert one.workspace_bytes == 1000 + 11
    assert memory(COPIED).of(1, 2, 3, recompute=(2,)).saved_bytes == 200 + 600


def test_workspace_is_the_most_of_one_action():
    assert memory().of(0, 0, 2).workspace_bytes == 11
    assert memory().of(0, 1, 2).workspace_bytes == 7
    # The logits are there while the loss is computed.
    assert memory().of(1, 2, 3).workspace_bytes == 300 + 5


def test_deferred_weight_gradients_keep_their_operands():
    layers = [layer("a", 1, 1000, 0, 10, deferred_bytes=50)]
    usual = {"in_flight": [3], "boundaries": [], "precision": "fp16"}
    kept, deferred = (StageMemory(layers, LOSS, deferred=d, **usual).of(0, 0, 1).saved_bytes for d in (False, True))
    assert deferred - kept == 3 * 50


def test_wires_are_two_buffers_per_boundary_and_direction_where_something_is_copied():
    assert memory(COPIED).of(0, 0, 2).wire_bytes == 2 * 2 * 200
    assert memory(COPIED).of(1, 1, 3).wire_bytes == 2 * 2 * 100
    packed = Boundary("int8", True)
    middle = memory(COPIED, packed, in_flight=(3, 2, 1))
    assert middle.of(1, 1, 2).wire_bytes == 2 * 2 * (100 + wire_bytes(200, "fp16", "int8"))
    # In one memory the tensor itself is the wire; the gradient on its way back is the sender's.
    assert (memory().of(0, 0, 2).wire_bytes, memory().of(1, 1, 3).wire_bytes) == (0, 100)


def test_a_cpu_beside_a_gpu_pins_its_wires_in_powers_of_two():
    to_gpu = memory(Boundary("none", True, before_on_gpu=False, after_on_gpu=True))
    assert to_gpu.of(0, 0, 2).wire_bytes == 2 * 2 * 256
    assert to_gpu.of(1, 2, 3).wire_bytes == 2 * 2 * 200


@given(st.integers(0, 1 << 40))
def test_pinned_memory_is_the_next_power_of_two(count):
    size = pinned_bytes(count)
    assert size >= count
    assert size == 0 if count == 0 else (size < 2 * count and size & (size - 1) == 0)


def test_the_total_is_the_sum():
    held = memory().of(0, 0, 2)
    assert held.total_bytes == 60 + 120 + 120 + 240 + held.saved_bytes + held.wire_bytes + held.workspace_bytes


@given(st.integers(0, 5000), st.sampled_from(["fp16", "bf16", "fp32"]), st.sampled_from(["fp16", "bf16", "int8"]))
@settings(max_examples=80)
def test_wire_sizes_are_those_of_the_codecs(count, precision, codec):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert wire_bytes(count * dtype.itemsize, precision, codec) == ops.wire_bytes((count,), dtype, codec)
    assert wire_bytes(count * dtype.itemsize, precision, "none") == count * dtype.itemsize


def test_an_unknown_codec_is_named():
    with pytest.raises(ValueError, match="unknown codec 'zip': use one of 'fp16', 'bf16', 'int8'"):
        wire_bytes(100, "fp16", "zip")
