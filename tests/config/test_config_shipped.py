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


def test_the_published_schedule_of_photon():
    first, second = load("photon_phase1"), load("photon_phase2")
    assert first.volume == second.volume and first.volume.shape == (140, 280, 280)
    assert first.training.optimizer.lr == 1e-4 and second.training.optimizer.lr == 1e-5
    assert {config.training.epochs for config in (first, second)} == {3}
    assert {config.training.optimizer.warmup for config in (first, second)} == {0.05}
    assert (first.training.volumes_per_batch, first.training.accumulation) == (2, 1)
    assert (second.training.volumes_per_batch, second.training.accumulation) == (1, 2)
