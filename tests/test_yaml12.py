"""What is typed in configs, profiles, sweeps and on the command line: numbers where numbers are meant, else text."""

import argparse

import pytest
import yaml

from cluster.launch import _configs, _parser
from cluster.options import add_cluster_options, chosen_cluster
from dico_t2i.config import ConfigError, dump_config, load_config, parse_config, read_cluster, read_yaml
from dico_t2i.config.yaml12 import read_value
from tests.test_config import MINIMAL

AS_TYPED = [
    "1:30:00", "12:30:00", "0123", "NO", "off", "2026-12-01", "2026-12-01T10:00:00", "1e3", "1.50", "0x1F", "1_000",
    "true", "~", "1,2", "+5", "a b", "afterok:12:13", "=x", "<<",
]  # fmt: skip


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def cluster(*options):
    parser = argparse.ArgumentParser()
    add_cluster_options(parser)
    return chosen_cluster(parser.parse_args(options))


@pytest.mark.parametrize("text", AS_TYPED)
def test_options_of_sbatch_stay_as_typed(text):
    assert cluster("--sbatch", f"time-min={text}").sbatch == {"time-min": text}


def test_an_option_of_sbatch_without_a_value():
    assert cluster("--sbatch", "hold", "--sbatch", "comment=").sbatch == {"hold": True, "comment": ""}


@pytest.mark.parametrize("text", [text for text in AS_TYPED if text not in ("=x", "<<")])
def test_a_profiles_environment_stays_as_typed(tmp_path, text):
    profile = tmp_path / "profile.yaml"
    profile.write_text("env: {}\nsbatch: {}\npartition: 010\ntime: 90\nmem: 0\naccount: 1.50\nenv2: 1\n")
    with pytest.raises(ConfigError, match="env2"):
        read_cluster(profile, {})
    profile.write_text(f"env:\n  A: {text}\n  B: null\n  C: 007\nsbatch:\n  begin: {text}\ntime: 90\naccount: 1.50\n")
    if text not in ("true", "~"):  # an option without a value; no value for one that needs it
        found = read_cluster(profile, {})
        assert found.sbatch == {"begin": text}
        assert (found.env, found.time, found.account) == ({"A": text, "B": "null", "C": "007"}, "90", "1.50")


@pytest.mark.parametrize("text", AS_TYPED)
def test_an_override_of_the_environment_stays_as_typed(config_file, text):
    assert load_config(config_file, [f"cluster.env.A={text}"]).cluster.env == {"A": text}


@pytest.mark.parametrize("key", ["seed", "train.global_batch", "cluster.nodes"])
@pytest.mark.parametrize("text", ["1:30", "010", "0x10", "0o10", "1_0"])
def test_only_decimal_numbers_are_numbers(config_file, key, text):
    with pytest.raises(ConfigError, match=rf"{key}: .*found '{text}'; write a plain decimal number"):
        load_config(config_file, [f"{key}={text}"])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=0123", "name", "0123"),
        ("name=2026-12-01", "name", "2026-12-01"),
        ("name=1.50", "name", "1.50"),
        ("data.path=1e5", "data.path", "1e5"),
        ("autoencoder.path=/a/b #3", "autoencoder.path", "/a/b #3"),
        ("log.wandb_project=no", "log.wandb_project", "no"),
        ("train.compile=off", "train.compile", "off"),
        ("data.flip=off", "data.flip", False),
        ("data.flip=Yes", "data.flip", True),
        ("data.flip=False", "data.flip", False),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("seed=12", "seed", 12),
        ("cluster.time=1:30", "cluster.time", "1:30"),
    ],
)
def test_values_by_what_is_meant(config_file, override, key, value):
    config = load_config(config_file, [override])
    found = config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    assert parse_config(read_yaml(dump_config(config)), "dumped") == config
    assert yaml.safe_load(dump_config(config))


@pytest.mark.parametrize("text", ["a: 1\na: 2", "8: [x=1]\n8: [x=2]", "'8': 1\n8: 2"])
def test_a_key_given_twice_is_an_error(text):
    with pytest.raises(yaml.YAMLError, match="is given twice, first in line 1"):
        read_yaml(text)


def test_quotes_and_structures_on_the_command_line():
    assert read_value("'010'") == "010"
    assert read_value("[a, 010, 3]") == ["a", "010", 3]
    assert read_value("{A: true}", raw=True) == "{A: true}"
    assert read_value('"x y"', raw=True) == "x y"


def test_a_config_with_a_mark_and_one_that_is_no_text(tmp_path, config_file):
    marked = tmp_path / "marked.yaml"
    marked.write_bytes(b"\xef\xbb\xbf" + config_file.read_bytes())
    assert load_config(marked) == load_config(config_file)
    config_file.write_bytes(b"name: Gel\xe4nde\n")
    with pytest.raises(ConfigError, match="line 1, character 10: 0xe4") as error:
        load_config(config_file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("8: [seed=1]\n8: [seed=2]\n", "8 is given twice"),
        ("a: [seed=1]\na: [seed=2]\n", "a is given twice"),
        ("{}\n", "no runs in it"),
        ("", "expected names, each with a list"),
        ("a: [name=x]\nb: [name=x]\n", "two entries make the run x"),
    ],
)
def test_sweeps_that_would_lose_runs(tmp_path, config_file, sweep, message):
    file = tmp_path / "sweep.yaml"
    file.write_text(sweep)
    with pytest.raises(ValueError, match=message):
        _configs(_parser().parse_args(["--config", str(config_file), "--sweep", str(file)]))


def test_names_of_a_sweep_stay_as_typed(tmp_path, config_file):
    file = tmp_path / "sweep.yaml"
    file.write_text("010: [seed=1]\n8: [seed=2]\n1e-4: [optimizer.lr=1e-4]\nno: [optimizer.lr=1e-3]\n")
    configs = _configs(_parser().parse_args(["--config", str(config_file), "--sweep", str(file)]))
    assert [config.name for config in configs] == ["test-010", "test-8", "test-1e-4", "test-no"]
