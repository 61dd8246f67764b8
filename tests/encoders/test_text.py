"""Text towers saved on the spot in the libraries' own formats, the seeded tower, and both tokenizers."""

import json
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dico_t2i.config import DiCoConfig, DiTConfig, TextEncoderConfig
from dico_t2i.encoders import TextEncoder, load_text_encoder
from dico_t2i.encoders.conditioner import Conditioner
from dico_t2i.encoders.text.clip import clip_backend, clip_tokenizer
from dico_t2i.encoders.text.open_clip import OpenClipTokenizer

START, END = 49406, 49407
CAPTIONS = ["a small red circle on a white background", "Two DOGS, and it's raining: 42!", "", "a dog " * 60]
WIDTH, PROJECTED = 16, 24
SIZE = {
    "vocab_size": END + 1,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": PROJECTED,
    "hidden_act": "quick_gelu",
}


def seeded(kind: str = "transformers", **size: int) -> TextEncoder:
    config = {"kind": kind, "weights": "seeded", "seeded": size}
    return load_text_encoder(TextEncoderConfig.model_validate(config), "cpu")


def pretrained(folder: Path) -> TextEncoder:
    return load_text_encoder(TextEncoderConfig(model=str(folder)), "cpu")


def open_clip(pretrained: Path, model: str = "ViT-L-14") -> TextEncoder:
    return load_text_encoder(TextEncoderConfig(kind="open_clip", model=model, pretrained=str(pretrained)), "cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


def save_clip(folder: Path) -> tuple[Path, Any]:
    """A whole CLIP, image tower and all, as transformers saves it; with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=SIZE, vision_config={**vision, "image_size": 32}, projection_dim=PROJECTED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    for weight in model.parameters():
        weight.data.mul_(5)  # the usual start is so small that errors would hide
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder, model


def save_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt, as CLIP was released with."""
    model = json.loads(clip_tokenizer()._backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def as_open_clip(tower: nn.Module, projection: Tensor | None) -> dict[str, Tensor]:
    """The weights of a transformers text tower under open_clip's names."""
    old = tower.state_dict()
    new = {
        "token_embedding.weight": old["embeddings.token_embedding.weight"],
        "positional_embedding": old["embeddings.position_embedding.weight"],
        "ln_final.weight": old["final_layer_norm.weight"],
        "ln_final.bias": old["final_layer_norm.bias"],
    }
    if projection is not None:
        new["text_projection"] = projection.T
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer, kind in product(range(2), ("weight", "bias")):
        source, target = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for old_name, new_name in names.items():
            new[f"{target}.{new_name}.{kind}"] = old[f"{source}.{old_name}.{kind}"]
        parts = [old[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        new[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
    return {name: weight.contiguous() for name, weight in new.items()}


@pytest.fixture(scope="module")
def open_clip_folder(clip: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a folder of open_clip, which says that they want quick GELU."""
    model = clip[1]
    state = as_open_clip(model.text_model, model.text_projection.weight.detach())
    folder = tmp_path_factory.mktemp("models") / "open_clip"
    folder.mkdir()
    save_file({**state, "visual.proj": torch.zeros(3)}, folder / "open_clip_model.safetensors")
    text = {"context_length": 77, "vocab_size": END + 1, "width": WIDTH, "heads": 2, "layers": 2}
    settings = {"embed_dim": PROJECTED, "vision_cfg": {}, "text_cfg": text, "quick_gelu": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    return folder


# --- tokenizers


@pytest.mark.parametrize(("make", "pad"), [(clip_tokenizer, END), (OpenClipTokenizer, 0)])
def test_tokenizers_cut_and_pad(make: Any, pad: int) -> None:
    tokenize = make()
    ids = tokenize(CAPTIONS)
    assert ids.shape == (4, 77)
    assert ids.dtype == torch.int64
    assert tokenize.pad_id == pad
    assert ids[:, 0].tolist() == [START] * 4
    # "a small red circle on a white background" in the released vocabulary
    assert ids[0, :10].tolist() == [START, 320, 2442, 736, 7117, 525, 320, 1579, 5994, END]
    assert ids[0, 10:].tolist() == [pad] * 67
    assert ids[2].tolist() == [START, END] + [pad] * 75
    assert ids[3, -1] == END
    assert ids[3, 1:-1].tolist() == [320, 1929] * 37 + [320]
    assert tokenize([]).shape == (0, 77)


def test_clips_tokenizer_is_that_of_transformers() -> None:
    from transformers import CLIPTokenizer

    ours = clip_backend().to_str()
    model = json.loads(ours)["model"]
    theirs = CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]).backend_tokenizer
    assert theirs.to_str() == ours


def test_tokenizers_agree_up_to_the_end_token() -> None:
    theirs, ours = OpenClipTokenizer()(CAPTIONS), clip_tokenizer()(CAPTIONS)
    lengths = (theirs == END).int().argmax(1)
    for row in range(len(CAPTIONS)):
        assert torch.equal(theirs[row, : lengths[row] + 1], ours[row, : lengths[row] + 1])


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_tokenizers_travel_to_workers_without_the_tower(kind: str) -> None:
    encoder = seeded(kind, width=32, layers=1, heads=2)
    packed = pickle.dumps(encoder.tokenize)
    assert len(packed) < 5_000_000  # the vocabulary; the tower's embeddings alone are 6.3 MB
    assert torch.equal(pickle.loads(packed)(CAPTIONS), encoder.tokenize(CAPTIONS))


# --- pretrained towers


@torch.no_grad()
def test_transformers_tower_is_the_saved_model(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    encoder = pretrained(folder)
    ids = encoder.tokenize(CAPTIONS)
    features = encoder.encode(ids)
    assert (encoder.width, encoder.pooled_dim, encoder.seeded) == (WIDTH, PROJECTED, False)
    assert encoder.description.startswith("pretrained text tower")
    expected = model.text_model(input_ids=ids)
    assert torch.equal(features.tokens, expected.last_hidden_state)
    assert torch.equal(features.pooled, model.text_projection(expected.pooler_output))
    norm = model.text_model.final_layer_norm
    normed = (features.tokens - norm.bias) / norm.weight
    assert normed.mean(-1).abs().max() < 1e-5
    assert (normed.var(-1, correction=0) - 1).abs().max() < 1e-2


def test_a_text_tower_alone_pools_without_projection(clip: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    folder, _ = clip

    CLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder, ids = pretrained(tmp_path), pretrained(folder).tokenize(CAPTIONS)
    features = encoder.encode(ids)
    assert encoder.pooled_dim == WIDTH
    rows = torch.arange(len(CAPTIONS))
    torch.testing.assert_close(features.pooled, features.tokens[rows, (ids == END).int().argmax(1)])
    torch.testing.assert_close(features.tokens, pretrained(folder).encode(ids).tokens)


@torch.no_grad()
def test_both_libraries_give_the_same_features(clip: tuple[Path, Any], open_clip_folder: Path) -> None:
    one, other = pretrained(clip[0]), open_clip(open_clip_folder)
    assert (other.width, other.pooled_dim) == (WIDTH, PROJECTED)
    assert "quick GELU" in other.description
    ids = other.tokenize(CAPTIONS)
    left, right = one.encode(ids), other.encode(ids)
    assert left.tokens.std() > 0.5
    torch.testing.assert_close(left.tokens, right.tokens, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(left.pooled, right.pooled, atol=2e-5, rtol=1e-4)
    # Padding is seen: after the end token the two tokenizers lead to other features, before it to the same.
    padded = one.encode(one.tokenize(CAPTIONS[:1])).tokens[0]
    torch.testing.assert_close(padded[:10], right.tokens[0, :10], atol=2e-5, rtol=1e-4)
    assert (padded[10:] - right.tokens[0, 10:]).abs().max() > 0.1


def test_quick_gelu_follows_the_folder(open_clip_folder: Path, tmp_path: Path) -> None:
    settings = json.loads((open_clip_folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["quick_gelu"] = False
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((open_clip_folder / "open_clip_model.safetensors").read_bytes())
    quick, exact = open_clip(open_clip_folder), open_clip(weights)
    assert "(open_clip, GELU)" in exact.description
    ids = exact.tokenize(CAPTIONS)
    assert (quick.encode(ids).tokens - exact.encode(ids).tokens).abs().max() > 1e-3
    assert quick.identity()["config"] != exact.identity()["config"]


def test_open_clip_weights_of_either_layout_load(open_clip_folder: Path, tmp_path: Path) -> None:
    state = load_file(open_clip_folder / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_bytes((open_clip_folder / "open_clip_config.json").read_bytes())
    torch.save(
        {"state_dict": {f"module.text.{name}": weight for name, weight in state.items() if "visual" not in name}},
        tmp_path / "open_clip_pytorch_model.bin",
    )
    one, other = open_clip(open_clip_folder), open_clip(tmp_path)
    ids = one.tokenize(CAPTIONS)
    assert torch.equal(one.encode(ids).tokens, other.encode(ids).tokens)


def test_a_folder_of_open_clip_must_say_its_architecture(open_clip_folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes((open_clip_folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"lacks open_clip_config\.json"):
        open_clip(tmp_path)


def test_unknown_names_of_open_clip_are_refused(open_clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text_encoder\.pretrained: 'opnai' is not .* tag of ViT-L-14 .*openai"):
        load_text_encoder(TextEncoderConfig(kind="open_clip", model="ViT-L-14", pretrained="opnai"), "cpu")
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes((open_clip_folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="open_clip has no architecture 'ViT-L-15'"):
        open_clip(weights, "ViT-L-15")
    with pytest.raises(ValueError, match=r"text tower of roberta-ViT-B-32 is not CLIP's"):
        open_clip(weights, "roberta-ViT-B-32")
    with pytest.raises(ValueError, match="has 64 positions"):
        open_clip(weights, "ViT-B-16-SigLIP")
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors: cannot be loaded"):
        open_clip(weights, "ViT-B-32")  # weights of another size


def test_unfit_transformers_folders_are_refused(clip: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks tokenizer\.json or merges\.txt"):
        pretrained(folder)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    with pytest.raises(ValueError, match=r"vocab\.json: CLIP has 49408 tokens, found 2"):
        pretrained(folder)
    save_tokenizer(folder)
    state = load_file(folder / "model.safetensors")
    del state["text_model.final_layer_norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: lacks .*final_layer_norm\.weight"):
        pretrained(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be loaded"):
        pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "bert"}))
    with pytest.raises(ValueError, match=r"config\.json describes 'bert', not CLIP"):
        pretrained(folder)


def test_identity_follows_weights_and_library(clip: tuple[Path, Any], open_clip_folder: Path, tmp_path: Path) -> None:
    first = pretrained(clip[0]).identity()
    assert first["kind"] == "transformers"
    assert first["model"] == "clip"
    assert first["pad_id"] == str(END)
    assert first["seeded"] == "false"
    assert pretrained(clip[0]).identity() == first
    other = open_clip(open_clip_folder).identity()
    assert (other["kind"], other["pad_id"]) == ("open_clip", "0")
    assert other["tokenizer"] != first["tokenizer"]

    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    state["text_projection.weight"] += 1e-3
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert {k for k, v in pretrained(folder).identity().items() if v != first[k]} == {"weights"}


# --- the seeded tower


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_seeded_tower_is_a_function_of_its_seed(kind: str) -> None:
    state = torch.random.get_rng_state()
    one, again, other = (seeded(kind, width=32, layers=1, heads=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = one.tokenize(CAPTIONS)
    assert torch.equal(one.encode(ids).tokens, again.encode(ids).tokens)
    assert (one.encode(ids).tokens - other.encode(ids).tokens).abs().mean() > 0.5
    assert one.identity() == again.identity()
    assert {k for k, v in one.identity().items() if v != other.identity()[k]} == {"model", "weights"}
    assert one.identity()["seeded"] == "true"
    assert one.seeded
    assert "seeded (random, untrained) text tower" in one.description
    assert (one.width, one.pooled_dim) == (32, 32)


def test_seeded_weights_are_the_same_everywhere() -> None:
    """The hash of a tower's weights, computed once: it may change only with the recipe, never with the machine."""
    identity = seeded(width=32, layers=1, heads=2).identity()
    assert identity["weights"] == "bd0c744fa0a94b9a6cab8c59a838060645bdd09d4ba57f673f2e23884f92a6ad"


def test_null_is_the_empty_caption() -> None:
    encoder = seeded(width=32, layers=1, heads=2)
    null = encoder.null()
    assert (null.tokens.shape, null.pooled.shape) == ((1, 77, 32), (1, 32))
    assert torch.equal(null.tokens, encoder.encode(encoder.tokenize([""])).tokens)
    features = encoder.encode(encoder.tokenize(CAPTIONS))
    assert not features.tokens.requires_grad
    assert not features.tokens.is_inference()  # these enter autograd as inputs of a layer
    torch.testing.assert_close(features.tokens[2:3], null.tokens)


def test_towers_run_in_bfloat16() -> None:
    for kind in ("transformers", "open_clip"):
        config = TextEncoderConfig.model_validate({"kind": kind, "weights": "seeded", "seeded": {"width": 32}})
        half, full = (load_text_encoder(config, "cpu", dtype) for dtype in (torch.bfloat16, torch.float32))
        ids = full.tokenize(CAPTIONS)
        assert half.encode(ids).tokens.dtype == torch.bfloat16
        assert (half.encode(ids).tokens.float() - full.encode(ids).tokens).abs().mean() < 0.02


def test_unfit_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text_encoder\.seeded: width 32 is not divisible by heads 5"):
        seeded(width=32, heads=5)


WORDS = (
    ("small", "large"),
    ("red", "green", "blue", "yellow", "purple", "orange"),
    ("circle", "square", "triangle", "star", "ring"),
    ("at the top left", "at the top right", "at the bottom left", "at the bottom right", "in the centre"),
)
TEMPLATES = ("a {0} {1} {2} {3} on a white background", "{3}, a {1} {2}, {0}", "there is a {1} {2} that is {0}, {3}")


def held_out_accuracy(features: Tensor, classes: Tensor) -> float:
    """Of a linear classifier by least squares, slightly damped; two thirds train it, one third tests."""
    features = torch.cat((features - features.mean(0), torch.ones(len(features), 1)), 1).double()
    targets = nn.functional.one_hot(classes).double()
    cut = 2 * len(features) // 3
    damping = 1e-3 * cut * torch.eye(features.shape[1]).double()
    weights = torch.linalg.solve(features[:cut].T @ features[:cut] + damping, features[:cut].T @ targets[:cut])
    return ((features[cut:] @ weights).argmax(1) == classes[cut:]).double().mean().item()


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_seeded_features_carry_the_words(kind: str) -> None:
    """Random as it is, the tower must tell a network what to draw: each attribute can be read off linearly."""
    encoder = seeded(kind)
    every = torch.tensor(list(product(*(range(len(words)) for words in WORDS))))
    classes = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    captions = [
        TEMPLATES[number % len(TEMPLATES)].format(*(words[i] for words, i in zip(WORDS, row, strict=True)))
        for number, row in enumerate(classes.tolist())
    ]
    features = encoder.encode(encoder.tokenize(captions))
    for pooled in (features.pooled, features.tokens.mean(1)):
        size, colour, shape, place = (held_out_accuracy(pooled, classes[:, k]) for k in range(4))
        assert min(colour, shape) >= 0.99
        assert min(size, place) >= 0.95
    # Captions differ visibly: what is common to all is not nearly everything, and no two coincide.
    varying = features.pooled.var(0).sum() / features.pooled.square().mean(0).sum()
    assert varying > 0.15
    centred = nn.functional.normalize(features.pooled - features.pooled.mean(0), dim=1)
    similar = (centred @ centred.T).fill_diagonal_(-1)
    assert similar.max() < 0.99


def test_a_model_without_a_null_class_cannot_be_guided() -> None:
    classes = Conditioner(DiTConfig(hidden_size=16, depth=1, num_heads=2, dropout_prob=0.0), None, torch.device("cpu"))
    conditioning = classes.of_labels(torch.tensor([0, 999]))
    assert classes.drop(conditioning, torch.tensor([True, True])) is conditioning
    with pytest.raises(ValueError, match="guidance: it must be 1, since this model has no null class"):
        classes.null(1)


def test_noise_of_text_features_depends_on_the_sample_and_leaves_padding() -> None:
    encoder = seeded()
    text = {"condition": "text", "text_dim": 128, "pooled_text": True, "pooled_dim": 128}
    config = DiCoConfig.model_validate({"hidden_size": 16, "depths": [1] * 5, "mlp_ratio": 2, **text})
    conditioner = Conditioner(config, encoder, torch.device("cpu"))
    plain = conditioner.of_prompts(CAPTIONS[:2])
    plain["cond"][:, 50:] = 0  # padding
    position = torch.tensor([7, 3])
    noisy = conditioner.add_noise(plain, 1.5, 0, position)
    for name, value in plain.items():
        added = noisy[name] - value
        assert not added[value == 0].any()
        scale = value.square().mean(-1, keepdim=True).sqrt()
        drawn = (added / scale)[scale.expand_as(added) > 0]
        assert drawn.std().item() == pytest.approx(1.5, rel=0.15 if name == "pooled" else 0.05)
        assert abs(drawn.mean().item()) < (0.5 if name == "pooled" else 0.05)
        # Sample 3 alone gets what it got beside sample 7, and another seed gives something else.
        alone = {key: each[1:] for key, each in plain.items()}
        assert conditioner.add_noise(alone, 1.5, 0, position[1:])[name].equal(noisy[name][1:])
        assert not conditioner.add_noise(plain, 1.5, 1, position)[name].equal(noisy[name])
    assert conditioner.add_noise(plain, 0.0, 0, position) is plain
