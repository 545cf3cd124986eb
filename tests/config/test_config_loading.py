"""Reading configs: names, parents, overrides, presets, origins, and the way back to YAML."""

import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mllm3d.config import (
    PRESETS,
    Config,
    OptimizerConfig,
    Settings,
    VolumeConfig,
    config_to_yaml,
    load,
    load_with_origins,
)
from mllm3d.config.show import show, write_preprocessing
from mllm3d.errors import UserError
from tests.config.conftest import MINIMAL


def test_a_minimal_config_is_typed_and_complete(write):
    config = load(write("run.yaml"))
    assert type(config) is Config
    assert type(config.model).__name__ == "RecipeSettings"
    assert config.training.optimizer.lr == 1e-4
    assert config.data.manifest == Path("manifest.jsonl")
    assert config.training.precision == "bf16" and config.training.zero_stage == 2


def test_a_config_is_found_by_path_and_by_name(write):
    write("configs/quickstart/phase1.yaml")
    names = [
        "quickstart/phase1",
        "quickstart/phase1.yaml",
        "configs/quickstart/phase1.yaml",
        Path("configs/quickstart/phase1"),
    ]
    configs = [load(name) for name in names]
    assert all(config == configs[0] for config in configs)
    assert configs[0].run.output == Path("runs/quickstart/phase1")


def test_outside_configs_a_run_is_named_after_the_file(write):
    assert load(write("elsewhere/mine.yaml")).run.output == Path("runs/mine")
    assert load("elsewhere/mine.yaml", ["run.output=out/x"]).run.output == Path("out/x")


def test_a_child_wins_over_its_parents_and_lists_are_replaced(write):
    write("base.yaml")
    write(
        "parts/middle.yaml",
        "extends: ../base.yaml\nmodel: {patch_size: [2, 14, 14]}\ntraining: {epochs: 1}\n",
    )
    write("top.yaml", "extends: parts/middle.yaml\ntraining: {max_steps: 20}\nmodel: {patch_size: [7, 7, 7]}\n")
    config = load("top.yaml")
    assert config.training.epochs == 1 and config.training.max_steps == 20
    assert config.training.optimizer.lr == 1e-4
    assert config.model.model_dump()["patch_size"] == (7, 7, 7)


def test_overrides_are_yaml_values(write):
    overrides = [
        "training.optimizer.lr=3e-5",
        "model.patch_size=[2, 4, 6]",
        "data.where={task: [existence, yes]}",
        "training.save_every=",
        "run.seed = 7",
        "model.checkpoint=runs/a=b",
    ]
    config = load(write("run.yaml"), overrides)
    assert config.training.optimizer.lr == 3e-5
    assert config.model.model_dump()["patch_size"] == (2, 4, 6)
    assert config.data.where == {"task": ["existence", "yes"]}  # `yes` is a word, not true
    assert config.training.save_every is None
    assert config.run.seed == 7
    assert config.model.model_dump()["checkpoint"] == "runs/a=b"


def test_null_clears_what_a_parent_filters(write):
    write("base.yaml", "data: {where: {task: [a]}}\n")
    write("run.yaml", "extends: base.yaml\nrecipe: test.recipe\nvolume: {}\ndata: {manifest: m, where: null}\n")
    assert load("run.yaml", ["training.epochs=1", "training.optimizer.lr=1e-3"]).data.where == {}


