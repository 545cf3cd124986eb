"""Hulu-Med through its public module names, on a small stand-in."""

from typing import Any

import pytest
import torch

import medpruner
from medpruner import HuluL1, MedPruner, PruningSettings
from medpruner.backbones.hulu import SHAPES
from tests.medpruner import agreement
from tests.medpruner.agreement import GREEDY, METHODS, logits
from tests.medpruner.stand_in_hulu import COMMA, IMAGE, TIME, hulu, prompts

ONE = [[("video", 4, 4, 6)]]
TWO = [[("video", 4, 4, 6)], [("video", 6, 4, 4), ("image", 1, 2, 4)]]
EVERYTHING = MedPruner(gamma=None, tau=1.0)


@pytest.fixture(params=["qwen2", "qwen3"])
def model(request: Any) -> Any:
    return hulu(request.param)


# --- the tower ------------------------------------------------------------------------------------------------


def test_reading_equals_plain_attention_averaged_over_what_is_merged() -> None:
    """From the definition: softmax over the keys of a slice, summed over its queries."""
    model = hulu()
    inputs = prompts(TWO)
    seen: dict[str, Any] = {}
    attention = model.model.vision_encoder.encoder.layers[1].self_attn
    handle = attention.register_forward_pre_hook(lambda _, args, kw: seen.update(x=args[0], **kw), with_kwargs=True)
    medpruner.attach(model)
    backbone = model.medpruner.backbone
    volumes = backbone.volumes(inputs, 16)
    assert [len(volume) for volume in volumes] == [4, 6, 1]
    encoded = backbone.encode(inputs, [torch.ones(len(v), dtype=torch.bool) for v in volumes], [1])
    handle.remove()
    received = []
    for start, stop in zip(seen["cu_seqlens"][:-1], seen["cu_seqlens"][1:], strict=True):
        angles = seen["rotary_pos_emb"][start:stop]
        heads = []
        for head in range(2):
            some = slice(16 * head, 16 * head + 16)
            q, k = (proj(seen["x"][start:stop])[:, some] for proj in (attention.q_proj, attention.k_proj))
            q, k = (
                torch.cat([x[:, :8] * angles.cos() - x[:, 8:] * angles.sin(),
                           x[:, 8:] * angles.cos() + x[:, :8] * angles.sin()], 1)
                for x in (q, k)
            )  # fmt: skip
            heads.append((q @ k.T / 4).softmax(-1).sum(0))
        received.append(torch.stack(heads).mean(0))
    merge = 10 * [4] + [1]
    expected = torch.cat([r.unflatten(0, (-1, g)).mean(1) for r, g in zip(received, merge, strict=True)])
    torch.testing.assert_close(encoded.readings[1].received, expected, rtol=1e-5, atol=1e-5)
    assert encoded.readings[1].keys.shape == (4 * 6 + 6 * 4 + 8, 16)


def test_pixels_of_a_token_are_those_that_are_merged() -> None:
    inputs = prompts(TWO)
    medpruner.attach(model := hulu())
    backbone = model.medpruner.backbone
    pixels = backbone.pixels(inputs, backbone.volumes(inputs, 16))
    assert [tuple(p.shape) for p in pixels] == [(4, 6, 192), (6, 4, 192), (1, 8, 48)]
    assert torch.equal(pixels[1][2, 3], inputs["pixel_values"][96 + 2 * 16 + 12 : 96 + 2 * 16 + 16].flatten())
    assert torch.equal(pixels[2][0], inputs["pixel_values"][192:])


def test_dropped_slices_do_not_enter_the_tower() -> None:
    model = hulu()
    shown: list[int] = []
    model.model.vision_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: shown.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5))
    logits(model, prompts(TWO))
    assert shown == [2 * 24 + 3 * 16 + 8]


# --- what the language model sees -----------------------------------------------------------------------------


def test_keeping_everything_gives_the_unpruned_logits_bit_for_bit(model: Any) -> None:
    agreement.keeping_everything_changes_nothing(model, prompts([[*ONE[0], ("image", 1, 4, 4)]]), prompts(TWO))


def test_a_dropped_slice_is_as_if_it_had_not_been_there(model: Any) -> None:
    """Exactly the plain model on the frames and the text that stay, at the positions that they had."""
    inputs = prompts(ONE)
    medpruner.attach(model, MedPruner(gamma=0.01, nucleus=False))
    found = logits(model, inputs)
    report = model.medpruner.report
    medpruner.detach(model)
    columns = report.columns[0]
    ids = inputs["input_ids"][:, columns]
    assert ids[0].tolist() == [20, 21, TIME, 30, *[IMAGE] * 6, COMMA, TIME, 32, *[IMAGE] * 6, COMMA, *range(40, 45)]
    by_hand = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": inputs["pixel_values"].unflatten(0, (4, 24))[[0, 2]].flatten(0, 1),
        "grid_sizes": torch.tensor([[2, 4, 6]]),
        "merge_sizes": inputs["merge_sizes"],
        "modals": ["video"],
        "position_ids": columns[None],
    }
    assert torch.equal(found, logits(model, by_hand))


