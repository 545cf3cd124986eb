"""What Photon's recipes hand to the trainer: groups, frozen parts, batches, loss terms, folders, figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from mllm3d.config import VolumeConfig, load
from mllm3d.data.dataset import GroupItem
from mllm3d.data.manifest import Row, write_manifest
from mllm3d.data.preprocess import Prepared
from mllm3d.errors import UserError
from mllm3d.registry import recipe_class
from mllm3d.training.recipe import Recipe
from photon import PhotonForConditionalGeneration
from photon.flops import forward_flops, vision_flops
from photon.recipes.base import checkpoint_folder
from photon.surrogate import DropTokens

SHAPE = (8, 16, 24)
TOKENS = 2 * 4 * 6
"""Of the volume, in patches of 4 x 4 x 4 voxels without merging."""
LIVER, LESION = 16, 45
ASKED = [
    ("v0", "existence", "pleural effusion", "Is there a pleural effusion?", "yes"),
    ("v0", "existence", "fatty liver", "Is the liver fatty?", "no"),
    ("v0", "counting", "pleural effusion", "How many lesions are there?", "twelve"),
    ("v1", "existence", "fatty liver", "Is the liver fatty?", "yes"),
]
ROWS = [
    Row(
        id=f"q{number}",
        case=volume,
        split="train",
        volume=f"{volume}.npy",
        labels=f"{volume}_labels.npy",
        question=question,
        answer=answer,
        task=task,
        meta={"finding": finding},
    )
    for number, (volume, task, finding, question, answer) in enumerate(ASKED)
]


class Kitchen:
    """Configs, recipes and saved models in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_manifest(folder / "manifest.jsonl", ROWS)

    def recipe(self, name: str, model: dict[str, Any], **changes: Any) -> Any:
        """The recipe of a config that was read from YAML; keywords are `section__key=value`."""
        config: dict[str, Any] = {
            "recipe": name,
            "volume": {"shape": list(SHAPE), "window_hu": [-200.0, 300.0], "mean": 0.5, "std": 0.5},
            "data": {"manifest": str(self.folder / "manifest.jsonl"), "questions_per_volume": 3},
            "model": model,
            "training": {
                "max_steps": 10,
                "precision": "fp32",
                "zero_stage": 0,
                "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
            },
        }
        for key, value in changes.items():
            *outer, last = key.split("__")
            section = config
            for part in outer:
                section = section[part]
            section[last] = value
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        loaded = load(file)
        return recipe_class(loaded.recipe)(loaded)

    def backbone(self, stage: str, checkpoint: Path | None = None, **changes: Any) -> Any:
        model: dict[str, Any] = {
            "stage": stage,
            "vocabulary": 320,
            "patch_size": [2, 4, 4],
            "slices_per_frame": 2,
            "text": {"hidden_size": 32, "layers": 4, "heads": 2, "mlp": 48},
            "vision": {"hidden_size": 32, "layers": 2, "heads": 2, "mlp": 48, "merge": 1},
            "classes": [LIVER, LESION],
            "small_classes": [LESION],
            "findings": ["pleural effusion", "fatty liver"],
            "dense_weight": 4.0,
            "findings_weight": 0.25,
        }
        if checkpoint is not None:
            model["checkpoint"] = str(checkpoint)
        return self.recipe("photon.backbone", model, **changes)

    def phase1(self, checkpoint: Path, **changes: Any) -> Any:
        model = {"checkpoint": str(checkpoint), "patch_size": [4, 4, 4], "temporal_step": 1.0}
        return self.recipe("photon.phase1", model, **changes)

    def phase2(self, checkpoint: Path, model: dict[str, Any] | None = None, **changes: Any) -> Any:
        scheduling = {"predictor_bias": 0.0, "soft_from": 0.2, "hard_from": 0.5}
        values = {"checkpoint": str(checkpoint), "scheduling": scheduling, "band": {"low": 0.1, "high": 0.2}}
        return self.recipe("photon.phase2", {**values, **(model or {})}, **changes)

    def save(self, recipe: Recipe, module: nn.Module, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        recipe.save(module, None, folder)
        return folder


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path)