def test_a_run_on_images_has_no_volume_section(write):
    """Not given, or cleared where a parent gives it; also after the way through the run's own YAML."""
    write("base.yaml")
    cleared = load_with_origins(write("run.yaml", "extends: base.yaml\nvolume: null\n"))
    assert not cleared.config.prepares_volumes and cleared.config.volume == VolumeConfig()
    assert cleared.origins["volume.preset"] == "default"
    again = write("runs/x/config.yaml", config_to_yaml(cleared.config))
    assert load(again) == cleared.config and not load(again).prepares_volumes
    assert "\nvolume:" not in again.read_text()
    assert load("base.yaml").prepares_volumes and load("run.yaml", ["volume.std=0.5"]).prepares_volumes
    absent = write("absent.yaml", "recipe: test.recipe\ndata: {manifest: m}\n")
    assert not load(absent, ["training.epochs=1", "training.optimizer.lr=1e-3"]).prepares_volumes
    assert not pickle.loads(pickle.dumps(cleared.config)).prepares_volumes


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.5e+3", 1500.0), (".5", 0.5), ("3.", 3.0), ("2", 2.0), ("1_000", 1000.0)],
)
def test_numbers_are_numbers(write, text, value):
    assert load(write("run.yaml"), [f"training.optimizer.lr={text}"]).training.optimizer.lr == value


@pytest.mark.parametrize("text", ["yes", "on", "2024-01-01", "'1e-4'", "12:30", "null_ish"])
def test_words_stay_words(write, text):
    assert load(write("run.yaml"), [f"data.train_split={text}"]).data.train_split == text.strip("'")


def test_other_settings_and_the_environment_can_be_named(write, monkeypatch):
    monkeypatch.setenv("DATA_FOLDER", "/somewhere")
    config = load(write("run.yaml"), ["data.manifest=${oc.env:DATA_FOLDER}/m.jsonl", "model.checkpoint=${recipe}/x"])
    assert config.data.manifest == Path("/somewhere/m.jsonl")
    assert config.model.model_dump()["checkpoint"] == "test.recipe/x"


def test_every_value_knows_where_it_comes_from(write):
    write("base.yaml")
    write("run.yaml", "extends: base.yaml\nvolume:\n  std: 0.25\ndata: {where: {task: [a]}}\n")
    origins = load_with_origins("run.yaml", ["training.optimizer.weight_decay=0.1", "data.where.organ=[liver]"]).origins
    assert origins["training.optimizer.lr"] == "base.yaml:9"
    assert origins["volume.std"] == "run.yaml:3"
    assert origins["volume.mean"] == "preset phantom"
    assert origins["volume.crop"] == "default"
    assert origins["training.optimizer.weight_decay"] == "command line"
    assert origins["data.where.task"] == "run.yaml:4" and origins["data.where.organ"] == "command line"


def test_shown_settings_name_value_origin_and_meaning(write):
    loaded = load_with_origins(write("run.yaml"), ["run.seed=3"])
    lines = show(loaded).splitlines()
    assert lines[0] == "# run.yaml"
    assert [line.split() for line in lines if line.startswith("run.seed")] == [["run.seed", "3", "command", "line"]]
    explained = show(loaded, explain=True)
    assert "    Peak learning rate" in explained and "    Lower end." in explained


def test_yaml_of_a_config_loads_to_the_same_config(write):
    overrides = [
        "volume.crop=[64, 64, 64]",
        "volume.window_percentile=[0.5, 99.5]",
        "training.optimizer.eps=1e-8",
    ]
    config = load(write("run.yaml"), [*overrides, "data.where={split_kind: ['1', 'null', 'true', '1e-4', 'a: b']}"])
    assert load(write("runs/x/config.yaml", config_to_yaml(config))) == config


@given(words=st.lists(st.text() | st.sampled_from(["${a}", "\\\\${a.b}x", "a\\", "???", "$", "- a", "#"]), max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_the_way_through_yaml(write, words):
    config = load(write("run.yaml"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"where": {"case": words}})})
    assert load(write("again.yaml", config_to_yaml(config))).data.where == {"case": words}


def test_a_config_reaches_worker_processes(write):
    config = load(write("run.yaml"))
    assert pickle.loads(pickle.dumps(config.data)) == config.data
    assert pickle.loads(pickle.dumps(config.volume)) == config.volume


