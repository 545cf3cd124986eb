"""From one stage to the next: what is saved, what the next one starts from, and what is planned before."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import source_folder
from photon import PhotonForConditionalGeneration
from photon.flops import forward_flops, vision_flops
from tests.photon.tiny_recipes import SHAPE, TOKENS, Recipes, run

# --- folders ------------------------------------------------------------------------------------------------


def test_heads_and_model_go_on_in_the_next_stage(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.backbone("questions", backbone)
    module = recipe.build()
    saved = load_file(backbone / "auxiliary_heads.safetensors")
    assert saved.keys() == module.heads.state_dict().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in module.heads.state_dict().items())
    again = PhotonForConditionalGeneration.from_pretrained(backbone)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.photon.parameters(), strict=True))
    assert recipe.processor.tokenizer.get_vocab() == recipes.phase1(backbone)._load(str(backbone))[1].get_vocab()


def test_gathered_weights_are_saved_without_the_heads(recipes: Recipes, backbone: Path, tmp_path: Path) -> None:
    """As under ZeRO 3, where rank 0 alone has them all."""
    recipe = recipes.backbone("questions", backbone)
    module = recipe.build()
    tied: dict[int, Tensor] = {}  # one tensor for both names of a tied weight, as DeepSpeed gathers it
    state = module.state_dict()
    gathered = {name: tied.setdefault(t.data_ptr(), torch.zeros_like(t)) for name, t in state.items()}
    (tmp_path / "gathered").mkdir()
    recipe.save(module, gathered, tmp_path / "gathered")
    saved = load_file(tmp_path / "gathered" / "model.safetensors")
    assert saved.keys() == load_file(backbone / "model.safetensors").keys()
    assert not any(tensor.any() for tensor in saved.values())


def test_phase1_starts_as_the_backbone_and_phase2_as_phase1(recipes: Recipes, backbone: Path) -> None:
    """The inflated kernel reads the same grey scale: equal losses, before anything has learned."""
    first = recipes.phase1(backbone)
    aligned = first.build()
    slices = recipes.backbone("questions", backbone)
    expected = run(slices, slices.build())[2].terms["ce"].value.item()
    assert run(first, aligned)[2].terms["ce"].value.item() == pytest.approx(expected, rel=1e-4)
    folder = recipes.save(first, aligned, "phase1")
    second = recipes.phase2(folder)
    module = second.build()
    assert run(second, module, step=0)[2].terms["ce"].value.item() == pytest.approx(expected, rel=1e-4)
    done = recipes.save(second, module, "phase2")
    again = PhotonForConditionalGeneration.from_pretrained(done)
    assert again.config.scheduling_settings == second.settings.scheduling.settings()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))


def test_a_checkpoint_may_be_a_run_or_one_of_its_steps(recipes: Recipes, backbone: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_7"
    step.mkdir(parents=True)
    backbone.rename(step / "model")
    (step.parent / "latest").write_text("step_7\n")
    (step / "model" / "preprocessing.json").write_text(VolumeConfig().model_dump_json())
    for source in (tmp_path / "run", step, step / "model"):
        assert source_folder(str(source)) == str(step / "model")
        assert recipes.phase1(source).initial_config().patches.size == (4, 4, 4)
    assert source_folder("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_loading_and_saving_draw_no_bars(recipes: Recipes, backbone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    recipe = recipes.phase2(backbone)
    recipes.save(recipe, recipe.build(), "again")
    assert capfd.readouterr() == ("", "")


def spoil(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    if what == "cut short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "another model":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "pickled":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("cut short", "weights are damaged"),
        ("another model", "a checkpoint of 'bert'"),
        ("no config", "neither config.json nor checkpoints/latest"),
        ("pickled", "model.safetensors"),
    ],
)
@pytest.mark.parametrize("phase", ["phase1", "phase2"])
def test_a_checkpoint_that_cannot_be_used_is_one_line(
    recipes: Recipes, backbone: Path, phase: str, what: str, says: str
) -> None:
    spoil(backbone, what)
    with pytest.raises(UserError) as error:
        getattr(recipes, phase)(backbone).build()
    assert says in str(error.value) and str(backbone) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stage_that_needs_an_earlier_one_says_which(recipes: Recipes, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.checkpoint: stage questions starts from a run of stage vision"):
        recipes.backbone("questions").build()
    with pytest.raises(UserError, match=r"model.checkpoint: .*absent: no such folder; train photon.phase1 first"):
        recipes.phase2(tmp_path / "absent").build()
    (backbone / "auxiliary_heads.safetensors").unlink()
    with pytest.raises(UserError, match="auxiliary_heads.safetensors: not there; .* stage vision"):
        recipes.backbone("questions", backbone).build()


# --- figures ------------------------------------------------------------------------------------------------


def test_figures_for_the_plan(recipes: Recipes, backbone: Path) -> None:
    first, second = recipes.phase1(backbone), recipes.phase2(backbone)
    planned = first.initial_config()
    assert first.describe()["tokens_per_volume"] == second.describe()["tokens_per_volume"] == TOKENS
    whole = forward_flops(planned, SHAPE, 3, 48, 8, None)
    assert first.describe()["flops_per_volume"] == pytest.approx(2 * whole)  # no gradients of frozen weights
    dropped = forward_flops(second.initial_config(), SHAPE, 3, 48, 8, 0.15)  # the middle of the band
    assert second.describe()["flops_per_volume"] == pytest.approx(3 * dropped)
    questions, vision = (recipes.backbone(stage) for stage in ("questions", "vision"))
    slices = questions.initial_config()
    assert questions.describe()["flops_per_volume"] == pytest.approx(3 * forward_flops(slices, SHAPE, 3, 48, 8, None))
    assert vision.describe()["flops_per_volume"] == pytest.approx(3 * vision_flops(slices, TOKENS, TOKENS // 2))


def test_phase2_is_planned_from_its_backbone_until_phase1_has_saved(
    recipes: Recipes, backbone: Path, tmp_path: Path
) -> None:
    started = tmp_path / "phase1"
    for _ in range(2):  # phase 1 has not been started; it has been, and has saved nothing
        recipe = recipes.phase2(started, {"backbone": "Qwen/Qwen2.5-VL-3B-Instruct"})
        assert recipe.initial_config().text_config.num_hidden_layers == 36
        started.mkdir(exist_ok=True)
    (backbone / "preprocessing.json").write_text(VolumeConfig().model_dump_json())
    backbone.rename(started / "model")
    assert recipes.phase2(started, {"backbone": "unused"}).initial_config().text_config.num_hidden_layers == 4


def test_volumes_of_any_size_have_no_figures_and_train_all_the_same(recipes: Recipes, backbone: Path) -> None:
    recipe = recipes.phase2(backbone, volume__shape=None)
    assert recipe.describe().keys() == {"most_tokens_per_image"}
    assert set(run(recipe, recipe.build())[2].terms) == {"ce", "band"}
