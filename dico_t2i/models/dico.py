"""The network: a U-shape of convolutional blocks at three resolutions (paper, section 3)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dico_t2i.config import DiCoConfig
from dico_t2i.models.blocks import (
    Block,
    Conv3x3,
    CrossAttention,
    Downsample,
    Head,
    TextConvolution,
    TextKernel,
    TextProjection,
    Upsample,
)
from dico_t2i.models.conditioning import Text, TextInput, TextSummary, TimestepEmbedding, reachable
from dico_t2i.models.isotropic import PatchHead, PatchStem, Step, in_a_row
from dico_t2i.models.mixers import ACTIVATIONS, ablated_mixer
from dico_t2i.models.network import Network

STAGES = ("encoder1", "encoder2", "middle", "decoder2", "decoder1")

# The text kernels of each stage: one for each block, or a single one that all its blocks share; and the text's summary.
TextKernels = dict[str, tuple[TextKernel, ...]]
SUMMARY = "summary"

# The adaLN inputs, after SiLU, for each width: (N, width).
Conditions = dict[int, Tensor]


class DiCo(Network):
    """DiCo with class labels or text.

    Called as ``model(x, t, cond, pooled=None)``. x is (N, C, H, W), with H and W divisible by 4. t is (N,) in 0..999
    and may be fractional. cond holds class ids (N,), where ``num_classes`` is the null class, or text tokens (N, T,
    text_dim). pooled is (N, pooled_dim) and needed only with ``pooled_text``. The tokens of several encoders follow one
    another, padded with zeros to the width of the widest. In place of tokens, cond may be the result of
    ``text_kernels``, so that many timesteps of one text share that work. Returns (N, C or 2C, H, W) in the weights'
    dtype: the noise and, with ``learn_sigma``, the fraction that interpolates the log variance. A fresh model returns
    0.

    The isotropic layouts run the same stages of blocks one after the other, at one width and half the resolution.
    """

    config: DiCoConfig

    def __init__(self, config: DiCoConfig) -> None:
        super().__init__(config)
        D, isotropic = config.hidden_size, config.layout != "u"
        factors = (1, 1, 1, 1, 1) if isotropic else (1, 2, 4, 2, 2)
        self.widths = {stage: factor * D for stage, factor in zip(STAGES, factors, strict=True)}
        self.stem = (PatchStem if isotropic else Conv3x3)(config.in_channels, D)
        levels = sorted(set(self.widths.values()))  # each width has its own embeddings
        self.time_embeddings = nn.ModuleList(TimestepEmbedding(width) for width in levels)
        self.condition_embeddings = nn.ModuleList(_condition_embedding(config, width) for width in levels)
        self.stages = nn.ModuleDict(
            {
                stage: _stage(config, self.widths[stage], depth)
                for stage, depth in zip(STAGES, config.depths, strict=True)
            }
        )
        self.text_input = _text_input(config)
        self.text_summary = _text_summary(config)
        self.summary_embeddings = nn.ModuleList(
            nn.Linear(config.summary_width, width) for width in levels if self.text_summary is not None
        )
        shared_text = config.condition == "text" and config.text_projection == "stage"
        self.stage_text = nn.ModuleDict(
            {s: TextProjection(config.text_width, self.widths[s]) for s in STAGES} if shared_text else {}
        )
        if isotropic:
            skips = sum(config.depths) // 2 if config.layout == "isotropic_skips" else 0
            self.merges = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(skips))
        else:
            self.down1, self.down2 = Downsample(D), Downsample(2 * D)
            self.up2, self.up1 = Upsample(4 * D), Upsample(2 * D)
            self.merge2, self.merge1 = nn.Linear(4 * D, 2 * D), nn.Linear(2 * D, 2 * D)
        self.head = (PatchHead if isotropic else Head)(self.widths["decoder1"], config.out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights as the release does (paper, appendix): mostly Xavier, with exceptions by name."""
        small: tuple[str, ...] = ("condition_embeddings",)
        if self.config.time_init == "small":
            small += ("time_embeddings",)
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "log_temperature")) or _starts_at_zero(name):
                nn.init.zeros_(parameter)
            elif name.startswith(small):
                nn.init.normal_(parameter, std=0.02)
            elif name == "stem.weight":
                nn.init.xavier_uniform_(parameter.view(len(parameter), -1))  # bounds of a (D, 9C) matrix
            else:
                nn.init.xavier_uniform_(parameter)
        if self.text_input is not None and self.text_input.pooling is not None:
            self.text_input.pooling.reset_position()
        if self.text_summary is not None:
            self.text_summary.reset_query()

    def text_kernels(self, tokens: Tensor) -> TextKernels:
        """The kernels of every block, which depend only on the tokens."""
        super().text_kernels(tokens)
        prepared = cast(Text, self._text(tokens))
        summary = self._summary(prepared)
        kernels: TextKernels = {} if summary is None else {SUMMARY: (TextKernel(summary),)}
        for stage in STAGES:
            text = self.stage_text[stage](prepared) if stage in self.stage_text else prepared
            branches = [cast(Block, block).text for block in self._blocks(stage)]
            kernels[stage] = tuple(
                cast(TextConvolution, b).kernel(text) for b in branches[: 1 if self.stage_text else None]
            )
        return kernels

    def residual_blocks(self) -> Iterator[nn.Module]:
        return (block for stage in STAGES for block in self._blocks(stage))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | TextKernels, pooled: Tensor | None = None) -> Tensor:
        text = self._text(cond)
        c = self._conditions(t, cond, pooled, self._summary(text))
        x = self.stem(x.to(self.stem.weight.dtype).permute(0, 2, 3, 1))
        x = (self._u_shape if self.config.layout == "u" else self._isotropic)(x, c, text)
        return self.head(x, c[self.widths["decoder1"]]).permute(0, 3, 1, 2)

    def _u_shape(self, x: Tensor, c: Conditions, text: Text | TextKernels | None) -> Tensor:
        skip1 = self._run("encoder1", x, c, text)
        skip2 = self._run("encoder2", self.down1(skip1), c, text)
        x = self._run("middle", self.down2(skip2), c, text)
        x = self._run("decoder2", self.merge2(torch.cat((self.up2(x), skip2), dim=-1)), c, text)
        return self._run("decoder1", self.merge1(torch.cat((self.up1(x), skip1), dim=-1)), c, text)

    def _isotropic(self, x: Tensor, c: Conditions, text: Text | TextKernels | None) -> Tensor:
        steps = [step for stage in STAGES for step in self._steps(stage, c, text, x.shape[1:3])]
        return in_a_row(x, steps, self.merges)

    def _text(self, cond: Tensor | TextKernels) -> Text | TextKernels | None:
        """The part of the condition that the stages receive: text, or None with class labels."""
        if self.config.condition == "class":
            return None
        return cond if self.text_input is None or isinstance(cond, dict) else self.text_input(cond)

    def _summary(self, text: Text | TextKernels | None) -> Tensor | None:
        """The summary (N, width) of what ``_text`` returned, or None if the network makes none."""
        if self.text_summary is None:
            return None
        return text[SUMMARY][0].value if isinstance(text, dict) else self.text_summary(text)

    def _conditions(
        self, t: Tensor, cond: Tensor | TextKernels, pooled: Tensor | None, summary: Tensor | None
    ) -> Conditions:
        """The adaLN inputs, after SiLU, for each width."""
        source = cond if self.config.condition == "class" else pooled
        if self.config.pooled_text and pooled is None:
            raise ValueError("this model also needs the pooled text (pooled_text): pass pooled=(N, pooled_dim)")
        conditions = {}
        for level, (time, embedding) in enumerate(zip(self.time_embeddings, self.condition_embeddings, strict=True)):
            embedded = time(t)
            if not isinstance(embedding, nn.Identity):
                embedded = embedded + embedding(source)
            if summary is not None:
                embedded = embedded + self.summary_embeddings[level](summary)
            conditions[embedded.shape[1]] = F.silu(embedded)
        return conditions

    def _run(self, stage: str, x: Tensor, c: Conditions, text: Text | TextKernels | None) -> Tensor:
        for step in self._steps(stage, c, text, x.shape[1:3]):
            x = step(x)
        return x

    def _steps(self, stage: str, c: Conditions, text: Text | TextKernels | None, size: Sequence[int]) -> Iterator[Step]:
        """The blocks of a stage, each bound to all its inputs except x, which has ``size`` (H, W)."""
        texts: tuple[Text | TextKernel | None, ...]
        if isinstance(text, dict):
            texts = text[stage]
        elif text is not None and stage in self.stage_text:
            texts = (self.stage_text[stage](reachable(text, self.config.text_kernel, size)),)
        else:
            texts = (text,)
        recompute = self.training and stage in self.config.checkpoint_stages
        for block, each in zip(self._blocks(stage), cycle(texts), strict=False):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            yield partial(_apply, run, c[self.widths[stage]], each)

    def _blocks(self, stage: str) -> nn.ModuleList:
        return cast(nn.ModuleList, self.stages[stage])


