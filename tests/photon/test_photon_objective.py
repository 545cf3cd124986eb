"""Phase 2's losses by kind of batch: which terms there are, what they are worth, and who learns from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mllm3d.training.recipe import StepOutput
from photon.losses import entropy, flip_loss
from tests.photon.tiny_recipes import Recipes, items, run

ALWAYS = {"probability": 1.0, "start": 0.0}
NEVER = {"probability": 0.0}


@pytest.fixture
def start(recipes: Recipes, backbone: Path) -> Any:
    """A phase-2 recipe with these settings, and its model."""

    def build(**model: Any) -> tuple[Any, nn.Module]:
        recipe = recipes.phase2(backbone, {"robustness": NEVER, "flip": NEVER, **model})
        torch.manual_seed(0)
        return recipe, recipe.build()

    return build


def step(recipe: Any, module: nn.Module, at: int = 9, **given: Any) -> tuple[StepOutput, dict[str, Any]]:
    """Losses of one batch (at step `at` of 10) and what the model returned in it."""
    seen: dict[str, Any] = {}
    handle = module.register_forward_hook(
        lambda _m, _a, kwargs, output: seen.update(output=output, given=kwargs), with_kwargs=True
    )
    output = run(recipe, module, at, **given)[2]
    handle.remove()
    return output, seen


def taught(module: nn.Module, output: StepOutput) -> set[str]:
    """Parameters that get a gradient from a batch."""
    module.zero_grad()
    sum(term.value for term in output.terms.values()).backward()
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_a_perturbed_batch_has_the_entropy_alone(start: Any) -> None:
    recipe, module = start(robustness={**ALWAYS, "weight": 2.0})
    output, seen = step(recipe, module)
    assert {name: term.per for name, term in output.terms.items()} == {"ce": "label_tokens", "robust": "label_tokens"}
    assert output.terms["ce"].value.item() == 0
    expected = -2 * entropy(seen["output"].logits).sum().item()
    assert output.terms["robust"].value.item() == pytest.approx(expected, rel=1e-6)
    whole = recipe.collate(items())["pixel_values_videos"]
    assert not torch.equal(seen["given"]["pixel_values_videos"], whole)
    assert output.metrics == {"perturbed": (1.0, 1.0), "flipped": (0.0, 1.0)}
    names = taught(module, output)
    assert names and not any("threshold_predictor" in name for name in names)


def test_a_flipped_batch_has_the_flip_loss_alone(start: Any) -> None:
    recipe, module = start(flip={**ALWAYS, "weight": 3.0})
    output, seen = step(recipe, module)
    assert set(output.terms) == {"ce", "flip"} and output.terms["ce"].value.item() == 0
    expected = 3 * flip_loss(seen["output"].token_losses).sum().item()
    assert output.terms["flip"].value.item() == pytest.approx(expected, rel=1e-6)
    assert output.metrics == {"perturbed": (0.0, 1.0), "flipped": (1.0, 1.0)}
    assert not any("threshold_predictor" in name for name in taught(module, output))


def test_an_added_flip_changes_nothing_of_the_other_losses(start: Any) -> None:
    recipe, module = start(flip=ALWAYS, objective="add")
    output, seen = step(recipe, module)
    usual, other = start()
    other.load_state_dict(module.state_dict())
    plain, _ = step(usual, other)
    assert set(output.terms) == {"ce", "band", "flip"} and set(plain.terms) == {"ce", "band"}
    for name in plain.terms:
        assert output.terms[name].value.item() == pytest.approx(plain.terms[name].value.item(), rel=1e-5)
    expected = flip_loss(seen["output"].flipped_losses).sum().item()
    assert output.terms["flip"].value.item() == pytest.approx(expected, rel=1e-6)
    assert {"keep_rate", "kept_tokens", "band_triggered", "token_accuracy"} <= output.metrics.keys()


def test_masks_are_flipped_from_their_start_on_and_only_where_tokens_are_dropped(start: Any) -> None:
    recipe, module = start(flip={"probability": 1.0, "start": 0.7})
    terms = [set(step(recipe, module, at)[0].terms) for at in (0, 3, 6, 8)]
    assert terms == [{"ce"}, {"ce", "band"}, {"ce", "band"}, {"ce", "flip"}]


def test_rows_without_a_volume_are_neither_perturbed_nor_flipped(start: Any) -> None:
    blind = items()[1]._replace(volumes=[])
    for settings in ({"robustness": ALWAYS}, {"flip": ALWAYS}):
        recipe, module = start(**settings)
        output, seen = step(recipe, module, chosen=[items()[0], blind])
        rows = recipe.collate([items()[0], blind])["layout"].label_rows
        own = seen["output"].token_losses[rows == 3].sum().item()  # the row of the second item
        assert own > 0 and output.terms["ce"].value.item() == pytest.approx(own, rel=1e-6)


def test_a_batch_without_any_volume_trains_text(start: Any) -> None:
    blind = [item._replace(volumes=[]) for item in items()]
    for settings in ({}, {"robustness": ALWAYS}, {"flip": ALWAYS}):
        recipe, module = start(**settings)
        output, seen = step(recipe, module, chosen=blind)
        assert output.terms["ce"].value.item() == pytest.approx(seen["output"].token_losses.sum().item(), rel=1e-6)
        assert all(term.value.item() == 0 for name, term in output.terms.items() if name != "ce")


def test_rows_without_a_volume_have_no_band_and_no_keep_rate(start: Any) -> None:
    recipe, module = start()
    blind = items()[1]._replace(volumes=[])
    alone, _ = step(recipe, module, chosen=[items()[0]])
    for chosen in ([items()[0], blind], [blind, items()[0]]):
        both, _ = step(recipe, module, chosen=chosen)
        assert both.terms["band"].value.item() == pytest.approx(alone.terms["band"].value.item(), rel=1e-5)
        for name in ("keep_rate", "band_triggered", "kept_tokens"):
            assert [float(x) for x in both.metrics[name]] == pytest.approx([float(x) for x in alone.metrics[name]])


def test_validation_sees_batches_as_they_are_and_draws_nothing(start: Any) -> None:
    recipe, module = start(robustness=ALWAYS)
    before = torch.get_rng_state()
    with torch.no_grad():
        output, seen = step(recipe, module)
    assert set(output.terms) == {"ce", "band"}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(seen["given"]["pixel_values_videos"], recipe.collate(items())["pixel_values_videos"])


def test_what_becomes_of_a_batch_follows_torchs_random_state(start: Any) -> None:
    recipe, module = start(robustness={"probability": 0.5})
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append([set(step(recipe, module)[0].terms) for _ in range(12)])
    assert drawn[0] == drawn[1]
    assert {"ce", "robust"} in drawn[0] and {"ce", "band"} in drawn[0]


def test_without_scheduling_every_token_is_kept(start: Any) -> None:
    recipe, module = start(scheduling=None)
    output, seen = step(recipe, module)
    assert set(output.terms) == {"ce"} and seen["output"].kept is None
    assert output.metrics["keep_rate"] == (1.0, 1.0)
    assert not any("threshold_predictor" in name for name in module.state_dict())


def test_phase2_without_phase1_renews_the_patch_embedding(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase2(backbone, {"patch_init": "fresh", "patch_size": [4, 4, 4]})
    module: Any = recipe.build()
    assert module.config.patches.size == (4, 4, 4) and module.config.patches.channels == 1
    assert recipe.initial_config().patches == module.config.patches


def test_background_can_be_left_out_of_training(start: Any) -> None:
    recipe, module = start(skip_background=-0.99)
    airy = items()
    for item in airy:
        item.volumes[0].array[:, :, 12:] = -1.0  # half of the 48 tokens are air up to the border
    batch = recipe.collate(airy)
    assert len(batch["token_index"]) == 24 * 2 and batch["patch_counts"] == [24, 24]
    for robustness in (NEVER, ALWAYS):
        recipe, module = start(skip_background=-0.99, robustness=robustness)
        output, seen = step(recipe, module, chosen=airy)
        assert len(seen["output"].visual_embeds) == 48
        assert all(term.value.isfinite() for term in output.terms.values())
    assert recipe.processor.skip_background == -0.99
