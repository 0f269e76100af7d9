"""Some seconds of the equivalence fuzzer; `make fuzz` runs it for longer."""

from __future__ import annotations

from fuzz import run_cases

_SECONDS, _AT_LEAST = 8.0, 2


def test_random_models_train_as_in_plain_torch() -> None:
    outcomes, failures = run_cases(0, None, _SECONDS, processes=1)
    assert not failures, "\n".join(f"python tests/fuzz.py --only {seed}: {outcome}" for seed, outcome, _ in failures)
    assert outcomes["equal"] >= _AT_LEAST, f"hardly anything was compared: {outcomes}"
