"""Photon behind the framework's inference interface: answers, kept tokens, and where a token lies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm3d.errors import UserError
from mllm3d.inference.adapter import RawAnswer
from mllm3d.inference.generation import question_seed
from photon.geometry import PatchGeometry
from photon.patch_embedding import patchify
from photon.processing_photon import PhotonProcessor
from photon.recipes.adapter import PhotonAdapter

QUESTIONS = ["Is there a pleural effusion?", "Which side is it on?", "How many lesions?"]
CPU = torch.device("cpu")


def scan(shape: tuple[int, int, int] = (8, 24, 32), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    model, processor = tiny()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(saved: Path) -> PhotonAdapter:
    return PhotonAdapter.load(saved, CPU, torch.float32)


def ask(adapter: PhotonAdapter, questions: Sequence[str], mode: Any, seed: int = 0, **given: Any) -> list[RawAnswer]:
    return adapter.answer(given.get("volumes", [scan()]), questions, mode, max_new_tokens=4, seed=seed)


def masks(answers: Sequence[RawAnswer]) -> list[list[bool]]:
    return [answer.kept.tolist() for answer in answers if answer.kept is not None]


def test_every_mode_accounts_for_all_tokens(adapter: PhotonAdapter) -> None:
    for mode in ("scheduled", "none", "random", "noisy", "evicted"):
        answers = ask(adapter, QUESTIONS, mode)
        assert len(answers) == len(QUESTIONS)
        for answer in answers:
            assert answer.tokens_before == 2 * 3 * 4  # tokens of 4 x 8 x 8 voxels
            assert answer.kept is not None and answer.kept.shape == (24,)
            assert answer.tokens_after == answer.kept.sum()
            assert answer.tokens_after == 24 if mode == "none" else 0 < answer.tokens_after < 24
            assert 1 <= answer.new_tokens <= 4
            assert 0 < answer.seconds_first <= answer.seconds_total


def film(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def see(adapter: PhotonAdapter, mode: Any = "scheduled", **shown: Any) -> list[RawAnswer]:
    return adapter.answer([], QUESTIONS, mode, max_new_tokens=4, seed=0, **shown)


def test_images_and_videos_are_asked_about_in_every_mode(adapter: PhotonAdapter) -> None:
    adapter.processor.min_pixels, adapter.processor.max_pixels = 256, 600
    shown = {"images": [film(1, 16, 24)[0], film(1, 50, 20)[0, ..., 0]], "videos": [film(6, 16, 16)]}
    boxes = [adapter.pixel_boxes((1, 16, 24)), adapter.pixel_boxes((1, 50, 20)), adapter.pixel_boxes((6, 16, 16))]
    # 16 x 24 stays, 50 x 20 is over the budget and becomes 32 x 8, 16 x 16 stays; tokens of 4 x 8 x 8.
    assert [len(item) for item in boxes] == [6, 4, 8]
    assert [item[-1].tolist() for item in boxes] == [
        [[0, 4], [8, 16], [16, 24]], [[0, 4], [24, 32], [0, 8]], [[4, 8], [8, 16], [8, 16]]
    ]  # fmt: skip
    grids = adapter.processor(None, [{"role": "user", "content": "?"}], **shown)["video_grid_thw"]
    assert [len(item) for item in boxes] == [int(grid.prod()) // 4 for grid in grids]
    for mode in ("scheduled", "none", "random", "noisy", "evicted"):
        for answer in see(adapter, mode, **shown):
            assert answer.tokens_before == 18 and answer.kept is not None and answer.kept.shape == (18,)
            assert answer.tokens_after == answer.kept.sum()
            assert answer.tokens_after == 18 if mode == "none" else 0 < answer.tokens_after < 18


def test_pixels_that_were_encoded_are_not_taken_for_others(adapter: PhotonAdapter, saved: Path) -> None:
    """The same numbers in another order, or as a video, or beside a volume, are something else."""
    adapter.processor.min_pixels = 64
    a, b = film(2, 16, 24)
    cases: list[dict[str, Any]] = [
        {"images": [a, b]}, {"images": [a, b]}, {"images": [b, a]}, {"videos": [np.stack([a, b])]}, {"images": [a]},
        {"videos": [a]},  # (16, 24, 3): sixteen grey frames of 24 x 3
        {"videos": [a[None]]},
    ]  # fmt: skip
    for shown in cases:
        fresh = PhotonAdapter.load(saved, CPU, torch.float32)
        fresh.processor.min_pixels = 64
        here, there = see(adapter, **shown), see(fresh, **shown)
        assert masks(here) == masks(there) and [x.text for x in here] == [x.text for x in there]


def test_tokens_of_frames_are_not_averaged_as_slices_are(adapter: PhotonAdapter) -> None:
    adapter.processor.slices_per_frame, adapter.processor.min_pixels = 3, 64
    assert len(adapter.token_boxes((12, 8, 8))) == 1 and len(adapter.pixel_boxes((12, 8, 8))) == 3


def test_what_is_kept_is_what_the_model_decides_on_the_prompt(adapter: PhotonAdapter) -> None:
    prompt = dict(adapter.processor([scan()], [[{"role": "user", "content": q}] for q in QUESTIONS]))
    decided = adapter.model(**prompt).kept
    assert masks(ask(adapter, QUESTIONS, "scheduled")) == decided.tolist()


def test_a_question_is_answered_alike_alone_and_in_company(adapter: PhotonAdapter) -> None:
    for mode in ("scheduled", "none", "random"):
        together = ask(adapter, QUESTIONS, mode)
        for index, question in enumerate(QUESTIONS):
            (alone,) = ask(adapter, [question], mode)
            assert masks([alone]) == masks([together[index]])
            assert alone.text == together[index].text


def test_random_tokens_are_as_many_as_scheduled_and_follow_the_seed(adapter: PhotonAdapter) -> None:
    scheduled, first, again, other = (
        ask(adapter, QUESTIONS, mode, seed)
        for mode, seed in (("scheduled", 0), ("random", 5), ("random", 5), ("random", 6))
    )
    assert [a.tokens_after for a in first] == [a.tokens_after for a in scheduled]
    assert masks(first) == masks(again)
    assert masks(first) != masks(other)
    assert masks(first) != masks(scheduled)


def test_random_tokens_differ_between_questions(tiny: Any) -> None:
    adapter = PhotonAdapter(*tiny(scheduling={"keep_ratio": 0.5}))  # as many tokens for each question
    drawn = masks(ask(adapter, QUESTIONS, "random"))
    assert [sum(mask) for mask in drawn] == [12, 12, 12]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_a_prior_and_a_current_scan_are_counted_together(adapter: PhotonAdapter) -> None:
    volumes = [scan((4, 8, 16)), scan()]
    (answer,) = ask(adapter, QUESTIONS[:1], "scheduled", volumes=volumes)
    assert answer.tokens_before == 2 + 24
    assert answer.kept is not None and len(answer.kept) == 26
    assert len(adapter.token_boxes((4, 8, 16))) == 2


def test_the_volume_matters(adapter: PhotonAdapter) -> None:
    (one,), (other,) = (ask(adapter, QUESTIONS[:1], "scheduled", volumes=[scan(seed=seed)]) for seed in (0, 1))
    assert masks([one]) != masks([other])


def test_generated_tokens_end_with_the_end_of_the_turn(adapter: PhotonAdapter) -> None:
    end = adapter.processor.tokenizer.eos_token_id
    with torch.no_grad():  # every hidden state now asks for the end token
        adapter.model.model.language_model.norm.weight.zero_()
        adapter.model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(adapter.model.lm_head.weight))
        adapter.model.lm_head.bias = torch.nn.Parameter(torch.eye(len(adapter.processor.tokenizer))[end])
    (answer,) = ask(adapter, QUESTIONS[:1], "scheduled")
    assert (answer.text, answer.new_tokens) == ("", 1)
    assert answer.seconds_first == answer.seconds_total


@pytest.mark.parametrize("slices_per_frame", [1, 2])
@pytest.mark.parametrize("shape", [(8, 24, 40), (9, 13, 37), (1, 9, 13)])
def test_a_token_box_holds_the_voxels_of_its_patches(
    tokenizer: Any, slices_per_frame: int, shape: tuple[int, int, int]
) -> None:
    """The voxels of one box are lit: the token's own patches see all of them, the others none."""
    geometry = PatchGeometry((2, 4, 6), 1, 2, slices_per_frame)
    processor = PhotonProcessor(tokenizer, geometry.size, 1, geometry.merge, slices_per_frame)
    boxes = PhotonAdapter(None, processor).token_boxes(shape)  # type: ignore[arg-type]
    assert len(boxes) == geometry.tokens(shape) > 1
    for token, ((d0, d1), (h0, h1), (w0, w1)) in enumerate(boxes.tolist()):
        lit = torch.zeros(shape)
        lit[d0:d1, h0:h1, w0:w1] = 1
        patches, _ = patchify(lit, geometry)
        seen = patches.reshape(len(boxes), -1).sum(1)
        assert seen.nonzero()[:, 0].tolist() == [token]
        assert seen[token].item() == pytest.approx(lit.sum().item() / slices_per_frame)