def test_a_pruner_of_another_name_replaces_and_of_the_same_is_merged(write):
    write("base.yaml", MINIMAL + "evaluation: {pruner: {name: medpruner, tau: 0.5, gamma: 0.1}}\n")
    same = load("base.yaml", ["evaluation.pruner.tau=0.7"])
    assert same.evaluation.pruner == {"name": "medpruner", "tau": 0.7, "gamma": 0.1}
    same = load("base.yaml", ["evaluation.pruner={name: medpruner, tau: 0.7}"])
    assert same.evaluation.pruner == {"name": "medpruner", "tau": 0.7, "gamma": 0.1}
    write("other.yaml", "extends: base.yaml\nevaluation: {pruner: {name: hiprune, keep: 0.2}}\n")
    other = load_with_origins("other.yaml", ["evaluation.pruner.alpha=0.2"])
    assert other.config.evaluation.pruner == {"name": "hiprune", "keep": 0.2, "alpha": 0.2}
    assert other.origins["evaluation.pruner.keep"].startswith("other.yaml:")
    assert load("other.yaml", ["evaluation.pruner=null"]).evaluation.pruner is None


def test_what_is_only_evaluated_needs_no_training_and_is_asked_where_it_lies(tmp_path):
    file = tmp_path / "asked.yaml"
    file.write_text("recipe: medpruner.slicewise\ndata: {manifest: m.jsonl}\nmodel: {checkpoint: models/m}\n")
    config = load(file)
    assert config.asked == Path("models/m") and config.run.output == Path("runs/asked")
    with pytest.raises(UserError, match="model.checkpoint"):
        load(file, ["model.checkpoint=null"])


def test_a_run_is_asked_where_it_is_kept(write):
    assert load(write("run.yaml"), ["run.output=out"]).asked == Path("out")


def test_preprocessing_is_written_once_beside_a_model(write, tmp_path):
    config = load(write("run.yaml"), ["volume.shape=[8, 16, 16]"])
    write_preprocessing(config, tmp_path)
    assert VolumeConfig.model_validate_json((tmp_path / "preprocessing.json").read_text()) == config.volume
    with pytest.raises(UserError, match="is there already; remove it first"):
        write_preprocessing(config, tmp_path)
    with pytest.raises(UserError, match="no such folder; give the model's"):
        write_preprocessing(config, tmp_path / "none")


# --- the sections -------------------------------------------------------------------------------------------


def test_settings_cannot_be_changed(write):
    config = load(write("run.yaml"))
    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 1


def test_presets_fill_what_is_not_given():
    photon = VolumeConfig(preset="photon")
    assert photon.shape == (140, 280, 280) and photon.crop == (364, 364, 364) and photon.flip == ("W",)
    assert VolumeConfig(preset="photon_max") == photon.model_copy(update={"preset": "photon_max"})
    assert VolumeConfig(preset="med3dvlm").window_percentile == (0, 100)
    given = VolumeConfig(preset="phantom", shape=(1, 2, 3), std=1.0, window_hu=(0.0, 1.0))
    assert (given.shape, given.mean, given.std) == ((1, 2, 3), 0.5, 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_preprocessing_survives_its_json_file(preset):
    config = VolumeConfig(preset=preset)
    assert VolumeConfig.model_validate_json(config.model_dump_json()) == config
    assert VolumeConfig(**config.model_dump(mode="json")) == config  # lists for tuples


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [1, 2]},
        {"shape": [1, 2, "3"]},
        {"shape": [1, 2, 0]},
        {"mean": True},
        {"std": 0},
        {"spacing": 1},
    ],
)
def test_nothing_else_is_converted(wrong):
    with pytest.raises(ValidationError):
        VolumeConfig(**wrong)


def test_every_setting_is_described():
    def sections(model: type[Settings]) -> list[type[Settings]]:
        inner = [field.annotation for field in model.model_fields.values()]
        found = [part for part in inner if isinstance(part, type) and issubclass(part, Settings)]
        return [model, *(below for part in found for below in sections(part))]

    described = sections(Config)
    assert OptimizerConfig in described
    missing = [f"{m.__name__}.{n}" for m in described for n, field in m.model_fields.items() if not field.description]
    assert missing == []
