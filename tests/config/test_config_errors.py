"""Every mistake in a config is one line that says where it is and what would be right."""

import pytest

from mllm3d.config import Config, TrainingConfig, load
from mllm3d.errors import UserError


def lines(name, overrides=None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(name, overrides)
    return str(caught.value).splitlines()


def allowed(section) -> str:
    return f"(allowed: {', '.join(section.model_fields)})"


def with_line(minimal: str, text: str) -> str:
    return f"{minimal}{text}\n"


@pytest.fixture
def minimal(write):
    return write("run.yaml").read_text()  # 9 lines


def test_all_mistakes_of_a_file_are_reported_in_order(write):
    write(
        "bad.yaml",
        "recipe: test.recipe\n"
        "volume: {preset: phantm, shape: [1, 2, x]}\n"
        "data: {manifest: 3}\n"
        "training:\n"
        "  optimiser:\n"
        "    lr: 1e-4\n"
        "  epochs: three\n"
        "  precision: fp16\n"
        "  zero_stage: 2.0\n"
        "model: {band: {mim: 0.1}}\n"
        "run: {seed: true}\n",
    )
    assert lines("bad.yaml") == [
        "bad.yaml:2: volume.preset: must be 'photon', 'photon_max', 'med3dvlm' or 'phantom', got 'phantm'",
        "bad.yaml:2: volume.shape[2]: must be a valid integer, got 'x'",
        "bad.yaml:3: data.manifest: must be a path, got 3",
        "bad.yaml:4: training.optimizer: missing, and it has no default",
        "bad.yaml:6: training.optimiser.lr: unknown key; did you mean training.optimizer.lr? "
        + allowed(TrainingConfig),
        "bad.yaml:7: training.epochs: must be a valid number, got 'three'",
        "bad.yaml:8: training.precision: must be 'bf16' or 'fp32', got 'fp16'",
        "bad.yaml:9: training.zero_stage: must be a valid integer, got 2.0",
        "bad.yaml:10: model.band.mim: unknown key; did you mean model.band.min? (allowed: min)",
        "bad.yaml:11: run.seed: must be a valid integer, got True",
    ]


def test_a_key_in_the_wrong_section_is_found_in_the_right_one(write, minimal):
    write("run.yaml", with_line(minimal, "  lr: 3"))
    wanted = "run.yaml:10: training.lr: unknown key; did you mean training.optimizer.lr? "
    assert lines("run.yaml") == [wanted + allowed(TrainingConfig)]


def test_a_key_like_no_other_lists_what_is_allowed(write, minimal):
    write("run.yaml", with_line(minimal, "model: {zzz: 1}"))
    assert lines("run.yaml") == ["run.yaml:10: model.zzz: unknown key; allowed: checkpoint, patch_size, band"]


def test_a_mistake_is_reported_in_the_file_that_has_it(write, minimal):
    write("child.yaml", "extends: run.yaml\n\ntraining: {log_every: 0}\n")
    write("run.yaml", with_line(minimal, "  accumulation: -1"))
    assert lines("child.yaml") == [
        "child.yaml:3: training.log_every: must be greater than 0, got 0",
        "run.yaml:10: training.accumulation: must be greater than 0, got -1",
    ]


def test_overrides_are_named_as_such(write, minimal):
    wanted = "command line: rn.seed: unknown key; did you mean run.seed? "
    assert lines("run.yaml", ["rn.seed=1"]) == [wanted + allowed(Config)]
    assert lines("run.yaml", ["run.seed=x"]) == ["command line: run.seed: must be a valid integer, got 'x'"]
    assert lines("run.yaml", ["seed"]) == ["override 'seed': must look like section.key=value"]
    assert lines("run.yaml", ["run..seed=1"]) == ["override 'run..seed=1': must look like section.key=value"]
    assert lines("run.yaml", ["run.seed=[1"])[0].startswith("command line:1: not valid YAML")
    assert lines("run.yaml", ["run=3"]) == ["command line: run: must be an object, got 3"]


def test_duplicate_keys_are_errors(write, minimal):
    write("run.yaml", with_line(minimal, "data: {manifest: other}\nmodel: {band: {min: 1, min: 2}}"))
    assert lines("run.yaml") == [
        "run.yaml:10: data: given twice (first in line 4); keep one",
        "run.yaml:11: model.band.min: given twice (first in line 11); keep one",
    ]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a: [1, 2\nb: 3\n", "bad.yaml:2: not valid YAML: "),
        ("a: b: c\n", "bad.yaml:1: not valid YAML: "),
        ("a: 1\n\tb: 2\n", "bad.yaml:2: not valid YAML: "),
        ("- a\n- b\n", "bad.yaml:1: a mapping"),
        ("just words\n", "bad.yaml:1: a mapping"),
        ("a: 1\n---\nb: 2\n", "bad.yaml:2: not valid YAML: "),
        ("recipe: !!python/object/apply:os.system ['true']\n", "bad.yaml:1: not valid YAML: "),
        ("recipe: !!python/name:os.system\n", "bad.yaml:1: not valid YAML: "),
        ("a: &x\n  b: *x\n", "bad.yaml:1: a.b.b"),
        ("a: \x01\n", "bad.yaml"),
    ],
)
def test_bad_yaml_names_its_line(write, text, start):
    write("bad.yaml", text)
    (line,) = lines("bad.yaml")
    assert line.startswith(start)


