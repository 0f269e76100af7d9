"""What is known of a tensor: found once, again after a change in place, and forgotten with the tensor."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from spu.common.known import Known


def test_an_answer_stands_until_the_tensor_changes() -> None:
    looks = []

    @Known
    def total(tensor: Tensor) -> float:
        looks.append(tensor.shape)
        return float(tensor.sum())

    tensor, equal = torch.ones(3), torch.ones(3)
    assert (total(tensor), total(tensor), len(looks)) == (3.0, 3.0, 1)
    assert (total(equal), len(looks)) == (3.0, 2), "by identity, not by value"
    tensor[0] = 5
    assert (total(tensor), total(tensor), len(looks)) == (7.0, 7.0, 3)
    view = tensor[1:]
    assert (total(view), len(looks)) == (2.0, 4)
    tensor.mul_(2)  # views count the changes of what they look into
    assert (total(view), len(looks)) == (4.0, 5)


def test_an_answer_is_of_what_else_was_asked() -> None:
    cast = Known(lambda tensor, dtype: tensor.to(dtype))
    tensor = torch.ones(2)
    half = cast(tensor, torch.float16)
    assert half.dtype == torch.float16
    assert cast(tensor, torch.float16) is half
    assert cast(tensor, torch.bfloat16).dtype == torch.bfloat16


def test_what_is_noted_is_not_looked_for() -> None:
    def fail(_: Tensor) -> str:
        raise AssertionError("looked at")

    known = Known(fail)
    tensor = torch.ones(2)
    known.note(tensor, "noted")
    assert known(tensor) == "noted"
    nothing: Known[None] = Known(fail)  # type: ignore[arg-type]
    nothing.note(tensor, None)
    assert nothing(tensor) is None, "None is an answer too"


def test_nothing_is_known_of_inference_tensors() -> None:
    known = Known(lambda tensor: float(tensor.sum()))
    with torch.inference_mode():
        tensor = torch.ones(2)
        known.note(tensor, 9.0)
        assert known(tensor) == 2.0
        tensor[0] = 4
        assert known(tensor) == 5.0
    assert len(known) == 0


def test_an_answer_goes_with_its_tensor_and_keeps_none() -> None:
    known = Known(lambda tensor: tensor.numel())
    for size in range(50):
        assert known(torch.ones(size)) == size
    gc.collect()
    assert len(known) == 0


def test_threads_may_ask_together() -> None:
    known = Known(lambda tensor: float(tensor.sum()))
    tensors = [torch.full((4,), float(value)) for value in range(20)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(known, tensors * 50))
    assert answers == [4.0 * value for value in range(20)] * 50
