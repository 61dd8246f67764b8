"""The pipeline from weights and prompts to images."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dico_t2i import randomness
from dico_t2i.config import Config, SamplerConfig
from dico_t2i.diffusion import ModelFn, guided, sample
from dico_t2i.encoders import Autoencoder
from dico_t2i.encoders.conditioner import Conditioner
from dico_t2i.encoders.identity import KEY, check_identities, identities
from dico_t2i.encoders.load import load_encoders
from dico_t2i.memory import keep_freed_memory
from dico_t2i.models import Network, build_network, merge_adapter, read_adapter
from dico_t2i.sampling.trained import find_trained

Progress = Callable[[int, int], None]


@dataclass
class Pipeline:
    """The parts that turn prompts or labels into images."""

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
        """Images (N, 3, H, W) uint8 on the host, one for each pair of a condition (prompt or label) and a seed.

        An image's noise depends only on its own seed, whatever the batch. ``progress(done, total)`` counts steps over
        all batches. decode_batch: how many images the autoencoder decodes at a time, which limits its memory.
        Raises ValueError for seeds that are not 64-bit integers.
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
        """The conditioning of prompts or labels; equal prompts are encoded only once."""
        if self.config.model.condition == "class":
            return self.conditioner.of_labels(torch.tensor([int(c) for c in conditions]))
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(str, conditions)))}
        prepared = self._prepared(self.conditioner.of_prompts(list(numbers)))
        if len(numbers) == len(conditions):
            return prepared
        rows = torch.tensor([numbers[str(c)] for c in conditions], device=self.device)
        return tree_map(lambda values: values[rows], prepared)

    def _prepared(self, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """The conditioning with the work on the text done that is the same at every step."""
        if self.config.model.condition == "class":
            return dict(conditioning)
        return {**conditioning, "cond": self.model.text_kernels(conditioning["cond"])}


def as_cuda_graph(network: ModelFn, like: Tensor) -> ModelFn:
    """The network as one CUDA graph for inputs x shaped like ``like``; unchanged on other devices.

    Replaying it needs one launch instead of thousands, whose cost dominates with small batches.
    """
    if like.device.type != "cuda":
        return network
    x, t = torch.zeros_like(like), torch.zeros(len(like), device=like.device)
    side = torch.cuda.Stream(like.device)
    side.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(side):  # choose and compile kernels first, which a capture does not allow
        network(x, t)
    torch.cuda.current_stream(like.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = network(x, t)

    def replay(x_now: Tensor, t_now: Tensor) -> Tensor:
        x.copy_(x_now)
        t.copy_(t_now)
        graph.replay()
        return output.clone()  # since the next replay writes into the same memory

    return replay


def load_pipeline(
    path: Path,
    weights: str | None,
    device: torch.device,
    dtype: torch.dtype,
    adapter: Path | None = None,
    adapter_scale: float = 1.0,
) -> Pipeline:
    """Load the pipeline of a run, of one of its checkpoints, or of an exported folder.

    weights: "weight" or an average such as "ema_0.9999"; None stands for the first average of the config, or for the
    weights if there is none. adapter: the file of an adapter, which is added to the weights with this scale. Raises
    ValueError (CheckpointError, ConfigError, MissingModelError) that says what is missing.
    """
    if device.type == "cpu":
        keep_freed_memory()
    source = find_trained(path, weights)
    added = read_adapter(adapter) if adapter else {}
    config = source.config
    autoencoder, conditioner = load_encoders(config, device, dtype)
    if source.record.get(KEY) is None:
        print(f"note: {path} does not say which encoders it was trained with; they are not checked", file=sys.stderr)
    else:
        check_identities(source.record[KEY], identities(autoencoder, conditioner.text_encoder), str(path))
    model = build_network(config.model)
    source.fill(model)
    merge_adapter(dict(model.named_parameters()), added, adapter_scale)
    return Pipeline(config, model.to(device, dtype).eval().requires_grad_(False), autoencoder, conditioner, device)
