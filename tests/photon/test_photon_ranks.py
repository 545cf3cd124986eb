"""Phase 2 on two ranks whose batches are of unlike kinds: perturbed, flipped, without a volume, entirely kept.

Everything happens in one run of rank_run.py, as starting it alone takes ten seconds; the tests look at what it left.
A rank that waits for the other ends it, so that a hang is a failure.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.integration.launching import PYTHON, Run, start
from tests.photon.rank_run import Step, plain_gradients
from tests.photon.tiny_qwen3 import tiny_qwen3
from tests.photon.tiny_recipes import Recipes

SCRIPT = str(Path(__file__).with_name("rank_run.py"))
LIMIT = 90
"""Seconds for one step, which takes a tenth of one on a machine that has nothing else to do."""

# Of 10 steps, those from 2 on weigh tokens and those from 5 on drop them.
EARLY = [Step(0, ["first:noise"], ["second"]), Step(3, ["text"], ["second:zeros"]), Step(3, ["first"], ["mixed:noise"])]
FLIPS = [
    Step(7, ["first:noise"], ["second:flip"]),
    Step(7, ["first:flip"], ["second"]),
    Step(7, ["text:zeros"], ["second:flip"]),
    Step(7, ["first:keep"], ["text:flip"]),
    Step(7, ["mixed:flip"], ["first:keep"]),
]
OTHERS = [
    Step(7, ["first"], ["second:shuffle_voxels"]),
    Step(7, ["text"], ["second"]),
    Step(7, ["mixed"], ["text"]),
    Step(7, ["first"], ["second"]),
    Step(7, ["first:keep_voxels"], ["second:zeros"]),  # nothing for the predictors, who had a gradient just now
]
FEW = [EARLY[0], EARLY[1], FLIPS[0], FLIPS[4], *OTHERS[2:]]
TEXT = [Step(7, ["text"], ["second"]), Step(7, ["text"], ["text"])]
TWICE = [
    Step(7, ["first:noise", "first"], ["second:flip", "text"]),
    Step(7, ["text", "first:zeros"], ["second:noise", "second:flip"]),
]


class Case(NamedTuple):
    """Steps under a ZeRO stage, with these changes to the recipe's `model` section."""

    stage: int
    steps: Sequence[Step]
    model: dict[str, Any] = {}
    recipe: str = "phase2"
    backbone: str = "backbone"

    @property
    def alone(self) -> str:
        """What tells its gradients apart in one process, where there is no stage."""
        return repr(self._replace(stage=0))


def scheduling(**changes: Any) -> dict[str, Any]:
    return {"scheduling": {"predictor_bias": 0.0, "soft_from": 0.2, "hard_from": 0.5, **changes}}


STAGES = (1, 2, 3)
GRADIENTS = {
    **{f"zero{stage}": Case(stage, [*EARLY, *FLIPS, *OTHERS]) for stage in STAGES},
    **{f"zero{stage}_add": Case(stage, FLIPS, {"objective": "add"}) for stage in STAGES},
    **{f"zero{stage}_twice": Case(stage, TWICE) for stage in STAGES},
    **{f"zero{stage}_phase1": Case(stage, TEXT, recipe="phase1") for stage in STAGES},
    # Layer 0 is asked before it runs; without `detach`, what it answers has a gradient.
    "zero3_first_layer": Case(3, FEW, scheduling(layers=[0], detach=False)),
    "zero3_two_layers": Case(3, FEW, scheduling(layers=[0, 1], selection="random")),
    "zero3_no_predictor": Case(3, FEW, scheduling(keep_ratio=0.25)),
    "zero2_qwen3": Case(2, FEW, backbone="qwen3"),
    "zero3_qwen3": Case(3, FEW, backbone="qwen3"),
}
MIXED = {f"zero{stage}_mixed": stage for stage in STAGES}
MIXED_STEPS = 200


def small_backbone(recipes: Recipes) -> None:
    """2 decoder layers and 1 vision block, with larger weights than the initial ones, so that tokens differ."""
    torch.manual_seed(0)
    recipe = recipes.backbone("vision")
    shapes = {
        "text": recipe.settings.text.model_copy(update={"layers": 2}),
        "vision": recipe.settings.vision.model_copy(update={"layers": 1}),
    }
    recipe.config = recipe.config.model_copy(update={"model": recipe.settings.model_copy(update=shapes)})
    module = recipe.build()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    recipes.save(recipe, module, "backbone")


def small_qwen3(folder: Path) -> None:
    """Deep-stack features enter the layers below the first drop, above it and above the last."""
    model, processor = tiny_qwen3(AutoTokenizer.from_pretrained(folder / "backbone"))
    model.save_pretrained(folder / "qwen3")
    processor.save_pretrained(folder / "qwen3")


