"""Writes the model card of an exported folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dico_t2i.config import (
    Config,
    DiCoConfig,
    DiffusionConfig,
    NetworkConfig,
    PatchConfig,
    Span,
    TextEncoderConfig,
    TextTowerConfig,
    TransformerConfig,
    ablated,
)
from dico_t2i.models import count_parameters
from dico_t2i.runs.evaluations import doubts, measured, protocol_name, shown_numbers
from dico_t2i.runs.lineage import KEY as LINEAGE
from dico_t2i.runs.lineage import Lineage, lineage_table


def model_card(
    config: Config,
    origin: Mapping[str, Any],
    metrics: Mapping[str, Any],
    parts: Sequence[str],
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of README.md: use, network, data, training, lineage, last numbers, evaluations, limits.

    origin: the content of export.json. metrics: a line of metrics.jsonl, or empty. parts: the encoders that are in the
    folder. evaluations: the results of these weights.
    """
    task = "text-to-image" if config.model.condition == "text" else "unconditional-image-generation"
    sections = {
        "Use": _usage(config, parts),
        "Network": _table(_network(config)),
        "Data": _table(_data(config)),
        "Training": _table(_training(config, origin)),
        **({"Lineage": _lineage(origin[LINEAGE])} if origin.get(LINEAGE) else {}),
        "Numbers at export": _numbers(metrics),
        **({"Evaluations": "\n\n".join(map(_evaluation, evaluations))} if evaluations else {}),
        "Limits": "\n".join(f"- {line}" for line in _limits(config, parts, evaluations)),
    }
    ours = isinstance(config.model, DiCoConfig)
    library = "diffusers" if ours else "dico_t2i"
    head = (
        f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags: [{config.model.kind}]\n---\n\n# {config.name}\n\n"
    )
    what = "DiCo, a purely convolutional diffusion model (arXiv 2505.11196)" if ours else "peer of DiCo"
    intro = f"A {what}, written by `dico export` of dico_t2i.\n"
    return head + intro + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def one_clip(encoder: TextEncoderConfig) -> bool:
    """Whether the exported pipeline supports the text encoder, that is, whether it is a single CLIP."""
    return encoder.kind in ("transformers", "open_clip") and not encoder.also


def _usage(config: Config, parts: Sequence[str]) -> str:
    if not isinstance(config.model, DiCoConfig):
        return f"`dico sample --checkpoint FOLDER`. {_sampler(config)} There is no diffusers pipeline for it."
    text = config.model.condition == "text"
    if text and not one_clip(config.text_encoder):
        return (
            f"`dico sample --checkpoint FOLDER`. {_sampler(config)} The diffusers pipeline supports only a single CLIP."
        )
    passed, lines = "", []
    if config.autoencoder.kind == "tiny" and config.model.in_channels > 16:
        return f"`dico sample --checkpoint FOLDER`. {_sampler(config)} diffusers has no class for this autoencoder."
    if config.autoencoder.kind != "pixels" and "vae" not in parts:
        name = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}[config.autoencoder.kind]
        lines.append(f'vae = diffusers.{name}.from_pretrained("{config.autoencoder.path}")')
        passed += ", vae=vae"
    if text and "text_encoder" not in parts:
        source = config.text_encoder.model
        lines.append(f'text = transformers.CLIPTextModelWithProjection.from_pretrained("{source}")')
        lines.append(f'tokenizer = transformers.CLIPTokenizer.from_pretrained("{source}")')
        passed += ", text_encoder=text, tokenizer=tokenizer"
    what = '"a red bus"' if text else "class_labels=[0, 1]"
    code = [
        "import diffusers",
        *(["import transformers"] if "text_encoder=" in passed else []),
        "",
        *lines,
        f"pipeline = diffusers.DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True{passed})",
        f"image = pipeline({what}, seed=0).images[0]",
    ]
    return "\n".join(["```python", *code, "```", "", f"or `dico sample --checkpoint FOLDER`. {_sampler(config)}"])


def _sampler(config: Config) -> str:
    sampler = config.sampler
    return f"Defaults: {sampler.kind}, {sampler.steps} steps, guidance {sampler.guidance:g}."


def _network(config: Config) -> dict[str, Any]:
    model = config.model
    rows: dict[str, Any] = {
        "parameters": f"{count_parameters(model):,}",
        **_dimensions(model),
        "latents": f"{model.in_channels} channels, {config.latent_size} x {config.latent_size}",
        "autoencoder": f"{config.autoencoder.kind}, {Path(config.autoencoder.path).name}"
        if config.autoencoder.kind != "pixels"
        else "none (pixels)",
    }
    if model.condition == "text":
        fusion = model.text_fusion if isinstance(model, DiCoConfig) else model.kind
        rows["text"] = f"{fusion}{', with the pooled text' if model.pooled_text else ''}"
        rows["text encoder"] = " + ".join(map(_text_tower, config.text_encoder.towers))
    else:
        rows["classes"] = model.num_classes
    return rows