def test_a_questions_seed_depends_on_its_text_and_the_seed_alone() -> None:
    assert question_seed(0, QUESTIONS[0]) == 1942243545  # the same on every machine and in every process
    seeds = {question_seed(seed, question) for seed in range(3) for question in QUESTIONS}
    assert len(seeds) == 9 and all(0 <= seed < 2**32 for seed in seeds)


def test_loading_is_quiet_and_leaves_the_library_as_it_was(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    PhotonAdapter.load(saved, CPU, torch.float32)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == before


@pytest.mark.parametrize("damage", ["missing weight", "cut", "no weights", "no tokenizer"])
def test_a_damaged_folder_is_one_line(saved: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = saved / "model.safetensors"
    if damage == "missing weight":
        kept = {k: v for k, v in load_file(weights).items() if "blocks.0.mlp.up_proj.weight" not in k}
        save_file(kept, weights, metadata={"format": "pt"})
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    else:
        (saved / "tokenizer.json").unlink()
    with pytest.raises(UserError) as error:
        PhotonAdapter.load(saved, CPU, torch.float32)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)
    if damage == "missing weight":
        assert "missing keys: model.visual.blocks.0.mlp.up_proj.weight" in str(error.value)


def test_volumes_that_were_just_encoded_are_not_encoded_again(adapter: PhotonAdapter) -> None:
    encoded: list[int] = []
    adapter.model.model.visual.register_forward_hook(lambda *_: encoded.append(1))
    first = ask(adapter, QUESTIONS[:1], "scheduled")
    again = ask(adapter, QUESTIONS, "scheduled")
    assert len(encoded) == 1
    assert again[0].text == first[0].text and masks(again)[:1] == masks(first)
    ask(adapter, QUESTIONS, "none")  # shares all layers, not those below the drop
    ask(adapter, QUESTIONS, "none", volumes=[scan(seed=1)])
    assert len(encoded) == 3
    fresh = ask(adapter, QUESTIONS, "scheduled")
    assert len(encoded) == 4
    assert [a.text for a in fresh] == [a.text for a in again] and masks(fresh) == masks(again)


def test_noise_moves_thresholds_the_same_way_every_time(adapter: PhotonAdapter) -> None:
    still, noisy, again = (ask(adapter, QUESTIONS, mode, seed=3) for mode in ("scheduled", "noisy", "noisy"))
    assert masks(noisy) == masks(again)
    assert masks(noisy) != masks(still)