def test_its_own_rule_keeps_what_hulu_l1_keeps() -> None:
    """The published compression against the pruner of that name, on frames that change in places."""
    model = hulu(compression=True)
    inputs = prompts(ONE)
    frames = inputs["pixel_values"].view(4, 6, 4, -1)
    frames[1, 2] += 0.3
    frames[3, [0, 5]] -= 0.2
    kept = model.compression_mask(inputs["pixel_values"], inputs["grid_sizes"], inputs["merge_sizes"], ["video"])
    compressed = logits(model, inputs)
    medpruner.attach(model, HuluL1())
    pruned = logits(model, inputs)
    assert torch.equal(model.medpruner.report.volumes[0].tokens.flatten(), kept)
    assert 0.3 < kept.float().mean() < 0.9
    # Compression counts positions anew, a pruned prompt keeps those of the whole one.
    shorter = {k: v for k, v in model.medpruner.prune(inputs)[0].items() if k not in ("input_ids", "position_ids")}
    medpruner.detach(model)
    assert compressed.shape == pruned.shape and not torch.equal(compressed, pruned)
    assert torch.equal(logits(model, shorter), compressed)


def test_images_in_a_row_are_one_volume_and_hidden_pixels_none() -> None:
    model = hulu()
    inputs = prompts([[("image", 1, 4, 4), ("image", 1, 4, 4), ("text", 1, 4, 4)], [("image", 3, 2, 4)]])
    expected = logits(model, inputs)
    medpruner.attach(model, EVERYTHING)
    # The hidden pixels are not encoded: a batch of another size in the tower.
    row = inputs["attention_mask"].bool()[0]
    torch.testing.assert_close(logits(model, inputs)[0, row], expected[0, row], rtol=1e-5, atol=1e-5)
    assert [v.tokens.shape for v in model.medpruner.report.volumes] == [(2, 16), (3, 8)]
    assert not [name for name in SHAPES if model.medpruner.prune(inputs)[0].get(name) is not None]


def test_videos_of_one_size_are_volumes_apart() -> None:
    model = hulu()
    medpruner.attach(model, MedPruner(gamma=0.01, nucleus=False))
    logits(model, prompts([[("video", 2, 4, 4), ("video", 2, 4, 4), ("video", 1, 4, 4)]]))
    assert [v.slices.tolist() for v in model.medpruner.report.volumes] == [[True, False], [True, False], [True]]


# --- generation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: s.name)
def test_generate_continues_as_single_steps_do(settings: PruningSettings) -> None:
    model = hulu()
    inputs = prompts(TWO)
    medpruner.attach(model, settings)
    out = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    assert out.shape == (2, 4)  # new tokens only, as its own
    agreement.generation_equals_single_steps(model, inputs, out)


def test_beams_samples_and_the_cache(model: Any) -> None:
    both = prompts(TWO)
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5))
    lengths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(**both, max_new_tokens=4, **GREEDY)
    assert lengths[0] < both["input_ids"].shape[1] and lengths[1:] == [1, 1, 1]
    agreement.beams_and_samples_see_their_own_row(model, both, prompts(ONE), 0)


def test_detach_gives_the_model_back(model: Any) -> None:
    agreement.detaching_gives_the_model_back(model, prompts(ONE))


def test_one_image_text_alone_and_bfloat16() -> None:
    model = hulu().bfloat16()
    text = {"input_ids": torch.tensor([[20, 21, 22]])}
    expected, generated = logits(model, text), model.generate(**text, max_new_tokens=2, **GREEDY)
    medpruner.attach(model, MedPruner(tau=0.5))
    assert torch.equal(logits(model, text), expected)
    assert torch.equal(model.generate(**text, max_new_tokens=2, **GREEDY), generated)
    inputs = prompts([[("image", 1, 4, 4)]])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert logits(model, inputs).isfinite().all()
    assert model.medpruner.report.slice_rate == 1.0 and model.medpruner.report.rate < 1
    assert model.generate(**inputs, max_new_tokens=2, **GREEDY).shape == (1, 2)


# --- what a user can get wrong ----------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_in_one_line(model: Any) -> None:
    inputs = prompts(ONE)
    medpruner.attach(model)
    wrong: dict[str, dict[str, Any]] = {
        "grid_sizes: missing": {"grid_sizes": None},
        "modals: 2 for 1 grid_sizes": {"modals": ["video", "video"]},
        "pixel_values: 95 patches, 96 in grid_sizes": {"pixel_values": inputs["pixel_values"][1:]},
        "grid_sizes: rows or columns": {"grid_sizes": torch.tensor([[4, 3, 8]])},
        "24 placeholders in row 0, 96": {"merge_sizes": torch.tensor([1])},
        "no placeholders for the last 1": {"input_ids": torch.full((1, 5), 20), "attention_mask": None},
    }
    for said, given in wrong.items():
        with pytest.raises(ValueError, match=said):
            model(**{**inputs, **given})


def test_a_model_that_is_built_otherwise_is_refused() -> None:
    model = hulu()
    model.model.vision_encoder.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="eager attention mixes slices; load with attn_implementation='sdpa'"):
        medpruner.attach(model)
    model = hulu()
    model.model.vision_encoder.encoder.layers[0].self_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="vision_encoder: no blocks with self_attn.q_proj"):
        medpruner.attach(model)
    del model.model.mm_projector
    with pytest.raises(ValueError, match="no vision_encoder or no mm_projector"):
        medpruner.attach(model)
    assert getattr(model, "medpruner", None) is None and "generate" not in vars(model)
