"""DiT, PixArt and FLUX from diffusers, as functions of noisy latents and the timestep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dico_t2i.config import DiffusionConfig, SamplerConfig
from dico_t2i.diffusion import space_timesteps
from dico_t2i.diffusion.flow_samplers import flow_times
from dico_t2i.encoders.local import download_allowed, load_diffusers, reading

_OLD_CLASS = "Transformer2DModel"  # the class that DiT and PixArt were published with
_GUIDANCE = 3.5  # the guidance input of FLUX's distilled networks, as in its pipeline
_LATENT_PIXELS = 8
_PIXART_TOKENS, _FLUX_TOKENS = 120, 512
Text = dict[str, Tensor]  # "tokens" (T, dim) or (N, T, dim); "pooled" (dim,) or (N, dim), FLUX only


class Backbone(ABC):
    """A network. shape: of one sample's latents. grid: rows and columns of image tokens, which come after all other
    tokens.

    layers: the modules with attention between image tokens, by name, in order.
    """

    class_name: str
    diffusion = DiffusionConfig()
    sampler = "ddim"
    learn_sigma = False

    def __init__(self, network: Any, text: Text) -> None:
        self.network, self.text = network, text
        self.device, self.dtype = network.device, network.dtype
        self.layers: dict[str, nn.Module] = {
            f"{part}.{number}": block.attn1 if hasattr(block, "attn1") else block.attn
            for part in ("transformer_blocks", "single_transformer_blocks")
            for number, block in enumerate(getattr(network, part, ()))
        }

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]: ...

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]: ...

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x (N, *shape) and t (N,) in 0..1000 to noise or velocity, with variance channels if ``learn_sigma``."""

    def sampler_config(self, steps: int) -> SamplerConfig:
        return SamplerConfig.model_validate({"kind": self.sampler, "steps": steps, "guidance": 1.0})

    def timesteps(self, steps: int) -> list[float]:
        """The timesteps at which the sampler evaluates the network, from noise on."""
        if self.diffusion.kind == "flow":
            return [self.diffusion.steps * time for time in flow_times(self.sampler_config(steps))[:-1]]
        return sorted(map(float, space_timesteps(self.diffusion.steps, str(steps))), reverse=True)

    def _text(self, key: str, samples: int, *shape: int) -> Tensor:
        """A text feature, (samples, *shape); zeros if none was given. Raises ValueError if it has a different shape."""
        given = self.text.get(key, torch.zeros(shape))
        if given.shape[-1] != shape[-1] or given.ndim not in (len(shape), len(shape) + 1):
            raise ValueError(f"--text: {key} is {tuple(given.shape)}, but this network takes {shape}")
        return given.expand(samples, *given.shape[-len(shape) :]).to(self.device, self.dtype)


class _OnSquares(Backbone):
    """A network for latents (C, S, S) that are divided into patches."""

    def __init__(self, network: Any, text: Text) -> None:
        super().__init__(network, text)
        self.learn_sigma = network.out_channels == 2 * network.config.in_channels

    @property
    def shape(self) -> tuple[int, int, int]:
        config = self.network.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.network.config.sample_size // self.network.config.patch_size
        return side, side


class DiT(_OnSquares):
    """DiT, with ImageNet classes that are evenly spread over the samples."""

    class_name = "DiTTransformer2DModel"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        classes = self.network.config.num_embeds_ada_norm
        labels = torch.arange(len(x), device=self.device) * classes // len(x)
        return self.network(x.to(self.dtype), timestep=t, class_labels=labels).sample


class PixArt(_OnSquares):
    """PixArt-alpha and -sigma."""

    class_name = "PixArtTransformer2DModel"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        config = self.network.config
        width = config.caption_channels or config.cross_attention_dim
        size: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            pixels = float(_LATENT_PIXELS * config.sample_size)
            size["resolution"] = torch.full((len(x), 2), pixels, device=self.device, dtype=self.dtype)
            size["aspect_ratio"] = torch.ones(len(x), 1, device=self.device, dtype=self.dtype)
        return self.network(
            x.to(self.dtype),
            encoder_hidden_states=self._text("tokens", len(x), _PIXART_TOKENS, width),
            timestep=t,
            added_cond_kwargs=size,
        ).sample


class Flux(Backbone):
    """FLUX, in which text tokens take part in the attention. A token is 16 pixels wide."""

    class_name = "FluxTransformer2DModel"
    diffusion = DiffusionConfig(kind="flow")
    sampler = "euler"
    side = 32  # tokens, for images of 512 pixels

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.network.config.in_channels, self.side, self.side

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        config = self.network.config
        tokens = self._text("tokens", len(x), _FLUX_TOKENS, config.joint_attention_dim)
        places = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in self.grid))
        guidance = torch.full((len(x),), _GUIDANCE, device=self.device) if config.guidance_embeds else None
        output = self.network(
            x.flatten(2).transpose(1, 2).to(self.dtype),
            encoder_hidden_states=tokens,
            pooled_projections=self._text("pooled", len(x), config.pooled_projection_dim),
            timestep=(t / self.diffusion.steps).to(self.dtype),
            img_ids=places.to(self.device, self.dtype),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=self.device, dtype=self.dtype),
            guidance=guidance,
        ).sample
        return output.transpose(1, 2).reshape(len(x), -1, *self.grid)


KINDS: dict[str, type[Backbone]] = {"dit": DiT, "pixart": PixArt, "flux": Flux}


def load_backbone(kind: str, model: str, text: Path | None, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Load a network from a folder or hub id, of the network itself or of a pipeline with it in transformer/.

    Raises ValueError if it cannot be found or is of a different class. Only DICO_ALLOW_DOWNLOAD=1 allows a download.
    """
    backbone = KINDS[kind]
    try:
        network = _load_network(backbone.class_name, model, dtype)
    except OSError as error:
        raise ValueError(
            f"--model {model}: it is neither a folder with the network of a diffusers pipeline (config.json, or"
            " transformer/config.json) nor in the Hugging Face cache; set DICO_ALLOW_DOWNLOAD=1 to download"
            f" it. {str(error).splitlines()[0]}"
        ) from None
    return backbone(network.to(device), _read_text(text))


def _load_network(class_name: str, model: str, dtype: torch.dtype) -> Any:
    import diffusers

    network_class = getattr(diffusers, class_name)
    place = {
        "subfolder": None if (Path(model) / "config.json").is_file() else "transformer",
        "local_files_only": not download_allowed(),
    }
    saved_as = network_class.load_config(model, **place).get("_class_name")
    if saved_as not in (class_name, _OLD_CLASS):
        raise ValueError(f"--model {model}: it is a {saved_as}, but this --kind is {class_name}")
    return load_diffusers(network_class, model, dtype, **place)


def _read_text(file: Path | None) -> Text:
    if file is None:
        return {}
    with reading(file):
        text = load_file(file)
    unknown = set(text) - {"tokens", "pooled"}
    if unknown:
        raise ValueError(f"--text {file}: it contains {', '.join(sorted(unknown))}; known names are tokens and pooled")
    return text
