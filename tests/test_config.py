from pathlib import Path

import pytest
import yaml

from dico_t2i.config import ConfigError, dump_config, load_config, parse_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "cluster"]
RUNS = sorted(str(path.relative_to(CONFIGS)) for path in FILES if not path.name.startswith("base"))
MINIMAL = {
    "name": "test",
    "model": {"variant": "DiCo-S"},
    "data": {"path": "data/x"},
    "train": {"duration": {"steps": 10}},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_config_is_valid_and_survives_saving(name):
    config = load_config(CONFIGS / name)
    assert parse_config(yaml.safe_load(dump_config(config)), name) == config
    assert config.batching(1)[0] <= config.train.micro_batch


def test_the_papers_settings():
    h = load_config(CONFIGS / "dico_h_imagenet256.yaml")
    assert (h.optimizer.betas, h.optimizer.lr, h.train.global_batch) == ((0.99, 0.99), 2e-4, 1024)
    assert h.optimizer.warmup is not None
    assert h.optimizer.warmup.steps == 5000
    xl = load_config(CONFIGS / "dico_xl_imagenet512.yaml")
    assert (xl.optimizer.lr, xl.optimizer.ema, xl.train.duration.steps) == (1e-4, (0.9999,), 3_000_000)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean lr?"),
        ("model.varient=DiCo-S", "model.varient: unknown key; did you mean variant?"),
        ("model={kind: dit, varient: DiT-S/2}", "model.varient: unknown key; did you mean variant?"),
        ("model={kind: dit, variant: DiCo-S}", "'DiCo-S' is not a variant of this kind (DiT-S/2, DiT-B/2"),
        ("model={kind: ditt, variant: DiT-S/2}", "model.kind: 'ditt' is not one of 'dico', 'dit', 'uvit'"),
        ("model={kind: dit, variant: DiT-S/2, condition: text}", "model.condition: Input should be 'class'"),
        ("model={kind: dit, hidden_size: 64, depth: 1, num_heads: 5}", "must be divisible by num_heads: 5"),
        ("model={kind: uvit, variant: U-ViT-S/2, latent_size: 16}", "set model.latent_size=32"),
        ("train.global_batch=many", "train.global_batch: "),
        ("train.global_batch=1.5", "train.global_batch: "),
        ("train.zero_stage=4", "train.zero_stage: "),
        ("data.streams=7", "data.streams: 7 does not divide train.global_batch: 256"),
        ("data={mixture: [{name: a, path: b, wieght: 2}]}", "data.mixture.0.wieght: unknown key; did you mean weight?"),
        ("data={streams: 64}", "give either data.path, or data.mixture"),
        ("data={path: 's3://a/b', streams: 64}", "s3://a/b is a URL and needs a local cache"),
        ("data.image_size=100", "data.image_size: 100 must be divisible by 32"),
        ("train.duration.minutes=5", "train.duration: give steps, images or epochs"),
        ("model.hidden_size=64", "variant: DiCo-S already sets hidden_size"),
        ("autoencoder.kind=pixels", "model.in_channels: it must be 3"),
        ("preview.prompts=[a]", "preview.prompts: a class-conditional model takes preview.labels"),
        ("preview.every.steps=5", "give prompts or labels"),
        ("preview.labels=[999, 1000]", "preview.labels: 1000, but the highest class is 999"),
        ("model.dropout_prob=0", "sampler.guidance: it must be 1 with model.dropout_prob: 0"),
        ("model.pooled_text=true", "pooled_text: it needs condition: text"),
        ("diffusion.steps=100", "sampler.steps: 250, but iddpm takes 2 to diffusion.steps: 100"),
        ("preview.sampler.steps=1", "preview.sampler.steps: 1, but dpm++ takes 2 to"),
        (
            "autoencoder.scale=-1",
            "autoencoder.scale: give a number above 0, one for each channel, or measured",
        ),
        ("autoencoder={scale: measured, mean: [0.1]}", "mean: scale: measured measures it, too; leave it out"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number"),
        ("optimizer.ema=[0.9, 0.9]", "optimizer.ema: two decays have the same first six digits"),
        ("optimizer.betas=[1, 1]", "optimizer.betas.0: Input should be less than 1"),
        ("log.every={minutes: 1}", "log.every: give steps, images or epochs"),
        ("validation={every: {steps: 1}, path: ./data/../data/x/}", "validation.path: the run trains on"),
        ("model={variant: DiCo-S, variant: DiCo-B}", "variant is given twice"),
        ("name=..", "name: String should match pattern"),
        ("name=a/b", "name: String should match pattern"),
        ("nonsense", "expected key.path=value"),
        ("name.x=3", "is a value, not a section"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert message in str(error.value)


def test_extends_merges_sections_and_replaces_spans(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**MINIMAL, "optimizer": {"lr": 3e-4, "clip": 1.0}}))
    (tmp_path / "top.yaml").write_text(
        "extends: base.yaml\nname: top\noptimizer: {clip: 2.0}\ntrain: {duration: {epochs: 2}}\n"
    )
    config = load_config(tmp_path / "top.yaml")
    assert (config.optimizer.lr, config.optimizer.clip) == (3e-4, 2.0)
    assert config.train.duration.epochs == 2
    assert config.train.duration.in_steps(256, 2560) == 20


def test_steps_alone_are_merged_into_a_section_with_other_keys(tmp_path):
    sections = {"diffusion": {"schedule": "cosine"}, "sampler": {"kind": "ddim", "steps": 50, "guidance": 4.0}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**MINIMAL, **sections}))
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ndiffusion: {steps: 500}\nsampler: {steps: 30}\n")
    config = load_config(tmp_path / "top.yaml")
    assert (config.diffusion.schedule, config.diffusion.steps) == ("cosine", 500)
    assert (config.sampler.kind, config.sampler.steps, config.sampler.guidance) == ("ddim", 30, 4.0)


def test_extending_in_a_circle_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00", "name: a\ndata: {}\nname: b\n"])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


def test_ranks_must_divide_the_streams_and_the_micro_batch_adapts():
    config = parse_config({**MINIMAL, "data": {"path": "x", "streams": 64}}, "test")
    assert config.batching(1) == (32, 8)
    assert config.batching(16) == (16, 1)
    with pytest.raises(ConfigError, match="64 is not divisible by the 3 ranks"):
        config.batching(3)