def _dimensions(model: NetworkConfig) -> dict[str, str]:
    if isinstance(model, DiCoConfig):
        switches = {key.replace("_", " "): str(value) for key, value in ablated(model).items()}
        sizes = f"{model.hidden_size}, {list(model.depths)}, {model.mlp_ratio:g}"
        return {"width, depths, FFN ratio": sizes, **switches}
    assert isinstance(model, PatchConfig)
    heads = {"heads": model.num_heads} if isinstance(model, TransformerConfig) else {}
    dimensions = {"width": model.hidden_size, "blocks": model.depth, **heads, "patch": model.patch_size}
    return {"kind": model.kind, ", ".join(dimensions): ", ".join(map(str, dimensions.values()))}


def _text_tower(encoder: TextTowerConfig) -> str:
    if encoder.weights == "seeded":
        size = encoder.seeded
        return f"random (seeded), width {size.width}, {size.layers} layers, seed {size.seed}"
    pretrained = f" {Path(encoder.pretrained).name}" if encoder.kind == "open_clip" else ""
    return f"{Path(encoder.model).name}{pretrained} ({encoder.kind})"


def _data(config: Config) -> dict[str, Any]:
    data = config.data
    return {
        "set": ", ".join(Path(path).name for path in data.paths),
        "size": f"{data.image_size} pixels, {data.crop}",
        "flips": "yes" if data.flip else "no",
    }


def _training(config: Config, origin: Mapping[str, Any]) -> dict[str, Any]:
    optimizer, train = config.optimizer, config.train
    steps = f"{origin['step']:,} of {_span(train.duration)}" if "step" in origin else _span(train.duration)
    if train.duration.steps is not None and origin.get("step", 0) > train.duration.steps:
        steps = f"{origin['step']:,}; the config's duration was set to {_span(train.duration)} afterwards"
    return {
        "steps": steps,
        "batch": train.global_batch,
        **({"images seen": f"{origin['images']:,}"} if "images" in origin else {}),
        "weights": origin["weights"],
        "diffusion": _diffusion(config.diffusion, config.model.learn_sigma),
        "AdamW": f"lr {optimizer.lr:g} {optimizer.schedule}, betas {list(optimizer.betas)},"
        f" weight decay {optimizer.weight_decay:g}, clip {optimizer.clip:g}",
        "precision": train.precision,
        "condition dropped": config.model.dropout_prob,
        **({"noise on text features": config.text_encoder.noise} if config.text_encoder.noise else {}),
    }


def _lineage(lineage: Lineage) -> str:
    """The sources of the weights, the oldest first."""
    rows = [["what", "from", "step", "sha256"], ["---"] * 4, *lineage_table(lineage)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _diffusion(diffusion: DiffusionConfig, learn_sigma: bool) -> str:
    if diffusion.kind == "flow":
        return f"rectified flow, {diffusion.timesteps} times, predicts velocity"
    variance = ", learned variance" if learn_sigma else ""
    return f"{diffusion.steps} steps, {diffusion.schedule}, predicts {diffusion.prediction}{variance}"


def _span(span: Span) -> str:
    ((unit, value),) = span.model_dump(exclude_none=True).items()
    return f"{value:,} {unit}"


def _numbers(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "The run has no report of this step."
    wanted = ("loss", "mse", "vb", "grad_norm", "images_per_s", "skipped_steps", "bad_samples")
    shown = {key: f"{metrics[key]:.5g}" for key in wanted if key in metrics}
    return f"The run's last report, of step {metrics['step']:,} (means since the report before it):\n\n{_table(shown)}"


def _evaluation(result: Mapping[str, Any]) -> str:
    """The numbers of one protocol, after the reasons why they are not comparable, if any."""
    why = "; ".join(doubts(result))
    said = f"`{protocol_name(result)}`, {result.get('images', '?')} images"
    note = f". **Not comparable**: {why}" if why else ""
    return f"{said}{note}\n\n{_table({name: measured(result, name) for name in shown_numbers(result)})}"


def _limits(config: Config, parts: Sequence[str], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    size = config.data.image_size
    lines = []
    if config.model.condition == "text" and any(tower.weights == "seeded" for tower in config.text_encoder.towers):
        lines.append(
            "**The text encoder is random and untrained (seeded)**: words that it was not trained with mean nothing."
        )
    if config.model.condition == "text":
        counts = " and ".join(str(tower.tokens) for tower in config.text_encoder.towers)
        lines.append(f"Prompts are cut to {counts} tokens.")
        if config.text_encoder.kind == "open_clip":
            lines.append(
                "Trained with open_clip's tokenizer, which pads with 0; transformers' tokenizer pads differently."
            )
    lines += [
        f"Trained at {size} x {size} pixels; other sizes run, but were not evaluated.",
        *(
            []
            if evaluations
            else ["No quality measure (FID or other) is part of this export; the numbers above are training losses."]
        ),
        "There is no content filter. The model reproduces what its training data show, including their biases.",
    ]
    if config.autoencoder.kind != "pixels" and "vae" not in parts:
        lines.append("The autoencoder is not in this folder.")
    return lines


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])
