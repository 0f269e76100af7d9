"""Models without weights: shipped configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from spu.cost.blueprint import blueprint, config_names, costs_by_rows, read_config
from spu.settings import Settings


def test_the_shipped_configs_are_of_the_sizes_they_say():
    pytest.importorskip("transformers")
    from spu.cost.blueprint import blueprint

    assert config_names() == ["internlm2-1.8b", "internlm2-20b", "internlm2-7b"]
    for name, billions in (("internlm2-1.8b", 1.89), ("internlm2-7b", 7.74), ("internlm2-20b", 19.86)):
        layers = blueprint(name)
        count = sum(p.numel() for layer in layers for p in layer.module.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.01)
        assert all(p.is_meta for layer in layers for p in layer.module.parameters())


@pytest.mark.parametrize(("content", "reason"), [("{", "not JSON"), ("{}", "no model_type")])
def test_what_is_no_config_is_named(tmp_path, content, reason):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_config(str(tmp_path))


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Bloom", "Mixtral"])
def test_decoders_without_a_plan_are_counted_by_their_config(family: str, tmp_path: Path) -> None:
    from families import make_decoder

    model = make_decoder(family, num_hidden_layers=2)
    model.config.save_pretrained(tmp_path)
    costs, _ = costs_by_rows(blueprint(str(tmp_path)), 16, Settings(precision="fp32"))(1)
    assert [cost.basis for cost in costs] == ["counted"] * 4
    assert sum(cost.param_count for cost in costs) == sum(p.numel() for p in model.parameters())
    assert costs[0].output_bytes == 16 * 32 * 4
    projection = 2 * 16 * 24 * 32 if family == "OPT" else 0
    assert costs[0].forward_flops == projection


def test_adapters_are_counted_and_the_model_beside_them_is_frozen(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from families import make_decoder

    from spu.model.lora import LoraOptions

    model = make_decoder("Llama", num_hidden_layers=2)
    model.config.save_pretrained(tmp_path)
    settings = Settings(precision="bf16")
    plain, _ = costs_by_rows(blueprint(str(tmp_path)), 16, settings)(1)
    for kind in ("lora", "dora"):
        costs, _ = costs_by_rows(blueprint(str(tmp_path), LoraOptions(rank=4, kind=kind)), 16, settings)(1)
        for cost, whole, layer in zip(costs, plain, (None, *model.model.layers, None), strict=True):
            linear = [] if layer is None else [m for m in layer.modules() if hasattr(m, "in_features")]
            adapters = sum(4 * (m.in_features + m.out_features) for m in linear)
            adapters += sum(m.out_features for m in linear) if kind == "dora" else 0
            assert cost.trained_count == adapters
            assert cost.param_count == whole.param_count + adapters
