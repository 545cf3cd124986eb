"""Small random Med3DVLM models over several kinds of language models."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import AutoConfig

from med3dvlm.building import med3dvlm_from
from med3dvlm.encoders import build_encoder
from med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from med3dvlm.processing_med3dvlm import Med3DVLMProcessor

SIZE = (32, 64, 64)
ENCODER = {"name": "dcformer-nano", "size": list(SIZE), "widths": [4, 4, 6, 8, 12], "kernels": [3, 3, 3, 3]}
IMAGE_TOKENS = 6
QUESTIONS = ["Is there a nodule?", "Where?", "Which organ does the large lesion lie in?"]
ANSWERS = ["yes", "left upper lobe", "liver"]

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {**WIDE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama": {**WIDE, "num_key_value_heads": 2, "tie_word_embeddings": False},
    # Caps its logits, and every other layer sees a window only.
    "gemma2": {**WIDE, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 8},
    # A state in place of keys and values.
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "tie_word_embeddings": True},
    # Positions are learned, and linear layers are of a kind of their own.
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0, "embd_pdrop": 0},
}
CHAT_TEMPLATE = "{% for m in messages %}<turn>{{ m['content'] }}<end>{% endfor %}<turn>"


@cache
def _bytes(begins: bool) -> str:
    """A tokenizer of single bytes, as JSON; ``begins``: rows begin with a BOS token, as Llama's do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>", "<pad>", "<begin>", "<turn>"])
    if begins:
        core.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", core.token_to_id("<begin>"))]
        )
    return core.to_str()


def tiny_tokenizer(begins: bool = False) -> Any:
    """Without ``<im_patch>``."""
    special = {"eos_token": "<end>", "pad_token": "<pad>"} | ({"bos_token": "<begin>"} if begins else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bytes(begins)), **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_language_model(kind: str = "qwen2", rows: int = 280) -> Any:
    """Larger weights than the initial ones, so that tokens differ. ``rows``: of the embedding table."""
    values = {"vocab_size": rows, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, **LANGUAGE_MODELS[kind]))
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return language_model


def tiny(
    kind: str = "qwen2", seed: int = 0, begins: bool = False, **settings: Any
) -> tuple[Med3DVLMForConditionalGeneration, Med3DVLMProcessor]:
    """A model in eval mode and its processor; ``settings`` are those of ``med3dvlm_from``."""
    torch.manual_seed(seed)
    settings = {"mixed_tokens": IMAGE_TOKENS, "max_length": 80, **settings}
    encoder = build_encoder(ENCODER)
    model, processor = med3dvlm_from(encoder, tiny_language_model(kind), tiny_tokenizer(begins), **settings)
    with torch.no_grad():  # image tokens as large as embeddings
        for parameter in model.projector.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.eval(), processor


def volumes(count: int, seed: int = 0) -> torch.Tensor:
    """``(count, *SIZE)`` in [0, 1], unlike one another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SIZE, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
