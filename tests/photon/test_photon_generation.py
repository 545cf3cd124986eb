"""Decoding: what `generate` computes is what training saw."""

from typing import Any

import pytest
import torch

from photon import PhotonForConditionalGeneration, PhotonProcessor
from photon.processing_photon import VolumeChats
from tests.photon.conftest import turn

QUESTIONS = ["Is there a pleural effusion?", "Which side is it on?"]


@pytest.mark.parametrize("reduction", ["none", "hard"])
def test_decoding_step_by_step_gives_the_teacher_forced_logits(tiny: Any, reduction: str) -> None:
    model, processor = tiny()
    model.eval()
    volume = torch.rand(8, 24, 32)
    prompts = dict(processor([volume], [turn(q) for q in QUESTIONS]))
    # The two questions differ in length, so the cache is padded; all rows belong to one volume.
    prompts["group_index"] = torch.zeros(2, dtype=torch.long)
    result = model.generate(
        **prompts, reduction=reduction, max_new_tokens=5, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    answers = result.sequences[:, prompts["input_ids"].shape[1] :]
    stepwise = torch.stack(result.logits, dim=1)

    rows = processor.batch([VolumeChats([volume], [turn(q, "yes") for q in QUESTIONS])])
    for row, answer in enumerate(answers.tolist()):
        ids = rows["input_ids"][row][: int((rows["labels"][row] != -100).nonzero()[0])]
        ids = torch.cat([ids, torch.tensor(answer)])[None]
        labels = torch.full_like(ids, -100)
        labels[0, -5:] = ids[0, -5:]
        forced = model(
            input_ids=ids, labels=labels, reduction=reduction,
            pixel_values_videos=rows["pixel_values_videos"], video_grid_thw=rows["video_grid_thw"],
        )  # fmt: skip
        torch.testing.assert_close(forced.logits, stepwise[row], rtol=1e-4, atol=1e-4)


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
