#!/usr/bin/env bash
# tqdm 4.70.1: a bar that is switched off starts a thread, which lives until the process ends.
#
# tqdm(..., disable=True) shows nothing, and closes at once. But the class makes its monitor before it looks at disable: a
# thread named tqdm_monitor that wakes every ten seconds. So a library that offers progressbar=False (peft's
# merge_and_unload, say) leaves a thread behind in every program that calls it. tqdm.monitor_interval = 0 prevents it.
#
# Seen: before 1 thread; after a bar with disable=True 2, tqdm_monitor among them; with monitor_interval 0 still 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tqdm==4.70.1
for interval in 10 0; do
    INTERVAL=$interval "$folder/venv/bin/python" - <<'PY'
import os
import threading

from tqdm import tqdm

tqdm.monitor_interval = int(os.environ["INTERVAL"])
before = threading.active_count()
assert list(tqdm([1, 2], disable=True)) == [1, 2]
names = [thread.name for thread in threading.enumerate()]
print(f"monitor_interval {tqdm.monitor_interval}: before {before}, after {len(names)}: {', '.join(names)}")
assert before == 1
assert ("tqdm_monitor" in names) == (tqdm.monitor_interval > 0)
PY
done
