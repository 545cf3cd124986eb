"""What Photon's recipes hand to the trainer: parameter groups, frozen parts, batches, loss terms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllm3d.data.dataset import GroupItem
from photon.patch_embedding import Scale
from photon.processing_photon import VolumeChats
from photon.surrogate import DropTokens
from tests.data.pictures import picture
from tests.photon.tiny_recipes import ROWS, TOKENS, Recipes, items, run, separate_losses


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


# --- parameters ---------------------------------------------------------------------------------------------


def rate_of_each(recipe: Any, module: nn.Module) -> dict[str, tuple[float, float, bool]]:
    """Name -> (rate, decay, whether Muon may take it); every parameter stands in one group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, tuple[float, float, bool]] = {}
    labels = []
    for group in recipe.parameter_groups(module):
        labels.append(group["name"])
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr"], group["weight_decay"], group["use_muon"]
    assert len(set(labels)) == len(labels)
    return found


def test_phase2_gives_the_vision_tower_and_the_predictor_their_own_rates(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase2(backbone, {"vision_lr": 5e-4, "predictor_lr": 1e-2})
    module = recipe.build()
    found = rate_of_each(recipe, module)
    assert found.keys() == trainable(module) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        rate = 5e-4 if ".visual." in name else 1e-2 if "threshold_predictor" in name else 1e-3
        assert found[name] == (rate, 0.1 if parameter.ndim >= 2 else 0.0, False), name


def test_without_rates_of_their_own_all_share_one(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase2(backbone)
    assert {rate for rate, _, _ in rate_of_each(recipe, recipe.build()).values()} == {1e-3}


def test_muon_takes_hidden_matrices_and_nothing_else(recipes: Recipes) -> None:
    recipe = recipes.backbone("questions", training__optimizer={"name": "muon", "lr": 1e-3, "weight_decay": 0.1})
    module = recipe.build(meta=True)
    found = rate_of_each(recipe, module)
    by_muon = {name for name, (_, _, muon) in found.items() if muon}
    assert all(dict(module.named_parameters())[name].ndim == 2 for name in by_muon)
    assert {f"photon.model.language_model.layers.{i}.mlp.up_proj.weight" for i in range(4)} < by_muon
    assert "photon.model.visual.blocks.1.attn.qkv.weight" in by_muon
    for part in ("patch_embed", "embed_tokens", "lm_head", "heads.", "norm", "bias"):
        assert not [name for name in by_muon if part in name], part


def test_phase1_trains_the_patch_embedding_alone(recipes: Recipes, backbone: Path) -> None:
    module = recipes.phase1(backbone).build()
    assert trainable(module) == {"model.visual.patch_embed.proj.weight"}
    assert trainable(recipes.phase1(backbone).build(meta=True)) == trainable(module)


def test_the_vision_stage_leaves_the_decoder_alone(recipes: Recipes, backbone: Path) -> None:
    module = recipes.backbone("vision").build()
    parts = {name.split(".")[0] if name.startswith("heads") else name.split(".")[2] for name in trainable(module)}
    assert parts == {"visual", "heads"}
    questions = recipes.backbone("questions", backbone).build()
    assert trainable(questions) == {name for name, _ in questions.named_parameters()}


@pytest.mark.parametrize("name", ["vision", "questions", "phase1", "phase2"])
def test_the_planned_model_has_the_parameters_of_the_built_one(recipes: Recipes, backbone: Path, name: str) -> None:
    small = name in ("vision", "questions")
    recipe = recipes.backbone(name, backbone) if small else getattr(recipes, name)(backbone)
    planned, built = recipe.build(meta=True), recipe.build()
    shapes = [{n: (tuple(p.shape), p.requires_grad) for n, p in m.named_parameters()} for m in (planned, built)]
    vocabulary = len(recipe.processor.tokenizer)
    if small:  # planned before the tokenizer is trained: with the largest vocabulary
        words = "photon.model.language_model.embed_tokens.weight"
        assert shapes[0][words][0] == (320, 32) and shapes[1][words][0] == (vocabulary, 32) and vocabulary <= 320
        shapes[0][words] = shapes[1][words]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in planned.parameters())


# --- batches and losses -------------------------------------------------------------------------------------


def test_counts_are_those_of_the_rows(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase2(backbone)
    recipe.build()
    batch = recipe.collate(items())
    tokenizer = recipe.processor.tokenizer
    answers = [len(tokenizer(row.answer)["input_ids"]) + 1 for row in ROWS]  # and the end of the turn
    assert len(set(answers)) > 1
    counts = recipe.counts(batch)
    assert (counts["label_tokens"], counts["questions"], counts["volumes"]) == (sum(answers), 4, 2)
    longest = int((batch["input_ids"][0] != tokenizer.pad_token_id).sum())
    assert longest > TOKENS
    # All that enters the decoder, each volume once: the rows without their repeated prefixes.
    whole = sum(int((row != tokenizer.pad_token_id).sum()) for row in batch["input_ids"])
    assert counts["tokens"] == whole - 2 * batch["layout"].prefix_lengths[0]
    assert recipe.sample_ids(batch) == ["q0", "q1", "q2", "q3"]


def test_images_and_videos_reach_the_model_in_their_order(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase2(backbone, {"min_pixels": 64, "max_pixels": 300})
    module = recipe.build()
    assert (recipe.processor.min_pixels, recipe.processor.max_pixels) == (64, 300)
    study, other = picture(3, 12, 16, 3), picture(2, 20, 30)
    found = [
        GroupItem([], ROWS[:2], None, list(study), []),
        GroupItem([], ROWS[2:3], None, [], [other]),
        items()[1],
    ]
    batch = recipe.collate(found)
    chats = [[{"role": "user", "content": r.question}, {"role": "assistant", "content": r.answer}] for r in ROWS]
    expected = recipe.processor.batch(
        [
            VolumeChats([], chats[:2], list(study)),
            VolumeChats([], chats[2:3], [], [other]),
            VolumeChats([found[2].volumes[0].array], chats[3:]),
        ]
    )
    assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert batch["grids"] == expected["video_grid_thw"].tolist() and len(batch["grids"]) == 5
    turned = recipe.collate([found[0]._replace(images=list(study[::-1])), *found[1:]])
    assert not torch.equal(turned["pixel_values_videos"], batch["pixel_values_videos"])
    assert recipe.counts(batch)["volumes"] == 3 and recipe.counts(batch)["questions"] == 4
    _, _, output = run(recipe, module, chosen=found)
    assert all(bool(term.value.isfinite()) for term in output.terms.values())


def test_without_volumes_grey_pixels_are_read_as_the_checkpoint_read_them(recipes: Recipes, backbone: Path) -> None:
    first = recipes.phase1(backbone)
    folder = recipes.save(first, first.build(), "grey")
    for volume, scale in ((None, Scale(0.5, 0.5)), ({"mean": 0.25}, Scale(0.25, 1.0))):
        recipe = recipes.phase2(folder, volume=volume)
        recipe.build()
        assert recipe.processor.reader.scale == [scale]


def test_phase1_sums_cross_entropy_over_label_tokens(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase1(backbone)
    module = recipe.build()
    _, counts, output = run(recipe, module)
    assert set(output.terms) == {"ce"} and output.terms["ce"].per == "label_tokens"
    apart = torch.cat(separate_losses(recipe, module))
    assert len(apart) == counts["label_tokens"]
    assert output.terms["ce"].value.item() == pytest.approx(apart.sum().item(), rel=1e-4)
    right, of = output.metrics["token_accuracy"]
    assert of == counts["label_tokens"] and 0 <= right <= of


@pytest.mark.parametrize(
    ("soft_from", "hard_from", "total", "stages"),
    [
        (0.2, 0.5, 10, {0: "none", 1: "none", 2: "soft", 4: "soft", 5: "hard", 9: "hard"}),
        (4000.0, 8000.0, 13950, {0: "none", 3999: "none", 4000: "soft", 7999: "soft", 8000: "hard", 13949: "hard"}),
        (0.0, 0.0, 10, {0: "hard"}),
        (0.0, 1.0, 10, {0: "soft", 1: "hard"}),  # from 1 on it is a number of steps
        (0.0, 20.0, 10, {0: "soft", 9: "soft"}),
    ],
)
def test_the_stage_follows_the_step(
    recipes: Recipes, tmp_path: Path, soft_from: float, hard_from: float, total: int, stages: dict[int, str]
) -> None:
    recipe = recipes.phase2(tmp_path, {"scheduling": {"soft_from": soft_from, "hard_from": hard_from}})
    assert {step: recipe.reduction(step, total) for step in stages} == stages


def test_phase2_adds_the_band_once_tokens_are_weighed(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase2(backbone, {"band": {"low": 0.1, "high": 0.2, "weight": 3.0}})
    module = recipe.build()
    batch, _, before = run(recipe, module, step=0)
    assert set(before.terms) == {"ce"} and before.metrics["keep_rate"] == (1.0, 1.0)
    for step, reduction in ((3, "soft"), (7, "hard")):
        _, _, output = run(recipe, module, step)
        assert {name: term.per for name, term in output.terms.items()} == {"ce": "label_tokens", "band": "questions"}
        forward = module(
            batch["input_ids"],
            layout=batch["layout"],
            pixel_values_videos=batch["pixel_values_videos"],
            video_grid_thw=torch.tensor(batch["grids"]),
            reduction=reduction,
        )
        outside = [max(r - 0.2, 0) + max(0.1 - r, 0) for r in forward.mean_probability[:, 0].tolist()]
        assert sum(outside) > 0
        assert output.terms["band"].value.item() == pytest.approx(3 * sum(outside), rel=1e-5)
        kept, of = (float(x) for x in output.metrics["keep_rate"])
        rate = forward.keep_rate.sum().item() / 4 if reduction == "hard" else 1.0
        assert kept / of == pytest.approx(rate)


def test_a_fixed_keep_ratio_needs_no_band_and_no_predictor(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase2(backbone, {"scheduling": {"keep_ratio": 0.25, "soft_from": 0.0, "hard_from": 0.0}})
    module = recipe.build()
    _, _, output = run(recipe, module)
    assert set(output.terms) == {"ce"}
    assert not [name for name, _ in module.named_parameters() if "threshold" in name]
    kept, of = (float(x) for x in output.metrics["keep_rate"])
    assert kept / of == pytest.approx(round(0.25 * TOKENS) / TOKENS)


def gradients(
    recipe: Any, module: nn.Module, batches: list[list[GroupItem]], step: int, scale: float = 1.0
) -> dict[str, Tensor]:
    """Of `scale` times the loss of one optimizer step that is cut into these batches."""
    counts = recipe.counts(recipe.collate([item for chosen in batches for item in chosen]))
    weights = {name: scale / count for name, count in counts.items()}
    module.zero_grad()
    for chosen in batches:
        terms = recipe.losses(module, recipe.collate(chosen), step, 10, weights).terms
        torch.stack([term.value * weights[term.per] for term in terms.values()]).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to rounding: a few units in the sixth digit of a tensor's largest entry."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest + 1e-9)


@pytest.mark.parametrize("step", [0, 3, 7])
def test_gradients_do_not_depend_on_how_a_step_is_cut_into_batches(recipes: Recipes, backbone: Path, step: int) -> None:
    recipe = recipes.phase2(backbone)
    module = recipe.build()
    together = gradients(recipe, module, [items()], step)
    assert any("threshold_predictor" in name for name in together) == (step > 0)
    assert_near(gradients(recipe, module, [[item] for item in items()], step), together)


def test_surrogate_gradients_follow_the_scale_of_the_loss(recipes: Recipes, backbone: Path) -> None:
    """Eq. 13 has an absolute epsilon: without the weights, a small share of a large batch would fall below it."""
    recipe = recipes.phase2(backbone)
    module = recipe.build()
    whole = gradients(recipe, module, [items()], step=7)
    assert all(whole[f"model.threshold_predictors.0.mlp.{layer}.weight"].any() for layer in (0, 2))
    share = gradients(recipe, module, [items()], step=7, scale=2.0**-20)
    assert_near({name: gradient * 2.0**20 for name, gradient in share.items()}, whole)


def test_the_predictor_learns_from_each_questions_own_mean(recipes: Recipes, backbone: Path) -> None:
    """Eq. 12 is of one sample's loss, however long its answer and whatever shares its batch."""
    scheduling = {"predictor_bias": 0.0, "hard_from": 0.0, "eps_std": 1e3}  # z is then proportional to eta
    recipe = recipes.phase2(backbone, {"scheduling": scheduling, "band": {"weight": 0.0}})
    module = recipe.build()

    def of_predictor(chosen: list[GroupItem]) -> dict[str, Tensor]:
        found = gradients(recipe, module, [chosen], step=9)
        return {name: gradient for name, gradient in found.items() if "threshold_predictor" in name}

    apart = [of_predictor([item._replace(rows=[row])]) for item in items() for row in item.rows]
    assert_near({name: sum(one[name] for one in apart) / 4 for name in apart[0]}, of_predictor(items()))  # type: ignore[misc]


def test_a_rows_gradient_is_turned_back_into_that_of_its_mean(
    recipes: Recipes, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.phase2(backbone)
    module = recipe.build()
    scales: list[Tensor] = []

    class Watched:
        @staticmethod
        def apply(*given: Any) -> Tensor:
            scales.append(given[6])
            return DropTokens.apply(*given)

    monkeypatch.setattr("photon.stream.DropTokens", Watched)
    batch, counts, _ = run(recipe, module)
    labels = torch.bincount(batch["layout"].label_rows)
    torch.testing.assert_close(scales[0], counts["label_tokens"] / labels)


def test_the_vision_stage_learns_from_labels_alone(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.backbone("vision", backbone)
    module = recipe.build()
    batch, counts, output = run(recipe, module)
    assert {name: term.per for name, term in output.terms.items()} == {"dense": "volumes", "findings": "volumes"}
    assert "token_accuracy" not in output.metrics
    shares = batch["shares"]
    assert shares.shape == (2, TOKENS, 2)
    assert shares[0, 0].tolist() == [1.0, 0.0]
    lesion = 6 * 4 + 6 + 1  # token (1, 1, 1) of the 2 x 4 x 6 grid
    assert shares[0, lesion].tolist() == [0.0, 1 / 64]
    # The first volume's findings are known, of the second only the liver; a count says nothing of existence.
    assert batch["findings"].tolist() == [[1.0, 0.0], [-1.0, 1.0]]
    known = output.metrics["finding_accuracy"][1]
    assert int(known) == 3 and counts["volumes"] == 2


def test_the_question_stage_adds_answers_to_the_heads(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.backbone("questions", backbone)
    module = recipe.build()
    _, counts, output = run(recipe, module)
    assert set(output.terms) == {"ce", "dense", "findings"} and output.terms["ce"].per == "label_tokens"
    apart = torch.cat(separate_losses(recipe, module.photon))
    assert output.terms["ce"].value.item() == pytest.approx(apart.sum().item(), rel=1e-4)
    vision = recipes.backbone("vision", backbone)
    alone = run(vision, vision.build())[2]
    for name in ("dense", "findings"):
        assert output.terms[name].value.item() == pytest.approx(alone.terms[name].value.item(), rel=1e-5)
    half = recipes.backbone("questions", backbone)
    half.config = half.config.model_copy(update={"model": half.settings.model_copy(update={"dense_weight": 2.0})})
    lighter = run(half, half.build())[2]
    assert lighter.terms["dense"].value.item() == pytest.approx(output.terms["dense"].value.item() / 2, rel=1e-5)