def test_a_file_that_is_no_text(write):
    write("bad.yaml").write_bytes(b"recipe: \xff\xfe")
    assert lines("bad.yaml") == ["bad.yaml: not UTF-8 text (byte 8); save it as UTF-8"]


def test_an_empty_file_misses_everything(write):
    write("bad.yaml", "# nothing\n")
    assert [line.split(": ")[1] for line in lines("bad.yaml")] == ["recipe", "data", "training"]


def test_a_missing_config_names_the_nearest(write):
    (line,) = lines("photon_phase3")
    assert line == "config 'photon_phase3': no such file, and no such name in configs/; did you mean photon_phase2?"


def test_parents_that_are_missing_circular_or_no_path(write):
    write("a.yaml", "run: {}\nextends: parts/b.yaml\n")
    assert lines("a.yaml") == ["a.yaml:2: extends: no such file: parts/b.yaml; the path is relative to ."]
    write("parts/b.yaml", "extends: ../a.yaml\n")
    (line,) = lines("a.yaml")
    assert "extends itself through a.yaml -> b.yaml -> a.yaml" in line
    write("a.yaml", "extends: [b.yaml]\n")
    assert lines("a.yaml") == ["a.yaml:1: extends: the path of one file is needed, got ['b.yaml']"]


def test_an_unknown_recipe_names_the_nearest(write, minimal):
    write("run.yaml", minimal.replace("test.recipe", "photon.phase3"))
    (line,) = lines("run.yaml")
    assert line.startswith("run.yaml:1: recipe 'photon.phase3': unknown; did you mean 'photon.phase")


def test_a_reference_that_leads_nowhere(write, minimal):
    (line,) = lines("run.yaml", ["data.manifest=${no.such}"])
    assert line.startswith("command line: data.manifest: ") and "no.such" in line
    (line,) = lines("run.yaml", ["data.manifest=${oc.env:SURELY_NOT_SET}"])
    assert line.startswith("command line: data.manifest: ") and "SURELY_NOT_SET" in line
    (line,) = lines("run.yaml", ["data.manifest=${unclosed"])
    assert line.startswith("command line: data.manifest: ")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["training.epochs=null"], "training: epochs or max_steps is needed"),
        (["training.optimizer.name=muon"], "training: optimizer.name muon needs zero_stage 0"),
        (
            ["training.offload=cpu", "training.zero_stage=0"],
            "training: offload cpu needs zero_stage 1, 2 or 3",
        ),
        (
            ["volume.window_hu=[3, 3]"],
            "volume.window_hu: the lower end must lie below the upper end, got [3, 3]",
        ),
        (["volume.flip=[W, W]"], "volume.flip: an axis is named twice"),
        (["training.optimizer.lr=.nan"], "training.optimizer.lr: must be"),
        (["training.optimizer.lr=.inf"], "training.optimizer.lr: must be"),
    ],
)
def test_impossible_combinations(write, minimal, overrides, text):
    (line,) = lines("run.yaml", overrides)
    assert text in line
