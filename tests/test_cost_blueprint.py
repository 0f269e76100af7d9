"""Models without weights: shipped configs, and anything that torch.export can trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spu.cost.blueprint import config_names, export_layers, read_config
from spu.cost.count import model_costs
from spu.model.layers import Layer


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        first = h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h + first)


def test_any_model_that_exports_is_cut_into_layers_that_compute_the_same():
    model, x = Residual(), torch.randn(2, 8)
    layers = export_layers(model, (x,))
    names = [name for name, _ in layers]
    assert names[0] == "embed"
    assert names[-1] == "head"
    value = (x,)
    for _, layer in layers:
        value = layer(value)
    torch.testing.assert_close(value[0], model(x), rtol=0, atol=0)
    costs, _ = model_costs([Layer(name, layer) for name, layer in layers], (x,), torch.float32)
    assert sum(cost.param_count for cost in costs) == sum(p.numel() for p in model.parameters())
    assert sum(cost.forward_flops for cost in costs) == 2 * 2 * (8 * 16 + 2 * 2 * 16 * 32 + 16 * 4)


def test_a_model_that_does_not_export_is_named():
    class Peeking(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ValueError, match="Peeking cannot be exported: .*; give its layers as a list"):
        export_layers(Peeking(), (torch.randn(2),))


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