class Launch:
    """The runs of the launch, and what they left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipes = Recipes(folder)
        small_backbone(self.recipes)
        small_qwen3(folder)
        often = {"robustness": {"probability": 0.4}, "flip": {"probability": 0.4, "start": 0.0}}
        runs = [{**self._run(name, case), "steps": case.steps} for name, case in GRADIENTS.items()]
        runs += [{**self._run(name, Case(stage, [], often)), "mixed": MIXED_STEPS} for name, stage in MIXED.items()]
        plan = folder / "plan.json"
        plan.write_text(json.dumps({"limit": LIMIT, "runs": sorted(runs, key=lambda run: str(run["name"])[:5])}))
        # Without LOCAL_SIZE, DeepSpeed starts a process for each bucket of ZeRO 3, to count NUMA nodes.
        self.done: Run = start([*PYTHON, SCRIPT, str(plan)], env={"LOCAL_SIZE": "2"})
        self._plain: dict[str, dict[str, torch.Tensor]] = {}

    def _run(self, name: str, case: Case) -> dict[str, Any]:
        """The run's entry in the plan, and its config."""
        training = {"zero_stage": case.stage, "accumulation": len(case.steps[0].rank0) if case.steps else 1}
        given: dict[str, Any] = {f"training__{key}": value for key, value in training.items()}
        given["run"] = {"seed": 3, "threads": 1, "output": str(self.folder / "unused")}
        backbone = self.folder / case.backbone
        if case.recipe == "phase1":
            self.recipes.phase1(backbone, **given)
        else:
            self.recipes.phase2(backbone, {"flip": {"start": 0.0}, **case.model}, **given)
        config = (self.folder / f"photon.{case.recipe}.yaml").rename(self.folder / f"{name}.yaml")
        # A tensor or two a bucket; three buckets where it is a matter of coming to an end.
        bucket = 20_000 if name in MIXED else 4000
        zero = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), bucket)
        if case.stage == 3:  # what is small stays whole on every rank: most biases and norms in mixed steps, or nothing
            whole = 1500 if name in MIXED else 0
            zero |= {"stage3_param_persistence_threshold": whole, "stage3_prefetch_bucket_size": 3000}
        return {"name": name, "config": str(config), "zero": zero}

    def file(self, name: str) -> Path:
        """What a run left, which must have come to its end."""
        file = self.folder / name
        assert file.is_file(), f"{file.stem} did not end\n{self.done.out}\n{self.done.err}"
        return file

    def plain(self, name: str) -> dict[str, torch.Tensor]:
        """The gradients of a case by plain autograd in this process."""
        case = GRADIENTS[name]
        if case.alone not in self._plain:
            self._plain[case.alone] = plain_gradients(str(self.folder / f"{name}.yaml"), case.steps)
        return self._plain[case.alone]

    def mixed(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file(f"{name}.json").read_text())
        return found


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_the_mean_of_the_ranks_own(launch: Launch, name: str) -> None:
    """Against plain autograd in this process. What has no gradient there has none here, not the last step's."""
    found, expected = load_file(launch.file(f"{name}.safetensors")), launch.plain(name)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        # The same sums in another order, in fp32: two micro-batches, and under ZeRO 3 a linear map of DeepSpeed's.
        # Found are 7e-6 of a tensor's largest entry. A gradient in another's place is off by about that entry.
        tolerance = 5e-5 * float(gradient.abs().max())
        assert float((found[key] - gradient).abs().max()) <= tolerance, key


def test_the_steps_are_of_the_kinds_they_say(launch: Launch) -> None:
    """By what has a gradient: predictors learn from no perturbed or flipped batch, the tower from no text."""
    steps = [
        Step(7, ["first"], ["second"]),
        Step(7, ["first:noise"], ["second:flip"]),
        Step(7, ["text"], ["text:zeros"]),
        Step(7, ["text:flip"], ["mixed"]),
        Step(7, ["first:keep"], ["second:keep"]),
    ]
    found = plain_gradients(str(launch.folder / "zero2.yaml"), steps)

    def learning(part: str) -> list[bool]:
        return [any(bool(g.any()) for k, g in found.items() if k.startswith(f"{n}/") and part in k) for n in range(5)]

    assert learning("lm_head" if any("lm_head" in key for key in found) else "embed_tokens") == [True] * 5
    assert learning("threshold_predictors") == [True, False, False, True, True]
    assert learning(".visual.") == [True, True, False, True, True]


@pytest.mark.parametrize("name", MIXED)
def test_mixed_steps_end_with_the_same_weights_on_both_ranks(launch: Launch, name: str) -> None:
    found = launch.mixed(name)
    assert len(found["losses"]) == MIXED_STEPS and torch.tensor(found["losses"]).isfinite().all()
    one, other = found["weights"]
    assert one == other
    kinds = [tuple(sorted({" ".join(own) for own in pair})) for pair in zip(*found["ranks"], strict=True)]
    assert sum(len(pair) == 2 for pair in kinds) > MIXED_STEPS // 2, "the ranks' batches differ"
    assert len(set(kinds)) > 20, "and in many ways"


def test_all_stages_take_the_same_mixed_steps(launch: Launch) -> None:
    """What is drawn depends on no stage, and the first losses are equal but for rounding (later ones: chaos)."""
    one, *others = (launch.mixed(name) for name in MIXED)
    assert one["losses"][0] != pytest.approx(one["losses"][1], rel=1e-2)
    for other in others:
        assert one["ranks"] == other["ranks"]
        assert one["losses"][:10] == pytest.approx(other["losses"][:10], rel=1e-4)
