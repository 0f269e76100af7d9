"""Models without weights: shipped configs."""

from __future__ import annotations

import pytest

from spu.cost.blueprint import config_names, read_config


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
