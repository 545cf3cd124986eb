"""Gemma 3 / MedGemma 1.5: pooling windows, sink tokens, labels of slices, attention both ways within an image."""

from typing import Any

import pytest
import torch
from torch import Tensor

import medpruner
from medpruner import MedPruner, PruningSettings, Random
from medpruner.backbones.gemma import _watch
from medpruner.towers import reading
from medpruner.windows import WINDOWS, ct_images, ct_message
from tests.medpruner import agreement
from tests.medpruner.agreement import GREEDY, METHODS, logits
from tests.medpruner.tiny_gemma import PATCH, SIDE, TOKENS, WINDOW, gemma

BOS, START, END, LINES, LABEL, COLON = 2, 3, 4, 10, 11, 9


def volume(count: int, generator: torch.Generator) -> Tensor:
    """Images of which every second nearly repeats the one before."""
    size = SIDE * WINDOW * PATCH
    images = torch.rand(count, 3, size, size, generator=generator)
    images[1::2] = images[:-1:2][: len(images[1::2])] + 0.001
    return images


def prompts(model: Any, counts: list[int], kinds: bool = True) -> dict[str, Any]:
    """A row for each number of slices, as MedGemma's processor writes them, padded on the left."""
    generator, token = torch.Generator().manual_seed(0), model.config.image_token_id
    rows = []
    for number, count in enumerate(counts):
        ids = [BOS, 20 + number, LINES]
        for s in range(count):
            ids += [LABEL, 12 + s, COLON, LINES, START, *[token] * TOKENS, END, LINES]
        rows.append([*ids, *range(40, 44 + number)])
    width = max(map(len, rows))
    ids_BL = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids_BL,
        "attention_mask": (torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])).long(),
        "pixel_values": torch.cat([volume(count, generator) for count in counts]),
    }
    return inputs | ({"token_type_ids": (ids_BL == token).long()} if kinds else {})


@pytest.fixture(params=[5, 70], ids=["placeholder in the vocabulary", "placeholder outside"])
def model(request: Any) -> Any:
    return gemma(request.param)


# --- pooling windows ----------------------------------------------------------------------------------------


def test_a_token_is_a_window_of_patches_not_a_piece_of_a_row() -> None:
    """Pixels, patches, importance and keys of a token all come from its square of the image."""
    model = gemma()
    medpruner.attach(model)
    backbone = model.medpruner.backbone
    inputs = prompts(model, [2])
    volumes = backbone.volumes(inputs, 16)
    pixels = backbone.pixels(inputs, volumes)[0]
    side = WINDOW * PATCH
    token = 1 * SIDE + 2  # second row, third column
    square = inputs["pixel_values"][1, :, side : 2 * side, 2 * side : 3 * side]
    assert pixels.shape == (2, TOKENS, 3 * side**2)
    assert torch.equal(pixels[1, token], square.flatten())
    flags = [torch.ones(2, dtype=torch.bool)]
    encoded = backbone.encode(inputs, flags, [2])
    tower = model.model.vision_tower(pixel_values=inputs["pixel_values"]).last_hidden_state
    grid = tower[1].unflatten(0, (SIDE * WINDOW, SIDE * WINDOW))
    mine = grid[2:4, 4:6].flatten(0, 1)
    assert torch.equal(encoded.patches[TOKENS + token], mine)
    # Averages in another order than the projector's own.
    torch.testing.assert_close(backbone.project(encoded.patches), encoded.features, rtol=1e-5, atol=1e-5)
    assert backbone.project(encoded.patches[:3]).shape == (3, 32)


def test_reading_equals_plain_attention_averaged_over_windows() -> None:
    model = gemma()
    model.set_attn_implementation("eager")
    inputs = prompts(model, [2])
    out = model.model.vision_tower(pixel_values=inputs["pixel_values"], output_attentions=True)
    columns = out.attentions[1].mean(1).sum(1)  # (images, patches): over heads, then queries
    expected = columns.unflatten(1, (SIDE, WINDOW, SIDE, WINDOW)).mean((2, 4)).flatten()
    medpruner.attach(model)
    encoded = model.medpruner.backbone.encode(inputs, [torch.ones(2, dtype=torch.bool)], [1])
    torch.testing.assert_close(encoded.readings[1].received, expected, rtol=1e-5, atol=1e-5)
    assert encoded.readings[1].received.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert encoded.readings[1].keys.shape == (2 * TOKENS, 8)


