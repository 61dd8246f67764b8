"""Serves a web page for trying one checkpoint, or two side by side. Needs gradio (pip install 'dico_t2i[demo]')."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image
from torch import Tensor

from dico_t2i.config import SamplerConfig, dump_config, parse_config
from dico_t2i.sampling.labels import CLASSES, class_number
from dico_t2i.sampling.pipeline import Pipeline, load_pipeline
from dico_t2i.text_lines import split_lines

if TYPE_CHECKING:
    import gradio

MAX_IMAGES = 64  # most images of one click
_WAITING = 16  # most clicks in the queue
_KEPT_S = 24 * 3600  # how long images are kept on the server's disk

# The page must not load anything from other hosts, whatever the version of gradio tries.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)


@dataclass(frozen=True)
class Settings:
    """The settings of one click."""

    conditions: tuple[str | int, ...]  # one for each image
    seeds: tuple[int, ...]
    size: int  # pixels
    sampler: SamplerConfig


def check_gradio() -> None:
    """Raise ValueError, before anything is loaded, if gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the package gradio is not installed; pip install 'dico_t2i[demo]'")


def serve(
    checkpoints: Sequence[Path], weights: str | None, device: torch.device, dtype: torch.dtype, host: str, port: int
) -> None:
    """Load the checkpoints and serve the page until interrupted. Raises ValueError that says what to correct."""
    check_gradio()
    names = [path.name for path in checkpoints]
    if len(set(names)) < len(names):
        names = [str(path) for path in checkpoints]
    loaded = [load_pipeline(path, weights, device, dtype) for path in checkpoints]
    pipelines = dict(zip(names, loaded, strict=True))
    kinds = {pipeline.config.model.condition for pipeline in pipelines.values()}
    if len(kinds) > 1:
        raise ValueError("--compare: one checkpoint takes text and the other classes; give two of the same kind")
    launch(build(pipelines), host, port)


def launch(page: "gradio.Blocks", host: str, port: int) -> None:
    """Serve until interrupted. Raises ValueError if the port is taken."""
    from starlette.middleware import Middleware

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
            theme=_theme(),
            app_kwargs={"middleware": [Middleware(_OnlyThisHost)]},
        )
    except OSError as error:
        raise ValueError(f"--port {port}: {error}") from None
    print(f"demo: http://{host}:{port}", flush=True)
    page.block_thread()


