"""The caches of shapes of 16-bit products: a trainer with small budgets bounds them."""

from __future__ import annotations

import os
import sys

import pytest
from hard_limit import run_limited

from spu.common.product_cache import VARIABLES, bound_product_caches, shapes_kept

MB = 10**6


def test_shapes_kept_take_a_sixteenth_of_the_budgets() -> None:
    assert shapes_kept([750 * MB]) == 69
    assert shapes_kept([750 * MB] * 2) == 99
    assert shapes_kept([2 * MB]) == 64  # a model's own few
    assert shapes_kept([64 * 10**9]) == 1024


def test_bound_product_caches_leaves_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "3")
        monkeypatch.delenv(name)
    monkeypatch.setenv(VARIABLES[0], "7")
    for roomy in ([], [64 * 10**9]):
        bound_product_caches(roomy)
        assert VARIABLES[1] not in os.environ
    bound_product_caches([750 * MB])
    assert [os.environ[name] for name in VARIABLES] == ["7", "69"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_products_of_many_shapes_do_not_grow_a_process_with_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """250 shapes kept 0.13 GB of a process whose trainer had a budget of 0.3 GB (CPUs with 16-bit products)."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    run = run_limited(
        "import torch, spu\n"
        "from spu.common import heap\n"
        "def held():\n"
        "    heap.give_back()\n"
        "    return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) * 1024\n"
        "spu.ModelParallelTrainer(torch.nn.Linear(4, 4), spu.DeviceManager('cpu:0=300MB').get_devices('cpu:0'))\n"
        "x, w = torch.ones(500, 256, dtype=torch.float16), torch.ones(256, 256, dtype=torch.float16)\n"
        "x[:10] @ w\n"
        "before = held()\n"
        "for rows in range(100, 350):\n"
        "    x[:rows] @ w\n"
        "print(held() - before)\n"
    )
    assert run.code == 0, run.errors
    assert int(run.output) < 80 * MB
