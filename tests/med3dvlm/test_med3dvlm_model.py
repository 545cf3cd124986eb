"""The whole model: rows about volumes, losses, what is frozen, generation, saving."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

import med3dvlm
from med3dvlm.building import add_image_token, med3dvlm_from, read_model, read_processor
from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.encoders import build_encoder
from med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from med3dvlm.processing_med3dvlm import VolumeTexts
from med3dvlm.projectors import KINDS
from tests.med3dvlm.tiny_med3dvlm import (
    ANSWERS,
    ENCODER,
    IMAGE_TOKENS,
    LANGUAGE_MODELS,
    QUESTIONS,
    SIZE,
    tiny,
    tiny_language_model,
    tiny_tokenizer,
    volumes,
)

# Float32 through two layers, summed in another order: a hundred of its units.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def groups(count: int = 2) -> list[VolumeTexts]:
    """The first volume with all questions, each of the others with one."""
    found = volumes(count)
    texts = list(zip(QUESTIONS, ANSWERS, strict=True))
    return [VolumeTexts(texts, found[0]), *(VolumeTexts(texts[i : i + 1], found[i]) for i in range(1, count))]


def plain_losses(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Each row alone, without padding, from full logits of the language model."""
    image = model.projector(*model.encode(batch["volumes"]))
    found = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids, labels = batch["input_ids"][row][mask], batch["labels"][row][mask]
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[ids == model.config.image_token_id] = image[batch["group_index"][row]]
        logits = model.language_model(inputs_embeds=embeds[None]).logits[0]
        losses = F.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=-100)
        found.append(losses[labels[1:] != -100])
    return found


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_losses_are_those_of_each_row_alone(kind: str, side: str, share_prefix: bool) -> None:
    model, processor = tiny(kind)
    batch = processor.batch(groups(), side)
    output = model(**batch, share_prefix=share_prefix)
    expected = plain_losses(model, batch)
    torch.testing.assert_close(output.token_losses, torch.cat(expected), **CLOSE)
    torch.testing.assert_close(output.loss, torch.cat(expected).mean(), **CLOSE)
    answers = [len(processor.row("", a).ids) - IMAGE_TOKENS for a in [*ANSWERS, ANSWERS[1]]]
    assert [len(losses) for losses in expected] == answers
    assert output.logits.shape == (sum(answers), 280)
    assert output.targets.tolist() == batch["labels"][batch["labels"] != -100].tolist()


def gradients(model: Any, batch: dict[str, torch.Tensor], **how: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, **how).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Gradients of a float64 model; the loss and the softmaxes' sums of some layers are float32 in the library."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_gradients_through_a_shared_prefix_are_those_of_separate_rows(kind: str) -> None:
    model, processor = tiny(kind)
    model.double().set_trainable("projector", "language_model", "embeddings")
    batch = processor.batch(groups())
    shared, separate = (gradients(model, batch, share_prefix=share) for share in (True, False))
    assert_same(shared, separate)
    assert any("low_mixer" in name for name in shared)


def lengths_of_passes(model: Any) -> list[tuple[int, int]]:
    """(rows, tokens) of each pass through the first decoder layer from now on."""
    seen: list[tuple[int, int]] = []
    layer = model.language_model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    return seen


def test_what_a_shared_prefix_saves() -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    length = batch["input_ids"].shape[1]
    seen = lengths_of_passes(model)
    model(**batch)
    lengths = sorted((batch["attention_mask"].sum(1) - IMAGE_TOKENS + 1).tolist())
    assert lengths[2] < lengths[3] / 2 < lengths[0] * 2  # the longest row goes alone
    assert seen == [(2, IMAGE_TOKENS - 1), (3, lengths[2]), (1, lengths[3])]
    seen.clear()
    model(**batch, position_ids=batch["attention_mask"].cumsum(1)[:, IMAGE_TOKENS - 1 :] - 1)  # a row for each
    assert seen == [(2, IMAGE_TOKENS - 1), (4, length - IMAGE_TOKENS + 1)]
    seen.clear()
    model(**batch, share_prefix=False)
    assert seen == [(4, length)]
    seen.clear()
    model(**processor.batch(groups()[1:]))  # nothing to share
    model(**{**batch, "labels": batch["input_ids"]})  # labels among the image tokens
    next(model.language_model.parameters()).ds_id = 0  # so ZeRO-3 marks what it has split
    model(**batch)
    assert len(seen) == 3


