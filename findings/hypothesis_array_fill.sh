#!/usr/bin/env bash
# hypothesis 6.170.17 with numpy 2.4.6: an array drawn by arrays() is mostly one number, however many elements it has.
#
# hypothesis.extra.numpy.arrays(float32, (32, 32), elements=floats(-1, 1)) is what one writes to test a kernel on random
# matrices. It draws a few elements and fills the rest with one value. Half of all examples have 12 different values or fewer
# among 1024, one in eight is a constant: a kernel that confuses rows, columns or blocks passes on many. With fill=nothing()
# each element is drawn.
#
# Seen, 100 examples, different values in an array: of 4 elements half have 2 or fewer, of 64 4, of 1024 12; constant arrays
# among them 23, 16, 12; in every one of 1024 one number has 85% of the places or more; with fill=nothing() half of those of 64
# elements have 47 or more, and 2 are constant
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hypothesis==6.170.17 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import statistics

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

quiet = settings(max_examples=100, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def different(shape, **options):
    """Return how many different values each of 100 examples has, and the smallest share that one value has of an example."""
    counts, shares = [], []

    @quiet
    @given(arrays(np.float32, shape, elements=st.floats(-1, 1, width=32), **options))
    def look(array):
        times = np.unique(array, return_counts=True)[1]
        counts.append(len(times))
        shares.append(times.max() / array.size)

    look()
    return counts, min(shares)


for shape in ((4,), (8, 8), (32, 32)):
    counts, share = different(shape)
    print(f"{shape}: median of different values {statistics.median(counts)}, constant {counts.count(1)}, one value {share:.0%}")
    assert statistics.median(counts) < 20 and counts.count(1) >= 6
    assert shape != (32, 32) or share > 0.7
drawn, _ = different((8, 8), fill=st.nothing())
print(f"(8, 8), each drawn: median {statistics.median(drawn)}, constant {drawn.count(1)}")
assert statistics.median(drawn) > 32
PY
