"""Background that is left out before the vision tower: which tokens it is, and that all others stay what they were."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from photon.background import body_tokens
from photon.geometry import PatchGeometry
from photon.patch_embedding import patchify
from photon.processing_photon import VolumeChats
from photon.recipes.adapter import PhotonAdapter
from photon.vision import PackedAttention
from tests.photon.conftest import turn
from tests.photon.tiny_qwen3 import tiny_qwen3

QUESTIONS = [turn("Is there a pleural effusion?", "yes"), turn("Which side is it on?", "left")]
AIR = 0.1
# The same products in another order, in float32.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


# --- which tokens are background ----------------------------------------------------------------------------


def of_slabs(*slabs: str) -> Tensor:
    """Tokens by letters, `.` air and `#` not, as a volume with one voxel of 1 in every token that is not air."""
    rows = [slab.split() for slab in slabs]
    volume = torch.zeros(2 * len(rows), 4 * len(rows[0]), 4 * len(rows[0][0]))
    for d, slab in enumerate(rows):
        for h, row in enumerate(slab):
            for w, letter in enumerate(row):
                volume[2 * d + 1, 4 * h + 3, 4 * w] = letter == "#"
    return volume


def drawn(volume: Tensor, threshold: float = AIR) -> list[str]:
    """Tokens that stay as `#`, slab by slab."""
    patches, (t, h, w) = patchify(volume, PatchGeometry((2, 2, 2), 1, 2))
    body = body_tokens(patches, (t, h, w), 2, threshold).view(t, h // 2, w // 2)
    return [" ".join("".join(".#"[x] for x in row) for row in slab) for slab in body.tolist()]


@pytest.mark.parametrize(
    ("slabs", "expected"),
    [
        # Air around a body goes, a lung in it stays.
        (["..... .###. .#.#. .###. ....."], ["..... .###. .###. .###. ....."]),
        # Air that only touches it over a corner is another space.
        (["....# .##.# .#.#. .###. ....."], ["....# .##.# .###. .###. ....."]),
        # A gap leads in, and on to the next slab, where nothing touches the border.
        (["##### #.... #####", "##### ##.## #####"], ["##### #.... #####", "##### ##.## #####"]),
        # The first slab and the last cut the lung open: that is no border.
        (["##### #...# #####", "##### #...# #####"], ["##### ##### #####"] * 2),
        # A way that is longer than the grid.
        (["####### .....## ####.## ##...## ##.#### ##...## #######"],) * 2,
        # Nothing is air, and all is.
        (["## ##"], ["## ##"]),
        (["... ... ..."], ["#.. ... ..."]),
        (["."], ["#"]),
    ],
)
def test_background_is_air_that_reaches_the_border_in_plane(slabs: list[str], expected: list[str]) -> None:
    assert drawn(of_slabs(*slabs)) == expected


def plain_body(air: np.ndarray) -> np.ndarray:
    """Flood from the border in plane, token by token."""
    found, open_places = set(), [p for p in np.ndindex(air.shape) if air[p]]
    open_places = [p for p in open_places if p[1] in (0, air.shape[1] - 1) or p[2] in (0, air.shape[2] - 1)]
    while open_places:
        place = open_places.pop()
        if place in found:
            continue
        found.add(place)
        for axis in range(3):
            for step in (-1, 1):
                beside = tuple(x + step * (i == axis) for i, x in enumerate(place))
                if all(0 <= x < n for x, n in zip(beside, air.shape, strict=True)) and air[beside]:
                    open_places.append(beside)
    return np.array([p not in found for p in np.ndindex(air.shape)])


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    share=st.floats(0.2, 0.9),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_background_is_that_of_a_plain_flood(shape: tuple[int, int, int], share: float, seed: int) -> None:
    air = np.random.default_rng(seed).random(shape) < share
    volume = torch.from_numpy(~air).float().repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(2, 0)
    patches, grid = patchify(volume, PatchGeometry((2, 2, 2), 1, 2))
    found = body_tokens(patches, grid, 2, AIR).numpy()
    expected = plain_body(air)
    if not expected.any():
        expected[0] = True
    assert found.tolist() == expected.tolist()


def test_a_token_is_air_up_to_the_threshold_and_by_its_brightest_voxel() -> None:
    assert drawn(torch.full((2, 4, 12), AIR)) == ["#.."]  # the first of equals
    volume = torch.zeros(2, 4, 12)
    volume[0, 0, 4] = AIR
    volume[1, 3, 11] = AIR + 1e-4
    assert drawn(volume) == ["..#"]
    assert drawn(volume, threshold=0.2) == ["..#"]  # all air: the brightest stays
    assert drawn(volume - 1, threshold=-0.95) == [".##"]
    assert drawn(volume, threshold=-1.0) == ["###"]


def test_padding_behind_a_volumes_end_is_air_like_its_minimum() -> None:
    volume = torch.full((3, 9, 9), -1.0)
    volume[:2, :4, :4] = 1.0
    assert drawn(volume, threshold=-0.5) == ["#.. ... ...", "... ... ..."]


# --- what enters the model ----------------------------------------------------------------------------------


def body(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """A scan with a body that fills its middle; tokens are 4 x 8 x 8 voxels."""
    volume = torch.zeros(shape)
    inner = volume[:, 8 : shape[1] - 8, 8 : shape[2] - 8]
    inner.copy_(torch.rand(inner.shape, generator=torch.Generator().manual_seed(seed)) + 0.2)
    return volume


def filled(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """A scan without background."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.2


