"""Low-rank adapters in the language model (Med3DVLM Eq. 8), through peft.

A model with adapters says so in its configuration (``lora``): ``from_pretrained`` builds them before it loads weights,
and the saved folder holds base and adapters apart. :func:`merge_lora` adds them to the base for good.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from med3dvlm.settings import settings_from

if TYPE_CHECKING:
    from med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration

MARK = "lora_"
"""In the names of all parameters of adapters and of no others."""


@dataclass(frozen=True)
class LoraSettings:
    """The paper's (Sec. 3.4), on all linear layers of Qwen's decoder.

    Attributes:
        targets: last parts of the names of the layers that get an adapter.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"lora: rank: {self.rank} is not a number from 1 on")
        if not self.targets:
            raise ValueError("lora: targets: none; name layers, or leave lora out")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoraSettings":
        """From config.json. Raises ``ValueError`` for an unknown key."""
        return settings_from(cls, values, "lora")

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {**asdict(self), "targets": list(self.targets)}


def inject(language_model: nn.Module, settings: LoraSettings) -> None:
    """Put fresh adapters, which change nothing yet, into a language model in place.

    Raises:
        ValueError: a target names no linear layer, the model has adapters already, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora: needs the package peft; install it, or merge the adapters on release") from error
    _check_targets(language_model, settings.targets)
    adapters = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    inject_adapter_in_model(adapters, language_model)
    language_model.train(language_model.training)  # new modules are in training mode, with dropout


def _check_targets(language_model: nn.Module, targets: tuple[str, ...]) -> None:
    """Each target has to match: peft is content where one of them does."""
    if any(MARK in name for name, _ in language_model.named_parameters()):
        raise ValueError("lora: the language model has adapters already; merge them first")
    linear = [n.rpartition(".")[2] for n, m in language_model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    missing = [target for target in targets if target not in linear]
    if missing:
        known = ", ".join(dict.fromkeys(linear))
        raise ValueError(f"lora: targets: no layer is called {', '.join(missing)}; the linear layers are {known}")


def add_lora(model: "Med3DVLMForConditionalGeneration", settings: LoraSettings) -> None:
    """Put fresh adapters into a model, in place. See :func:`inject` for errors."""
    inject(model.language_model, settings)
    model.config.lora = settings.to_dict()
    model.set_trainable(*model.trainable, "lora")


def merge_lora(model: "Med3DVLMForConditionalGeneration") -> None:
    """Add the adapters to the weights they adapt, in place; after that the model needs no peft.

    In bfloat16 the sum is rounded; merge a float32 copy where that matters.
    """
    if model.config.lora is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.language_model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            model.language_model.set_submodule(name, layer.get_base_layer())
    del model.language_model.peft_config
    model.config.lora = None
    model.set_trainable(*(part for part in model.trainable if part != "lora"))
