"""The checksum against published values, against its own table form, and without a compiler."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from spu.memory.checksum import Checksums, checksum, checksum_name

host = pytest.importorskip("spu._host", reason="spu._host is not built here")

# RFC 3720 (iSCSI), appendix B.4, and the check value of the catalogue of CRC algorithms.
KNOWN = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


@pytest.mark.parametrize(("data", "value"), KNOWN, ids=[str(len(data)) for data, _ in KNOWN])
def test_known_values(data: bytes, value: int) -> None:
    assert host.crc32c(data) == host.crc32c_by_tables(data) == value


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4095, 12287, 12288, 12289, 12296, 40000, 100003])
def test_the_instruction_and_the_tables_agree_at_every_size_and_start(size: int) -> None:
    data = random.Random(size).randbytes(size + 3)
    for start in range(4):
        part = memoryview(data)[start : start + size]
        whole = host.crc32c_by_tables(part)
        assert host.crc32c(part) == whole
        cut = size // 3
        assert host.crc32c(part[cut:], host.crc32c(part[:cut])) == whole


def test_one_changed_bit_is_seen_wherever_it_is() -> None:
    data = np.frombuffer(random.Random(0).randbytes(30000), np.uint8).copy()
    whole = host.crc32c(data)
    for place in (0, 4095, 4096, 8192, 12287, 12288, 29999):
        data[place] ^= 1 << (place % 8)
        assert host.crc32c(data) != whole
        data[place] ^= 1 << (place % 8)
    assert host.crc32c(data) == whole


def test_memory_with_gaps_is_refused() -> None:
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        host.crc32c(np.zeros(16, np.uint8)[::2])


def test_the_compiled_checksum_is_used_where_it_is() -> None:
    assert checksum_name == "crc32c"
    assert checksum(b"123456789") == 0xE3069283


def test_without_a_compiler_zlib_serves() -> None:
    code = (
        "import sys; sys.modules['spu._host'] = None\n"
        "from spu.memory.checksum import checksum, checksum_name\n"
        "print(checksum_name, hex(checksum(b'123456789')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["crc32", "0xcbf43926"]


def test_a_piece_agrees_with_what_was_set_last_only() -> None:
    sums = Checksums(2)
    assert not sums.written(0)
    sums.set(0, 0)  # a checksum like any other
    assert sums.written(0)
    assert not sums.written(1)
    sums.set(0, 0xFFFFFFFF)
    assert sums.agrees(0, 0xFFFFFFFF)
    assert not sums.agrees(0, 0)
