"""CLIP's text tower (Radford et al., arXiv 2103.00020, section 2.4), with the weights' names of transformers.

It computes what ``CLIPTextModel`` of transformers does, with the same operations, so to the bit. A rank that imports
that class also imports torch's compiler, torchvision and scipy: two thousand modules, 300 MB and twice the time to the
first step. Exported folders still have the class of transformers (``as_transformers``).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 77
VOCABULARY = 49408
START, END = VOCABULARY - 2, VOCABULARY - 1


@dataclass(frozen=True)
class ClipSettings:
    """The part of a ``config.json`` that describes the tower, with the defaults of transformers."""

    vocab_size: int = VOCABULARY
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = TOKENS
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = START
    eos_token_id: int = END
    pad_token_id: int = 1

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "ClipSettings":
        """The settings in the config of a whole CLIP, or of its text tower alone."""
        text = {**settings, **settings.get("text_config", {})}
        return cls(**{field.name: text[field.name] for field in fields(cls) if field.name in text})


class ClipTextTower(nn.Module):
    """Token ids (N, 77) -> features of all tokens (N, 77, width), and the feature at the end token (N, pooled)."""

    def __init__(self, settings: ClipSettings, projected: bool) -> None:
        """projected: whether the pooled feature is projected. Raises ValueError for an activation that CLIP lacks."""
        super().__init__()
        if settings.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act: {settings.hidden_act!r} is none of CLIP's: {', '.join(_ACTIVATIONS)}")
        self.settings = settings
        self.embeddings, self.encoder = _Embeddings(settings), _Encoder(settings)
        self.final_layer_norm = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        projection = nn.Linear(settings.hidden_size, settings.projection_dim, bias=False) if projected else None
        self.text_projection = projection

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(self.embeddings(ids))
        x = self.final_layer_norm(x)
        pooled = x[torch.arange(len(x), device=x.device), (ids == END).int().argmax(dim=-1)]
        return x, pooled if self.text_projection is None else self.text_projection(pooled)

    def as_transformers(self) -> Any:
        """The same tower as a model of transformers."""
        import transformers

        config = transformers.CLIPTextConfig(**asdict(self.settings))
        state = self.state_dict()
        if self.text_projection is None:
            model = transformers.CLIPTextModel(config)
        else:
            model = transformers.CLIPTextModelWithProjection(config)
            state = {name if name in model.state_dict() else f"text_model.{name}": w for name, w in state.items()}
        model.to(self.final_layer_norm.weight.dtype).load_state_dict(state)
        return model.eval()


class _Embeddings(nn.Module):
    def __init__(self, settings: ClipSettings) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.position_embedding = nn.Embedding(settings.max_position_embeddings, settings.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class _Encoder(nn.Module):
    def __init__(self, settings: ClipSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Layer(nn.Module):
    """Attention and a feed-forward, each after a norm and added to its input."""

    def __init__(self, settings: ClipSettings) -> None:
        super().__init__()
        width, eps = settings.hidden_size, settings.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = _Attention(width, settings.num_attention_heads)
        self.mlp = _FeedForward(width, settings.intermediate_size, settings.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    """Attention of each token to itself and to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}
