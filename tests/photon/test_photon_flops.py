"""FLOPs counted from shapes beside those that torch counts while the model runs, and what they say of Photon 3B."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from photon import PhotonConfig, PhotonForConditionalGeneration, PhotonProcessor
from photon.building import patched_config, planned_config
from photon.flops import flip_flops, forward_flops, token_flops, vision_flops, volume_flops
from photon.processing_photon import VolumeChats
from photon.tokenization import SPECIAL_TOKENS, token_fields

EXACT = 1e-6
CHOICE = 0.01
"""Where tokens are chosen the model also computes saliency, which the count leaves out; beside 512 visual tokens of
width 64 that is visible, beside Photon 3B it is not."""


def visible_pairs(query: Tensor, key: Tensor, dropout: float, causal: bool, mask: Tensor | None) -> float:
    """Of all heads and sequences: a product with a masked key is not work that has to be done.

    The kernel gets masks as what is added, 0 or minus infinity.
    """
    batch, heads, length = query.shape[:3]
    if mask is not None:
        return float((mask == 0).expand(batch, heads, length, key.shape[2]).sum())
    return batch * heads * (length * (length + 1) / 2 if causal else length * key.shape[2])


def attention_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    out_val: Any = None,
    **_: Any,
) -> int:
    """Products of queries with keys and of weights with values; torch has no count for its CPU kernel."""
    return round(2 * (query.shape[-1] + value.shape[-1]) * visible_pairs(query, key, dropout, causal, attn_mask))


attention_flops._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes: masks have to be read


def counted(run: Any) -> int:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # Without gradients, so that masks and shared key-value heads take the same kernel as anything else.
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter:
        run()
    return counter.get_total_flops()


def qwen3_config(tokenizer: Any, **changes: Any) -> PhotonConfig:
    """Heads wider than width / heads, no windows, two deep-stack mergers."""
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    text = {
        "model_type": "qwen3_vl_text", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
        "pad_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_vl_vision", "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 64, "patch_size": 4, "temporal_patch_size": 4, "in_channels": 1,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return PhotonConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **token_fields(tokenizer), **changes
    )


@pytest.fixture
def build(tiny: Any, tokenizer: Any) -> Any:
    """Of either backbone, with a scheduling that keeps a fixed share."""

    def make(backbone: str, scheduling: Any) -> tuple[PhotonForConditionalGeneration, PhotonProcessor]:
        if backbone == "qwen2.5":
            return tiny(scheduling=scheduling)
        torch.manual_seed(0)
        config = qwen3_config(tokenizer, scheduling=scheduling)
        return PhotonForConditionalGeneration(config), PhotonProcessor.from_config(config, tokenizer)

    return make


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def asked(processor: PhotonProcessor, shape: tuple[int, int, int], questions: int) -> dict[str, Any]:
    """A batch of one volume. The height leaves windows that are cut off."""
    chats = [conversation("Is there a pleural effusion?", "yes")] * questions
    return processor.batch([VolumeChats([torch.rand(shape)], chats)])


def lengths(model: PhotonForConditionalGeneration, batch: dict[str, Any]) -> dict[str, int]:
    """Tokens of a question with its answer, of them with a label, and of text before the questions."""
    names = ("input_ids", "attention_mask", "video_grid_thw", "group_index", "labels")
    layout = model.layout(*(batch[name] for name in names))
    return {
        "text": layout.suffix_lengths[0][0],
        "answers": len(layout.targets) // layout.rows,
        "before": layout.prefix_lengths[0] - layout.visual_counts[0],
    }


SHAPE = (16, 72, 64)


@pytest.mark.parametrize("backbone", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("questions", [1, 3])
def test_a_pass_over_all_tokens(build: Any, backbone: str, questions: int) -> None:
    model, processor = build(backbone, None)
    batch = asked(processor, SHAPE, questions)
    found = counted(lambda: model(**batch, reduction="none"))
    planned = forward_flops(model.config, SHAPE, questions, keep_rate=None, **lengths(model, batch))
    assert planned == pytest.approx(found, rel=EXACT)


@pytest.mark.parametrize("backbone", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("questions", [1, 3])
@pytest.mark.parametrize(
    ("layers", "keep_ratio"), [(["n/4"], 0.25), ([3], 0.5), ([0], 0.25), ([1, 2], 0.5), ([0, "n/4", "3n/4"], 0.5)]
)
def test_a_pass_that_drops(build: Any, backbone: str, questions: int, layers: list[Any], keep_ratio: float) -> None:
    """288 visual tokens, of which every share here is a whole number."""
    model, processor = build(backbone, {"layers": layers, "keep_ratio": keep_ratio})
    batch = asked(processor, SHAPE, questions)
    of_text = lengths(model, batch)
    found = counted(lambda: model(**batch))
    planned = forward_flops(model.config, SHAPE, questions, keep_rate=keep_ratio, **of_text)
    if layers[0] == 0:  # whose queries and keys are made once more, and values and outputs with them
        t: Any = model.config.text_config
        head = getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads
        tokens = of_text["before"] + 288 + questions * of_text["text"]
        found -= 4 * tokens * t.hidden_size * head * (t.num_attention_heads + t.num_key_value_heads)
    assert planned == pytest.approx(found, rel=CHOICE)
    assert planned <= found


@pytest.mark.parametrize("keep_ratio", [0.25, 0.75])
@pytest.mark.parametrize("questions", [1, 3])
def test_flipped_copies(build: Any, keep_ratio: float, questions: int) -> None:
    model, processor = build("qwen2.5", {"keep_ratio": keep_ratio})
    batch = asked(processor, SHAPE, questions)
    of_text = lengths(model, batch)
    found = counted(lambda: model(**batch, flip="add")) - counted(lambda: model(**batch))
    planned = flip_flops(model.config, SHAPE, questions, keep_rate=keep_ratio, **of_text)
    assert planned == pytest.approx(found, rel=EXACT)


@pytest.mark.parametrize("backbone", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("early_cache", ["keep", "evict"])
@pytest.mark.parametrize(("layers", "keep_ratio"), [(None, None), (["n/4"], 0.25), ([1, 3], 0.5)])
def test_a_generated_token(
    build: Any, backbone: str, early_cache: Any, layers: list[Any] | None, keep_ratio: float | None
) -> None:
    model, processor = build(backbone, None if layers is None else {"layers": layers, "keep_ratio": keep_ratio})
    batch = asked(processor, SHAPE, 1)
    of_text = lengths(model, batch)
    del batch["labels"]
    how: Any = {"reduction": "none" if layers is None else "hard", "early_cache": early_cache, "use_cache": True}
    with torch.no_grad():
        cache = model(**batch, **how).past_key_values
    found = counted(lambda: model(torch.tensor([[5]]), past_key_values=cache))
    planned = token_flops(model.config, SHAPE, of_text["text"] + 1, keep_ratio, of_text["before"], early_cache)
    assert planned == pytest.approx(found, rel=EXACT)


@pytest.mark.parametrize("backbone", ["qwen2.5", "qwen3"])
def test_the_vision_tower_alone(build: Any, backbone: str) -> None:
    model, processor = build(backbone, None)
    for shape in (SHAPE, (8, 64, 64), (16, 48, 80)):
        batch = asked(processor, shape, 1)
        found = counted(lambda: model.model.visual.encode(batch["pixel_values_videos"], batch["video_grid_thw"]))  # noqa: B023
        assert volume_flops(model.config, shape) == pytest.approx(found, rel=EXACT)


def test_windows_that_the_edge_cuts_off_see_less(tiny: Any) -> None:
    model, _ = tiny()
    whole, cut = (vision_flops(model.config, 256, 64, window) for window in (None, 9.0))
    assert whole == vision_flops(model.config, 256, 64, 16.0) > cut


# --- Photon 3B --------------------------------------------------------------------------------------------------

VOLUME, TEXT, ANSWER = (140, 280, 280), 120, 8


def baseline() -> PhotonConfig:
    """Qwen2.5-VL-3B with its own patches of 2 x 14 x 14 voxels in three channels."""
    config = planned_config("Qwen/Qwen2.5-VL-3B-Instruct")
    assert config is not None
    config.scheduling = {}
    return config


def per_question(config: PhotonConfig, questions: int, keep: float | None) -> float:
    return forward_flops(config, VOLUME, questions, TEXT, ANSWER, keep) / questions


@pytest.mark.parametrize(
    ("name", "questions", "keep", "times"),
    [
        ("b", 1, None, "7.2"),
        ("c", 1, 0.39, "9.3"),
        ("d", 4, 0.39, "21"),
        ("d", 8, 0.39, "26"),
        ("d", 16, 0.39, "30"),
        ("f", 4, None, "24"),
        ("f", 8, None, "40"),
        ("f", 16, None, "60"),
    ],
)
def test_photon_3b_against_the_unpruned_baseline(name: str, questions: int, keep: float | None, times: str) -> None:
    """120 tokens of text a question, 8 of them with logits, none before the volume; per question."""
    ratio = per_question(baseline(), 1, None) / per_question(
        patched_config(baseline(), (14, 14, 14), 1), questions, keep
    )
    assert f"{ratio:.1f}" == times if "." in times else f"{ratio:.0f}" == times


def test_photon_max_against_the_unpruned_baseline() -> None:
    config = baseline()
    assert config.patches.tokens(VOLUME) == 7000
    assert patched_config(config, (14, 14, 14), 1).patches.tokens(VOLUME) == 1000
    assert f"{per_question(config, 1, None) / per_question(config, 1, 0.44):.1f}" == "1.3"


@pytest.mark.parametrize(("keep", "share"), [(0.1, 0.39), (0.39, 0.31), (0.8, 0.17)])
def test_a_flipped_branch_beside_a_second_pass(keep: float, share: float) -> None:
    """One question a volume: below half of a pass of its own with the inverted mask."""
    config = patched_config(baseline(), (14, 14, 14), 1)
    branch = flip_flops(config, VOLUME, 1, TEXT, ANSWER, keep)
    assert branch / per_question(config, 1, 1 - keep) == pytest.approx(share, abs=0.01)


def test_planning_without_scheduling_settings_drops_after_a_quarter() -> None:
    """What phase 2 plans with before its backbone has been trained."""
    config = patched_config(baseline(), (14, 14, 14), 1)
    planned = per_question(config, 4, 0.39)
    config.scheduling = None
    assert per_question(config, 4, 0.39) == planned


def test_each_scheduling_layer_may_have_its_own_rate() -> None:
    config = patched_config(baseline(), (14, 14, 14), 1)
    config.scheduling = {"layers": ["n/4", "n/2"]}
    both = forward_flops(config, VOLUME, 1, TEXT, ANSWER, (0.39, 1.0))
    config.scheduling = {}
    assert both == forward_flops(config, VOLUME, 1, TEXT, ANSWER, 0.39)
    with pytest.raises(ValueError, match="zip"):
        forward_flops(config, VOLUME, 1, TEXT, ANSWER, (0.39, 1.0))
