"""Decoding: what `generate` computes is what training saw."""

from typing import Any

import pytest
import torch

from photon import PhotonForConditionalGeneration, PhotonProcessor
from photon.attention import Plan
from photon.processing_photon import VolumeChats
from tests.photon.conftest import turn

QUESTIONS = ["Is there a pleural effusion?", "Which side is it on?"]


def continued(model: Any, prompts: dict[str, Any], **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Five greedy tokens ``(R, 5)`` and their logits ``(R, 5, V)``."""
    result = model.generate(
        **prompts, **how, max_new_tokens=5, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return result.sequences[:, -5:], torch.stack(result.logits, dim=1)


def with_answer(processor: PhotonProcessor, volume: torch.Tensor, question: str, answer: torch.Tensor) -> Any:
    """One row: the prompt and these answer tokens, which carry the labels."""
    row = dict(processor([volume], turn(question)))
    ids = torch.cat([row["input_ids"], answer[None]], dim=1)
    labels = torch.full_like(ids, -100)
    labels[0, -len(answer) :] = answer
    return {**row, "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("reduction", "layers"), [("none", ["n/4"]), ("hard", ["n/4"]), ("hard", [0]), ("hard", [1, "3n/4"])]
)
def test_decoding_step_by_step_gives_the_teacher_forced_logits(tiny: Any, reduction: str, layers: Any) -> None:
    model, processor = tiny(scheduling={"predictor_bias": 0.0, "layers": layers})
    model.eval()
    volume = torch.rand(8, 24, 32)
    # The two questions differ in length, so the cache is padded; all rows belong to one volume.
    answers, stepwise = continued(model, processor([volume], [turn(q) for q in QUESTIONS]), reduction=reduction)
    for row, question in enumerate(QUESTIONS):
        forced = model(**with_answer(processor, volume, question, answers[row]), reduction=reduction)
        torch.testing.assert_close(forced.logits, stepwise[row], rtol=1e-4, atol=1e-4)
        assert reduction == "none" or 0 < forced.keep_rate.item() < 1


class Masked(Plan):
    """Attention with an explicit mask: what a plain implementation would do."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        share = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(share, 0), value.repeat_interleave(share, 0)
        scores = (query @ key.mT * scale).masked_fill(~self.mask, -torch.inf)
        return scores.softmax(-1) @ value


def evicting_logits(model: Any, row: dict[str, Any], kept: torch.Tensor, answer: int) -> torch.Tensor:
    """Logits at the answer of one row when dropped tokens leave the caches of the lower layers, too.

    The prompt passes the lower layers whole; the answer's tokens see there only what stayed.
    """
    inner, split = model.model, model.config.scheduling_layers[0]
    layout = model.layout(row["input_ids"], None, row["video_grid_thw"], None, row["labels"])
    visual, _ = inner.visual.encode(row["pixel_values_videos"], row["video_grid_thw"])
    hidden = inner.embed(row["input_ids"], layout, visual)
    rotary = inner.language_model.rotary_emb(hidden[None], layout.positions[:, None])
    length = len(hidden)
    stays = torch.ones(length, dtype=torch.bool)
    stays[layout.visual] = kept
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[length - answer :] &= stays
    whole = torch.full((length,), -1)
    hidden = inner.run(hidden, range(split), rotary, Masked(mask), whole, [])[stays]
    rotary = tuple(x[:, stays] for x in rotary)
    mask = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
    layers = range(split, model.config.text_config.num_hidden_layers)
    hidden = inner.run(hidden, layers, rotary, Masked(mask), whole[stays], [])
    return model.lm_head(inner.language_model.norm(hidden))[-answer - 1 : -1]


def test_evicting_dropped_tokens_equals_a_plain_implementation(tiny: Any) -> None:
    model, processor = tiny(scheduling={"predictor_bias": 0.0, "layers": ["n/2"]})
    model.eval()
    volume = torch.rand(8, 24, 32)
    prompts = processor([volume], [turn(q) for q in QUESTIONS])
    answers, evicted = continued(model, prompts, early_cache="evict")
    kept = model(**prompts).kept
    for row, question in enumerate(QUESTIONS):
        one = with_answer(processor, volume, question, answers[row])
        with torch.no_grad():
            expected = evicting_logits(model, one, kept[row], 5)
        torch.testing.assert_close(evicted[row], expected, rtol=1e-4, atol=1e-4)
    _, whole = continued(model, prompts, early_cache="keep")
    assert torch.equal(whole[:, 0], evicted[:, 0])  # the prompt has seen everything either way
    assert not torch.allclose(whole[:, 1:], evicted[:, 1:], atol=1e-4)


@pytest.mark.parametrize(("early", "layers"), [("keep", [1, 3]), ("evict", [1, 3]), ("keep", [0])])
def test_caches_hold_what_each_layer_may_see(tiny: Any, early: Any, layers: Any) -> None:
    model, processor = tiny(scheduling={"predictor_bias": 0.0, "layers": layers})
    prompts = processor([torch.rand(8, 24, 32)], turn(QUESTIONS[0]))
    output = model(**prompts, use_cache=True, early_cache=early)
    text = prompts["input_ids"].shape[1] - 24
    lengths = [output.past_key_values.get_seq_length(i) for i in range(4)]
    kept = text + int(output.kept.sum())
    assert kept < text + 24
    if early == "evict" or layers == [0]:
        assert lengths == [kept] * 4
    else:
        assert lengths[0] == text + 24 > lengths[1] == lengths[2] >= lengths[3] == kept


@pytest.mark.parametrize("reduction", ["none", "hard"])
@pytest.mark.parametrize("layers", [["n/4"], [0]])
def test_a_second_question_uses_the_encoded_volume(tiny: Any, reduction: str, layers: Any) -> None:
    model, processor = tiny(scheduling={"predictor_bias": 0.0, "layers": layers})
    model.eval()
    volume = torch.rand(8, 24, 32)
    first = model(**processor([volume], turn(QUESTIONS[0])), reduction=reduction, use_cache=True)
    prompt = dict(processor([volume], turn(QUESTIONS[1])))
    expected = continued(model, prompt, reduction=reduction)
    encoded: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: encoded.append(1))
    prompt.pop("pixel_values_videos")
    found = continued(model, prompt, reduction=reduction, prefix=first.past_key_values.photon.prefix)
    assert torch.equal(found[0], expected[0]) and not encoded
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_an_encoded_volume_serves_only_its_own_prompts(tiny: Any) -> None:
    model, processor = tiny()
    volume = torch.rand(8, 24, 32)
    prefix = model(**processor([volume], turn("Which side?")), use_cache=True).past_key_values.photon.prefix
    larger = processor([torch.rand(12, 24, 32)], turn("Which side?"))
    with pytest.raises(ValueError, match="prefix: .* is not the encoded one"):
        model(**larger, prefix=prefix)
    with pytest.raises(ValueError, match="encoded for 1 decoder layers, this pass shares 4"):
        model(**processor([volume], turn("Which side?")), prefix=prefix, reduction="none")
    two = processor.batch([VolumeChats([volume], [turn("Which side?")])] * 2)
    with pytest.raises(ValueError, match="2 groups of rows"):
        model(**two, prefix=prefix)


