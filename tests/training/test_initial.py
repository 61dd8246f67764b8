"""Runs that start from weights of another one."""

import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dico_t2i.commands.prefetch import check, prefetch
from dico_t2i.config import ConfigError, DiCoConfig, InitConfig, load_config
from dico_t2i.encoders.local import ALLOW_DOWNLOAD, WEIGHTS_FOLDER
from dico_t2i.export.folder import export
from dico_t2i.models import DiCo
from dico_t2i.models.official import load_official_state_dict
from dico_t2i.runs.checkpoint import Piece, newest_checkpoint, read_weights
from dico_t2i.runs.kinds import WEIGHT
from dico_t2i.runs.lineage import read_lineage
from dico_t2i.training.initial import Initial, fit
from dico_t2i.training.source import open_source
from tests.models.test_official import released_state

from .conftest import Runs

SIZES = {"hidden_size": 8, "depths": (1, 1, 1, 1, 1), "mlp_ratio": 2.0}
CLASSES = {**SIZES, "in_channels": 3, "condition": "class", "num_classes": 4}
TEXT = {**SIZES, "in_channels": 3, "condition": "text", "text_dim": 16}
LATENTS, TIMES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0])


def randomised(config):
    """A network none of whose parameters is zero."""
    model = DiCo(DiCoConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def saved(folder, model):
    """An exported folder, as far as training needs it."""
    folder.mkdir()
    tree = {"name": "x", "model": model.config.model_dump(mode="json"), "autoencoder": {"kind": "pixels"}}
    tree |= {"data": {"path": "x", "image_size": 8}, "train": {"duration": {"steps": 1}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "export.json").write_text('{"run": "x", "step": 7, "weights": "ema_0.9"}')
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def started(folder, config, *ignore):
    """A fresh network of this config that starts from a folder or file."""
    model = DiCo(DiCoConfig(**config)).eval()
    init = InitConfig(**{"from": str(folder), "ignore": ignore})
    source = open_source(init)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    initial = Initial(source, fit(source, shapes, model.config, init), model.config)
    for name, parameter in model.named_parameters():
        half = parameter.numel() // 2  # two ranks, each with a part of every parameter
        whole = parameter.data.view(-1)
        initial.fill([Piece(name, 0, {WEIGHT: whole[:half]}), Piece(name, half, {WEIGHT: whole[half:]})])
    return model, initial.fit


@torch.no_grad()
def test_a_text_model_starts_as_the_unconditional_class_model(tmp_path):
    source = randomised(CLASSES)
    folder = saved(tmp_path / "classes", source)
    null = source(LATENTS, TIMES, torch.tensor([4, 4]))
    ignore = ("condition_embeddings.*", "stages.*.text.*")
    text, pooled = torch.randn(2, 77, 16), torch.randn(2, 12)
    model, found = started(folder, TEXT, *ignore)
    assert found.unconditional
    assert torch.allclose(model(LATENTS, TIMES, text), null, atol=1e-4)
    model, _ = started(folder, {**TEXT, "pooled_text": True, "pooled_dim": 12}, *ignore)
    assert torch.allclose(model(LATENTS, TIMES, text, pooled), null, atol=1e-4)


@torch.no_grad()
def test_pooled_kernels_start_from_kernels_of_single_tokens(tmp_path):
    source = randomised({**TEXT, "text_tokens": 81})
    folder = saved(tmp_path / "text", source)
    model, found = started(folder, {**TEXT, "text_tokens": 120, "text_pooling": "attention"}, "text_input.*")
    assert found.fresh == {"text_input.pooling.query", "text_input.pooling.key.weight", "text_input.pooling.position"}
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in source.named_parameters())


@torch.no_grad()
def test_more_blocks_change_nothing_at_first(tmp_path):
    source = randomised(CLASSES)
    deeper = {**CLASSES, "depths": (2, 1, 3, 1, 1)}
    model, found = started(saved(tmp_path / "small", source), deeper, "stages.encoder1.1.*", "stages.middle.[12].*")
    assert {name.split(".")[1] for name in found.fresh} == {"encoder1", "middle"}
    classes = torch.tensor([0, 3])
    assert torch.equal(model(LATENTS, TIMES, classes), source(LATENTS, TIMES, classes))


@torch.no_grad()
def test_more_channels_change_nothing_of_the_first_ones(tmp_path):
    source = randomised(CLASSES)
    ignore = ("stem.weight", "head.out.*")
    model, found = started(saved(tmp_path / "rgb", source), {**CLASSES, "in_channels": 5}, *ignore)
    assert found.widened == {"stem.weight", "head.out.weight", "head.out.bias"}
    more, classes = torch.cat((LATENTS, torch.randn(2, 2, 8, 8)), dim=1), torch.tensor([0, 3])
    ours, theirs = model(more, TIMES, classes), source(LATENTS, TIMES, classes)
    assert torch.allclose(ours[:, [0, 1, 2, 5, 6, 7]], theirs, atol=1e-4)
    assert not ours[:, [3, 4, 8, 9]].any()


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_released_file_needs_no_conversion(tmp_path, suffix):
    config = {**SIZES, "num_classes": 10}
    state, file = released_state(DiCoConfig(**config)), tmp_path / f"DiCo.{suffix}"
    torch.save({"ema": state}, file) if suffix == "pt" else save_file(state, file)
    theirs = DiCo(DiCoConfig(**config))
    load_official_state_dict(theirs, state)
    model, found = started(file, config)
    assert not found.fresh
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in theirs.named_parameters())


