import pytest
import torch

from dico_t2i.models import DiCo, DiCoConfig
from dico_t2i.models.official import (
    infer_config,
    load_official_state_dict,
    official_key,
    official_shape,
    read_official,
)

CONFIG = DiCoConfig(hidden_size=8, depths=(2, 1, 2, 1, 2), mlp_ratio=4.0, num_classes=10)


def released_state(config):
    torch.manual_seed(0)
    model = DiCo(config)
    return {official_key(name): torch.randn(official_shape(name, p.shape)) for name, p in model.named_parameters()}


def test_every_weight_is_taken_and_the_dimensions_are_found(tmp_path):
    state = released_state(CONFIG)
    torch.save({"ema": {f"module.{k}": v for k, v in state.items()}, "model": {}, "opt": {}}, tmp_path / "release.pt")
    read = read_official(tmp_path / "release.pt")
    model = DiCo(infer_config(read))
    assert model.config == CONFIG
    load_official_state_dict(model, read)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), state[official_key(name)].flatten()), name


def test_a_state_of_another_model_is_refused():
    state = released_state(CONFIG)
    other = DiCo(CONFIG.model_copy(update={"num_classes": 20}))
    with pytest.raises(ValueError, match="embedding_table_0"):
        load_official_state_dict(other, state)
    del state["x_embedder.proj.bias"]
    with pytest.raises(ValueError, match=r"missing x_embedder\.proj\.bias"):
        load_official_state_dict(DiCo(CONFIG), state)
    with pytest.raises(ValueError, match="not a released DiCo"):
        infer_config({"a": torch.zeros(1)})


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported|Weights only"):
        read_official(tmp_path / "evil.pt")
    assert not (tmp_path / "written").exists()
