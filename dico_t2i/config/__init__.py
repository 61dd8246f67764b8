"""The typed config tree. One object, ``Config``, describes a run and is checked as a whole before anything starts."""

from dico_t2i.config.adapter import AdapterConfig
from dico_t2i.config.base import ConfigError, NonNegative, Positive, Section, Span
from dico_t2i.config.cluster import ClusterConfig, HardwareConfig, ReliabilityConfig
from dico_t2i.config.data import CacheConfig, DataConfig
from dico_t2i.config.encoders import (
    MEASURED,
    AutoencoderConfig,
    SeededTower,
    TextEncoderConfig,
    TextTowerConfig,
    VisionEncoderConfig,
)
from dico_t2i.config.load import (
    dump_config,
    flatten,
    load_config,
    load_section,
    parse_config,
    parse_section,
    read_cluster,
)
from dico_t2i.config.networks import (
    DIT_VARIANTS,
    NETWORKS,
    UVIT_VARIANTS,
    VARIANTS,
    DiCoConfig,
    DiTConfig,
    MMDiTConfig,
    NetworkConfig,
    PatchConfig,
    PixArtConfig,
    SizedConfig,
    TransformerConfig,
    UViTConfig,
    ablated,
)
from dico_t2i.config.process import SAMPLER_NAMES, SAMPLERS, DiffusionConfig, SamplerConfig, check_sampler
from dico_t2i.config.training import GuardConfig, InitConfig, OptimizerConfig, ProfileConfig, TrainConfig
from dico_t2i.config.tree import Config
from dico_t2i.config.yaml12 import AnyText, Text, read_yaml

__all__ = [
    "DIT_VARIANTS",
    "MEASURED",
    "NETWORKS",
    "SAMPLERS",
    "SAMPLER_NAMES",
    "UVIT_VARIANTS",
    "VARIANTS",
    "AdapterConfig",
    "AnyText",
    "AutoencoderConfig",
    "CacheConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiCoConfig",
    "DiTConfig",
    "DiffusionConfig",
    "GuardConfig",
    "HardwareConfig",
    "InitConfig",
    "MMDiTConfig",
    "NetworkConfig",
    "NonNegative",
    "OptimizerConfig",
    "PatchConfig",
    "PixArtConfig",
    "Positive",
    "ProfileConfig",
    "ReliabilityConfig",
    "SamplerConfig",
    "Section",
    "SeededTower",
    "SizedConfig",
    "Span",
    "Text",
    "TextEncoderConfig",
    "TextTowerConfig",
    "TrainConfig",
    "TransformerConfig",
    "UViTConfig",
    "VisionEncoderConfig",
    "ablated",
    "check_sampler",
    "dump_config",
    "flatten",
    "load_config",
    "load_section",
    "parse_config",
    "parse_section",
    "read_cluster",
    "read_yaml",
]