def test_what_does_not_fit_is_listed(tmp_path):
    folder = saved(tmp_path / "classes", randomised(CLASSES))
    with pytest.raises(ConfigError) as error:
        started(folder, {**TEXT, "in_channels": 4}, "stages.decoder?.0.text.*")
    assert "missing there: stages.encoder1.*.text.projection.hidden.bias" in str(error.value)
    assert "left over: condition_embeddings.*.weight (3)" in str(error.value)
    assert "of another shape: head.out.bias, head.out.weight, stem.weight" in str(error.value)
    assert "decoder" not in str(error.value)
    with pytest.raises(ConfigError, match=r"holds only ema_0\.9"):
        open_source(InitConfig(**{"from": str(folder), "weights": "ema_0.99"}))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        open_source(InitConfig(**{"from": str(tmp_path / "bad.safetensors")}))
    with pytest.raises(ValueError, match=r"init\.from: /no/such/run: no such run or exported folder"):
        open_source(InitConfig(**{"from": "/no/such/run"}))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_weights_at_a_url_and_prefetched(tmp_path, monkeypatch):
    """An exported folder and a file on a real web server; after a prefetch, without it."""
    (tmp_path / "www").mkdir()
    source = randomised(CLASSES)
    saved(tmp_path / "www" / "classes", source)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www")))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/classes"
    monkeypatch.setattr("dico_t2i.encoders.local.URL_CACHE", tmp_path / "cache")
    with pytest.raises(ValueError, match=f"{ALLOW_DOWNLOAD}=1 to let"):
        started(url, CLASSES)
    monkeypatch.setenv(ALLOW_DOWNLOAD, "1")
    for name in (url, f"{url}/model.safetensors"):
        model, _ = started(name, CLASSES)
        assert torch.equal(model.stem.weight, source.stem.weight)
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        started(f"{url}/other.safetensors", CLASSES)
    config = load_config(tmp_path / "www" / "classes" / "config.yaml", [f"init={{from: {url}}}"])
    prefetch(config, tmp_path / "files")
    assert check(tmp_path / "files", config) == 3
    server.shutdown()
    server.server_close()
    monkeypatch.setattr("dico_t2i.encoders.local.URL_CACHE", tmp_path / "none")
    monkeypatch.delenv(ALLOW_DOWNLOAD)
    monkeypatch.setenv(WEIGHTS_FOLDER, str(tmp_path / "files"))
    model, _ = started(url, CLASSES)
    assert torch.equal(model.stem.weight, source.stem.weight)


STILL = ("optimizer={lr: 1e-30, ema: [0.9]}", "train.duration.steps=1")  # one step that moves nothing that can be seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes_data):
    runs = Runs(tmp_path_factory.mktemp("trained"), shapes_data)
    runs.train("source", "train.duration.steps=4", ranks=2)
    return runs.folder / "source"


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_every_zero_stage_starts_from_the_same_weights(runs, trained, stage, ranks):
    runs.train("new", f"init.from={trained}", f"train.zero_stage={stage}", *STILL, ranks=ranks)
    theirs = dict(read_weights(newest_checkpoint(trained / "checkpoints"), "ema_0.9"))
    new = newest_checkpoint(runs.folder / "new" / "checkpoints")
    assert new.step == new.optimizer_steps == 1
    for kind in ("weight", "ema_0.9"):
        for name, weight in read_weights(new, kind):
            assert torch.allclose(weight, theirs[name], atol=1e-20, rtol=0), (kind, name)


def test_a_run_remembers_what_it_started_from_and_goes_on_from_its_own(runs, trained, tmp_path):
    source = newest_checkpoint(trained / "checkpoints")
    options = (f"init={{from: {trained}, weights: raw}}", "optimizer.ema=[0.9]")
    output = runs.train("first", *options, "train.duration.steps=2")
    assert f"[init] weights of {trained} (weight): " in output
    lineage = [{"what": "init", "from": f"{trained} (weight)", "sha256": source.sha256, "step": 4}]
    assert read_lineage(runs.folder / "first") == lineage
    output = runs.train("first", *options, "train.duration.steps=3")
    assert "resumed from" in output
    assert "[init]" not in output
    assert "init.weights: 'raw' -> None" in runs.train("first", "optimizer.ema=[0.9]", f"init.from={trained}", code=2)
    export(runs.folder / "first", None, tmp_path / "export", encoders=False)
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"| init | {trained} (weight) | 4 | {source.sha256[:12]} |" in card
    runs.train("second", f"init.from={tmp_path / 'export'}", "train.duration.steps=1")
    assert [entry["step"] for entry in read_lineage(runs.folder / "second")] == [4, 3]


def test_damaged_weights_are_told(runs, trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shard = next((copy / "checkpoints").glob("*/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    output = runs.train("new", f"init.from={copy}", "train.duration.steps=1", code=2)
    assert "content does not match its hash" in output