def test_beams_repeat_rows_and_not_volumes(tiny: Any) -> None:
    model, processor = tiny()
    model.eval()
    prompts = dict(processor([torch.rand(8, 24, 32)], [turn(q) for q in QUESTIONS]))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    both = model.generate(**prompts, num_beams=3, **settings)
    for row, question in enumerate(QUESTIONS):
        single = dict(processor([torch.zeros(8, 24, 32)], [turn(question)]))
        single["pixel_values_videos"] = prompts["pixel_values_videos"]
        found = model.generate(**single, num_beams=3, **settings)
        assert torch.equal(found[0, -4:], both[row, -4:])


def test_sampling_draws_several_answers(tiny: Any) -> None:
    model, processor = tiny()
    model.eval()
    prompts = dict(processor([torch.rand(8, 24, 32)], [turn(QUESTIONS[0])]))
    torch.manual_seed(0)
    drawn = model.generate(**prompts, do_sample=True, temperature=3.0, num_return_sequences=4, max_new_tokens=4)
    assert len({tuple(row) for row in drawn.tolist()}) > 1


def test_a_saved_model_gives_the_same_logits_through_the_auto_classes(tiny: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = tiny()
    batch = processor.batch([VolumeChats([torch.rand(8, 24, 32)], [turn(QUESTIONS[0], "yes")])])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, PhotonForConditionalGeneration) and isinstance(reader, PhotonProcessor)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert reader.geometry == processor.geometry
    assert not [f for f in tmp_path.iterdir() if f.suffix in {".bin", ".pt", ".pkl"}]