@pytest.fixture
def backbone(kitchen: Kitchen) -> Path:
    """A saved backbone after the vision stage, with larger weights than the initial ones, so that tokens differ."""
    torch.manual_seed(0)
    recipe = kitchen.backbone("vision")
    module = recipe.build()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return kitchen.save(recipe, module, "backbone")


def items() -> list[GroupItem]:
    """Two volumes: three questions about the first, one about the second."""
    made = []
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        random = np.random.default_rng(number)
        array = random.uniform(-1, 1, SHAPE).astype(np.float32)
        labels = np.zeros(SHAPE, np.uint8)
        labels[:4, :4, :4] = LIVER  # all of the first token
        labels[4, 4, 4] = LESION  # one voxel of 64
        made.append(GroupItem([Prepared(array, np.eye(4), SHAPE, np.eye(4))], rows, [labels]))
    return made


def run(recipe: Any, module: nn.Module, step: int = 9, total: int = 10, chosen: list[GroupItem] | None = None) -> Any:
    """Batch, its counts, and the output of `losses` with weights as on one rank."""
    batch = recipe.collate(items() if chosen is None else chosen)
    counts = recipe.counts(batch)
    weights = {name: 1 / count for name, count in counts.items()}
    return batch, counts, recipe.losses(module, batch, step, total, weights)


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


