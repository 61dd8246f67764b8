"""The network as a model of diffusers."""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin

from dico_t2i.config import DiCoConfig
from dico_t2i.models.dico import DiCo


class DiCoTransformer(DiCo, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """``DiCo`` with the same parameters under the same names. network: the fields of ``DiCoConfig``.

    With peft installed, ``load_lora_adapter`` and its companions of diffusers work, too.
    """

    @register_to_config
    def __init__(self, network: dict[str, Any]) -> None:
        super().__init__(DiCoConfig(**network))

    @property  # type: ignore[override]
    def config(self) -> DiCoConfig:
        """The network's own config; diffusers keeps its registered config elsewhere."""
        return self._network_config

    @config.setter
    def config(self, config: DiCoConfig) -> None:
        self._network_config = config
