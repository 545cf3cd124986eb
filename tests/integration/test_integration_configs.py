"""Every config for a real run passes the dry run: model on the meta device, steps, memory, hours."""

from pathlib import Path

import pytest

from medpruner import settings_of
from mllm3d.config import load
from mllm3d.errors import UserError
from mllm3d.registry import recipe_class
from mllm3d.training.estimate import report

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if "quickstart" not in path.parts
)
PHOTON = [name for name in NAMES if not name.startswith(("med3dvlm", "medpruner"))]
MED3DVLM = [name for name in NAMES if name.startswith("med3dvlm")]
MEDPRUNER = [name for name in NAMES if name.startswith("medpruner")]
MOST_TOKENS = {
    "photon_medframeqa": "16,384",
    "photon_slake": "16,384",
    "photon_nextqa": "128",
    "table7/training_free": "16,384",
}
"""Configs on images or videos, and the most tokens of an image."""
SEVEN_THOUSAND = ("photon_max", "table4/qwen25vl", "table4/zero_shot")
UNCOUNTED = ("photon_deeptumorvqa_ood", "photon_deeptumorvqa_ood_free")
"""Configs on a split whose size the paper does not give."""


def dry_run(name: str) -> dict[str, str]:
    config = load(name)
    lines = report(config, recipe_class(config.recipe)(config)).splitlines()
    return {line[:18].strip(): line[18:].strip() for line in lines if line[:18].strip()}


@pytest.mark.parametrize("name", PHOTON)
def test_a_config_passes_the_dry_run_without_weights_or_data(name: str) -> None:
    found = dry_run(name)
    assert found["recipe"].startswith("photon.")
    if name in MOST_TOKENS:
        assert "tokens per volume" not in found
        assert found["tokens per image"].startswith(f"at most {MOST_TOKENS[name]}; of a video")
        return
    unknown = [key for key, value in found.items() if "unknown" in value]
    assert unknown == (["data", "steps", "hours"] if name in UNCOUNTED else [])
    assert found["tokens per volume"] == ("7,000" if name in SEVEN_THOUSAND else "1,000")
    assert "tokens per image" not in found


@pytest.mark.parametrize("name", MED3DVLM)
def test_a_config_of_med3dvlm_passes_it_too(name: str) -> None:
    found = dry_run(name)
    stage = load(name).recipe.removeprefix("med3dvlm.")
    assert stage in ("contrastive", "projector", "finetune")
    unknown = [key for key, value in found.items() if "unknown" in value]
    assert unknown == ([] if stage == "contrastive" else ["data", "steps", "hours"])
    trainable = found["parameters"].split(" trainable")[0].split(" (")[0]
    tokens = found["tokens per volume"]
    expected = {
        "med3dvlm_contrastive": ("85.79 M", "32"),
        "med3dvlm/table5_dcformer_clip": ("85.79 M", "32"),
        "med3dvlm/table5_vit3d_clip": ("154.93 M", "256"),
        "med3dvlm_projector": ("47.22 M", "256"),  # the published number
        "med3dvlm/projector_1xmlp_mixer_h": ("29.91 M", "256"),
        "med3dvlm/projector_2xmlp_h": ("29.83 M", "288"),
        "med3dvlm/projector_2xmlp": ("15.60 M", "32"),
        "med3dvlm_finetune": ("87.59 M", "256"),  # with 40.37 M of adapters
    }
    assert (trainable, tokens) == expected[name]


@pytest.mark.parametrize(
    ("name", "data", "steps", "hours"),
    [
        (
            "photon_medframeqa",
            "2,566 studies, 2,566 questions (data.expected",
            "242 of 32 studies",
            "unknown: images and videos differ in size",
        ),
        ("photon_nextqa", "unknown: datasets/nextqa/manifest.jsonl is not there", "unknown", "unknown"),
    ],
)
def test_images_and_videos_are_counted_as_studies(name: str, data: str, steps: str, hours: str) -> None:
    found = dry_run(name)
    assert found["data"].startswith(data) and found["steps"].startswith(steps)
    assert found["hours"] == hours


@pytest.mark.parametrize("name", MOST_TOKENS)
def test_images_and_videos_have_the_simplified_schedule(name: str) -> None:
    """Photon A.3: no warm-ups, no robustness loss, the main loss alone; the backbone's own patches."""
    config = load(name)
    s = config.model.model_dump()
    assert s["scheduling"]["soft_from"] == s["scheduling"]["hard_from"] == 0
    assert s["robustness"]["probability"] == s["flip"]["probability"] == 0
    assert s["checkpoint"] == "Qwen/Qwen2.5-VL-3B-Instruct" and s["patch_init"] is None
    assert not config.prepares_volumes


@pytest.mark.parametrize(("name", "billions"), [("photon_7b_phase2", "8.29"), ("photon_qwen3_phase2", "2.13")])
def test_other_backbones_have_their_number_of_parameters(name: str, billions: str) -> None:
    """Of the published models with the larger patch embedding and the threshold predictor."""
    assert dry_run(name)["parameters"].startswith(f"{billions} G")


@pytest.mark.parametrize("name", MEDPRUNER)
def test_a_config_of_medpruner_names_a_method_and_is_only_evaluated(name: str) -> None:
    config = load(name)
    assert config.evaluation.pruner is not None
    values = dict(config.evaluation.pruner)
    assert settings_of(values.pop("name"), values)
    with pytest.raises(UserError, match="recipe: medpruner.slicewise trains nothing; evaluate it with eval.py"):
        dry_run(name)
