"""From weights and prompts to images."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_map

from dico_t2i import randomness
from dico_t2i.config import Config, SamplerConfig, load_config
from dico_t2i.diffusion import ModelFn, guided, sample
from dico_t2i.encoders import Autoencoder
from dico_t2i.encoders.conditioner import Conditioner
from dico_t2i.encoders.identity import KEY, check_identities, identities
from dico_t2i.encoders.load import load_encoders
from dico_t2i.encoders.local import read_json
from dico_t2i.memory import keep_freed_memory
from dico_t2i.models import Network, build_network
from dico_t2i.runs.checkpoint import read_weights
from dico_t2i.runs.weights import chosen_weights, exported_weights, locate_checkpoint

Progress = Callable[[int, int], None]


@dataclass
class Pipeline:
    """Everything that turns prompts or labels into images."""

    config: Config
    model: Network
    autoencoder: Autoencoder
    conditioner: Conditioner
    device: torch.device

    @torch.no_grad()
    def generate(
        self,
        conditions: Sequence[str | int],
        seeds: Sequence[int],
        sampler: SamplerConfig,
        batch: int = 16,
        progress: Progress | None = None,
        decode_batch: int = 16,
    ) -> Tensor:
        """Images (N, 3, H, W) uint8 on the host, one for each prompt or label and its seed.

        An image's noise depends on its own seed only, whatever the batch. ``progress(done, total)`` counts steps
        over all batches. decode_batch: images that go through the autoencoder at a time, whose memory it bounds.
        Raises ValueError for seeds that are no whole numbers of 64 bits.
        """
        seeds = randomness.check_seeds(seeds)
        if not seeds or len(conditions) != len(seeds):
            raise ValueError(f"{len(conditions)} prompts or labels and {len(seeds)} seeds; give one seed for each")
        chunks = [slice(i, i + batch) for i in range(0, len(seeds), batch)]
        null = self._prepared(self.conditioner.null(1)) if sampler.guidance != 1 else {}
        images = []
        for number, chunk in enumerate(chunks):

            def report(done: int, steps: int, number: int = number) -> None:
                if progress:
                    progress(number * steps + done, len(chunks) * steps)

            latents = self._latents(self._conditioning(conditions[chunk]), null, seeds[chunk], sampler, report)
            images += [self.autoencoder.decode(part).cpu() for part in latents.split(decode_batch)]
        return torch.cat(images)

    def _latents(
        self,
        cond: dict[str, Any],
        null: dict[str, Any],
        seeds: Sequence[int],
        sampler: SamplerConfig,
        report: Progress,
    ) -> Tensor:
        index = torch.tensor(seeds, device=self.device)
        size = self.config.latent_size
        shape = (self.config.model.in_channels, size, size)
        noise = randomness.normal(0, "initial noise", index, shape)
        network = guided(
            self.model,
            cond,
            null,
            sampler.guidance,
            sampler.guidance_channels,
            sampler.guidance_interval,
            self.config.diffusion.steps,
            wrap=lambda network: as_cuda_graph(network, noise),
        )
        return sample(
            self.config.diffusion,
            sampler,
            network,
            noise,
            lambda step: randomness.normal(0, f"step noise {step}", index, shape),
            self.config.model.learn_sigma,
            report,
        )

    def _conditioning(self, conditions: Sequence[str | int]) -> dict[str, Any]:
        """Each different prompt is encoded, and its kernels are made, once."""
        if self.config.model.condition == "class":
            return self.conditioner.of_labels(torch.tensor([int(c) for c in conditions]))
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(str, conditions)))}
        prepared = self._prepared(self.conditioner.of_prompts(list(numbers)))
        if len(numbers) == len(conditions):
            return prepared
        rows = torch.tensor([numbers[str(c)] for c in conditions], device=self.device)
        return tree_map(lambda values: values[rows], prepared)

    def _prepared(self, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """The conditioning with all work on the text done that is the same at every step."""
        if self.config.model.condition == "class":
            return dict(conditioning)
        return {**conditioning, "cond": self.model.text_kernels(conditioning["cond"])}


def as_cuda_graph(network: ModelFn, like: Tensor) -> ModelFn:
    """The network as one CUDA graph, for inputs x shaped as ``like``; itself on other devices.

    A replay costs one launch instead of thousands, which is what small batches wait for.
    """
    if like.device.type != "cuda":
        return network
    x, t = torch.zeros_like(like), torch.zeros(len(like), device=like.device)
    side = torch.cuda.Stream(like.device)
    side.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(side):  # kernels are chosen and compiled before the capture, which allows neither
        network(x, t)
    torch.cuda.current_stream(like.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = network(x, t)

    def replay(x_now: Tensor, t_now: Tensor) -> Tensor:
        x.copy_(x_now)
        t.copy_(t_now)
        graph.replay()
        return output.clone()  # the next replay writes into the same memory

    return replay


def load_pipeline(path: Path, weights: str | None, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """From a run, one of its checkpoints, or an exported folder.

    weights: "weight" or an average such as "ema_0.9999"; None is the first average of the config, or else the
    weights. Raises ValueError (CheckpointError, ConfigError, MissingModelError) saying what is missing.
    """
    if device.type == "cpu":
        keep_freed_memory()
    source = _find_weights(path, weights)
    config = source.config
    autoencoder, conditioner = load_encoders(config, device, dtype)
    if source.encoders is None:
        print(f"note: {path} does not say which encoders it was trained with; they are not checked", file=sys.stderr)
    else:
        check_identities(source.encoders, identities(autoencoder, conditioner.text_encoder), str(path))
    model = build_network(config.model)
    source.fill(model)
    return Pipeline(config, model.to(device, dtype).eval().requires_grad_(False), autoencoder, conditioner, device)


@dataclass(frozen=True)
class _Source:
    """Where a network comes from. encoders: the identities of those it was trained with, None where nobody noted them.

    fill: puts the weights into the network.
    """

    config: Config
    encoders: Mapping[str, Any] | None
    fill: Callable[[Network], None]


def _find_weights(path: Path, weights: str | None) -> _Source:
    file = exported_weights(path)
    if file is not None:
        origin = _origin(path)
        if weights not in (None, origin.get("weights")):
            held = origin.get("weights")
            raise ValueError(f"--weights {weights}: {path} is exported, and holds {held} alone; give the run instead")
        return _Source(exported_config(path), origin.get(KEY), lambda model: _fill(model, load_file(file), path))
    run, checkpoint = locate_checkpoint(path)
    config = load_config(run / "config.yaml")
    kind = chosen_weights(weights, config, checkpoint)
    return _Source(
        config,
        checkpoint.state.get(KEY),
        lambda model: _fill(model, dict(read_weights(checkpoint, kind)), checkpoint.path),
    )


def _origin(folder: Path) -> dict[str, Any]:
    """What an exported folder says of its weights."""
    file = folder / "export.json"
    return read_json(file) if file.exists() else {}


def exported_config(folder: Path) -> Config:
    """The config of an exported folder, with the encoders that lie in it."""
    config = load_config(folder / "config.yaml")
    vae, text = folder / "vae", folder / "text_encoder"
    changes: dict[str, Any] = {}
    if vae.is_dir():
        changes["autoencoder"] = config.autoencoder.model_copy(update={"path": str(vae)})
    if text.is_dir():
        own = {"model": str(text), "weights": "pretrained"}
        changes["text_encoder"] = config.text_encoder.model_copy(update=own)
    return config.model_copy(update=changes)


def _fill(model: Network, state: dict[str, Tensor], source: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source}: not weights of the model in its config: {str(error).splitlines()[1]}") from None
    broken = next((name for name, values in state.items() if not values.isfinite().all()), None)
    if broken:
        raise ValueError(f"{source}: {broken} is not finite, this training diverged; take an earlier checkpoint")