def _condition_embedding(config: DiCoConfig, width: int) -> nn.Module:
    if config.condition == "class":
        return nn.Embedding(config.num_classes + (config.dropout_prob > 0), width)
    if config.pooled_text:
        return nn.Linear(config.pooled_dim, width)
    return nn.Identity()


def _stage(config: DiCoConfig, width: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(
        Block(
            width,
            config.mlp_ratio,
            _text_branch(config, width),
            ablated_mixer(config, width, number),
            ACTIVATIONS[config.activation],
        )
        for number in range(depth)
    )


def _apply(block: Callable[..., Tensor], condition: Tensor, text: Text | TextKernel | None, x: Tensor) -> Tensor:
    return block(x, condition, text)


def _text_branch(config: DiCoConfig, width: int) -> nn.Module | None:
    if config.condition == "class":
        return None
    if config.text_fusion == "cross_attention":
        return CrossAttention(config.text_width, width, config.text_mask)
    projection = TextProjection(config.text_width, width) if config.text_projection == "block" else None
    return TextConvolution(projection, config.text_kernel)


def _text_input(config: DiCoConfig) -> TextInput | None:
    """The layer before the blocks, or None where they take the tokens of one encoder unchanged."""
    taps = config.text_kernel**2 if config.text_pooling == "attention" else None
    if config.condition == "class" or not (config.text_inputs or config.text_layers or taps):
        return None
    sizes = config.text_inputs or ((config.text_tokens, config.text_dim),)
    width = config.text_width if config.text_inputs else None
    return TextInput(sizes, width, config.text_layers, taps, config.text_mask)


def _text_summary(config: DiCoConfig) -> TextSummary | None:
    if config.condition == "class" or not config.text_summary:
        return None
    return TextSummary(config.text_width, config.text_summary, config.summary_width, config.text_mask)


def _starts_at_zero(name: str) -> bool:
    """Whether a parameter starts at zero: adaLN, the head, and the last layer of every text branch.

    The blocks of a fresh model are then the identity, and its output is 0.
    """
    parts = name.split(".")
    text = "text" in parts or "stage_text" in parts
    return "modulation" in parts or parts[0] == "head" or (text and parts[-2] == "out")