@pytest.fixture(params=["qwen2.5", "qwen3"])
def skipping(request: Any, tiny: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A model of either backbone, with patches of 4 x 4 x 4 and windows of 4 x 4, and a processor that skips."""
    scheduling = {"layers": [1], "predictor_bias": 0.0}
    if request.param == "qwen2.5":
        model, processor = tiny(scheduling=scheduling)
    else:
        vision = {"temporal_patch_size": 4, "in_channels": 1}
        model, processor = tiny_qwen3(tokenizer, vision=vision, scheduling=scheduling)
    processor.skip_background = AIR
    return model, processor


def whole(processor: Any, groups: list[VolumeChats]) -> dict[str, Any]:
    """The batch of a processor that skips nothing."""
    processor.skip_background = None
    batch = processor.batch(groups)
    processor.skip_background = AIR
    return batch


SCANS = [body((8, 32, 40)), filled((4, 16, 24)), body((4, 24, 48), seed=1)]
"""Two with background, between them one without: 2 x 4 x 5, 2 x 3 and 3 x 6 tokens."""


def test_only_tokens_that_are_there_are_cut_and_written(skipping: Any) -> None:
    _, processor = skipping
    groups = [VolumeChats([scan], QUESTIONS) for scan in SCANS]
    batch, everything = processor.batch(groups), whole(processor, groups)
    present = [2 * 2 * 3, 2 * 3, 1 * 4]
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")).sum(1).tolist() == [
        n for n in present for _ in QUESTIONS
    ]
    assert torch.equal(batch["video_grid_thw"], everything["video_grid_thw"])
    index = batch["token_index"]
    first = [s * 20 + h * 5 + w for s in range(2) for h in (1, 2) for w in (1, 2, 3)]
    assert index.tolist() == [*first, *range(40, 46), *[46 + 6 + w for w in (1, 2, 3, 4)]]
    patches = everything["pixel_values_videos"].unflatten(0, (-1, 4))[index].flatten(0, 1)
    assert torch.equal(batch["pixel_values_videos"], patches)
    assert "token_index" not in everything


def test_positions_are_those_of_the_full_grid(skipping: Any) -> None:
    model, processor = skipping
    groups = [VolumeChats(SCANS[:2], QUESTIONS), VolumeChats(SCANS[2:], QUESTIONS[:1])]
    batch, everything = processor.batch(groups), whole(processor, groups)
    names = ("input_ids", "attention_mask", "video_grid_thw", "group_index", "labels")
    sparse = model.layout(*[batch[n] for n in names], token_index=batch["token_index"])
    full = model.layout(*[everything[n] for n in names])
    gone = torch.ones(len(full.visual), dtype=torch.bool)
    gone[batch["token_index"]] = False
    stays = torch.ones(len(full.source), dtype=torch.bool)
    stays[full.visual[gone]] = False
    assert torch.equal(sparse.positions, full.positions[:, stays])
    assert torch.equal(sparse.next_position, full.next_position)
    ids = [batch["input_ids"].flatten()[sparse.source], everything["input_ids"].flatten()[full.source[stays]]]
    assert torch.equal(*ids)


def masked_attention(allowed: Tensor) -> Callable[..., Tensor]:
    """A tower's attention over all tokens in which only ``allowed`` patches (N) are seen, written out."""

    def forward(
        self: PackedAttention, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any
    ) -> Tensor:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(1, 0, 2, 3)
        query, key = apply_rotary_pos_emb_vision(qkv[0], qkv[1], *position_embeddings)
        owner = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        seen = (owner[:, None] == owner) & allowed
        scores = torch.einsum("nhe,mhe->hnm", query, key) * self.scaling
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()  # a window may hold nothing
        return self.proj(torch.einsum("hnm,mhe->nhe", weights, qkv[2]).flatten(1))

    return forward


@torch.no_grad()
def test_the_tower_sees_what_attention_masked_to_present_tokens_sees(
    skipping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = skipping
    tower, groups = model.model.visual, [VolumeChats(SCANS, QUESTIONS)]
    batch, everything = processor.batch(groups), whole(processor, groups)
    grid, index = batch["video_grid_thw"], batch["token_index"]
    found, features = tower.encode(batch["pixel_values_videos"], grid, index)

    present = torch.zeros(int(grid.prod(1).sum()) // 4, dtype=torch.bool)
    present[index] = True
    if hasattr(tower, "window_size"):  # Qwen2.5-VL goes window by window
        order, _ = get_vision_window_index(grid, 2, tower.window_size, tower.patch_size)
        present = present[order]
    monkeypatch.setattr(PackedAttention, "forward", masked_attention(present.repeat_interleave(4)))
    expected, all_features = tower.encode(everything["pixel_values_videos"], grid)
    monkeypatch.undo()
    torch.testing.assert_close(found, expected[index], **CLOSE)
    assert len(features) == len(all_features) == len(getattr(tower, "deepstack_visual_indexes", ()))
    for feature, of_all in zip(features, all_features, strict=True):
        torch.testing.assert_close(feature, of_all[index], **CLOSE)
    # The mask matters: background changes what the body's tokens become.
    usual, _ = tower.encode(everything["pixel_values_videos"], grid)
    assert (usual[index] - found).abs().max() > 1e-2


@torch.no_grad()
def test_an_index_of_all_tokens_changes_nothing(skipping: Any) -> None:
    model, processor = skipping
    batch = whole(processor, [VolumeChats(SCANS[:2], QUESTIONS), VolumeChats(SCANS[2:], QUESTIONS)])
    every = torch.arange(int(batch["video_grid_thw"].prod(1).sum()) // 4)
    for reduction in ("none", "hard"):
        expected, found = model(**batch, reduction=reduction), model(**batch, reduction=reduction, token_index=every)
        assert torch.equal(found.logits, expected.logits)
        assert expected.kept is None or torch.equal(found.kept, expected.kept)
    without = processor.batch([VolumeChats([SCANS[1]], QUESTIONS)])
    assert without["token_index"].tolist() == list(range(6))


def test_volumes_with_and_without_background_change_nothing_for_each_other(skipping: Any) -> None:
    model, processor = skipping
    image = np.full((9, 20), 7, np.uint8)  # dark, but images keep every token
    processor.min_pixels = 64
    groups = [
        *[VolumeChats([scan], QUESTIONS) for scan in SCANS],
        VolumeChats(SCANS[:2], QUESTIONS[:1], [image]),
        VolumeChats([], QUESTIONS),
    ]
    batch = processor.batch(groups)
    # Both tokens of the image, which comes behind scans of 40, 6, 18, 40 and 6 tokens.
    assert batch["token_index"][-2:].tolist() == [110, 111]
    together = model(**batch)
    alone = [model(**processor.batch([group])) for group in groups]
    torch.testing.assert_close(together.token_losses, torch.cat([a.token_losses for a in alone]), **CLOSE)
    rates = torch.cat([a.keep_rate for a in alone])
    torch.testing.assert_close(together.keep_rate, rates)
    assert bool((rates[:-2] < 1).all())
    together.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.model.visual.parameters())


def test_a_volume_of_air_is_one_token(skipping: Any) -> None:
    model, processor = skipping
    batch = processor.batch([VolumeChats([torch.zeros(8, 16, 24)], QUESTIONS)])
    assert batch["token_index"].tolist() == [0] and len(batch["pixel_values_videos"]) == 4
    output = model(**batch)
    assert output.kept.tolist() == [[True], [True]] and bool(output.loss.isfinite())


@torch.no_grad()
def test_generation_gives_the_teacher_forced_logits(skipping: Any) -> None:
    model, processor = skipping
    model.eval()
    prompt = dict(processor([SCANS[0]], QUESTIONS[0][:1]))
    length = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    result = model.generate(**prompt, **length, output_logits=True, return_dict_in_generate=True)
    labels = torch.full_like(result.sequences, -100)
    labels[0, -5:] = result.sequences[0, -5:]
    inputs = {name: prompt[name] for name in ("pixel_values_videos", "video_grid_thw", "token_index")}
    forced = model(input_ids=result.sequences, labels=labels, **inputs)
    torch.testing.assert_close(forced.logits, torch.stack(result.logits, dim=1)[0], **CLOSE)
    beams = model.generate(**prompt, num_beams=2, num_return_sequences=2, **length)
    assert beams.shape == (2, prompt["input_ids"].shape[1] + 5)


def test_tokens_that_do_not_fit_are_an_error(skipping: Any) -> None:
    model, processor = skipping
    batch = processor.batch([VolumeChats([SCANS[0]], QUESTIONS)])
    with pytest.raises(ValueError, match="<|video_pad|> tokens for a volume"):
        model(**{**batch, "token_index": batch["token_index"][:-1]})
    with pytest.raises(ValueError, match=r"token_index: must ascend within 0\.\.39"):
        model(**{**batch, "token_index": batch["token_index"].flip(0)})
    with pytest.raises(ValueError, match="pixel_values_videos: 44 patches for 12 tokens"):
        model(**{**batch, "pixel_values_videos": batch["pixel_values_videos"][4:]})


def test_evidence_is_on_the_full_grid_and_background_counts_as_dropped(skipping: Any) -> None:
    model, processor = skipping
    adapter = PhotonAdapter(model.eval(), processor)
    volumes = [scan.numpy() for scan in SCANS[:2]]
    asked = [chat[0]["content"] for chat in QUESTIONS]
    prompt = dict(processor(volumes, [chat[:1] for chat in QUESTIONS]))
    there = torch.zeros(46, dtype=torch.bool)
    there[prompt["token_index"]] = True
    decided = model(**prompt).kept
    for mode in ("scheduled", "none", "random"):
        answers = adapter.answer(volumes, asked, mode, max_new_tokens=2, seed=0)
        for row, answer in enumerate(answers):
            assert answer.kept is not None and answer.kept.shape == (46,) and answer.kept.dtype == bool
            assert answer.tokens_before == 46 and answer.tokens_after == answer.kept.sum()
            assert len(adapter.token_boxes(volumes[0].shape)) + len(adapter.token_boxes(volumes[1].shape)) == 46
            assert not answer.kept[~there.numpy()].any()
            if mode == "none":
                assert answer.kept.tolist() == there.tolist()
            elif mode == "scheduled":
                assert answer.kept[there.numpy()].tolist() == decided[row].tolist()