def generate(pipeline: Pipeline, settings: Settings, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Images (N, 3, H, W) uint8, equal to those of ``dico sample`` for the same prompts and seeds."""
    return resized(pipeline, settings.size).generate(
        settings.conditions, settings.seeds, settings.sampler, progress=progress
    )


def resized(pipeline: Pipeline, size: int) -> Pipeline:
    """The same weights for images of ``size`` pixels; a convolutional network takes all sizes that it can halve twice.

    Raises ConfigError for a size that does not fit.
    """
    config = pipeline.config
    if size == config.data.image_size:
        return pipeline
    tree = config.model_dump(mode="json", exclude_none=True)
    tree["data"]["image_size"] = size
    return replace(pipeline, config=parse_config(tree, "image size"))


def read_conditions(text: str, pipeline: Pipeline) -> list[str | int]:
    """The conditions of a text with a prompt, or the number or ImageNet name of a class, on each line.

    Raises ValueError for classes that the model does not have.
    """
    lines = [line.strip() for line in split_lines(text) if line.strip()]
    if not lines:
        raise ValueError("Write one or several prompts, one on each line.")
    model = pipeline.config.model
    if model.condition == "text":
        return list(lines)
    if model.num_classes != CLASSES and not all(line.isdecimal() for line in lines):
        raise ValueError(f"This model has {model.num_classes} classes, which are not ImageNet's: give numbers.")
    numbers = [class_number(line) for line in lines]
    beyond = [number for number in numbers if number >= model.num_classes]
    if beyond:
        raise ValueError(f"class {beyond[0]}: this model has the classes 0 to {model.num_classes - 1}.")
    return list(numbers)


def read_settings(
    pipeline: Pipeline, text: str, seed: float, each: float, size: float, kind: str, steps: float, guidance: float
) -> Settings:
    """The settings in the fields of the page. Raises ValueError with a message for the page."""
    conditions = [condition for condition in read_conditions(text, pipeline) for _ in range(int(each))]
    if len(conditions) > MAX_IMAGES:
        raise ValueError(f"{len(conditions)} images are too many for one click; the limit is {MAX_IMAGES}.")
    if seed is None or seed < 0:
        raise ValueError("The seed must be 0 or more.")
    changes = {"kind": kind, "steps": int(steps), "guidance": float(guidance)}
    sampler = SamplerConfig.model_validate({**pipeline.config.sampler.model_dump(), **changes})
    seeds = range(int(seed), int(seed) + len(conditions))
    resized(pipeline, int(size))
    return Settings(tuple(conditions), tuple(seeds), int(size), sampler)


def build(pipelines: dict[str, Pipeline]) -> "gradio.Blocks":
    """The page, with settings on the left and a gallery for each checkpoint on the right."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    import gradio as gr

    with gr.Blocks(title="DiCo", analytics_enabled=False, delete_cache=(3600, _KEPT_S)) as page:
        gr.Markdown(f"# DiCo\n{', '.join(f'`{name}`' for name in pipelines)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = _fields(next(iter(pipelines.values())))
                with gr.Row():
                    button = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
            with gr.Column(scale=3), gr.Row():
                galleries = [_gallery(name, number) for number, name in enumerate(pipelines)]
        with gr.Accordion("Configs", open=False), gr.Row():
            for name, pipeline in pipelines.items():
                gr.Code(dump_config(pipeline.config), language="yaml", label=name, max_lines=30)
        work = button.click(_handler(pipelines), fields, galleries, concurrency_limit=1, api_name="generate")
        stop.click(None, cancels=[work])
    return page.queue(max_size=_WAITING)


def _fields(pipeline: Pipeline) -> list[Any]:
    """The fields of the page, in the order of the arguments of ``read_settings``."""
    import gradio as gr

    config = pipeline.config
    text = config.model.condition == "text"
    unit = 4 if config.autoencoder.kind == "pixels" else 32
    size = config.data.image_size
    return [
        gr.Textbox(
            label="Prompts, one on each line" if text else "Classes, one on each line: a number or an ImageNet name",
            value="\n".join(config.preview.prompts[:2]) if text else "207\n360",
            lines=3,
            elem_id="prompts",
        ),
        gr.Number(label="Seed of the first image", value=0, precision=0, minimum=0, elem_id="seed"),
        gr.Slider(1, 16, 1, step=1, label="Images of each", elem_id="each"),
        gr.Slider(unit, 4 * size, size, step=unit, label=f"Image size, pixels (trained at {size})", elem_id="size"),
        gr.Dropdown(
            list(get_args(SamplerConfig.model_fields["kind"].annotation)),
            value=config.sampler.kind,
            label="Sampler",
            elem_id="sampler",
        ),
        gr.Slider(1, 250, config.sampler.steps, step=1, label="Steps", elem_id="steps"),
        gr.Slider(0, 15, config.sampler.guidance, step=0.1, label="Guidance (1 is none)", elem_id="guidance"),
    ]


def _gallery(name: str, number: int) -> Any:
    import gradio as gr

    return gr.Gallery(label=name, format="png", columns=2, height="auto", elem_id=f"gallery-{number}", min_width=240)


def _handler(pipelines: dict[str, Pipeline]) -> Callable[..., Iterator[Any]]:
    """A handler that samples one checkpoint after the other, and shows each result as soon as it is done."""
    import gradio as gr

    # gradio recognises the progress bar by this default value.
    def run(*fields: Any, progress: Any = gr.Progress()) -> Iterator[Any]:  # noqa: B008
        shown: list[Any] = [[] for _ in pipelines]
        yield _one_or_all(shown)
        for number, (name, pipeline) in enumerate(pipelines.items()):
            try:
                settings = read_settings(pipeline, *fields)
                images = generate(pipeline, settings, partial(_tell, progress, name))
            except ValueError as error:
                raise gr.Error(str(error)) from None
            shown[number] = _captioned(images, settings)
            yield _one_or_all(shown)

    return run


def _tell(progress: Any, name: str, done: int, total: int) -> None:
    progress((done, total), desc=name, unit="steps")


def _one_or_all(values: list[Any]) -> Any:
    """The value in the form that gradio expects for one output, or for several."""
    return values[0] if len(values) == 1 else tuple(values)


def _captioned(images: Tensor, settings: Settings) -> list[tuple[Image.Image, str]]:
    """Images with captions for the gallery; prompt and seed are also stored in the PNG."""
    found = []
    for image, condition, seed in zip(images, settings.conditions, settings.seeds, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.info = {"prompt": str(condition), "seed": str(seed)}
        found.append((picture, f"seed {seed} · {condition}"))
    return found


def _theme() -> Any:
    """gradio's default theme, with fonts of the reader's system."""
    import gradio as gr

    fonts = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
    return gr.themes.Default(font=list(fonts), font_mono=["ui-monospace", "monospace"])


class _OnlyThisHost:
    """Adds the content security policy to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)
