"""Prompts, answers and their labels, lengths, volumes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from med3dvlm.building import add_image_token
from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.processing_med3dvlm import Med3DVLMProcessor, VolumeTexts, choice, with_choices
from tests.med3dvlm.tiny_med3dvlm import tiny_tokenizer

SIZE, N = (4, 6, 8), 5
END, PAD, BEGIN, PATCH = 256, 257, 258, 260
"""Ids of the tiny tokenizer, whose other tokens are bytes."""


def processor(begins: bool = False, **settings: Any) -> Med3DVLMProcessor:
    tokenizer = tiny_tokenizer(begins)
    add_image_token(tokenizer)
    return Med3DVLMProcessor(tokenizer, SIZE, N, **{"max_length": 40, **settings})


def words(made: Med3DVLMProcessor, ids: list[int]) -> str:
    """Text of ids, special tokens and all."""
    return made.tokenizer.decode(ids)


def test_a_row_is_image_tokens_question_space_answer_end() -> None:
    made = processor()
    row = made.row("Where?", "left lung")
    assert row.ids[:N] == [PATCH] * N and row.ids[-1] == END
    assert words(made, row.ids[N:-1]) == "Where? left lung"
    labelled = [i for i in row.labels if i != -100]
    assert words(made, labelled) == " left lung<end>" and row.ids[-len(labelled) :] == labelled
    assert row.cut == 0
    assert made.row("Where?").ids == row.ids[: -len(labelled)]  # what generation begins with


def test_a_row_of_a_tokenizer_that_begins_rows() -> None:
    row = processor(begins=True).row("Where?", "left")
    assert row.ids[: N + 1] == [BEGIN] + [PATCH] * N and row.ids.count(BEGIN) == 1 and row.ids[-1] == END


def test_prompts_of_a_chat_template() -> None:
    made = processor(prompt_style="template")
    row = made.row("Where?", "left")
    patches = "<im_patch>" * N
    assert words(made, row.ids) == f"<turn>{patches}Where?<end><turn>left<end>"
    assert words(made, [i for i in row.labels if i != -100]) == "left<end>"


def test_choices() -> None:
    choices = ["liver", "spleen", "kidney", "lung"]
    asked = with_choices("Which organ?", choices)
    assert asked == "Which organ? Choices: A. liver B. spleen C. kidney D. lung"
    assert choice(choices, 1) == "B. spleen"
    assert with_choices("Which organ?", []) == "Which organ?"


def test_batches_are_padded_on_the_right_and_prompts_on_the_left() -> None:
    made = processor()
    groups = [
        VolumeTexts([("Where?", "left"), ("Is it?", "y")], np.zeros(SIZE)),
        VolumeTexts([("?", "n")], torch.ones(SIZE)),
    ]
    batch = made.batch(groups)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == [N + 6 + 5 + 1, N + 6 + 2 + 1, N + 1 + 2 + 1]
    for row, length in enumerate(lengths):
        assert batch["attention_mask"][row, :length].all()
        assert (batch["input_ids"][row, length:] == PAD).all() and (batch["labels"][row, length:] == -100).all()
    assert batch["group_index"].tolist() == [0, 0, 1]
    assert batch["volumes"].shape == (2, 1, *SIZE) and batch["volumes"].dtype == torch.float32
    assert batch["volumes"][1].min() == 1

    prompts = made(torch.zeros(SIZE), ["Where?", "?"])
    assert prompts["attention_mask"].tolist() == [[1] * (N + 6), [0] * 5 + [1] * (N + 1)]
    assert prompts["input_ids"][1, :5].tolist() == [PAD] * 5
    assert prompts["group_index"].tolist() == [0, 0] and "labels" not in prompts


def test_which_volume_a_question_is_about() -> None:
    made, two = processor(), torch.rand(2, *SIZE)
    for given in (two, list(two), [v.numpy() for v in two]):
        prompts = made(given, ["a", "b"])
        assert torch.equal(prompts["volumes"][:, 0], two) and "group_index" not in prompts
    assert made(two, ["a", "b", "c"], group_index=[1, 0, 1])["group_index"].tolist() == [1, 0, 1]
    assert made(two[0], "a")["input_ids"].shape == (1, N + 1)
    features = made(text=["a", "b"], group_index=[0, 0])
    assert "volumes" not in features and (features["input_ids"] == PATCH).sum() == 2 * N
    assert (made(text="a", image=False)["input_ids"] == PATCH).sum() == 0


def test_groups_without_volumes() -> None:
    made = processor()
    assert "volumes" not in made.batch([VolumeTexts([("a", "b")])])
    with pytest.raises(ValueError, match="1 of 2 have a volume"):
        made.batch([VolumeTexts([("a", "b")]), VolumeTexts([("a", "b")], torch.zeros(SIZE))])
    with pytest.raises(ValueError, match="no question in any"):
        made.batch([VolumeTexts([], torch.zeros(SIZE))])


def test_long_answers_lose_their_end_and_image_tokens_never() -> None:
    made = processor(max_length=N + 10)
    row = made.row("Where?", "left upper lobe")
    assert row.ids == [PATCH] * N + list(made.tokenizer("Where? lef")["input_ids"]) and len(row.ids) == N + 10
    assert row.cut == len(" left upper lobe") + 1 - 4
    assert END not in row.labels  # nothing teaches to stop here
    fits = made.row("Where?", "le")
    assert fits.cut == 0 and fits.ids[-1] == END and len(fits.ids) == N + 10
    with pytest.raises(ValueError, match="answer: 13 tokens more than max_length 15"):
        processor(max_length=N + 10, long_answers="error").row("Where?", "left upper lobe")


def test_a_batch_says_once_that_answers_were_cut(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr("med3dvlm.processing_med3dvlm.logger.warning_once", said.append)
    made = processor(max_length=N + 10)
    made.batch([VolumeTexts([("Where?", "le")])])
    assert said == []
    made.batch([VolumeTexts([("Where?", "left")])])
    assert len(said) == 1 and "max_length 15" in said[0]


@pytest.mark.parametrize("answer", [None, "x"])
def test_a_question_that_leaves_no_room_is_refused(answer: str | None) -> None:
    made = processor(max_length=N + 7)
    made.row("Where?", answer)
    with pytest.raises(ValueError, match="question: 12 tokens with 5 image tokens leave no room.*max_length 12"):
        made.row("Where??", answer)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (torch.zeros(4, 6, 9), r"number 0 is \(4, 6, 9\), this model reads \(4, 6, 8\)"),
        (torch.zeros(8, 6, 4), "this model reads"),
        (torch.full(SIZE, -1000.0), "values from -1000 to -1000; scale them"),
        (torch.full(SIZE, 255), "values from 255"),
        (torch.full(SIZE, torch.nan), "values from nan"),
    ],
)
def test_volumes_that_do_not_fit(volume: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor()([volume], "Where?")


def test_a_little_overshoot_of_interpolation_is_let_through() -> None:
    volume = torch.zeros(SIZE)
    volume[0, 0, :2] = torch.tensor([-0.005, 1.005])
    assert torch.equal(processor()(volume, "Where?")["volumes"][0, 0], volume)


def test_questions_that_do_not_fit() -> None:
    made = processor()
    with pytest.raises(ValueError, match="at least one question"):
        made(torch.zeros(SIZE), [])
    with pytest.raises(ValueError, match="<im_patch> in its text; leave it out"):
        made(torch.zeros(SIZE), "What is <im_patch>?")
    with pytest.raises(ValueError, match="given with image=False"):
        made(torch.zeros(SIZE), "a", image=False)


def test_a_tokenizer_without_the_image_token() -> None:
    with pytest.raises(ValueError, match=r"has no <im_patch>; .*add_image_token"):
        Med3DVLMProcessor(tiny_tokenizer(), SIZE, N)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    add_image_token(tokenizer)
    config = Med3DVLMConfig(encoder_config={"name": "dcformer-nano", "size": SIZE}, image_token_id=PATCH)
    with pytest.raises(ValueError, match="<im_patch> is 261, in config.json image_token_id is 260"):
        Med3DVLMProcessor.from_config(config, tokenizer)


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = tiny_tokenizer()
    add_image_token(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs an end token"):
        Med3DVLMProcessor(tokenizer, SIZE, N)


@pytest.mark.parametrize("wrong", [{"prompt_style": "chat"}, {"long_answers": "drop"}])
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        processor(**wrong)


def test_settings_are_saved(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_length": 33, "prompt_style": "template", "long_answers": "error"}
    made = processor(**settings)
    made.save_pretrained(tmp_path)
    again = Med3DVLMProcessor.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in settings} == settings
    assert (again.size, again.image_tokens, again.image_token_id) == (list(SIZE), N, PATCH)
    assert again.row("Where?", "left").ids == made.row("Where?", "left").ids
    assert again.batch_decode([made.row("Where?", "left").ids], skip_special_tokens=True) == ["Where?left"]
