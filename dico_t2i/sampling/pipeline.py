"""The pipeline from weights and prompts to images."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map

from dico_t2i import randomness
from dico_t2i.command import progress_bar
from dico_t2i.config import Config, SamplerConfig
from dico_t2i.diffusion import GivenLatents, ModelFn, guided, sample
from dico_t2i.encoders import Autoencoder
from dico_t2i.encoders.conditioner import Conditioner
from dico_t2i.encoders.identity import KEY, check_identities, identities
from dico_t2i.encoders.load import load_encoders
from dico_t2i.memory import keep_freed_memory
from dico_t2i.models import Network, build_network, merge_adapter, read_adapter
from dico_t2i.sampling.given import Kept, begin_with, keep_pixels
from dico_t2i.sampling.images import to_pil
from dico_t2i.sampling.labels import conditions_of
from dico_t2i.sampling.options import Options, changed_sampler, image_size
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

    @staticmethod
    def load(
        path: str | Path,
        weights: str | None = None,
        dtype: str | None = None,
        adapter: str | Path | None = None,
        adapter_scale: float = 1.0,
    ) -> "Pipeline":
        """The pipeline of a run, of one of its checkpoints, or of an exported folder; on the GPU if there is one.

        weights: "weight", or an average such as "ema_0.9999"; by default the first average. dtype: "bf16" or "fp32"; by
        default bf16 on a GPU and fp32 on a CPU. adapter: a file of an adapter, which is added to the weights with this
        scale. Raises ValueError that says what is missing.
        """
        added = Path(adapter) if adapter else None
        return load_pipeline(Path(path), weights, *choose_device(dtype), added, adapter_scale)

    def __call__(
        self,
        prompts: str | int | Sequence[str | int],
        *,
        seed: int = 0,
        per_prompt: int = 1,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch: int = 16,
        **options: Any,
    ) -> list[Image.Image]:
        """Images of prompts, or of classes by number or ImageNet name, with a progress bar.

        seed: the seed of the first image; the next ones count up from it. per_prompt: how many images of each. sampler,
        steps, guidance: by default the config's. batch: how many images are sampled at a time. options: the fields of
        ``Options``: negative_prompt, height, width, image, strength, mask. The same arguments give the images of ``dico
        sample``. Raises ValueError for arguments that do not fit the model.
        """
        listed = [prompts] if isinstance(prompts, str | int) else list(prompts)
        conditions = [one for one in conditions_of(listed, self.config.model) for _ in range(per_prompt)]
        chosen = changed_sampler(self.config.sampler, {"kind": sampler, "steps": steps, "guidance": guidance})
        seeds = range(seed, seed + len(conditions))
        with progress_bar() as bar:
            task = bar.add_task("sampling", total=None)
            images = self.generate(
                conditions,
                seeds,
                chosen,
                batch,
                lambda done, total: bar.update(task, completed=done, total=total),
                options=Options(**options),
            )
        return [to_pil(image) for image in images]

    @torch.no_grad()
    def generate(
        self,
        conditions: Sequence[str | int],
        seeds: Sequence[int],
        sampler: SamplerConfig,
        batch: int = 16,
        progress: Progress | None = None,
        decode_batch: int = 16,
        options: Options = Options(),  # noqa: B008
    ) -> Tensor:
        """Images (N, 3, H, W) uint8 on the host, one for each pair of a condition (prompt or label) and a seed.

        An image's noise depends only on its own seed, whatever the batch. ``progress(done, total)`` counts steps over
        all batches. decode_batch: how many images the autoencoder decodes at a time, which limits its memory.
        Raises ValueError for seeds that are not 64-bit integers, or for options that do not fit the model.
        """
        seeds = randomness.check_seeds(seeds)
        if not seeds or len(conditions) != len(seeds):
            raise ValueError(f"{len(conditions)} prompts or labels and {len(seeds)} seeds; give one seed for each")
        self.check(options, sampler)
        chunks = [slice(i, i + batch) for i in range(0, len(seeds), batch)]
        canvas = self._canvas(options)
        null = self._null(options.negative_prompt) if sampler.guidance != 1 else {}
        images = []
        for number, chunk in enumerate(chunks):

            def report(done: int, steps: int, number: int = number) -> None:
                if progress:
                    progress(number * steps + done, len(chunks) * steps)

            latents = self._latents(self._conditioning(conditions[chunk]), null, seeds[chunk], sampler, canvas, report)
            images += [self.autoencoder.decode(part).cpu() for part in latents.split(decode_batch)]
        return keep_pixels(torch.cat(images), canvas.kept)

    def check(self, options: Options, sampler: SamplerConfig) -> None:
        """Raise ValueError for options that do not fit the model or the sampler, before anything is computed."""
        image_size(self.config, options)
        if options.negative_prompt is None:
            return
        if self.config.model.condition == "class":
            raise ValueError("negative_prompt: this model takes classes, which have no negative prompt")
        if sampler.guidance == 1:
            raise ValueError("negative_prompt: it has no effect with guidance 1; raise the guidance, or leave it out")

    def _canvas(self, options: Options) -> "_Canvas":
        """The sizes of latents, and what is given of them."""
        height, width = image_size(self.config, options)
        scale = self.autoencoder.downscale
        shape = (self.config.model.in_channels, height // scale, width // scale)
        given, kept = begin_with(
            options.image, options.strength, options.mask, (height, width), scale, self.autoencoder.mean_latents
        )
        return _Canvas(shape, given, kept)

    def _latents(
        self,
        cond: dict[str, Any],
        null: dict[str, Any],
        seeds: Sequence[int],
        sampler: SamplerConfig,
        canvas: "_Canvas",
        report: Progress,
    ) -> Tensor:
        index = torch.tensor(seeds, device=self.device)
        noise = randomness.normal(0, "initial noise", index, canvas.shape)
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
            lambda step: randomness.normal(0, f"step noise {step}", index, canvas.shape),
            self.config.model.learn_sigma,
            report,
            given=canvas.given,
        )

    def _null(self, negative_prompt: str | None) -> dict[str, Any]:
        """The conditioning that guidance leads away from, for one sample."""
        if negative_prompt is None:
            return self._prepared(self.conditioner.null(1))
        return self._prepared(self.conditioner.of_prompts([negative_prompt]))

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


@dataclass(frozen=True)
class _Canvas:
    """What the latents of all images have in common.

    shape: (C, H, W). given: the latents of the image that sampling begins with. kept: the pixels that a mask keeps.
    """

    shape: tuple[int, int, int]
    given: GivenLatents | None = None
    kept: Kept | None = None


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


def choose_device(dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype for sampling; the default dtype is bf16 on a GPU and fp32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wished = dtype or ("bf16" if device.type == "cuda" else "fp32")
    return device, torch.bfloat16 if wished == "bf16" else torch.float32


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