def test_rows_that_begin_otherwise_share_nothing() -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    begin = torch.tensor([[65], [66], [67], [68]])  # another letter before the image tokens of each row
    batch |= {
        "input_ids": torch.cat([begin, batch["input_ids"]], 1),
        "attention_mask": F.pad(batch["attention_mask"], (1, 0), value=1),
        "labels": F.pad(batch["labels"], (1, 0), value=-100),
    }
    torch.testing.assert_close(model(**batch).token_losses, torch.cat(plain_losses(model, batch)), **CLOSE)


def test_activation_checkpointing_changes_nothing() -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    model.double().set_trainable("projector", "language_model")
    usual = gradients(model, batch)
    model.train()
    newer = hasattr(model, "activation_checkpointing_enable")
    getattr(model, "activation_checkpointing_enable" if newer else "gradient_checkpointing_enable")()
    assert_same(gradients(model, batch), usual)


def test_features_do_in_place_of_volumes() -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    features = tuple(model.encode(batch["volumes"]))
    assert tuple(features[0].shape[1:]) == model.config.projector.low
    expected = model(**batch)
    del batch["volumes"]
    found = model(**batch, features=features)
    assert torch.equal(found.token_losses, expected.token_losses)
    assert torch.equal(found.image_embeds, expected.image_embeds)
    assert found.image_embeds.shape == (2, IMAGE_TOKENS, 32)


def test_volumes_and_questions_both_matter() -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    before = model(**batch).token_losses
    other = model(**{**batch, "volumes": batch["volumes"].flip(2)}).token_losses
    assert ((before - other).abs() > 1e-4).float().mean() > 0.5
    swapped = model(**{**batch, "volumes": batch["volumes"].flip(0), "group_index": 1 - batch["group_index"]})
    torch.testing.assert_close(swapped.token_losses, before, **CLOSE)


def test_without_labels_the_last_tokens_have_logits() -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    del batch["labels"]
    output = model(**batch)
    assert output.logits.shape == (4, 1, 280) and output.loss is None
    alone = model(**{k: v[1:2, : int(batch["attention_mask"][1].sum())] for k, v in batch.items() if v.ndim == 2},
                  volumes=batch["volumes"][:1])  # fmt: skip
    torch.testing.assert_close(output.logits[1], alone.logits[0], **CLOSE)


def test_text_alone() -> None:
    model, processor = tiny()
    prompts = processor(text=QUESTIONS, image=False)
    logits = model(**prompts).logits[0, 0]
    alone = processor(text=QUESTIONS[:1], image=False)
    expected = model.language_model(input_ids=alone["input_ids"]).logits[0, -1]
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_batch_without_label_tokens_has_no_loss_and_a_gradient() -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    output = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert output.token_losses.shape == (0,) and output.loss == 0
    output.loss.backward()


def test_published_splice_of_a_model() -> None:
    """What the language model reads, against the published join of three pieces; padding does not move it."""
    model, processor = tiny(splice="published")
    batch = processor.batch(groups(), "left")
    rows = model.embed(batch["input_ids"], batch["attention_mask"], batch["volumes"], None, batch["group_index"])
    for row, mask in enumerate(batch["attention_mask"].bool()):
        words = model.get_input_embeddings()(batch["input_ids"][row][mask])
        assert rows.image is not None
        image = rows.image[batch["group_index"][row]]
        expected = torch.cat([words[:1], image, words[1 + IMAGE_TOKENS :]])
        assert torch.equal(rows.embeds[row][mask], expected)
    shared, separate = (model(**processor.batch(groups()), share_prefix=share).token_losses for share in (True, False))
    torch.testing.assert_close(shared, separate, **CLOSE)


def test_a_tokenizer_that_begins_rows() -> None:
    model, processor = tiny("llama", begins=True)
    batch = processor.batch(groups())
    assert batch["input_ids"][:, 0].unique().tolist() == [processor.tokenizer.bos_token_id]
    published, _ = tiny("llama", begins=True, splice="published")
    assert torch.equal(model(**batch).token_losses, published(**batch).token_losses)


