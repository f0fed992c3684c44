"""Which attention the language model computes with, where a stage has the setting `attn_implementation`."""

from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from diffclip.base.errors import InputError, first_line
from mllm.packed import BY_EXAMPLE
from stages.settings import ConversationConfig, LanguageConfig
from stages.training import training_device


def check_attention(config: ConversationConfig | LanguageConfig) -> None:
    """Raise InputError, before any weights are read, where this machine cannot compute as the setting says, or where
    packing would take longer than padding.
    """
    name, on_cpu = config.attn_implementation, training_device(config).type == "cpu"
    if name == "flash_attention_2" and (on_cpu or not is_flash_attn_2_available()):
        raise InputError(
            "setting `attn_implementation`: flash_attention_2 needs a GPU and the package flash-attn; install that, or "
            "set auto"
        )
    if name == "flash_attention_2" and config.precision != "bf16":
        raise InputError(
            "setting `attn_implementation`: flash_attention_2 computes in half precision; set precision bf16, or auto"
        )
    if name == "flex_attention" and on_cpu:
        raise InputError("setting `attn_implementation`: flex_attention has no gradient on a CPU; set auto")
    if config.packing and name in ("eager", "sdpa"):
        raise InputError(
            f"setting `packing`: {name} keeps examples of a row apart by a mask of all its tokens by all, which takes "
            "longer than padding; set `attn_implementation` auto, or `packing` false"
        )


def attention_of(config: ConversationConfig | LanguageConfig) -> str:
    """The name by which transformers knows the attention that the settings ask for, "" for what it takes by itself."""
    if config.attn_implementation == "auto":
        return BY_EXAMPLE if config.packing else ""
    return config.attn_implementation


def set_attention(language_model: PreTrainedModel, name: str) -> None:
    """Let a language model compute with the attention of that name; InputError if its class cannot."""
    if not name:
        return
    reason = "its class has an attention of its own"
    try:
        language_model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = first_line(error)
    if language_model.config._attn_implementation != name:
        raise InputError(
            f"setting `attn_implementation`: {type(language_model).__name__} cannot compute with {name} ({reason}); "
            "set auto"
        )