def test_phase2_gives_the_vision_tower_and_the_predictor_their_own_rates(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.phase2(backbone, {"vision_lr": 5e-4, "predictor_lr": 1e-2})
    module = recipe.build()
    found = rate_of_each(recipe, module)
    assert found.keys() == trainable(module) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        rate = 5e-4 if ".visual." in name else 1e-2 if "threshold_predictor" in name else 1e-3
        assert found[name] == (rate, 0.1 if parameter.ndim >= 2 else 0.0, False), name


def test_without_rates_of_their_own_all_share_one(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.phase2(backbone)
    assert {rate for rate, _, _ in rate_of_each(recipe, recipe.build()).values()} == {1e-3}


def test_muon_takes_hidden_matrices_and_nothing_else(kitchen: Kitchen) -> None:
    recipe = kitchen.backbone("questions", training__optimizer={"name": "muon", "lr": 1e-3, "weight_decay": 0.1})
    module = recipe.build(meta=True)
    found = rate_of_each(recipe, module)
    by_muon = {name for name, (_, _, muon) in found.items() if muon}
    assert all(dict(module.named_parameters())[name].ndim == 2 for name in by_muon)
    assert {f"photon.model.language_model.layers.{i}.mlp.up_proj.weight" for i in range(4)} < by_muon
    assert "photon.model.visual.blocks.1.attn.qkv.weight" in by_muon
    for part in ("patch_embed", "embed_tokens", "lm_head", "heads.", "norm", "bias"):
        assert not [name for name in by_muon if part in name], part


def test_phase1_trains_the_patch_embedding_alone(kitchen: Kitchen, backbone: Path) -> None:
    module = kitchen.phase1(backbone).build()
    assert trainable(module) == {"model.visual.patch_embed.proj.weight"}
    assert trainable(kitchen.phase1(backbone).build(meta=True)) == trainable(module)


def test_the_vision_stage_leaves_the_decoder_alone(kitchen: Kitchen, backbone: Path) -> None:
    module = kitchen.backbone("vision").build()
    parts = {name.split(".")[0] if name.startswith("heads") else name.split(".")[2] for name in trainable(module)}
    assert parts == {"visual", "heads"}
    questions = kitchen.backbone("questions", backbone).build()
    assert trainable(questions) == {name for name, _ in questions.named_parameters()}


@pytest.mark.parametrize("name", ["vision", "questions", "phase1", "phase2"])
def test_the_planned_model_has_the_parameters_of_the_built_one(kitchen: Kitchen, backbone: Path, name: str) -> None:
    small = name in ("vision", "questions")
    recipe = kitchen.backbone(name, backbone) if small else getattr(kitchen, name)(backbone)
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


def test_counts_are_those_of_the_rows(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.phase2(backbone)
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


def separate_losses(recipe: Any, module: nn.Module) -> list[Tensor]:
    """Cross-entropy of each row alone, through the model's own forward pass."""
    from photon.processing_photon import VolumeChats

    found = []
    for item in items():
        for row in item.rows:
            chat = [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}]
            batch = recipe.processor.batch([VolumeChats([item.volumes[0].array], [chat])])
            found.append(module(**batch, reduction="none").token_losses)
    return found


def test_phase1_sums_cross_entropy_over_label_tokens(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.phase1(backbone)
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
    kitchen: Kitchen, tmp_path: Path, soft_from: float, hard_from: float, total: int, stages: dict[int, str]
) -> None:
    recipe = kitchen.phase2(tmp_path, {"scheduling": {"soft_from": soft_from, "hard_from": hard_from}})
    assert {step: recipe.reduction(step, total) for step in stages} == stages


def test_phase2_adds_the_band_once_tokens_are_weighed(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.phase2(backbone, {"band": {"low": 0.1, "high": 0.2, "weight": 3.0}})
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
        outside = [max(r - 0.2, 0) + max(0.1 - r, 0) for r in forward.mean_probability.tolist()]
        assert sum(outside) > 0
        assert output.terms["band"].value.item() == pytest.approx(3 * sum(outside), rel=1e-5)
        kept, of = (float(x) for x in output.metrics["keep_rate"])
        rate = forward.keep_rate.sum().item() / 4 if reduction == "hard" else 1.0
        assert kept / of == pytest.approx(rate)


def test_a_fixed_keep_ratio_needs_no_band_and_no_predictor(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.phase2(backbone, {"scheduling": {"keep_ratio": 0.25, "soft_from": 0.0, "hard_from": 0.0}})
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
def test_gradients_do_not_depend_on_how_a_step_is_cut_into_batches(kitchen: Kitchen, backbone: Path, step: int) -> None:
    recipe = kitchen.phase2(backbone)
    module = recipe.build()
    together = gradients(recipe, module, [items()], step)
    assert any("threshold_predictor" in name for name in together) == (step > 0)
    assert_near(gradients(recipe, module, [[item] for item in items()], step), together)


def test_surrogate_gradients_follow_the_scale_of_the_loss(kitchen: Kitchen, backbone: Path) -> None:
    """Eq. 13 has an absolute epsilon: without the weights, a small share of a large batch would fall below it."""
    recipe = kitchen.phase2(backbone)
    module = recipe.build()
    whole = gradients(recipe, module, [items()], step=7)
    assert all(whole[f"model.threshold_predictor.mlp.{layer}.weight"].any() for layer in (0, 2))
    share = gradients(recipe, module, [items()], step=7, scale=2.0**-20)
    assert_near({name: gradient * 2.0**20 for name, gradient in share.items()}, whole)


def test_the_predictor_learns_from_each_questions_own_mean(kitchen: Kitchen, backbone: Path) -> None:
    """Eq. 12 is of one sample's loss, however long its answer and whatever shares its batch."""
    scheduling = {"predictor_bias": 0.0, "hard_from": 0.0, "eps_std": 1e3}  # z is then proportional to eta
    recipe = kitchen.phase2(backbone, {"scheduling": scheduling, "band": {"weight": 0.0}})
    module = recipe.build()

    def of_predictor(chosen: list[GroupItem]) -> dict[str, Tensor]:
        found = gradients(recipe, module, [chosen], step=9)
        return {name: gradient for name, gradient in found.items() if "threshold_predictor" in name}

    apart = [of_predictor([item._replace(rows=[row])]) for item in items() for row in item.rows]
    assert_near({name: sum(one[name] for one in apart) / 4 for name in apart[0]}, of_predictor(items()))  # type: ignore[misc]


def test_a_rows_gradient_is_turned_back_into_that_of_its_mean(
    kitchen: Kitchen, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = kitchen.phase2(backbone)
    module = recipe.build()
    scales: list[Tensor] = []

    class Watched:
        @staticmethod
        def apply(*given: Any) -> Tensor:
            scales.append(given[6])
            return DropTokens.apply(*given)

    monkeypatch.setattr("photon.modeling_photon.DropTokens", Watched)
    batch, counts, _ = run(recipe, module)
    labels = torch.bincount(batch["layout"].label_rows)
    torch.testing.assert_close(scales[0], counts["label_tokens"] / labels)


@pytest.mark.parametrize("step", [3, 7])
def test_recomputed_activations_change_no_gradient(kitchen: Kitchen, backbone: Path, step: int) -> None:
    recipe = kitchen.phase2(backbone)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        module = recipe.build()
        module.train()
        if recompute:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _, counts, output = run(recipe, module, step)
        sum(term.value / counts[term.per] for term in output.terms.values()).backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_the_vision_stage_learns_from_labels_alone(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.backbone("vision", backbone)
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


def test_the_question_stage_adds_answers_to_the_heads(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.backbone("questions", backbone)
    module = recipe.build()
    _, counts, output = run(recipe, module)
    assert set(output.terms) == {"ce", "dense", "findings"} and output.terms["ce"].per == "label_tokens"
    apart = torch.cat(separate_losses(recipe, module.photon))
    assert output.terms["ce"].value.item() == pytest.approx(apart.sum().item(), rel=1e-4)
    vision = kitchen.backbone("vision", backbone)
    alone = run(vision, vision.build())[2]
    for name in ("dense", "findings"):
        assert output.terms[name].value.item() == pytest.approx(alone.terms[name].value.item(), rel=1e-5)
    half = kitchen.backbone("questions", backbone)
    half.config = half.config.model_copy(update={"model": half.settings.model_copy(update={"dense_weight": 2.0})})
    lighter = run(half, half.build())[2]
    assert lighter.terms["dense"].value.item() == pytest.approx(output.terms["dense"].value.item() / 2, rel=1e-5)


# --- folders ------------------------------------------------------------------------------------------------


def test_heads_and_model_go_on_in_the_next_stage(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.backbone("questions", backbone)
    module = recipe.build()
    saved = load_file(backbone / "auxiliary_heads.safetensors")
    assert saved.keys() == module.heads.state_dict().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in module.heads.state_dict().items())
    again = PhotonForConditionalGeneration.from_pretrained(backbone)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.photon.parameters(), strict=True))
    assert recipe.processor.tokenizer.get_vocab() == kitchen.phase1(backbone)._load(str(backbone))[1].get_vocab()


def test_gathered_weights_are_saved_without_the_heads(kitchen: Kitchen, backbone: Path, tmp_path: Path) -> None:
    """As under ZeRO 3, where rank 0 alone has them all."""
    recipe = kitchen.backbone("questions", backbone)
    module = recipe.build()
    tied: dict[int, Tensor] = {}  # one tensor for both names of a tied weight, as DeepSpeed gathers it
    state = module.state_dict()
    gathered = {name: tied.setdefault(t.data_ptr(), torch.zeros_like(t)) for name, t in state.items()}
    (tmp_path / "gathered").mkdir()
    recipe.save(module, gathered, tmp_path / "gathered")
    saved = load_file(tmp_path / "gathered" / "model.safetensors")
    assert saved.keys() == load_file(backbone / "model.safetensors").keys()
    assert not any(tensor.any() for tensor in saved.values())


def test_phase1_starts_as_the_backbone_and_phase2_as_phase1(kitchen: Kitchen, backbone: Path) -> None:
    """The inflated kernel reads the same grey scale: equal losses, before anything has learned."""
    first = kitchen.phase1(backbone)
    aligned = first.build()
    slices = kitchen.backbone("questions", backbone)
    expected = run(slices, slices.build())[2].terms["ce"].value.item()
    assert run(first, aligned)[2].terms["ce"].value.item() == pytest.approx(expected, rel=1e-4)
    folder = kitchen.save(first, aligned, "phase1")
    second = kitchen.phase2(folder)
    module = second.build()
    assert run(second, module, step=0)[2].terms["ce"].value.item() == pytest.approx(expected, rel=1e-4)
    done = kitchen.save(second, module, "phase2")
    again = PhotonForConditionalGeneration.from_pretrained(done)
    assert again.config.scheduling_settings == second.settings.scheduling.settings()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))


def test_a_checkpoint_may_be_a_run_or_one_of_its_steps(kitchen: Kitchen, backbone: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_7"
    step.mkdir(parents=True)
    backbone.rename(step / "model")
    (step.parent / "latest").write_text("step_7\n")
    (step / "model" / "preprocessing.json").write_text(VolumeConfig().model_dump_json())
    for source in (tmp_path / "run", step, step / "model"):
        assert checkpoint_folder(str(source)) == str(step / "model")
        assert kitchen.phase1(source).initial_config().patches.size == (4, 4, 4)
    assert checkpoint_folder("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_loading_and_saving_draw_no_bars(kitchen: Kitchen, backbone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    recipe = kitchen.phase2(backbone)
    kitchen.save(recipe, recipe.build(), "again")
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
    kitchen: Kitchen, backbone: Path, phase: str, what: str, says: str
) -> None:
    spoil(backbone, what)
    with pytest.raises(UserError) as error:
        getattr(kitchen, phase)(backbone).build()
    assert says in str(error.value) and str(backbone) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stage_that_needs_an_earlier_one_says_which(kitchen: Kitchen, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.checkpoint: stage questions starts from a run of stage vision"):
        kitchen.backbone("questions").build()
    with pytest.raises(UserError, match=r"model.checkpoint: .*absent: no such folder; train photon.phase1 first"):
        kitchen.phase2(tmp_path / "absent").build()
    (backbone / "auxiliary_heads.safetensors").unlink()
    with pytest.raises(UserError, match="auxiliary_heads.safetensors: not there; .* stage vision"):
        kitchen.backbone("questions", backbone).build()


# --- figures ------------------------------------------------------------------------------------------------


def test_figures_for_the_plan(kitchen: Kitchen, backbone: Path) -> None:
    first, second = kitchen.phase1(backbone), kitchen.phase2(backbone)
    planned = first.initial_config()
    assert first.describe()["tokens_per_volume"] == second.describe()["tokens_per_volume"] == TOKENS
    whole = forward_flops(planned, SHAPE, 3, 48, 8, None)
    assert first.describe()["flops_per_volume"] == pytest.approx(2 * whole)  # no gradients of frozen weights
    dropped = forward_flops(second.initial_config(), SHAPE, 3, 48, 8, 0.15)  # the middle of the band
    assert second.describe()["flops_per_volume"] == pytest.approx(3 * dropped)
    questions, vision = (kitchen.backbone(stage) for stage in ("questions", "vision"))
    slices = questions.initial_config()
    assert questions.describe()["flops_per_volume"] == pytest.approx(3 * forward_flops(slices, SHAPE, 3, 48, 8, None))
    assert vision.describe()["flops_per_volume"] == pytest.approx(3 * vision_flops(slices, TOKENS, TOKENS // 2))


def test_volumes_of_any_size_have_no_figures_and_train_all_the_same(kitchen: Kitchen, backbone: Path) -> None:
    recipe = kitchen.phase2(backbone, volume__shape=None)
    assert recipe.describe() == {}
    assert set(run(recipe, recipe.build())[2].terms) == {"ce", "band"}
