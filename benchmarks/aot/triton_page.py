"""The page of ``make aot``: what ``aot_triton.py`` compiled, as tables by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
_SAME = ("name", "tile", "stages", "flags", "registers", "spilled_bytes", "shared_bytes", "threads", "tensor_core",
         "uses_tma")  # fmt: skip
_MIX = ("tensor", "shared", "global", "fp32", "special", "other")

_HEAD = """# Kernels, compiled ahead of time

Every Triton kernel in every configuration of the tables (where nobody has measured they are
derived: `kernels/triton/derive.py`), compiled without a device with Triton {version}. This page: {count} kernels in
{dtypes}, written by `make aot` (`ARGS="--dtypes fp16"` for some). All dtypes take about 40 CPU-minutes; what is in
`build/aot-cache` is not compiled again, so a run that was cut off goes on and a second one takes a minute.

- **registers**, **spilled** bytes: a thread's. **shared** bytes: a block's. **resident**: share of a multiprocessor's
  threads that fit, by registers and shared memory; products live from few, large blocks.
- **mix**: per cent of the instructions in the innermost loop that multiplies most, or in the whole kernel where none
  does: tensor / shared memory / global memory / fp32 / special functions / other (addresses, conversions, control).
  Read for fp16; bf16 differs in roundings alone.
- **permits**: the share of the multiplying units' peak that the loop's issue slots leave room for. Tensor cores driven
  asynchronously (wgmma, tcgen05) need few slots: 1. Empty for kernels that multiply little: memory limits them.
- **in flight**: KB that the resident threads of a multiprocessor load without waiting. An H100 needs about 15 bytes a
  cycle and multiprocessor x 800 cycles = 12 KB for all of its bandwidth, GDDR cards about 6 KB. With less, bandwidth is
  out of reach.

These are estimates from machine code, not measurements: they show what cannot be reached, and where to look first.

The gate refuses spills (but for the exceptions named below), more shared memory than a block may have, products of
which fewer than two warps a scheduler fit a multiprocessor, 16-bit products without tensor-core instructions, accesses
of less than 16 bytes in kernels that memory limits, and contraction of a * b + c where it was switched off. "ragged"
are shapes and strides that are multiples of nothing, "long" rows of 8,192 and 16,384 elements and 64 heads.
"""


def markdown(rows: list[Row], exceptions: Mapping[tuple[str, int], tuple[int, str]], dtypes: tuple[str, ...]) -> str:
    """The page. ``rows`` are the gate's, of ``dtypes``; ``exceptions``: how much (kernel, architecture or 0) may spill,
    and why."""
    import triton

    lines = [_HEAD.format(version=triton.__version__, count=f"{len(rows):,}", dtypes=", ".join(dtypes))]
    for (name, arch), (size, reason) in exceptions.items():
        where = f"sm_{arch}" if arch else "every architecture"
        lines.append(f"Exception: {name} on {where} may spill {size} bytes a thread: {reason}.")
    if not exceptions:
        lines.append("Exceptions: none.")
    for arch in sorted({row["arch"] for row in rows}):
        lines += ["", f"## sm_{arch}", "", *_section([row for row in rows if row["arch"] == arch])]
    return "\n".join(lines) + "\n"


def _section(rows: list[Row]) -> list[str]:
    built, refused = [row for row in rows if "registers" in row], [row for row in rows if row["faults"]]
    spilled = sum(row["spilled_bytes"] > 0 for row in built)
    lines = [f"{len(rows)} kernels, {spilled} with spills, {len(refused)} refused.", ""]
    for row in refused:
        lines.append(f"Refused: {row['name']} ({row['label']}): {'; '.join(row['faults'])}")
    lines.append(
        "| kernel | case | tile | registers | spilled | shared | warps | resident | instruction | mix | permits "
        "| in flight |"
    )
    lines.append("|---" * 12 + "|")
    groups: dict[str, list[Row]] = {}
    for row in built:
        groups.setdefault(str([row[name] for name in _SAME]), []).append(row)
    return lines + [_line(same) for same in groups.values()]


def _line(same: list[Row]) -> str:
    """One line for kernels that compiled to the same figures."""
    row = same[0]
    flags = " ".join(value if value != "True" else key.lower() for key, value in row["flags"].items())
    instruction = row["tensor_core"] + (" + TMA" if row["uses_tma"] else "")
    tile = "x".join(map(str, row["tile"])) + (f", {row['stages']} stages" if row["stages"] else "")
    mix = "/".join(f"{100 * row['mix'][kind]:.0f}" for kind in _MIX) if row["mix"] else ""
    permits = f"{row['peak_share']:.2f}" if row["peak_share"] else ""
    in_flight = f"{row['bytes_in_flight'] / 1024:.1f}" if row["bytes_in_flight"] else ""
    return (
        f"| {row['name']} | {_cases(same)} {flags} | {tile} | {row['registers']} | {row['spilled_bytes']} "
        f"| {row['shared_bytes']} | {row['threads'] // 32} | {row['occupancy']:.2f} | {instruction} | {mix} "
        f"| {permits} | {in_flight} |"
    )


def _cases(same: list[Row]) -> str:
    """ "fp16, bf16: medium, large" from labels like "fp16 medium"."""
    dtypes = dict.fromkeys(row["label"].split()[0] for row in same)
    classes = dict.fromkeys(row["label"].partition(" ")[2] for row in same if " " in row["label"])
    return ", ".join(dtypes) + (": " + ", ".join(classes) if classes else "")
