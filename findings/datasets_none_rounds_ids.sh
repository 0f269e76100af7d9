#!/usr/bin/env bash
# datasets 5.2.0 with torch 2.13.0: one None in an integer column makes the whole batch fp32, which rounds its ids.
#
# With format "torch" an int64 column gives int64 tensors, exact. A batch with a None in it becomes floats, with NaN for the
# None, and floats become fp32: an id above 2^24 in another row is rounded. So a row's value depends on whether it is read
# alone or in a batch, and on the other rows of the batch; in a list of numbers with a None it is rounded always. The format
# "numpy" does the same; without a format the ids are exact.
#
# Seen, rows 16777217, None, 3: row 0 alone 16777217 (int64); in a batch with row 2 16777217 (int64); in a batch with all
# 16777216 (fp32), numpy too; without a format 16777217; in a list with None 16777216 (fp32)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy datasets==5.2.0
HF_HUB_OFFLINE=1 HF_HOME="$folder" "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import datasets

rows = datasets.Dataset.from_dict({"id": [16777217, None, 3], "ids": [[16777217, None], [1], [2]]})
assert rows.features["id"] == datasets.Value("int64")
torch_rows = rows.with_format("torch")
found = {
    "alone": torch_rows[0]["id"],
    "with row 2": torch_rows[[0, 2]]["id"][0],
    "with all": torch_rows[:]["id"][0],
    "with all, numpy": rows.with_format("numpy")[:]["id"][0],
    "with all, no format": rows[:]["id"][0],
    "in a list with None": torch_rows[0]["ids"][0],
}
for name, value in found.items():
    print(f"{name:20} {int(value)} {getattr(value, 'dtype', '')}")
    exact = name in ("alone", "with row 2", "with all, no format")
    assert int(value) == (16777217 if exact else 16777216), name
PY