@pytest.mark.parametrize("name", KINDS)
def test_every_projector(name: str) -> None:
    model, processor = tiny(projector=name)
    batch = processor.batch(groups())
    tokens = model.config.image_tokens
    assert (batch["input_ids"][0] == model.config.image_token_id).sum() == tokens == processor.image_tokens
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.projector.parameters() if p.ndim == 2)


# --- frozen and trained -------------------------------------------------------------------------------------


def trainable(model: Any) -> set[str]:
    return {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_the_projector_alone_trains_at_first_and_the_encoder_stays_in_eval_mode() -> None:
    model, processor = tiny()
    assert trainable(model) == {"projector"}
    model.train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    batch = processor.batch(groups())
    output = model(**batch)
    assert not any(module.training for module in model.encoder.modules())
    assert model.language_model.training and model.projector.training
    output.loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert all(p.grad is None for p in (*model.encoder.parameters(), *model.language_model.parameters()))


def test_parts_are_trained_by_name() -> None:
    model, processor = tiny(kind="llama")
    model.set_trainable("encoder", "embeddings")
    assert trainable(model) == {"encoder", "language_model"}
    names = [n for n, p in model.language_model.named_parameters() if p.requires_grad]
    assert names == ["model.embed_tokens.weight"]
    assert model.train().encoder.training
    model(**processor.batch(groups())).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    counted = {part: len(parameters) for part, parameters in model.parts().items()}
    assert sum(counted.values()) == len(list(model.parameters())) and counted["lora"] == 0
    with pytest.raises(ValueError, match="visoin: unknown; known: encoder, projector"):
        model.set_trainable("visoin")
    with pytest.raises(ValueError, match="lora: the model has no adapters"):
        model.set_trainable("lora")


# --- generation ---------------------------------------------------------------------------------------------


def continued(model: Any, prompts: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Six greedy tokens of each row, whatever they are, and their logits ``(R, 6, V)``."""
    found = model.generate(
        **prompts, **how, max_new_tokens=6, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(found.sequences[:, :-6], prompts["input_ids"])
    return found.sequences[:, -6:], torch.stack(found.logits, dim=1)


def greedy(model: Any, prompts: Any, **how: Any) -> torch.Tensor:
    """The tokens alone."""
    return continued(model, prompts, **how)[0]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_unequal_questions_in_one_batch_get_the_answers_that_each_gets_alone(kind: str, share_prefix: bool) -> None:
    model, processor = tiny(kind)
    found = volumes(2)
    # Padding of one, longer than what is shared, and none.
    asked = [(0, QUESTIONS[0]), (0, QUESTIONS[2][:-1]), (1, QUESTIONS[2]), (1, QUESTIONS[1])]
    prompts = processor(found, [q for _, q in asked], group_index=[v for v, _ in asked])
    tokens, logits = continued(model, prompts, share_prefix=share_prefix)
    alone = [continued(model, processor(found[v], q)) for v, q in asked]
    assert torch.equal(tokens, torch.cat([t for t, _ in alone]))
    torch.testing.assert_close(logits, torch.cat([x for _, x in alone]), rtol=1e-4, atol=1e-4)
    assert len({tuple(row) for row in tokens.tolist()}) > 1


@pytest.mark.parametrize("splice", ["correct", "published"])
def test_decoding_step_by_step_gives_the_teacher_forced_logits(splice: Any) -> None:
    model, processor = tiny(splice=splice)
    prompts = processor(volumes(1)[0], QUESTIONS)
    tokens, logits = continued(model, prompts)
    forced = model(**with_answer(prompts, tokens)).logits
    torch.testing.assert_close(forced, logits.flatten(0, 1), **CLOSE)


def test_sampling_and_beams() -> None:
    model, processor = tiny()
    prompts = processor(volumes(1)[0], QUESTIONS[:2])
    how: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    torch.manual_seed(0)
    sampled = model.generate(**prompts, do_sample=True, top_k=0, num_return_sequences=3, **how)
    assert sampled.shape == (6, prompts["input_ids"].shape[1] + 4)
    assert len({tuple(row) for row in sampled[:3, -4:].tolist()}) > 1
    beams = model.generate(**prompts, do_sample=False, num_beams=3, **how)
    alone = [model.generate(**processor(volumes(1)[0], q), do_sample=False, num_beams=3, **how) for q in QUESTIONS[:2]]
    assert torch.equal(beams[:, -4:], torch.cat([row[:, -4:] for row in alone]))
    scores = [model(**with_answer(prompts, rows)).token_losses.reshape(2, 4).sum(1)
              for rows in (beams[:, -4:], greedy(model, prompts)[:, :4])]  # fmt: skip
    assert (scores[0] <= scores[1] + 1e-4).all()


def with_answer(prompts: Any, answers: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch that ends with these tokens and has them as labels."""
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    return {
        **{k: prompts[k] for k in ("volumes", "group_index")},
        "input_ids": torch.cat([ids, answers], 1),
        "attention_mask": torch.cat([mask, torch.ones_like(answers)], 1),
        "labels": torch.cat([torch.full_like(ids, -100), answers], 1),
    }


def test_generation_runs_over_shared_image_tokens_once() -> None:
    model, processor = tiny()
    seen = lengths_of_passes(model)
    prompts = processor(volumes(1)[0], QUESTIONS)
    greedy(model, prompts)
    width = prompts["input_ids"].shape[1]
    assert seen == [(1, IMAGE_TOKENS - 1), (3, width - IMAGE_TOKENS + 1), *[(3, 1)] * 5]


def test_features_do_for_generation() -> None:
    model, processor = tiny()
    prompts = processor(volumes(1)[0], QUESTIONS)
    expected = greedy(model, prompts)
    features = model.encode(prompts.pop("volumes"))
    assert torch.equal(greedy(model, prompts, features=features), expected)


def test_generation_stops_at_the_end_of_an_answer() -> None:
    model, processor = tiny("llama")
    assert model.generation_config.eos_token_id[0] == processor.tokenizer.eos_token_id
    with torch.no_grad():
        head = model.language_model.lm_head
        head.weight.zero_()
        head.bias = torch.nn.Parameter(F.one_hot(torch.tensor(256), 280).float())
    prompts = processor(volumes(1)[0], QUESTIONS)
    found = model.generate(**prompts, max_new_tokens=9)
    assert found.shape[1] == prompts["input_ids"].shape[1] + 1
    assert (found[:, -1] == processor.tokenizer.eos_token_id).all()


# --- saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_saved_folder_loads_with_the_auto_classes_and_answers_alike(kind: str, tmp_path: Path) -> None:
    model, processor = tiny(kind, projector="1xMLP-Mixer-H", splice="published")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Med3DVLMForConditionalGeneration)
    assert loaded.config.splice == "published" and loaded.config.encoder_config == model.config.encoder_config
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    own = loaded.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    prompts = processor(volumes(1)[0], QUESTIONS)
    again = reader(volumes(1)[0], QUESTIONS)
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in prompts.items()}
    assert torch.equal(greedy(loaded.eval(), again), greedy(model, prompts))
    assert trainable(loaded) == {"projector"}
    assert read_processor(tmp_path, read_model(tmp_path).config).size == list(SIZE)


