"""Tiers as users write them: sizes of the host, a folder on a disk, and what is no tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from spu.devices.tiers import Tiers, parse_tiers, split_budget

GB = 10**9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu=32GB", Tiers(32 * GB)),
        ("disk=/data/spill:100GB", Tiers(0, Path("/data/spill"), 100 * GB)),
        (" CPU = 1GiB , Disk = a:b : 1.5GB ", Tiers(1 << 30, Path("a:b"), 3 * GB // 2)),
        ("", Tiers()),
    ],
)
def test_tiers_are_read(text, expected):
    assert parse_tiers(text) == expected


def test_a_budget_gives_its_disk_away():
    rest, tiers = split_budget("cuda:0=8GB,cpu=32GB,disk=C:\\spill:100GB")
    assert (rest, tiers) == ("cuda:0=8GB,cpu=32GB", Tiers(0, Path("C:\\spill"), 100 * GB))
    assert split_budget("disk=/x:1B") == (None, Tiers(0, Path("/x"), 1))
    assert split_budget(None) == (None, Tiers())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("disk=/data", "disk=/data has no size: write disk=FOLDER:SIZE"),
        ("disk=:1GB", "disk=:1GB has no folder: write disk=FOLDER:SIZE"),
        ("disk=/data:lots", "disk=lots: 'lots' is not a size"),
        ("disk=/data:50%", "a share needs a total"),
        ("disk=/data:0GB", "disk=0GB is zero; leave it out"),
        ("disk=/a:1GB,disk=/b:1GB", "gives disk twice; give one"),
        ("cpu=1GB,cpu=2GB", "gives cpu twice; give one"),
        ("cuda:0=8GB", "cuda:0 is no tier; there are cpu=SIZE and disk=FOLDER:SIZE"),
        ("cpu", "is not DEVICE=SIZE"),
    ],
)
def test_what_is_no_tier_is_named(text, reason):
    with pytest.raises(ValueError, match="(?s).*") as error:
        parse_tiers(text)
    assert reason in str(error.value)


def test_a_disk_is_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    Tiers(1, tmp_path / "not" / "yet", 1).check()
    Tiers(1).check()
    assert not (tmp_path / "not").exists()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        Tiers(0, tmp_path / "file" / "below", 1).check()
