"""The meaning of each colour in our pictures; colour-blind readers can tell them apart, also in grey."""

from __future__ import annotations

WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
FILL = {"F": "#2f6fb3", "B": "#f0a030", "I": "#f6c66f", "W": "#4aa58d"}
INK = {"F": "#ffffff", "B": "#3a2600", "I": "#3a2600", "W": "#ffffff"}
OTHER_FILL, OTHER_INK = "#9a8fb8", "#ffffff"
IDLE = "#e2e8ef"
TEXT, FAINT = "#1f2933", "#66727f"
