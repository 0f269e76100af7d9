"""Processes of a start find one another in a store that is full of an earlier start's keys."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from spu.distributed.meeting import found_store, meeting

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def started(store: dist.Store, size: int) -> list[dist.Store]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: meeting(store, rank, size, 20.0), range(size)))


def test_each_start_has_keys_of_its_own() -> None:
    store = dist.HashStore()
    for attempt in range(3):
        stores = started(store, 3)
        assert not any(own.check(["address of 1"]) for own in stores), "of a process that is dead"
        stores[1].set("address of 1", str(attempt))
        assert [own.get("address of 1") for own in stores] == [str(attempt).encode()] * 3


def test_who_has_asked_and_died_is_not_waited_for() -> None:
    store = dist.HashStore()
    store.set("spu/asked/1", "a word of a process that died before it was told")
    first, second = started(store, 2)
    second.set("x", "1")
    assert first.get("x") == b"1"


def test_one_alone_gives_up() -> None:
    assert not meeting(dist.HashStore(), 0, 1, 1.0).check(["x"])
    with pytest.raises(TimeoutError, match=r"rank 0 has waited 0.05 s for ranks \[1, 2\]"):
        meeting(dist.HashStore(), 0, 3, 0.05)
    with pytest.raises(TimeoutError, match="rank 2 has heard nothing of rank 0 for 0.05 s"):
        meeting(dist.HashStore(), 2, 3, 0.05)


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:  # as torchrun's is when its process is stopped: the system takes connections for it
        server.bind(("127.0.0.1", 0))
        server.listen()
        given = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.getsockname()[1]}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        with pytest.raises(TimeoutError, match="has not answered for 0.2 s"):
            found_store(0.2)
