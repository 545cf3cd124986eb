"""What Med3DVLM's recipes hand to the trainer: earlier stages, frozen parts, batches, loss terms, features."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModel, AutoModelForCausalLM

from med3dvlm.building import read_model, read_processor
from med3dvlm.modeling_med3dclip import Med3DCLIPModel
from med3dvlm.processing_med3dvlm import VolumeTexts
from mllm3d.data.prompts import target_text
from mllm3d.errors import UserError
from mllm3d.training.optim import build_optimizer
from mllm3d.training.recipe import FrozenEncoder
from mllm3d.training.trainer import part_lines
from tests.med3dvlm.tiny_med3dvlm import ENCODER, SIZE
from tests.med3dvlm.tiny_recipes import ROWS, Recipes, given, items, model_folder, run, single

IMAGE_STAGES = ("contrastive", "projector", "finetune")
LANGUAGE_STAGES = ("projector", "finetune")
RUNS = dict[str, Path]


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def assert_equal(mine: nn.Module, theirs: nn.Module) -> None:
    """Parameters and buffers to the last bit, under the same names."""
    first, second = mine.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- building -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", IMAGE_STAGES)
def test_the_planned_model_has_the_parameters_of_the_built_one(recipes: Recipes, stage: str) -> None:
    recipe = recipes.of(stage)
    planned, built = recipe.build(meta=True), recipe.build()
    shapes = [{n: (tuple(p.shape), p.requires_grad) for n, p in m.named_parameters()} for m in (planned, built)]
    if stage == "projector":  # planned without the tokenizer, and so without a row for <im_patch>
        words = "language_model.model.embed_tokens.weight"
        assert shapes[1][words][0][0] == shapes[0][words][0][0] + 1
        shapes[0][words] = shapes[1][words]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in planned.parameters())


@pytest.mark.parametrize("stage", IMAGE_STAGES)
def test_figures_are_those_of_the_model(recipes: Recipes, stage: str) -> None:
    described = recipes.of(stage).describe()
    assert described["tokens_per_volume"] == (4 if stage in LANGUAGE_STAGES else 1)
    assert described["flops_per_volume"] > 0
    if stage != "contrastive":
        uncached = recipes.of(stage, model={"cache_features": False}).describe()
        assert uncached["flops_per_volume"] > described["flops_per_volume"]


def test_a_stage_takes_the_run_before_it(recipes: Recipes, stages: RUNS) -> None:
    text = AutoModel.from_pretrained(model_folder(stages["bert"]), add_pooling_layer=False)
    clip = recipes.contrastive().build()
    assert_equal(clip.language_encoder, text)
    trained = Med3DCLIPModel.from_pretrained(model_folder(stages["contrastive"]))
    model = recipes.projector().build()
    assert_equal(model.encoder, trained.vision_encoder)
    decoder = AutoModelForCausalLM.from_pretrained(model_folder(stages["decoder"]))
    mine, theirs = model.language_model.state_dict(), decoder.state_dict()
    for name, value in theirs.items():
        assert torch.equal(mine[name][: len(value)], value), name
    before = read_model(model_folder(stages["projector"])).state_dict()
    finetuned = recipes.finetune().build().state_dict()
    renamed = {name.replace(".base_layer", ""): value for name, value in finetuned.items() if "lora_" not in name}
    assert renamed.keys() == before.keys() and all(torch.equal(renamed[name], before[name]) for name in before)


def test_a_contrastive_run_goes_on_with_another_loss(recipes: Recipes, stages: RUNS) -> None:
    settings = {"checkpoint": str(stages["contrastive"]), "symmetric": True}
    recipe = recipes.contrastive(settings)
    assert_equal(recipe.build(), Med3DCLIPModel.from_pretrained(model_folder(stages["contrastive"])))
    plain = recipes.contrastive({"checkpoint": str(stages["contrastive"])})
    mine, theirs = (run(r, r.build(), single())[2].terms["siglip"].value for r in (recipe, plain))
    assert not torch.equal(mine, theirs)


@pytest.mark.parametrize("stage", LANGUAGE_STAGES)
def test_what_is_saved_is_read_back_to_the_last_bit(recipes: Recipes, stages: RUNS, stage: str) -> None:
    recipe = recipes.of(stage)
    module = recipe.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    folder = model_folder(recipes.save(recipe, module, "again"))
    model = read_model(folder)
    assert_equal(model, module)
    processor = read_processor(folder, model.config)
    groups = [VolumeTexts([(row.question, row.answer) for row in ROWS])]
    for name, value in processor.batch(groups).items():
        assert torch.equal(value, recipe.processor.batch(groups)[name])
    following = recipes.finetune({"checkpoint": str(recipes.folder / "again")})
    if stage == "finetune":  # its adapters go on
        assert_equal(following.build(), module)
        assert following.build(meta=True).config.lora == module.config.lora


# --- what trains --------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Recipes], Any], set[str]]] = {
    "projector": (lambda r: r.projector(), {"projector"}),
    "finetune": (lambda r: r.finetune(), {"projector", "lora"}),
    "adapters": (lambda r: r.finetune({"train": ["lora"]}), {"lora"}),
    "all of the text": (
        lambda r: r.finetune({"train": ["projector", "embeddings", "language_model"], "lora": None}),
        {"projector", "embeddings", "language_model"},
    ),
    "encoder": (lambda r: r.projector({"train": ["encoder", "projector"]}), {"encoder", "projector"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_frozen_parts_stay_bit_for_bit_over_steps(recipes: Recipes, name: str) -> None:
    make, learning = PARTS[name]
    recipe = make(recipes)
    module = recipe.build()
    assert {part for part, found in recipe.parts(module).items() if any(p.requires_grad for p in found)} == learning
    before = copy.deepcopy(module.state_dict())
    optimizer = build_optimizer(module, recipe.parameter_groups(module), recipe.config.training.optimizer)
    module.train()
    assert module.encoder.training == ("encoder" in learning) and module.language_model.training
    for _ in range(3):
        _, _, output = run(recipe, module, items())
        output.terms["ce"].value.backward()
        optimizer.step()
        optimizer.zero_grad()
    module.eval().train()
    after, learns = module.state_dict(), trainable(module)
    learning_tensors = {p.data_ptr() for p in module.parameters() if p.requires_grad}  # tied ones have two names
    own = ("encoder.",) if "encoder" in learning else ()
    frozen = [key for key in after if after[key].data_ptr() not in learning_tensors and not key.startswith(own)]
    assert frozen
    assert [key for key in frozen if not torch.equal(before[key], after[key])] == []
    # The finer of two streams may be cut off by a ReLU; adapters start with one half at zero.
    moved = {key for key in learns if not torch.equal(before[key], after[key])}
    of_parts = {part: {id(p) for p in found} for part, found in recipe.parts(module).items()}
    names = {id(p): key for key, p in module.named_parameters()}
    for part in learning:
        assert len({names[i] for i in of_parts[part]} & moved) > len(of_parts[part]) / 2, part
    statistics = [key for key in after if key.startswith("encoder.") and key.endswith("running_mean")]
    assert statistics
    if "encoder" in learning:
        assert any(not torch.equal(before[key], after[key]) for key in statistics)


@pytest.mark.parametrize("name", PARTS)
def test_parameter_groups_hold_what_trains_once(recipes: Recipes, name: str) -> None:
    recipe = PARTS[name][0](recipes)
    module = recipe.build()
    names = {id(parameter): key for key, parameter in module.named_parameters()}
    found = [(names[id(p)], p.ndim, g) for g in recipe.parameter_groups(module) for p in g["params"]]
    assert len(found) == len({key for key, _, _ in found}) and {key for key, _, _ in found} == trainable(module)
    for _, axes, group in found:
        assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1 if axes >= 2 else 0.0)


@pytest.mark.parametrize("stage", ["contrastive", "finetune"])
def test_muon_takes_matrices_between_layers(recipes: Recipes, stage: str) -> None:
    recipe = getattr(recipes, stage)(training__optimizer={"name": "muon", "lr": 1e-3})
    module = recipe.build()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = recipe.parameter_groups(module)
    muon = {names[id(p)] for group in groups if group["use_muon"] for p in group["params"]}
    for part in ("vision_encoder", "language_encoder") if stage == "contrastive" else ("projector", "lora"):
        assert [name for name in muon if part in name], part
    edges = ("embed", "lm_head", "mm_vision_proj", "mm_language_proj", ".scale")
    assert not [name for name in muon if any(edge in name for edge in edges)]


def test_the_contrastive_stage_trains_everything(recipes: Recipes) -> None:
    recipe = recipes.contrastive()
    module = recipe.build()
    assert trainable(module) == {name for name, _ in module.named_parameters()}
    assert sum(len(found) for found in recipe.parts(module).values()) == len(trainable(module))


def test_parts_are_printed_with_what_trains(recipes: Recipes) -> None:
    recipe = recipes.finetune()
    module = recipe.build()
    sizes = {part: sum(p.numel() for p in found) for part, found in module.parts().items()}
    lines = [" ".join(line.split()) for line in part_lines(recipe.parts(module))]
    states = {"encoder": "frozen", "projector": "trains", "embeddings": "frozen", "language_model": "frozen"}
    assert lines == [f"{part} {sizes[part]:,} {state}" for part, state in {**states, "lora": "trains"}.items()]
    next(module.encoder.parameters()).requires_grad_(True)
    first = next(module.encoder.parameters()).numel()
    line = part_lines(recipe.parts(module))[0]
    assert line.endswith(f"trains, {sizes['encoder'] - first:,} of them frozen")
    assert len(part_lines(recipes.projector().parts(recipes.projector().build()))) == 4  # no adapters, no line
    assert part_lines({}) == []


# --- batches and losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", LANGUAGE_STAGES)
def test_counts_are_those_of_the_rows(recipes: Recipes, stage: str) -> None:
    recipe = recipes.of(stage)
    recipe.build()
    batch = recipe.collate(items())
    tokenizer = recipe.processor.tokenizer
    answers = [len(tokenizer(" " + target_text(row))["input_ids"]) + 1 for row in ROWS]  # and the end
    counts = recipe.counts(batch)
    assert counts == {"label_tokens": sum(answers), "tokens": counts["tokens"], "questions": 5, "volumes": 2}
    assert counts["tokens"] == int(sum((row != tokenizer.pad_token_id).sum() for row in batch["input_ids"]))
    assert recipe.sample_ids(batch) == [row.id for row in ROWS]


def test_questions_are_in_the_published_words(recipes: Recipes) -> None:
    recipe = recipes.projector()
    recipe.build()
    batch = recipe.collate(items())
    text = recipe.processor.tokenizer.decode(batch["input_ids"][1])
    assert "Which organ holds it? Choices: A. liver B. left kidney C. spleen A. liver<|endoftext|>" in text
    answer = [int(i) for i in batch["labels"][3] if i != -100]
    assert recipe.processor.tokenizer.decode(answer) == " C. spleen<|endoftext|>"


@pytest.mark.parametrize("stage", LANGUAGE_STAGES)
@pytest.mark.parametrize("form", ["volumes", "features"])
def test_cross_entropy_is_summed_over_label_tokens(recipes: Recipes, stage: str, form: str) -> None:
    recipe = recipes.of(stage)
    module = recipe.build().eval()
    chosen = items() if form == "volumes" else with_features(recipe.frozen_encoder(), items())
    _, counts, output = run(recipe, module, chosen)
    assert set(output.terms) == {"ce"} and output.terms["ce"].per == "label_tokens"
    apart = []
    for item in items():
        for question, answer in recipe.batch_texts(item):
            row = recipe.processor.batch([VolumeTexts([(question, answer)], item.volumes[0].array)])
            apart.append(module(**row).token_losses)
    assert sum(map(len, apart)) == counts["label_tokens"]
    # Rows share a prefix in a batch, and convolutions of one volume add up in another order: rounding.
    assert output.terms["ce"].value.item() == pytest.approx(torch.cat(apart).sum().item(), rel=1e-5)
    right, of = output.metrics["token_accuracy"]
    assert of == counts["label_tokens"] and 0 <= right <= of


def test_siglip_is_summed_over_pairs(recipes: Recipes) -> None:
    recipe = recipes.contrastive({"start": "original"})
    module = recipe.build().eval()
    batch, counts, output = run(recipe, module, single())
    assert counts == {"volumes": 2} and recipe.sample_ids(batch) == ["q0", "q2"]
    found = module(**{name: batch[name] for name in ("volumes", "input_ids", "attention_mask")})
    logits = 10 * found.image_embeds @ found.text_embeds.T - 10
    expected = -logsigmoid(logits * (2 * torch.eye(2) - 1)).sum()
    term = output.terms["siglip"]
    assert term.per == "volumes" and term.value.item() == pytest.approx(expected.item(), rel=1e-5)
    right, of = output.metrics["batch_recall"]
    assert (int(right), of) == (int((logits.argmax(1) == torch.arange(2)).sum()), 2.0)


def test_clip_is_a_term_of_its_own(recipes: Recipes) -> None:
    recipe = recipes.contrastive({"loss": "clip"})
    module = recipe.build()
    assert module.bias is None
    assert set(run(recipe, module, single())[2].terms) == {"clip"}


# --- features of a frozen encoder ---------------------------------------------------------------------------


def with_features(frozen: FrozenEncoder, chosen: list[Any]) -> list[Any]:
    """What the reader gives once features are there: they came from one volume at a time."""
    made = []
    for item in chosen:
        with torch.inference_mode():
            found = frozen.encode(frozen.module, torch.from_numpy(item.volumes[0].array))
        features = {name: value.clone() for name, value in found.items()}
        made.append(item._replace(volumes=[], features=[features]))
    return made


@pytest.mark.parametrize("source", ["run", "random"])
def test_features_are_those_of_the_encoder_in_the_model(recipes: Recipes, source: str) -> None:
    """Also where its weights were drawn: the features are not those of a second draw."""
    encoder = {} if source == "run" else {"encoder": {k: v for k, v in ENCODER.items() if k != "size"}}
    recipe = recipes.projector(encoder)
    module = recipe.build()
    frozen = recipe.frozen_encoder()
    assert_equal(frozen.module, module.encoder)
    assert not frozen.module.training and trainable(frozen.module) == set()
    assert frozen.module is not module.encoder  # it may be moved and cast
    batch = recipe.collate(with_features(frozen, items()))
    assert "volumes" not in batch
    expected = module.encode(recipe.collate(items())["volumes"])
    for mine, theirs in zip(batch["features"], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_encoder_is_known_by_its_weights(recipes: Recipes) -> None:
    def identity(seed: int, model: dict[str, Any]) -> str:
        torch.manual_seed(seed)
        recipe = recipes.projector(model)
        recipe.build()
        return str(recipe.frozen_encoder().identity)

    own = {k: v for k, v in ENCODER.items() if k != "size"}
    assert identity(0, {}) == identity(1, {})
    assert identity(0, {"encoder": own}) == identity(0, {"encoder": own})
    assert len({identity(0, {}), identity(0, {"encoder": own}), identity(1, {"encoder": own})}) == 3
    assert identity(0, {"encoder": own}) != identity(0, {"encoder": {**own, "residual": True}})


def test_an_encoder_that_learns_or_is_not_to_be_cached_reads_volumes(recipes: Recipes) -> None:
    for model in ({"cache_features": False}, {"train": ["encoder", "projector"]}):
        recipe = recipes.projector(model)
        recipe.build()
        assert recipe.frozen_encoder() is None
    assert recipes.contrastive().frozen_encoder() is None


# --- mistakes -----------------------------------------------------------------------------------------------


def changed(number: int, **fields: Any) -> list[Any]:
    rows = list(ROWS)
    rows[number] = rows[number].model_copy(update=fields)
    return rows


ROWS_REFUSED = {
    "no report": ("contrastive", changed(0, report=None)[:1], "row q0: report: is missing"),
    "an empty report": ("contrastive", changed(2, report=" \n")[2:3], "row q2: report: is missing"),
    "a scan twice": ("contrastive", ROWS[:2], "row q1: v0.npy is in row q0 already"),
    "prior, contrastive": ("contrastive", changed(0, prior="v9.npy")[:1], "row q0: prior: med3dvlm.contrastive reads"),
    "prior, projector": ("projector", changed(3, prior="v9.npy"), "row q3: prior: med3dvlm.projector reads one scan"),
    "prior, finetune": ("finetune", changed(3, prior="v9.npy"), "row q3: prior: med3dvlm.finetune reads one scan"),
    "images": ("projector", changed(1, volume=None, images=["a.png"]), "row q1: a.png: med3dvlm.projector takes"),
}


@pytest.mark.parametrize("name", ROWS_REFUSED)
def test_rows_that_a_stage_cannot_read(recipes: Recipes, name: str) -> None:
    stage, rows, message = ROWS_REFUSED[name]
    with pytest.raises(UserError) as raised:
        recipes.of(stage).check_rows(rows)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
    assert "data.where" in str(raised.value) or "no images" in str(raised.value)


REFUSED: dict[str, tuple[Callable[[Recipes], Any], str, str]] = {
    "another shape": (
        lambda r: r.projector(volume__shape=[32, 64, 96]).build(),
        "volume.shape: [32, 64, 96]",
        "trained on volumes of [32, 64, 64]; prepare them alike",
    ),
    "another shape, finetune": (
        lambda r: r.finetune(volume__shape=[32, 32, 64]).build(),
        "volume.shape: [32, 32, 64]",
        "prepare them alike",
    ),
    "another shape, contrastive": (
        lambda r: r.contrastive({"checkpoint": str(r.runs / "contrastive")}, volume__shape=[64, 64, 64]).build(),
        "volume.shape: [64, 64, 64]",
        "prepare them alike",
    ),
    "no shape": (lambda r: r.projector(volume__shape=None), "volume.shape: is missing", "set it"),
    "mean": (lambda r: r.projector(volume__mean=0.5), "volume.mean, volume.std: ", "set them to 0 and 1"),
    "std": (lambda r: r.contrastive(volume__std=0.5), "volume.mean, volume.std: ", "set them to 0 and 1"),
    "targets": (
        lambda r: r.finetune({"lora": {"targets": ["q_proj", "c_attn"]}}).build(),
        "model.lora: targets: no layer is called c_attn",
        "the linear layers are q_proj",
    ),
    "targets, planned": (
        lambda r: r.finetune({"lora": {"targets": ["c_attn"]}}).build(meta=True),
        "model.lora: targets: no layer is called c_attn",
        "the linear layers are q_proj",
    ),
    "no adapters": (
        lambda r: r.finetune({"lora": None}).build(),
        "model.train: lora: the model has no adapters",
        "set model.lora (med3dvlm.finetune), or leave lora out",
    ),
    "no such folder": (
        lambda r: r.projector({"language_model": "/nowhere/model"}).build(),
        "model.language_model: /nowhere/model: no such folder",
        "name a model folder, a run or a hub name",
    ),
    "no language model": (
        lambda r: r.projector({"language_model": str(r.runs / "contrastive")}).build(),
        "model.language_model: ",
        "a checkpoint of 'med3dclip', which is no causal language model",
    ),
    "an empty folder": (
        lambda r: r.projector({"language_model": str(_empty(r))}).build(),
        "model.language_model: ",
        "neither config.json nor checkpoints/latest",
    ),
    "an empty encoder's folder": (
        lambda r: r.projector({"encoder": str(_empty(r))}).build(),
        "model.encoder: ",
        "neither config.json nor checkpoints/latest",
    ),
    "an empty checkpoint": (
        lambda r: r.finetune({"checkpoint": str(_empty(r))}).build(),
        "model.checkpoint: ",
        "neither config.json nor checkpoints/latest",
    ),
    "no encoder": (
        lambda r: r.projector({"encoder": str(r.runs / "decoder")}).build(),
        "model.encoder: ",
        "a checkpoint of 'qwen2', expected 'med3dclip'; name another folder",
    ),
    "no text encoder": (
        lambda r: r.contrastive({"text_encoder": str(r.runs / "projector")}).build(),
        "model.text_encoder: ",
        "a checkpoint of 'med3dvlm', which is no text encoder; name one",
    ),
    "a contrastive model for a text encoder": (
        lambda r: r.contrastive({"text_encoder": str(r.runs / "contrastive")}).build(),
        "model.text_encoder: ",
        "a checkpoint of 'med3dclip', which is no text encoder; name one",
    ),
    "a decoder for a text encoder": (
        lambda r: r.contrastive({"text_encoder": str(r.runs / "decoder")}).build(),
        "model.text_encoder: ",
        "'qwen2' is no encoder",
    ),
    "another stage's checkpoint": (
        lambda r: r.finetune({"checkpoint": str(r.runs / "contrastive")}).build(),
        "model.checkpoint: ",
        "a checkpoint of 'med3dclip', expected 'med3dvlm'",
    ),
    "an unknown encoder": (
        lambda r: r.contrastive({"encoder": "dcformer-smal"}).build(),
        "model.encoder: ",
        "dcformer-small",
    ),
    "an unknown projector": (
        lambda r: r.projector({"projector": "3xMLP"}).build(),
        "model.projector: ",
        "2xMLP-Mixer-H",
    ),
    "an unknown projector, planned": (
        lambda r: r.projector({"projector": "3xMLP"}).build(meta=True),
        "model.projector: ",
        "2xMLP-Mixer-H",
    ),
    "a long question": (
        lambda r: _collated(r.projector({"max_length": 8})),
        "volumes of rows q0, q2: question: ",
        "raise max_length",
    ),
    "a volume that is not scaled": (
        lambda r: _collated(r.contrastive(), 300.0),
        "volumes of rows q0, q2: volumes: number 0",
        "scale them to 0 to 1",
    ),
}


def _empty(recipes: Recipes) -> Path:
    folder = recipes.folder / "empty"
    folder.mkdir()
    return folder


def _collated(recipe: Any, factor: float = 1.0) -> Any:
    recipe.build()
    chosen = single()
    for item in chosen:
        np.multiply(item.volumes[0].array, factor, out=item.volumes[0].array)
    return recipe.collate(chosen)


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_named_with_their_key_and_a_remedy(recipes: Recipes, name: str) -> None:
    make, start, part = REFUSED[name]
    with pytest.raises(UserError) as raised:
        make(recipes)
    message = str(raised.value)
    assert message.startswith(start) and part in message and "\n" not in message, message


def test_volumes_have_the_size_of_the_settings(recipes: Recipes) -> None:
    recipe = recipes.contrastive()
    recipe.build()
    batch: dict[str, Tensor] = recipe.collate(single())
    assert batch["volumes"].shape == (2, 1, *SIZE) and len(given("contrastive")) == 2
