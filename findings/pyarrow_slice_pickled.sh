#!/usr/bin/env bash
# pyarrow 26.0.1: a slice of a table that is pickled takes the whole table along.
#
# table.slice(start, 10) is a view that costs nothing, and how a table is shared out: to the workers of a data loader, to the
# tasks of a pool, to processes by a queue. Pickle writes its buffers, and a slice's are those of the table: 10 rows are as many
# bytes as a million, n parts are n tables, and each receiver holds all of it. The same for arrays, chunked arrays and record
# batches, and for a column of texts. num_rows, nbytes (which counts the slice alone) and the rows are right. Written as Arrow
# IPC, or taken by take(), it is the slice alone. NumPy pickles the 10 rows of such a view.
#
# Seen, bytes of 10 rows of 1,000,000 integers: pickle of a table, a column, an array, a record batch 8,000,164 to 8,000,295;
# nbytes 80; IPC 360; take() 362; NumPy 228; 10 of 100,000 texts 1,789,086
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyarrow==26.0.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import pickle

import numpy as np
import pyarrow as pa

values = np.arange(1_000_000)
table = pa.table({"x": values})
part = table.slice(500, 10)
slices = {
    "table": part,
    "column": part["x"],
    "array": part["x"].chunk(0),
    "record batch": part.to_batches()[0],
}
for name, piece in slices.items():
    size = len(pickle.dumps(piece))
    print(f"{name}: nbytes {piece.nbytes}, pickled {size}")
    assert piece.nbytes == 80 and 8_000_000 < size < 8_001_000
texts = pa.array([f"document {i}" for i in range(100_000)]).slice(500, 10)
sink = pa.BufferOutputStream()
with pa.ipc.new_stream(sink, part.schema) as stream:
    stream.write_table(part)
sizes = {
    "texts": len(pickle.dumps(texts)),
    "IPC": sink.getvalue().size,
    "take()": len(pickle.dumps(table.take(list(range(500, 510))))),
    "NumPy": len(pickle.dumps(values[500:510])),
}
print(sizes)
assert sizes.pop("texts") > 1_000_000 and all(size < 1000 for size in sizes.values())
assert pickle.loads(pickle.dumps(part)).equals(part)
PY