def test_sink_tokens_leave_one_primary_token_and_the_centres() -> None:
    """256 tokens of 4 x 4 patches with one-hot attention: 1 + 12 stay, under 5 % once slices go (MedPruner Table 2)."""
    model = gemma(image_size=128, patch_size=2, num_hidden_layers=1)
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    sink = 21 * 64 + 42  # a patch: row 21, column 42
    with torch.no_grad():
        embeddings = model.model.vision_tower.embeddings.position_embedding.weight
        embeddings[:, 0], embeddings[sink, 0] = -5.0, 50.0
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.fill_(30.0)
        attention.k_proj.weight.zero_()
        attention.k_proj.weight[:, 0] = 30.0
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 128, 128, generator=generator)
    images[1] = images[0] + 0.001
    ids = [BOS, *[x for s in range(2) for x in (LABEL, 12 + s, START, *[5] * 256, END)], 40]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": images}
    medpruner.attach(model, MedPruner())
    logits(model, inputs)
    report = model.medpruner.report
    kept = report.volumes[0]
    assert kept.slices.tolist() == [True, False]
    assert kept.tokens[0].sum() == 13 and kept.centres[0] == 12
    assert report.rate == 13 / 512 < 0.05
    primary = (21 // 4) * 16 + 42 // 4
    assert kept.tokens[0, primary]
    found = model.medpruner.backbone.encode(inputs, [kept.slices], [0]).readings[0].received
    assert found.argmax() == primary and found[primary] == pytest.approx(256, rel=1e-3)


# --- what the language model sees -----------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [True, False])
def test_keeping_everything_gives_the_unpruned_logits_bit_for_bit(model: Any, kinds: bool) -> None:
    agreement.keeping_everything_changes_nothing(model, prompts(model, [4], kinds), prompts(model, [3, 5], kinds))


def test_a_dropped_slice_is_as_if_it_had_not_been_there(model: Any) -> None:
    """Exactly the plain model on the images and the text that stay, at the positions that they had."""
    inputs = prompts(model, [4])
    medpruner.attach(model, MedPruner(gamma=0.01, nucleus=False))
    found = logits(model, inputs)
    report = model.medpruner.report
    assert report.volumes[0].slices.tolist() == [True, False, True, False]
    medpruner.detach(model)
    columns = report.columns[0]
    ids = inputs["input_ids"][:, columns]
    token = [model.config.image_token_id] * TOKENS
    slices = [[LABEL, 12 + s, COLON, LINES, START, *token, END] for s in (0, 2)]
    assert ids[0].tolist() == [BOS, 20, LINES, *slices[0], LINES, *slices[1], LINES, 40, 41, 42, 43]
    by_hand = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": inputs["token_type_ids"][:, columns],
        "pixel_values": inputs["pixel_values"][[0, 2]],
        "position_ids": columns[None],
    }
    assert torch.equal(found, logits(model, by_hand))
    one_way = {**by_hand, "token_type_ids": torch.zeros_like(ids)}
    assert not torch.equal(found, logits(model, one_way))  # both ways within an image matters here


def test_tokens_that_stay_see_each_other_both_ways() -> None:
    """A token's output depends on later tokens of its image, not on those of a later image."""
    model = gemma(window=512)
    inputs = prompts(model, [2])
    medpruner.attach(model, Random(keep=0.5))
    shorter, visual, _ = model.medpruner.prune(inputs)
    medpruner.detach(model)
    del shorter["input_ids"]
    assert torch.equal(shorter["token_type_ids"].bool(), visual)
    places = visual[0].nonzero()[:, 0]
    first, last, next_image = int(places[0]), int(places[TOKENS // 2 - 1]), int(places[-1])
    before = logits(model, shorter)
    for place, same in ((last, False), (next_image, True)):
        changed = {**shorter, "inputs_embeds": shorter["inputs_embeds"].clone()}
        changed["inputs_embeds"][0, place] += 1.0
        assert torch.equal(logits(model, changed)[0, first], before[0, first]) is same


def test_given_positions_are_kept() -> None:
    model = gemma()
    inputs = prompts(model, [2])
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None] * 2
    medpruner.attach(model, MedPruner(gamma=0.01, nucleus=False))
    shorter = model.medpruner.prune(inputs)[0]
    assert torch.equal(shorter["position_ids"][0], 2 * model.medpruner.report.columns[0])


# --- generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: s.name)
def test_generate_continues_as_single_steps_do(settings: PruningSettings) -> None:
    model = gemma()
    inputs = prompts(model, [4, 3])
    medpruner.attach(model, settings)
    out = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :width], inputs["input_ids"])
    agreement.generation_equals_single_steps(model, inputs, out[:, width:])


