#!/usr/bin/env bash
# datasets 5.2.0 with torch 2.13.0: map() with a function that was edited gives the old rows, if it is imported from a module.
#
# map() keeps its result on disk under a fingerprint of the data and the function, so that it runs again when either changes. Of
# a function in the script that runs, its code is in the fingerprint. Of one that is imported, as helpers are, only the module's
# and the function's names are: what it did before it was edited comes back, in the next process too, without a word. A lambda
# that calls it is the same, and so is everything that is called by a function of the script. Likewise
# Dataset.from_generator(rows) does not run rows again, whatever the files hold now that it reads. load_from_cache_file=False
# helps for map().
#
# Seen, rows 1 and 2, a function that adds 1 and then, edited, 100: in the script 2 3, then 101 102; imported 2 3, then 2 3; by
# a lambda 2 3, then 2 3; with load_from_cache_file=False 101 102; from_generator of a file with 1 2, then 7 8 9: 1 2, then 1 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 datasets==5.2.0
write() { # what the function adds, and the lines of the generator's file
    printf 'def change(row):\n    return {"y": row["x"] + %s}\n' "$1" > "$folder/helpers.py"
    sed "s/ADDED/$1/" "$folder/template.py" > "$folder/script.py"
    printf '%s\n' $2 > "$folder/lines.txt"
}
cat > "$folder/template.py" <<'PY'
import sys

import datasets
import helpers

datasets.disable_progress_bars()
folder = sys.argv[1]
rows = datasets.load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train", cache_dir=f"{folder}/cache")


def change(row):
    return {"y": row["x"] + ADDED}


def lines(path):
    with open(path) as file:
        for line in file:
            yield {"x": int(line)}


generated = datasets.Dataset.from_generator(
    lines, gen_kwargs={"path": f"{folder}/lines.txt"}, cache_dir=f"{folder}/cache"
)
print(
    rows.map(change)["y"][:],
    rows.map(helpers.change)["y"][:],
    rows.map(lambda row: helpers.change(row))["y"][:],
    generated["x"][:],
    sep=";",
)
if sys.argv[2:]:
    print(rows.map(helpers.change, load_from_cache_file=False)["y"][:])
PY
printf '{"x": 1}\n{"x": 2}\n' > "$folder/rows.jsonl"
export HF_HOME="$folder/home" PYTHONDONTWRITEBYTECODE=1
write 1 "1 2"
first=$("$folder/venv/bin/python" -W ignore "$folder/script.py" "$folder" 2>/dev/null)
write 100 "7 8 9"
then=$("$folder/venv/bin/python" -W ignore "$folder/script.py" "$folder" again 2>/dev/null)
echo "in the script; imported; by a lambda; from_generator: $first, then $then"
[ "$first" = "[2, 3];[2, 3];[2, 3];[1, 2]" ]
[ "$then" = "[101, 102];[2, 3];[2, 3];[1, 2]"$'\n'"[101, 102]" ]
