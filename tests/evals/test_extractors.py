"""The FID Inception and its resizes against torch-fidelity's and clean-fid's, on the same seeded weights and images."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from evals.quality import extractors
from evals.quality.extractors import Inception, load_inception, resize_images, seeded_inception
from evals.quality.features import LOGITS, POOL, SPATIAL
from evals.quality.protocol import STATE_DICT, TORCHSCRIPT, Extractor
from evals.quality.weights import MissingWeightsError, Weights, find_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = [np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(2)]
    return [*smooth, rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)]


@pytest.fixture(scope="module")
def state_dict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights in the file format of the published ones."""
    path = tmp_path_factory.mktemp("weights") / STATE_DICT
    torch.save(seeded_inception().state_dict(), path)
    return path


def test_tensorflow_resize_equals_torch_fidelitys(images: list[np.ndarray]) -> None:
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    assert (resize_images(images, "legacy_tensorflow") - theirs).abs().max() < 1e-3  # float32, of 255


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_resize_equals_clean_fids(images: list[np.ndarray], mode: str) -> None:
    theirs = np.stack([build_resizer(mode)(image) for image in images]).transpose(0, 3, 1, 2)
    assert np.abs(resize_images(images, mode).numpy() - theirs).max() < 1e-3


def test_features_equal_torch_fidelitys(images: list[np.ndarray], state_dict: Path) -> None:
    """Pooled, logits without bias, and, by a hook there, the spatial ones; a file gives what its seed does."""
    with torch.random.fork_rng():
        theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(state_dict))
    spatial: list[torch.Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _x, out: spatial.append(out))
    pool, logits = theirs(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    settings = Extractor(sha256="6726825d", resize="legacy_tensorflow")
    weights = find_weights(settings, state_dict, state_dict.parent)
    assert weights.doubt
    assert "not 6726825d" in weights.doubt
    mine = load_inception(settings, weights, CPU)(images)
    torch.testing.assert_close(mine[POOL], pool, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine[LOGITS], logits, rtol=1e-3, atol=1e-4)
    expected = spatial[0].permute(0, 2, 3, 1)[..., :7].reshape(3, -1)
    torch.testing.assert_close(mine[SPATIAL], expected, rtol=1e-3, atol=1e-4)
    seeded = Inception("legacy_tensorflow", Weights(None, "seeded", None), CPU)(images)
    assert torch.equal(seeded[POOL], mine[POOL])
    assert mine[POOL].std(dim=0).mean() > 1e-3


class _Scripted(torch.nn.Module):
    """The interface of the published TorchScript: ``layers`` on scaled pixels, as clean-fid calls it."""

    def __init__(self) -> None:
        super().__init__()
        net = seeded_inception()
        pooled = [layer for name, layer in net.named_children() if name not in ("dropout", "fc")]
        self.layers = torch.nn.Sequential(*pooled)


def test_clean_fids_network_from_torchscript(images: list[np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / TORCHSCRIPT
    with torch.no_grad():
        module = _Scripted().eval()
        module.layers = torch.jit.trace(module.layers, torch.zeros(1, 3, 299, 299), check_trace=False)
        torch.jit.script(module).save(str(path))
    settings = Extractor(file=TORCHSCRIPT, resize="clean")
    weights = find_weights(settings, None, tmp_path)
    found = load_inception(settings, weights, CPU)(images[:1])
    expected = Inception("clean", Weights(None, "seeded", None), CPU)(images[:1])
    torch.testing.assert_close(found[POOL], expected[POOL], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="requires pt_inception"):
        Extractor(file=TORCHSCRIPT, resize="legacy_pytorch")


def test_missing_weights_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICO_ALLOW_DOWNLOAD", raising=False)
    asked: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **options: asked.append(host))
    with pytest.raises(MissingWeightsError, match=r"sha256 6726825d[\s\S]*curl -L -o pt_inception"):
        find_weights(Extractor(sha256="6726825d", resize="clean"), None, tmp_path)
    assert not asked  # anybody: the answer is here


def test_bad_weights(tmp_path: Path) -> None:
    torn = tmp_path / STATE_DICT
    torn.write_bytes(b"not weights")
    settings = Extractor(resize="clean")
    with pytest.raises(ValueError, match="cannot be loaded; download it again"):
        load_inception(settings, find_weights(settings, torn, tmp_path), CPU)
    torch.save({"conv": torch.zeros(1)}, torn)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_inception(settings, find_weights(settings, torn, tmp_path), CPU)
    other = tmp_path / "weights.pt"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a \.pth file"):
        find_weights(settings, other, tmp_path)


def test_clip_score_and_dinov2_from_local_folders(images: list[np.ndarray], tmp_path: Path) -> None:
    """Random models in the layouts of the real ones, against the libraries' own calls."""
    import json

    import open_clip
    import transformers
    from PIL import Image

    size = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    card = {"model_cfg": {"embed_dim": 32, "vision_cfg": size, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(card))
    torch.manual_seed(0)
    clip = open_clip.CLIP(32, size, text)
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    scores = extractors.ClipScorer(str(tmp_path), CPU)(images, ["a cat", "two dogs", "noise"])["clip"]
    clip, prepare = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    with torch.no_grad():
        pixels = torch.stack([prepare(Image.fromarray(image)) for image in images])
        ids = open_clip.tokenize(["a cat", "two dogs", "noise"])
        expected = 100 * torch.cosine_similarity(clip.encode_image(pixels), clip.encode_text(ids))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    found = extractors.DinoFeatures(str(tmp_path / "dino"), CPU)(images)["dinov2"]
    assert found.shape == (3, 32)
    assert not torch.equal(found[0], found[1])
