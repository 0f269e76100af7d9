#!/usr/bin/env bash
# torch 2.13.0, torchrun --max-restarts: processes that are started again read what the dead ones have written.
#
# torchrun's processes meet in a store that its agent holds (TORCHELASTIC_USE_AGENT_STORE), and that store stays when the
# processes are started again. init_process_group keeps no attempts apart: it looks for the other processes' addresses under
# the keys that the dead have filled. Whoever is quicker than its neighbour connects to a port where nobody listens: gloo
# ends with "connectFullMesh failed ... Connection refused", or waits, and a restart is used up, or several. A prefix that
# all processes of one attempt agree on keeps them apart.
#
# Seen: attempt 0: both keys are new; attempt 1: both are there, with the values of attempt 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/worker.py" <<'PY'
import os
import sys

from torch.distributed.rendezvous import rendezvous

store, rank, size = next(rendezvous("env://"))
attempt, key = os.environ["TORCHELASTIC_RESTART_COUNT"], f"address of {rank}"
known = store.check([key])
print(f"attempt {attempt} rank {rank}: {'of attempt ' + store.get(key).decode() if known else 'new'}", flush=True)
store.set(key, attempt)
sys.exit(attempt == "0")  # the first attempt fails
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone --max-restarts 1 --nproc-per-node 2 \
  "$folder/worker.py" > "$folder/out" 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
sort "$folder/out"
test "$(grep -c ': new$' "$folder/out")" = 2
test "$(grep -c '^attempt 1 .*: of attempt 0$' "$folder/out")" = 2
