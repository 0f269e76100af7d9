#!/usr/bin/env bash
# diffusers 0.42.1 with torch 2.13.0: EMAModel(decay=0.9999) averages with a smaller decay for 90,000 steps, warm-up or not.
#
# use_ema_warmup says whether the decay rises in the beginning; it is False by default, and one expects 0.9999 from the first
# step on. False means another warm-up, (1 + t) / (10 + t), under which the average at step t is over the last ninth of all
# steps or so, however many there were. True, at its default power, is the smaller one from about 1,000 steps on, where
# both forget in 100 steps what was meant to last 10,000. min_decay=0.9999 ends that, but for the first call, which
# always has decay 0 and takes the weights of that step for the average.
#
# Seen, decay at steps 1, 2, 100, 1,000, 10,000, 89,993: False 0, 0.1818, 0.9174, 0.9911, 0.9991, 0.9999; True 0, 0.3700,
# 0.9536, 0.9900, 0.9978, 0.9995; min_decay 0, then 0.9999; share of the last 100 of 1,000 steps in the average: asked for
# 0.0100, default 0.6107, min_decay 0.0100
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from diffusers.training_utils import EMAModel

STEPS, AT = 1000, (1, 2, 100, 1000, 10_000, 89_993)


def average(**options):
    """Return what EMAModel makes of a weight that is 0 for 900 steps and 1 for 100, and its decays."""
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    made = EMAModel([weight], decay=0.9999, **options)
    for step in range(STEPS):
        weight.data.fill_(float(step >= 0.9 * STEPS))
        made.step([weight])
    return made.shadow_params[0].item(), [made.get_decay(step) for step in AT]


share, plain = average()
_, warmed = average(use_ema_warmup=True)
held, least = average(min_decay=0.9999)
for name, decays in (("default", plain), ("use_ema_warmup", warmed), ("min_decay", least)):
    print(f"{name}: decays", ", ".join(f"{decay:.4f}" for decay in decays))
asked = 1 - 0.9999 ** (0.1 * STEPS)
print(f"share of the last tenth: asked for {asked:.4f}, default {share:.4f}, min_decay {held:.4f}")
assert plain[0] == 0 and plain[1] < 0.2 and plain[3] < 0.992 and plain[4] < 0.9992 and plain[5] == 0.9999
assert warmed[3] < 0.992 and least == [0] + [0.9999] * 5
assert abs(held - asked) < 1e-6 and share > 0.5
PY
