"""Pruned models: what stays, what the language model sees, generation, and the way back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import medpruner
from medpruner import HiPrune, HuluL1, MedPruner, PruningSettings, Random, Uniform, VisionZip
from tests.medpruner.tiny_slicewise import END, START, prompts, qwen3, qwen25

MODELS: dict[str, Callable[[], Any]] = {"qwen2.5": qwen25, "qwen3": qwen3}
EVERYTHING = MedPruner(gamma=None, tau=1.0)
METHODS = [
    MedPruner(gamma=0.01, tau=0.5), MedPruner(gamma=0.01, tau=0.5, features="tower"), VisionZip(keep=0.3), HiPrune(),
    HuluL1(threshold=0.2), Uniform(), Random(keep=0.3),
]  # fmt: skip
SIZES = [(4, 4, 6), (6, 4, 4)]


@pytest.fixture(params=list(MODELS))
def model(request: Any) -> Any:
    return MODELS[request.param]()


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("kind", ["video", "image"])
def test_keeping_everything_gives_the_unpruned_logits_bit_for_bit(model: Any, kind: str) -> None:
    inputs = prompts(model, SIZES, kind)
    expected = logits(model, inputs)
    medpruner.attach(model, EVERYTHING)
    found = logits(model, inputs)
    seen = inputs["attention_mask"].bool()
    assert torch.equal(found[seen], expected[seen])
    assert model.medpruner.report.rate == 1.0


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_dropped_slice_is_as_if_it_had_not_been_there(model: Any, kind: str) -> None:
    """Unpruned on a prompt from which the same slices were taken by hand, at the same positions."""
    inputs = prompts(model, [(4, 4, 6)], kind)
    medpruner.attach(model, MedPruner(gamma=0.01, nucleus=False))
    found = logits(model, inputs)
    report = model.medpruner.report
    assert report.volumes[0].slices.tolist() == [True, False, True, False]
    assert (report.slice_rate, report.token_rate, report.rate) == (0.5, 1.0, 0.5)
    positions = model.medpruner.backbone.positions(inputs)
    medpruner.detach(model)
    columns = report.columns[0]
    pixels, grid = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    by_hand = {
        "input_ids": inputs["input_ids"][:, columns],
        "attention_mask": torch.ones(1, len(columns), dtype=torch.long),
        "mm_token_type_ids": inputs["mm_token_type_ids"][:, columns],
        pixels: inputs[pixels].unflatten(0, (4, 24))[[0, 2]].flatten(0, 1),
        grid: inputs[grid][[0, 2]] if kind == "image" else torch.tensor([[2, 4, 6]]),
        "position_ids": torch.cat([torch.arange(len(columns))[None, None], positions[..., columns]]),
    }
    # The same products, in the tower over fewer slices: in float32, in another order.
    torch.testing.assert_close(found, logits(model, by_hand), rtol=1e-5, atol=1e-5)


def test_what_remains_of_a_prompt_reads_as_if_the_slice_had_not_been_there(model: Any) -> None:
    inputs = prompts(model, [(4, 4, 4)], "image")
    medpruner.attach(model, MedPruner(gamma=0.01, nucleus=False))
    logits(model, inputs)
    ids = inputs["input_ids"][0, model.medpruner.report.columns[0]].tolist()
    a_slice = [5] * 4
    assert ids[2:18] == [22, 30, START, *a_slice, END, 22, 32, START, *a_slice, END]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: s.name)
def test_generate_continues_as_single_steps_do(model: Any, settings: PruningSettings) -> None:
    """Greedy tokens of a batch equal those of its rows alone, chosen one by one from the logits of a longer prompt."""
    inputs = prompts(model, SIZES)
    medpruner.attach(model, settings)
    special = [0, START, END, 5, 6]  # a random model may write placeholders
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=special)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert 0 < model.medpruner.report.rate < 1
    new = out[:, inputs["input_ids"].shape[1] :]
    longer = dict(inputs)
    for step in range(4):
        last = logits(model, longer)[:, -1].index_fill(1, torch.tensor(special), -torch.inf)
        assert torch.equal(last.argmax(-1), new[:, step])
        longer["input_ids"] = torch.cat([longer["input_ids"], new[:, step : step + 1]], 1)
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            longer[name] = torch.cat([longer[name], torch.full((2, 1), fill, dtype=longer[name].dtype)], 1)


def test_beams_and_samples_see_their_own_row(model: Any) -> None:
    both = prompts(model, SIZES)
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5))
    beams = model.generate(**both, max_new_tokens=3, num_beams=3, do_sample=False, eos_token_id=None)
    samples = model.generate(
        **both, max_new_tokens=3, num_return_sequences=2, do_sample=True, top_k=1, eos_token_id=None
    )
    greedy = model.generate(**both, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(samples, greedy.repeat_interleave(2, 0))
    assert beams.shape == greedy.shape
    assert torch.equal(beams[:, : both["input_ids"].shape[1]], both["input_ids"])
    scored = model.generate(**both, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, do_sample=False)
    # Steps with a cache and a whole prompt: the same sums in another order.
    torch.testing.assert_close(scored.logits[0], logits(model, both)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [MedPruner(gamma=0.01, tau=0.5), VisionZip(keep=0.3)], ids=lambda s: s.name)
def test_rows_do_not_depend_on_their_company(model: Any, settings: PruningSettings) -> None:
    both = prompts(model, SIZES)
    medpruner.attach(model, settings)
    together = logits(model, both)[1, -1]
    patches = 4 * 4 * 6
    width = int(both["attention_mask"][1].sum())
    alone = {k: both[k][1:, -width:] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    alone |= {
        "pixel_values_videos": both["pixel_values_videos"][patches:],
        "video_grid_thw": both["video_grid_thw"][1:],
    }
    torch.testing.assert_close(logits(model, alone)[0, -1], together, rtol=1e-4, atol=1e-4)


def test_the_published_order_gives_the_same_and_costs_the_tower(model: Any) -> None:
    inputs = prompts(model, SIZES)
    shown: list[int] = []
    model.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: shown.append(len(args[0])))
    found = []
    for first in (False, True):
        medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5, encode_dropped=first))
        found.append(logits(model, inputs))
        medpruner.detach(model)
    assert shown[0] * 2 == shown[1] == len(inputs["pixel_values_videos"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)  # a batch of another size in the tower


def test_one_token_of_each_dropped_slice_can_stay(model: Any) -> None:
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5, encode_dropped=True, dropped_tokens=1))
    logits(model, prompts(model, SIZES))
    volume = model.medpruner.report.volumes[0]
    assert volume.slices.tolist() == [True, False, True, False]
    assert volume.tokens[~volume.slices].sum(1).tolist() == [1, 1]


def test_merging_before_the_projector_differs_only_at_centres(model: Any) -> None:
    inputs = prompts(model, [(2, 8, 8)])
    seen = []
    for features in ("projector", "tower"):
        medpruner.attach(model, MedPruner(gamma=None, tau=0.5, features=features, centre_share=0.2))  # type: ignore[arg-type]
        seen.append(model.medpruner.prune(inputs)[0]["inputs_embeds"])
        centres = int(model.medpruner.report.volumes[0].centres.sum())
        medpruner.detach(model)
    different = (seen[0] != seen[1]).any(-1).sum()
    assert centres == different == 6  # 16 tokens a slice, 3 centres each


def test_two_volumes_in_a_row_are_filtered_apart(model: Any) -> None:
    inputs = prompts(model, [[(2, 4, 4), (2, 4, 4)]], "image")
    medpruner.attach(model, MedPruner(gamma=0.01, nucleus=False))
    logits(model, inputs)
    assert [v.slices.tolist() for v in model.medpruner.report.volumes] == [[True, False], [True, False]]


def test_images_and_videos_share_a_prompt(model: Any) -> None:
    """A video and then images in one row: each is pruned as it is alone."""
    video, images = prompts(model, [(4, 4, 6)]), prompts(model, [(2, 4, 4)], "image", seed=1)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    both = {**video, **images, **{name: torch.cat([video[name], images[name]], 1) for name in names}}
    medpruner.attach(model, EVERYTHING)
    found = logits(model, both)
    medpruner.detach(model)
    assert torch.equal(found, logits(model, both))
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5))
    logits(model, both)
    together = model.medpruner.report.volumes
    for alone, of_both in ((images, together[0]), (video, together[1])):
        logits(model, alone)
        assert torch.equal(model.medpruner.report.volumes[0].tokens, of_both.tokens)


def test_detach_gives_the_model_back(model: Any) -> None:
    inputs = prompts(model, SIZES)
    before, attributes = logits(model, inputs), set(vars(model))
    assert medpruner.attach(model, MedPruner(gamma=0.01, tau=0.3)) is model
    assert logits(model, inputs).shape != before.shape
    medpruner.detach(model)
    assert torch.equal(logits(model, inputs), before)
    assert set(vars(model)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_text_alone_and_bfloat16(model: Any) -> None:
    inputs = prompts(model, SIZES)
    text = {"input_ids": torch.tensor([[20, 21, 22]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = logits(model, text)
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5))
    assert torch.equal(logits(model, text), expected)
    model.bfloat16()
    assert logits(model, inputs).isfinite().all()


def test_labels_follow_the_columns(model: Any) -> None:
    inputs = prompts(model, SIZES)
    labels = torch.where(inputs["input_ids"] == 24, 24, -100)
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.5))
    shorter = model.medpruner.prune({**inputs, "labels": labels})[0]
    assert torch.equal(shorter["labels"] == 24, shorter["input_ids"] == 24)
    assert (shorter["labels"] == 24).sum() == 22


# --- what a user can get wrong ------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(model: Any) -> None:
    inputs = prompts(model, [(2, 4, 4)])
    with pytest.raises(ValueError, match=r"model_type None can't be pruned \(known: qwen2_5_vl"):
        medpruner.attach(torch.nn.Linear(1, 1))
    qkv = model.model.visual.blocks[1].attn.qkv
    del model.model.visual.blocks[1].attn.qkv
    with pytest.raises(ValueError, match="no attn.qkv in them; the tower's attention can't be read"):
        medpruner.attach(model)
    model.model.visual.blocks[1].attn.qkv = qkv
    with pytest.raises(ValueError, match="layer: 3, the tower has blocks 0 to 2"):
        medpruner.attach(model, MedPruner(layer=3))
    with pytest.raises(ValueError, match="the model does not prune"):
        medpruner.detach(model)
    medpruner.attach(model)
    with pytest.raises(ValueError, match="prunes already"):
        medpruner.attach(model)
    with pytest.raises(ValueError, match="8 placeholders in row 0, 4 visual tokens"):
        model(**{**inputs, "video_grid_thw": torch.tensor([[1, 4, 4]])})
    with pytest.raises(ValueError, match="takes its inputs by name"):
        model(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"})
    with pytest.raises(ValueError, match="input_ids: missing"):
        model.generate(pixel_values_videos=inputs["pixel_values_videos"], video_grid_thw=inputs["video_grid_thw"])


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("medpruner", {"tau": 0.0}, "tau: 0.0, allowed is more than 0 to 1"),
        ("medpruner", {"tau": float("nan")}, "tau: nan"),
        ("medpruner", {"gamma": -1.0}, "gamma: -1.0, allowed is 0 to inf"),
        ("medpruner", {"temperature": 0.0}, "temperature: 0.0"),
        ("medpruner", {"gamma_unit": "hu"}, "gamma_unit: hu needs hu_per_pixel"),
        ("medpruner", {"dropped_tokens": 1}, "dropped_tokens: needs encode_dropped"),
        ("medpruner", {"tua": 0.5}, "no setting 'tua'"),
        ("visionzip", {"keep": 1.5}, "keep: 1.5, allowed is more than 0 to 1"),
        ("fastv", {}, "pruner 'fastv': unknown"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        medpruner.settings_of(name, values)


def test_gamma_in_hu_is_that_of_the_pixels() -> None:
    assert MedPruner(gamma=20.0, gamma_unit="hu", hu_per_pixel=400.0).threshold == 0.05
