"""Every YAML file in configs/ is what the schema says, and the papers' figures stand in it."""

from pathlib import Path

import pytest

from mllm3d.config import config_to_yaml, load

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_shipped_config_loads_by_name_and_again_from_its_own_yaml(path, tmp_path):
    config = load(path.relative_to(CONFIGS).with_suffix("").as_posix())
    saved = tmp_path / "config.yaml"
    saved.write_text(config_to_yaml(config))
    assert load(saved) == config


def test_the_rows_of_table_6_differ_in_the_form_of_the_question_alone():
    inside, free = load("photon_deeptumorvqa"), load("photon_deeptumorvqa_free")
    choice, text = load("photon_deeptumorvqa_ood"), load("photon_deeptumorvqa_ood_free")
    assert (choice.data.where, text.data.where) == (inside.data.where, free.data.where)
    assert choice.data.where != text.data.where
    for config in (choice, text):
        assert (config.data.train_split, config.data.eval_split) == ("train_ood", "test_ood")
        assert config.data.expected is None  # the sizes are those of the other split
        assert (config.model, config.training) == (inside.model, inside.training)


def test_the_rows_of_table_4_without_finetuning():
    """One asks the backbone as it is, the other trains phase 1's vision tower and merger alone."""
    zero, baseline = load("table4/zero_shot"), load("table4/qwen25vl")
    assert zero.model == baseline.model.model_copy(update={"vision_lr": None})
    assert zero.volume == baseline.volume and zero.data == baseline.data
    assert zero.training.max_steps == 1
    vision, first, second = load("table4/vision_finetuned"), load("photon_phase1"), load("photon_phase2")
    assert vision.data == first.data and vision.volume == first.volume
    assert vision.model.checkpoint == second.model.checkpoint and vision.model.backbone == second.model.backbone
    assert vision.model.patch_init is None and vision.model.trains == "vision"
    assert vision.training.optimizer.lr == second.model.vision_lr
    # A hundred thousand steps at this rate move a weight by 1e-7 at most.
    assert zero.training.optimizer.lr == 1e-12 and zero.training.optimizer.weight_decay == 0
    assert zero.model.predictor_lr is None


def test_the_published_schedule_of_photon():
    first, second = load("photon_phase1"), load("photon_phase2")
    assert first.volume == second.volume and first.volume.shape == (140, 280, 280)
    assert first.training.optimizer.lr == 1e-4 and second.training.optimizer.lr == 1e-5
    assert {config.training.epochs for config in (first, second)} == {3}
    assert {config.training.optimizer.warmup for config in (first, second)} == {0.05}
    assert (first.training.volumes_per_batch, first.training.accumulation) == (2, 1)
    assert (second.training.volumes_per_batch, second.training.accumulation) == (1, 2)
