#!/usr/bin/env bash
# torch 2.13.0, CPython 3.11: a process group outlives destroy_process_group(), if torch.distributed.pipelining was
# imported after init_process_group(), and a process may then end in SIGABRT.
#
# pipelining imports torch.distributed.nn.functional, whose functions have `group=group.WORLD` for a default: the group
# that is there at the import, for as long as Python runs. Gloo's threads live as long as the group. One of them lets go
# of a message's tensor after it has woken who waits for the message; for that it needs the interpreter's lock. If it
# comes to that while Python ends, CPython 3.11 ends the thread by pthread_exit, within a C++ destructor: "terminate
# called without an active exception". It takes a thread that loses its core at the wrong moment (2 of 32 runs on two
# busy cores). Imported before init_process_group(), or by nobody, the group and its threads end as they should.
#
# Seen: imported before: threads of the group 2, after destroy_process_group() 0
#       imported after: threads of the group 2, after destroy_process_group() 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/kept.py" <<'PY'
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def threads():
    time.sleep(0.5)  # one that begins or ends is counted a moment later
    names = [task / "comm" for task in Path("/proc/self/task").iterdir()]
    return sum(name.read_text().startswith("pt_gloo") for name in names)


when = sys.argv[1]
if when == "before":
    from torch.distributed import pipelining
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if when == "after":
    from torch.distributed import pipelining
dist.all_reduce(torch.ones(1))
during = threads()
dist.destroy_process_group()
left = threads()
print(f"imported {when}: threads of the group {during}, after destroy_process_group() {left}")
assert during > 0 and left == (during if when == "after" else 0)
PY
"$folder/venv/bin/python" "$folder/kept.py" before
"$folder/venv/bin/python" "$folder/kept.py" after
