import pytest

from dico_t2i.config import load_config
from evals.every_config import CONFIGS, all_configs, make_data, markdown, measure, small

# One of each kind of network, objective and text; the script itself takes all.
TRAINED = [
    "ablations/isotropic_skips.yaml",
    "coco_dwc_repa.yaml",
    "dico_xl_imagenet256_flow.yaml",
    "peers/dig_s_imagenet256.yaml",
    "peers/dim_h_imagenet512.yaml",
    "peers/dis_s_imagenet256.yaml",
    "peers/dit_s_imagenet256.yaml",
    "peers/mmdit_coco.yaml",
    "peers/uvit_s_coco.yaml",
    "text/coco_clip_t5.yaml",
]


@pytest.mark.parametrize("path", all_configs(), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_small_twin_keeps_kind_and_switches(path, tmp_path):
    config = load_config(path)
    twin = small(config, tmp_path, 2)
    sizes = {"hidden_size", "depth", "depths", "num_heads", "latent_size", "in_channels"}
    sizes |= {"text_dim", "pooled_dim", "text_inputs", "text_inputs_width"}
    assert twin.model.model_dump(exclude=sizes) == config.model.model_dump(exclude=sizes)
    assert (twin.diffusion, twin.sampler.kind) == (config.diffusion, config.sampler.kind)


def test_twins_train_and_sample(long):
    names = TRAINED if long else TRAINED[1::3]
    rows = list(measure([CONFIGS / name for name in names], 2))
    assert [row["config"] for row in rows] == names
    assert all(0.5 < row["first_loss"] < 3 for row in rows)
    assert markdown(rows).count("\n") == len(names) + 1


def test_the_data_has_captions_and_classes(tmp_path):
    make_data(tmp_path / "data")
    for name in ("dico_s_imagenet256.yaml", "coco_dwc.yaml"):
        from dico_t2i.data.checks import check_data
        from dico_t2i.data.sources import load_data

        config = small(load_config(CONFIGS / name), tmp_path / "data", 2)
        check_data(config, load_data(config.data))
