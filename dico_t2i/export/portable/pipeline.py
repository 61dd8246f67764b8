"""The pipeline for users of diffusers."""

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dico_t2i.config import SAMPLERS, DiffusionConfig, SamplerConfig, check_sampler
from dico_t2i.diffusion.flow_samplers import Progress
from dico_t2i.diffusion.given import GivenLatents, StepHook
from dico_t2i.diffusion.guidance import guided
from dico_t2i.diffusion.process import ModelFn
from dico_t2i.diffusion.samplers import sample
from dico_t2i.encoders.autoencoders import DECODE_CHUNK, to_uint8
from dico_t2i.encoders.text.clip import TOKENS, clip_features
from dico_t2i.encoders.text.features import TextFeatures
from dico_t2i.models.adapter import merge_adapter, read_adapter
from dico_t2i.randomness import check_seeds, normal
from dico_t2i.sampling.given import Kept, begin_with, check_image_given, keep_pixels
from dico_t2i.text_lines import check_text

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Prompts, classes, or the features of prompts.
_Given = list[str] | list[int] | TextFeatures
Callback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor]]


class DiCoPipeline(DiffusionPipeline):
    """Makes images from prompts or classes.

    The noise depends only on an image's seed and is the same on every device. The samplers are DiCo's own, in float32.
    ``scheduler`` describes the noise schedule to diffusers; a different scheduler in its place is used for sampling.
    A model of pixels has no vae, and a model of classes has neither text encoder nor tokenizer.

    diffusion, sampler: the fields of DiffusionConfig and SamplerConfig, which are the defaults of a call. image_size:
    the image size of training, in pixels. downscale: the ratio of image size to latent size, 1 without a vae.
    latent_scale: the factor between the vae's latents and the network's input. latent_channels: in place of it, the
    "mean" that is subtracted from each channel and its "scale". id2label: names of classes by number.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        diffusion: dict[str, Any] | None = None,
        sampler: dict[str, Any] | None = None,
        image_size: int = 256,
        downscale: int = 8,
        latent_scale: float = 1.0,
        latent_channels: dict[str, list[float]] | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            diffusion=diffusion or {},
            sampler=sampler or {},
            image_size=image_size,
            downscale=downscale,
            latent_scale=latent_scale,
            latent_channels=latent_channels,
            id2label=id2label,
        )

    def load_adapter(self, file: str | Path, scale: float = 1.0) -> None:
        """Add an adapter (LoRA) of the network, a file that `dico export` wrote, to the weights; peft is not needed.

        scale: its strength. Several adapters may be added one after the other; load the pipeline again to be rid of
        them. Raises ValueError if the file is no adapter, or one of another network.
        """
        merge_adapter(dict(self.transformer.named_parameters()), read_adapter(Path(file)), scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        sampler: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        image: Image.Image | None = None,
        strength: float | None = None,
        mask_image: Image.Image | None = None,
    ) -> Any:
        """Make images of prompts, or of class_labels (numbers or names).

        prompt_embeds, negative_prompt_embeds: (N, tokens, width), in place of the texts, and (1 or N, ...);
        pooled_prompt_embeds, negative_pooled_prompt_embeds: (N, D) for a model that takes pooled text. See
        ``encode_prompt``. image: an image to begin with, cropped and resized to height and width. strength: how far
        results may depart from it, more than 0 and at most 1; 0.8 by default, or 1 with a mask. mask_image: white where
        the image is made anew; all other pixels stay as they are.
        seed: the seed of the first image, from which the others count up, or a list with one for each image. Without
        it, seeds are drawn from ``generator`` (one, or a list with one for each image), or from torch's default one.
        sampler: iddpm, ddim or dpm++; for a flow euler, heun, dpm++ or euler_sde. output_type: pil, latent, or np
        (N, H, W, 3) or pt (N, 3, H, W) in 0..1. guidance_scale: w in uncond + w (cond - uncond); 1 means no guidance.
        callback_on_step_end(pipeline, step, timestep, {"latents": ...}) may return different latents. Raises ValueError
        for arguments that do not fit the model.
        """
        self._check_call(output_type, callback_on_step_end_tensor_inputs)
        check_image_given(image, strength, mask_image)
        embeds = self._embeds(prompt_embeds, pooled_prompt_embeds, "prompt_embeds")
        negative_embeds = self._embeds(negative_prompt_embeds, negative_pooled_prompt_embeds, "negative_prompt_embeds")
        given = self._given(prompt, class_labels, embeds)
        each = _whole("num_images_per_prompt", num_images_per_prompt, 1)
        negatives = self._negatives(negative_prompt, negative_embeds, _count(given))
        config = self._sampler(sampler, num_inference_steps, guidance_scale)
        own = self._samples_itself(sampler, config, image)
        device = self._execution_device
        index = torch.tensor(_seeds(seed, generator, _count(given) * each), device=device)
        size = self._size(height, width)
        scale = self.config.downscale
        shape = (self.transformer.config.in_channels, size[0] // scale, size[1] // scale)
        begun, kept = begin_with(image, strength, mask_image, size, scale, partial(self._mean_latents, device))
        model_fn = self._guided(given, negatives, each, config, device)
        hook = partial(self._after_step, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._num_timesteps = config.steps
        with self.progress_bar(total=config.steps) as bar:
            report = partial(self._advance, bar)
            if own:
                latents = self._sample(model_fn, config, index, shape, report, hook, begun)
            else:
                latents = self._sample_by_scheduler(model_fn, config, index, shape, report, hook)
        images = latents if output_type == "latent" else self._images(latents, output_type, kept)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """The features of texts, for a call's prompt_embeds (N, tokens, width) and pooled_prompt_embeds (N, D)."""
        features = self._encode(_texts("prompt", prompt), self._execution_device)
        return features.tokens, features.pooled

    def _check_call(self, output_type: str, inputs: Sequence[str]) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        unknown = sorted({*inputs} - {*self._callback_tensor_inputs})
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs: {', '.join(unknown)} unknown; use {known}")

    def _samples_itself(self, sampler: str | None, config: SamplerConfig, image: Image.Image | None) -> bool:
        """Whether a sampler of this pipeline is used, not the scheduler. Raises ValueError if it does not fit."""
        own = sampler is not None or isinstance(self.scheduler, DDPMScheduler | FlowMatchEulerDiscreteScheduler)
        if own:
            check_sampler(DiffusionConfig(**self.config.diffusion), config)
        elif image is not None:
            known = ", ".join(SAMPLERS[DiffusionConfig(**self.config.diffusion).kind])
            raise ValueError(f"image: it needs a sampler of this pipeline; give sampler=, one of {known}")
        return own

    def _guided(
        self, given: _Given, negatives: _Given | None, each: int, config: SamplerConfig, device: torch.device
    ) -> ModelFn:
        """The network with its conditioning and guidance."""
        cond = self._conditioning(given, each, device)
        null = self._null(negatives, each, device) if config.guidance != 1 else {}
        steps = DiffusionConfig(**self.config.diffusion).steps
        interval = (config.guidance_interval[0], config.guidance_interval[1])  # JSON made it a list
        return guided(self.transformer, cond, null, config.guidance, config.guidance_channels, interval, steps)

    def _advance(self, bar: Any, done: int, total: int) -> None:
        bar.total = self._num_timesteps = total
        bar.update()

    def _after_step(
        self, callback: Callback | None, inputs: Sequence[str], step: int, timestep: float, latents: Tensor
    ) -> Tensor:
        """The latents that the callback returns, or those that it was given."""
        if callback is None:
            return latents
        tensors = {"latents": latents} if "latents" in inputs else {}
        return (callback(self, step, timestep, tensors) or {}).get("latents", latents)

    def _sample(
        self,
        model_fn: ModelFn,
        config: SamplerConfig,
        index: Tensor,
        shape: Sequence[int],
        report: Progress,
        on_step: StepHook,
        begun: GivenLatents | None,
    ) -> Tensor:
        return sample(
            DiffusionConfig(**self.config.diffusion),
            config,
            model_fn,
            normal(0, "initial noise", index, shape),
            lambda step: normal(0, f"step noise {step}", index, shape),
            self.transformer.config.learn_sigma,
            report,
            on_step,
            begun,
        )

    def _sample_by_scheduler(
        self,
        model_fn: ModelFn,
        config: SamplerConfig,
        index: Tensor,
        shape: Sequence[int],
        report: Progress,
        on_step: StepHook,
    ) -> Tensor:
        """Sample by a scheduler of diffusers, from the prediction channels; its noise comes from the images' seeds."""
        scheduler = self.scheduler
        scheduler.set_timesteps(config.steps, device=index.device)
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = [torch.Generator(index.device).manual_seed(s) for s in index.tolist()]
        x = normal(0, "initial noise", index, shape) * scheduler.init_noise_sigma
        for step, t in enumerate(scheduler.timesteps):
            prediction = model_fn(scheduler.scale_model_input(x, t), t.expand(len(x)))[:, : shape[0]]
            x = on_step(step, int(t), scheduler.step(prediction, t, x, **options).prev_sample)
            report(step + 1, len(scheduler.timesteps))
        return x

    def _mean_latents(self, device: torch.device, images: Tensor) -> Tensor:
        """The posterior means of images, scaled: (N, 3, H, W) uint8 -> (N, C, h, w) float32."""
        x = images.to(device).float() / 127.5 - 1
        if self.vae is None:
            self._check_vae()
            return x
        encoded = self.vae.encode(x.to(self.vae.dtype))
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        shift, scale = self._shift_and_scale(device)
        return (mean.float() - shift) * scale

    def _shift_and_scale(self, device: torch.device) -> tuple[Any, Any]:
        """The numbers between the vae's latents and the network's input, or of each channel (C, 1, 1)."""
        each = self.config.latent_channels
        if each is None:
            return 0.0, self.config.latent_scale
        mean, scale = (torch.tensor(each[key], device=device).reshape(-1, 1, 1) for key in ("mean", "scale"))
        return mean, scale

    def _embeds(self, tokens: Tensor | None, pooled: Tensor | None, name: str) -> TextFeatures | None:
        """Given features, or None. Raises ValueError if they do not have the network's shapes."""
        if tokens is None:
            if pooled is not None:
                raise ValueError(f"{name}: they are missing; give them with the pooled ones")
            return None
        network = self.transformer.config
        if network.condition == "class":
            raise ValueError(f"{name}: this model takes classes, which have no features")
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            name: (tokens, (network.text_tokens, network.text_dim))
        }
        if network.pooled_text:
            wanted[name.replace("prompt", "pooled_prompt")] = (pooled, (network.pooled_dim,))
        for key, (found, shape) in wanted.items():
            if found is None or tuple(found.shape) != (len(tokens), *shape) or not len(tokens):
                got = "none" if found is None else tuple(found.shape)
                raise ValueError(f"{key}: this model needs ({', '.join(map(str, ('N', *shape)))}), found {got}")
        return TextFeatures(tokens, tokens[:, :0, 0] if pooled is None else pooled)

    def _given(self, prompt: str | Sequence[str] | None, labels: Any, embeds: TextFeatures | None) -> _Given:
        """The prompts, their features, or the class numbers."""
        if embeds is not None:
            if prompt is not None or labels is not None:
                raise ValueError("prompt_embeds: they take the place of prompt; leave one of them out")
            return embeds
        if self.transformer.config.condition == "text":
            if prompt is None or labels is not None:
                raise ValueError("this model needs prompt, not class_labels")
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(
                    "no text encoder: pass text_encoder=... and tokenizer=... to from_pretrained; see README.md"
                )
            return _texts("prompt", prompt)
        if labels is None or prompt is not None:
            raise ValueError("this model needs class_labels, not prompt")
        listed = _listed(labels)
        if not listed:
            raise ValueError("class_labels: the list is empty")
        return [self._class(one) for one in listed]

    def _class(self, label: Any) -> int:
        classes = self.transformer.config.num_classes
        names = self.config.id2label or {}
        found = [int(n) for n, name in names.items() if str(label).lower() == name.lower()]
        if isinstance(label, str) and not label.isdecimal():
            if len(found) != 1:
                several = f"several classes ({', '.join(map(str, found))}); give a number" if found else "not a class"
                raise ValueError(f"class_labels: {label!r} is {several}; names are in pipeline.config.id2label")
            return found[0]
        number = _whole("class_labels", int(label) if isinstance(label, str) else label, 0)
        if number >= classes:
            raise ValueError(f"class_labels: {label} must be in 0..{classes - 1}")
        return number

    def _negatives(
        self, negative: str | Sequence[str] | None, embeds: TextFeatures | None, count: int
    ) -> _Given | None:
        """The negative prompt of each prompt, one for all, or None."""
        if negative is None and embeds is None:
            return None
        if self.transformer.config.condition == "class":
            raise ValueError("negative_prompt: this model takes classes, which have no negative prompt")
        if negative is not None and embeds is not None:
            raise ValueError("negative_prompt_embeds: they take the place of negative_prompt; leave one of them out")
        listed = embeds if embeds is not None else _texts("negative_prompt", negative)
        if _count(listed) not in (1, count):
            raise ValueError(f"negative_prompt: {_count(listed)} for {count} prompts; give one, or one for each prompt")
        return listed

    def _sampler(self, kind: str | None, steps: int | None, guidance: float | None) -> SamplerConfig:
        changes = {"kind": kind, "steps": steps, "guidance": guidance}
        known = SAMPLERS[DiffusionConfig(**self.config.diffusion).kind]
        if kind is not None and kind not in known:
            raise ValueError(f"sampler: {kind!r} is not one of {', '.join(known)}")
        if steps is not None:
            changes["steps"] = _whole("num_inference_steps", steps, 1)
        if guidance is not None and not (isinstance(guidance, Real) and 0 <= guidance < math.inf):
            raise ValueError(f"guidance_scale: {guidance!r} is not a number of 0 or more; 1 is no guidance")
        return SamplerConfig(**{**self.config.sampler, **{k: v for k, v in changes.items() if v is not None}})

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The images' height and width in pixels."""
        size, unit = self.config.image_size, 4 * self.config.downscale
        height = size if height is None else _whole("height", height, 1)
        width = size if width is None else _whole("width", width, 1)
        if height % unit or width % unit:
            raise ValueError(f"height and width: {height}x{width} must be divisible by {unit}")
        return height, width

    def _conditioning(self, given: _Given, each: int, device: torch.device) -> dict[str, Any]:
        """The network's conditioning, ``each`` times for each of the given.

        Each distinct prompt is encoded, and its kernels are computed, only once.
        """
        if self.transformer.config.condition == "class":
            return {"cond": torch.tensor(given, device=device).repeat_interleave(each)}
        numbers = list(range(_count(given)))
        if isinstance(given, TextFeatures):
            features = TextFeatures(*(part.to(device, self.transformer.dtype) for part in given))
        else:
            distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(str, given)))}
            numbers = [distinct[str(prompt)] for prompt in given]
            features = self._encode(list(distinct), device)
        prepared = self._prepared(features)
        if each == 1 and len(features.tokens) == len(numbers):
            return prepared
        rows = torch.tensor(numbers, device=device).repeat_interleave(each)
        return tree_map(lambda values: values[rows], prepared)

    def _null(self, negatives: _Given | None, each: int, device: torch.device) -> dict[str, Any]:
        """The null conditioning: one for all samples, or that of each sample's negative prompt."""
        if self.transformer.config.condition == "class":
            if not self.transformer.config.dropout_prob:
                raise ValueError("guidance_scale: must be 1, since this model has no null class (dropout_prob: 0)")
            return {"cond": torch.full((1,), self.transformer.config.num_classes, device=device)}
        if negatives is None and self.text_encoder is None:
            raise ValueError("negative_prompt_embeds: guidance needs them, since there is no text encoder")
        chosen: _Given = [""] if negatives is None else negatives
        return self._conditioning(chosen, 1 if _count(chosen) == 1 else each, device)

    def _prepared(self, features: TextFeatures) -> dict[str, Any]:
        """Compute everything from the text that is the same at every step.

        An offloaded network is on the device only in its forward pass, which then computes this at each step.
        """
        offloaded = hasattr(self.transformer, "_hf_hook")
        cond = features.tokens if offloaded else self.transformer.text_kernels(features.tokens)
        return {"cond": cond, "pooled": features.pooled} if self.transformer.config.pooled_text else {"cond": cond}

    def _encode(self, texts: list[str], device: torch.device) -> TextFeatures:
        ids = self.tokenizer(
            texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        features = clip_features(self.text_encoder(input_ids=ids.to(device)))
        network = self.transformer.config
        if features.tokens.shape[1:] != (network.text_tokens, network.text_dim):
            raise ValueError(
                f"this network needs {network.text_tokens} tokens of width {network.text_dim}, but the encoder has"
                f" {tuple(features.tokens.shape[1:])}; use dico sample for models of several text encoders"
            )
        return features

    def _images(self, latents: Tensor, output_type: str, kept: Kept | None) -> Any:
        self._check_vae()
        images = torch.cat([self._decode(part) for part in latents.split(DECODE_CHUNK)]).cpu()
        images = keep_pixels(images, kept).float() / 255
        return VaeImageProcessor(do_normalize=False).postprocess(images, output_type)

    def _check_vae(self) -> None:
        if self.vae is None and self.config.downscale != 1:
            raise ValueError("no vae: pass vae=... to from_pretrained, see README.md; output_type='latent' needs none")

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return to_uint8(latents)
        shift, scale = self._shift_and_scale(latents.device)
        return to_uint8(self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample.float())


def _seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[int]:
    """The seed of each image."""
    if seed is not None:
        seeds = check_seeds(_listed(seed))
        if not _is_several(seed):
            seeds = check_seeds(range(seeds[0], seeds[0] + count))
    elif isinstance(generator, Sequence):
        seeds = [_draw(one, 1)[0] for one in generator]
    else:
        seeds = _draw(generator, count)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds or generators for {count} images; give one, or one for each image")
    return seeds


def _count(given: _Given) -> int:
    return len(given.tokens) if isinstance(given, TextFeatures) else len(given)


def _is_several(value: Any) -> bool:
    """Whether a value is a list, or an array with an axis. A text is a single value."""
    return not isinstance(value, str) and hasattr(value, "__iter__") and getattr(value, "ndim", 1) > 0


def _listed(value: Any) -> list[Any]:
    return list(value) if _is_several(value) else [value]


def _texts(name: str, given: Any) -> list[str]:
    """A list of one or more texts. Raises ValueError if it is empty or contains anything else."""
    listed = _listed(given)
    if not listed:
        raise ValueError(f"{name}: the list is empty")
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise ValueError(f"{name}: number {number} is {text!r}, not a text")
        check_text(text, f"{name} {number}")
    return listed


def _whole(name: str, value: Any, least: int) -> int:
    """A whole number from any integer type. Raises ValueError if it is not one, or below ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r} is not a whole number") from None
    if number < least:
        raise ValueError(f"{name}: must be at least {least}, not {number}")
    return number


def _draw(generator: torch.Generator | None, count: int) -> list[int]:
    device = generator.device if generator is not None else "cpu"
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