LOADS = """
import sys
sys.modules.update(dict.fromkeys(["peft", "deepspeed", "monai", "timm", "torchvision", "mllm3d", "photon", "triton"]))
import torch, med3dvlm
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1])
prompts = processor(torch.zeros(32, 64, 64), ["Where?"])
print(model.generate(**prompts, max_new_tokens=2, do_sample=False, eos_token_id=None).shape[1])
"""


def test_a_saved_folder_loads_where_only_torch_and_transformers_are(tmp_path: Path) -> None:
    model, processor = tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    root = Path(med3dvlm.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == IMAGE_TOKENS + len("Where?") + 2


def test_half_precision(tmp_path: Path) -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    expected = model(**batch).loss
    model.save_pretrained(tmp_path)
    loaded = read_model(tmp_path, torch.bfloat16).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    output = loaded(**batch)
    assert output.token_losses.dtype == torch.float32
    # bfloat16 has 8 bits: 1 % of a loss that is a mean over many logits.
    torch.testing.assert_close(output.loss, expected, rtol=0.02, atol=0.02)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    model, _ = tiny()
    state = model.state_dict()
    kept = {k: v for k, v in state.items() if k != "projector.low_mixer.0.ln1.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match="do not fit config.json.*missing keys: projector.low_mixer.0.ln1.weight"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="a checkpoint of 'qwen2', expected 'med3dvlm'"):
        read_model(tmp_path)


# --- building, and what cannot be ---------------------------------------------------------------------------


def test_building_gives_the_token_a_row_where_there_is_none() -> None:
    tokenizer, roomy, tight = tiny_tokenizer(), tiny_language_model(), tiny_language_model(rows=260)
    before = roomy.get_input_embeddings().weight.clone()
    assert add_image_token(tokenizer, roomy) == len(tokenizer) - 1 == 260
    assert torch.equal(roomy.get_input_embeddings().weight, before)
    add_image_token(tokenizer, tight)
    assert tight.get_input_embeddings().num_embeddings == 261 == tight.config.vocab_size
    assert add_image_token(tokenizer, tight) == 260 and len(tokenizer) == 261  # again: nothing changes


def test_building_from_folders(tmp_path: Path) -> None:
    language_model, tokenizer = tiny_language_model(), tiny_tokenizer()
    language_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = build_encoder(ENCODER)
    model, processor = med3dvlm_from(encoder, tmp_path, tmp_path, mixed_tokens=4)
    own = model.state_dict()
    for prefix, part in (("encoder.", encoder), ("language_model.", language_model)):
        assert all(torch.equal(value, own[prefix + name]) for name, value in part.state_dict().items())
    assert model.config.image_tokens == processor.image_tokens == 4
    assert processor.image_token_id == model.config.image_token_id == len(processor.tokenizer) - 1


def test_encoder_and_projector_that_do_not_fit() -> None:
    model, _ = tiny()
    config = Med3DVLMConfig(**{**model.config.to_dict(), "projector_config": {"name": "2xMLP-H", "low": [256, 384]}})
    with pytest.raises(ValueError, match=r"projector_config: made for low \(256, 384\) .* the encoder gives \(4, 8\)"):
        Med3DVLMForConditionalGeneration(config)


def test_volumes_features_and_rows_that_do_not_fit() -> None:
    model, processor = tiny()
    batch = processor.batch(groups())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"volumes": torch.rand(2, 1, 64, 64, 32)}, "32 x 64 x 64"),
        ({"volumes": None}, "<im_patch> without a volume"),
        ({"features": tuple(model.encode(batch["volumes"]))}, "both are given"),
        ({"volumes": None, "features": (torch.rand(2, 9, 4), torch.rand(2, 1, 4))}, "features: low"),
        ({"group_index": None}, "group_index: missing for 4 rows about 2 volumes"),
        ({"group_index": torch.tensor([0, 0, 0, 2])}, "for 4 rows about volumes 0 to 1"),
        ({"group_index": torch.tensor([0, 1])}, "for 4 rows about volumes 0 to 1"),
        ({"input_ids": batch["input_ids"].clamp(max=259)}, "0 <im_patch> in row 0 for 6 image tokens"),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **changes})
    prompts = processor(volumes(1)[0], QUESTIONS, padding_side="right")
    with pytest.raises(ValueError, match="pad on the left to generate"):
        model.generate(**prompts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"splice": "right"}, "splice: 'right' is not one of correct, published"),
        ({"projector_config": {"name": "MLP"}}, "'MLP' is not one of"),
        ({"lora": {"r": 16}}, "lora: unknown r; known: rank"),
        ({"lora": {"rank": 0}}, "lora: rank: 0"),
    ],
)
def test_configurations_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Med3DVLMConfig(**values)


def test_the_published_shape() -> None:
    config = Med3DVLMConfig()
    assert config.image_tokens == 256 and config.text_config.hidden_size == 3584
    assert (config.projector.low, config.projector.high) == ((256, 384), (32, 768))
