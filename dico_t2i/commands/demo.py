"""Serves a web page for trying one checkpoint, or two side by side. Needs gradio (pip install 'dico_t2i[demo]')."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image, ImageChops
from torch import Tensor

from dico_t2i.config import Config, SamplerConfig, dump_config
from dico_t2i.sampling.images import to_pil
from dico_t2i.sampling.labels import conditions_of
from dico_t2i.sampling.options import Options
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
    sampler: SamplerConfig
    options: Options


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
    return pipeline.generate(
        settings.conditions, settings.seeds, settings.sampler, progress=progress, options=settings.options
    )


def read_conditions(text: str, pipeline: Pipeline) -> list[str | int]:
    """The conditions of a text with a prompt, or the number or ImageNet name of a class, on each line.

    Raises ValueError for classes that the model does not have.
    """
    lines: list[str | int] = [line.strip() for line in split_lines(text) if line.strip()]
    if not lines:
        raise ValueError("Write one or several prompts, one on each line.")
    return conditions_of(lines, pipeline.config.model)


def read_settings(
    pipeline: Pipeline,
    text: str,
    seed: float,
    each: float,
    height: float,
    width: float,
    kind: str,
    steps: float,
    guidance: float,
    negative_prompt: str = "",
    drawing: Mapping[str, Any] | None = None,
    strength: float | None = None,
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
    image, mask = read_drawing(drawing)
    options = Options(
        negative_prompt.strip() or None, int(height), int(width), image, None if image is None else strength, mask
    )
    pipeline.check(options, sampler)
    return Settings(tuple(conditions), tuple(seeds), sampler, options)


def read_drawing(drawing: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The image of the editor, and a mask that is white where it was painted; None for what is missing."""
    image = drawing["background"] if drawing else None
    if drawing is None or image is None:
        return None, None
    mask = Image.new("L", image.size)
    for layer in drawing["layers"] or ():
        painted = layer.getchannel("A").point(lambda alpha: 255 if alpha else 0)
        mask = ImageChops.lighter(mask, painted.resize(image.size, Image.Resampling.NEAREST))
    return image, mask if mask.getbbox() else None


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
    prompts = gr.Textbox(
        label="Prompts, one on each line" if text else "Classes, one on each line: a number or an ImageNet name",
        value="\n".join(config.preview.prompts[:2]) if text else "207\n360",
        lines=3,
        elem_id="prompts",
    )
    seed = gr.Number(label="Seed of the first image", value=0, precision=0, minimum=0, elem_id="seed")
    each = gr.Slider(1, 16, 1, step=1, label="Images of each", elem_id="each")
    with gr.Row(elem_id="size"):
        sides = [_side(config, name) for name in ("height", "width")]
    sampler = gr.Dropdown(
        list(get_args(SamplerConfig.model_fields["kind"].annotation)),
        value=config.sampler.kind,
        label="Sampler",
        elem_id="sampler",
    )
    steps = gr.Slider(1, 250, config.sampler.steps, step=1, label="Steps", elem_id="steps")
    guidance = gr.Slider(0, 15, config.sampler.guidance, step=0.1, label="Guidance (1 is none)", elem_id="guidance")
    negative = gr.Textbox(label="Negative prompt", elem_id="negative", visible=text)
    with gr.Accordion("Begin with an image", open=False):
        gr.Markdown("Paint over what is made anew. Without paint, all of the image changes.")
        drawing = gr.ImageMask(type="pil", show_label=False, elem_id="drawing")
        strength = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength (1 begins with noise alone)", elem_id="strength")
    return [prompts, seed, each, *sides, sampler, steps, guidance, negative, drawing, strength]


def _side(config: Config, name: str) -> Any:
    """A slider for the height or the width of the images."""
    import gradio as gr

    unit, size = config.model.latent_divisor * config.downscale, config.data.image_size
    return gr.Slider(
        unit,
        4 * size,
        size,
        step=unit,
        label=f"{name.title()}, pixels (trained at {size})",
        elem_id=name,
        min_width=120,
    )


def _gallery(name: str, number: int) -> Any:
    import gradio as gr

    return gr.Gallery(label=name, format="png", columns=2, height="auto", elem_id=f"gallery-{number}", min_width=240)


def _handler(pipelines: dict[str, Pipeline]) -> Callable[..., Iterator[Any]]:
    """A handler that samples one checkpoint after the other, and shows each result as soon as it is done.

    Galleries without news are skipped: gradio would write their files again while the browser reads them.
    """
    import gradio as gr

    # gradio recognises the progress bar by this default value.
    def run(*fields: Any, progress: Any = gr.Progress()) -> Iterator[Any]:  # noqa: B008
        yield _one_or_all([[] for _ in pipelines])
        for number, (name, pipeline) in enumerate(pipelines.items()):
            try:
                settings = read_settings(pipeline, *fields)
                images = generate(pipeline, settings, partial(_tell, progress, name))
            except ValueError as error:
                raise gr.Error(str(error)) from None
            news = [gr.skip() for _ in pipelines]
            news[number] = _captioned(images, settings, name)
            yield _one_or_all(news)

    return run


def _tell(progress: Any, name: str, done: int, total: int) -> None:
    progress((done, total), desc=name, unit="steps")


def _one_or_all(values: list[Any]) -> Any:
    """The value in the form that gradio expects for one output, or for several."""
    return values[0] if len(values) == 1 else tuple(values)


def _captioned(images: Tensor, settings: Settings, checkpoint: str) -> list[tuple[Image.Image, str]]:
    """Images with captions for the gallery; prompt, seed and checkpoint are also stored in the PNG.

    The checkpoint makes equal pictures of two checkpoints two files, which gradio names by their content.
    """
    found = []
    for image, condition, seed in zip(images, settings.conditions, settings.seeds, strict=True):
        picture = to_pil(image)
        picture.info = {"prompt": str(condition), "seed": str(seed), "checkpoint": checkpoint}
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