def test_beams_samples_and_the_cache() -> None:
    model = gemma()
    both = prompts(model, [4, 3])
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5))
    lengths: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.generate(**both, max_new_tokens=4, **GREEDY)
    assert lengths[0] < both["input_ids"].shape[1] and lengths[1:] == [1, 1, 1]
    first = {**{k: v[:1] for k, v in both.items()}, "pixel_values": both["pixel_values"][:4]}
    agreement.beams_and_samples_see_their_own_row(model, both, first, both["input_ids"].shape[1])


def test_detach_gives_the_model_back(model: Any) -> None:
    agreement.detaching_gives_the_model_back(model, prompts(model, [4]))


def test_one_image_and_bfloat16() -> None:
    model = gemma().bfloat16()
    medpruner.attach(model, MedPruner(tau=0.5))
    inputs = prompts(model, [1])
    assert logits(model, inputs).isfinite().all()
    assert model.medpruner.report.slice_rate == 1.0 and model.medpruner.report.rate < 1
    assert model.generate(**inputs, max_new_tokens=2, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 2


def test_what_does_not_fit_is_said_in_one_line() -> None:
    model = gemma()
    inputs = prompts(model, [2])
    medpruner.attach(model)
    with pytest.raises(ValueError, match=r"pixel_values: of shape \(3, 32, 32\); give \(images, 3, 32, 32\)"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][0]})
    with pytest.raises(ValueError, match="no placeholders for the last 2 of the images"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match="32 placeholders in row 0, 16 visual tokens"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    medpruner.detach(model)
    model.model.vision_tower = torch.nn.Identity()
    with pytest.raises(ValueError, match="vision_tower: no blocks with self_attn.q_proj"):
        medpruner.attach(model)


def test_hooks_of_a_reading_are_gone_after_an_error() -> None:
    model = gemma()
    medpruner.attach(model)
    attention = model.medpruner.backbone.attention
    with pytest.raises(KeyError), reading({0: attention[0]}, _watch):
        raise KeyError
    assert not attention[0].q_proj._forward_hooks and not attention[0]._forward_hooks


# --- the scan -------------------------------------------------------------------------------------------------


def test_colours_are_three_windows() -> None:
    hu = torch.tensor([-2000.0, -1024.0, 0.0, 40.0, 215.0, 3000.0]).reshape(1, 2, 3)
    images = ct_images(hu)
    assert images.shape == (1, 3, 2, 3) and images.dtype == torch.float32
    assert WINDOWS == ((-1024, 1024), (-135, 215), (0, 80))
    for colour, (low, high) in enumerate(WINDOWS):
        levels = [round(255 * min(max((x - low) / (high - low), 0.0), 1.0)) for x in hu.flatten().tolist()]
        expected = torch.tensor([(level / 255 - 0.5) / 0.5 for level in levels])
        torch.testing.assert_close(images[0, colour].flatten(), expected, rtol=1e-6, atol=1e-6)


def test_slices_of_a_long_scan_are_chosen_uniformly() -> None:
    hu = (torch.arange(200.0) * 10 - 1000)[:, None, None].expand(200, 2, 2)
    images = ct_images(hu)
    assert len(images) == 85 and len(ct_images(hu[:85])) == 85 and len(ct_images(hu[:1])) == 1
    shown = ((images[:, 0, 0, 0] + 1) * 1024 - 1024 + 1000) / 10
    gaps = shown.diff()
    assert shown[0].item() == pytest.approx(0, abs=1) and gaps.min() > 1 and gaps.max() < 4
    assert ct_images(hu, limit=4, size=8).shape == (4, 3, 8, 8)


def test_labels_come_before_images_and_the_question_last() -> None:
    parts = ct_message(2, "What is seen?", "A CT.")
    assert [part.get("text", "image") for part in parts] == [
        "A CT.", "SLICE 1:", "image", "SLICE 2:", "image", "What is seen?",
    ]  # fmt: skip
    assert [part["type"] for part in parts] == ["text", "text", "image", "text", "image", "text"]


def test_what_is_no_scan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"CT: of shape \(4, 4\)"):
        ct_images(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="not finite"):
        ct_images(torch.full((1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="limit: 0"):
        ct_images(torch.zeros(1, 2, 2), limit=0)
    with pytest.raises(ValueError, match="count: 0"):
        ct_message(0, "?")
