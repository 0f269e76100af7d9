"""The settings: checked in one place, and one more of them costs one line."""

from __future__ import annotations

import inspect
import json

import pytest
from torch import nn

from spu import ModelParallelTrainer
from spu.common.options import AUTO, kind_of
from spu.settings import Recompute, Settings, TrainSettings


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"schedule": "2f2b"}, "unknown schedule '2f2b': give one of gpipe, 1f1b, interleaved"),
        ({"precision": "fp8"}, "unknown precision 'fp8': give one of fp16, bf16, fp32"),
        ({"precision": None}, "unknown precision None"),
        ({"transfer": "int3"}, "unknown transfer 'int3': give one of auto, none, fp16"),
        ({"recompute": "on"}, "unknown recompute 'on': give one of auto, on .True., off .False., or a list of layers"),
        ({"recompute": [True]}, "unknown recompute"),
        ({"recompute": 1}, "unknown recompute 1"),
        ({"microbatches": 0}, "microbatches 0 must be a whole number of at least 1, or auto"),
        ({"microbatches": True}, "microbatches True must be"),
        ({"microbatches": "few"}, "microbatches 'few' must be"),
        ({"accumulate": AUTO}, "accumulate 'auto' must be a whole number of at least 1"),
        ({"virtual": 2}, "schedule '1f1b' has 1 stage on each rank, so virtual must be 1"),
        ({"virtual": 2, "schedule": AUTO}, "virtual 2 needs a schedule that is named"),
        ({"max_grad_norm": 0.0}, "max_grad_norm 0.0 must be a positive number"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm nan must be a positive number"),
        ({"seed": -1}, "seed -1 must be a whole number of at least 0"),
        ({"replan": 1}, "replan 1 must be true or false"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(values, reason):
    with pytest.raises(ValueError, match=reason):
        TrainSettings(**values)
    with pytest.raises(ValueError, match=reason):
        ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2)), "cpu", **values)
    with pytest.raises(ValueError, match=reason):
        TrainSettings.from_json({**TrainSettings().to_json(), **values})


@pytest.mark.parametrize("value", [AUTO, True, False, [0, 3]])
def test_recompute_is_one_type_inside_and_what_the_user_writes_outside(value):
    settings = Settings(recompute=value)
    assert settings.recompute == Recompute.of(value)
    assert settings.to_json()["recompute"] == value
    assert Recompute.parse(str(settings.recompute)) == value


def test_settings_round_trip_through_json():
    settings = TrainSettings(recompute=[2, 1], schedule="zbv", virtual=2, max_grad_norm=1)
    assert TrainSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(ValueError, match=r"x\.max_grad_norm is missing"):
        TrainSettings.from_json(Settings().to_json(), "x.")
    with pytest.raises(ValueError, match=r"'colour' is not a setting; there are schedule"):
        Settings.from_json({**Settings().to_json(), "colour": 1})


def test_a_misspelt_keyword_is_named_with_its_nearest_match():
    with pytest.raises(TypeError, match="'microbatch' is not one of its keywords; did you mean microbatches"):
        ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2)), "cpu", microbatch=2)


def test_the_trainer_takes_settings_as_keywords_and_as_one_object():
    given = TrainSettings(precision="fp32", microbatches=2, seed=3)
    with ModelParallelTrainer(nn.Sequential(nn.Linear(2, 2)), "cpu", settings=given, accumulate=2) as trainer:
        assert (trainer.settings.precision, trainer.settings.parts, trainer.seed) == ("fp32", 4, 3)


def test_the_trainer_shows_every_setting_in_its_signature_and_documentation():
    parameters = inspect.signature(ModelParallelTrainer).parameters
    assert list(parameters)[:2] == ["model", "devices"]
    assert "keywords" not in parameters
    for name, start in TrainSettings().to_json().items():
        assert parameters[name].default == start
        assert f"        {name}: " in ModelParallelTrainer.__doc__


def test_every_setting_has_a_sentence():
    for field in Settings.__dataclass_fields__.values():
        assert kind_of(field).about.endswith("."), field.name
