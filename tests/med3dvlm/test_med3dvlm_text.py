"""Small text models from nothing: their tokenizers, batches and losses, and what other libraries read of them."""

import json
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from med3dvlm.recipes.text import MASKED, byte_pairs, word_pieces
from mllm3d.data.prompts import target_text
from mllm3d.errors import UserError
from tests.med3dvlm.tiny_recipes import REPORTS, ROWS, Recipes, given, items, model_folder, run, single

KINDS = {"bert": "encoder", "decoder": "decoder"}


def built(recipes: Recipes, stage: str, **changes: Any) -> tuple[Any, Any]:
    recipe = recipes.of(stage, **changes)
    torch.manual_seed(0)
    return recipe, recipe.build()


# --- tokenizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [word_pieces, byte_pairs])
def test_a_tokenizer_depends_on_its_texts_and_not_on_their_order(make: Any) -> None:
    texts = [*REPORTS.values(), "Ünïcode: 3 × 4 mm", "a  b"]
    found = [make(order, 310, 64).backend_tokenizer.to_str() for order in (texts, texts[::-1])]
    assert found[0] == found[1]
    assert json.loads(make([*texts, "zzz zzz zzz"], 310, 64).backend_tokenizer.to_str()) != json.loads(found[0])
    assert len(make(texts, 310, 64)) <= 310


def test_bytes_are_read_back_as_they_were() -> None:
    tokenizer = byte_pairs(REPORTS.values(), 310, 64)
    for text in ("The liver holds it.", "Größe 3×4\n日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<pad>")
    assert tokenizer.eos_token_id not in tokenizer("text")["input_ids"]


def test_word_pieces_stand_between_their_marks() -> None:
    tokenizer = word_pieces(REPORTS.values(), 310, 12)
    ids = tokenizer("The LIVER", truncation=True, max_length=12)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "the", "liver", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("☃")["input_ids"]) == ["[CLS]", "[UNK]", "[SEP]"]


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", KINDS)
def test_the_planned_model_has_the_shapes_of_the_built_one(recipes: Recipes, stage: str) -> None:
    recipe, module = built(recipes, stage)
    planned = recipes.of(stage).build(meta=True)
    vocabulary = len(recipe.tokenizer)
    assert vocabulary <= 310
    for name, parameter in planned.named_parameters():
        shape = [vocabulary if size == 310 else size for size in parameter.shape]  # at most so many tokens are found
        assert parameter.is_meta and shape == list(dict(module.named_parameters())[name].shape), name
    assert planned.state_dict().keys() == module.state_dict().keys()
    assert recipe.describe() == {} and not recipe.wants_volumes


@pytest.mark.parametrize("stage", KINDS)
def test_a_saved_model_is_read_by_the_library(recipes: Recipes, stage: str) -> None:
    recipe, module = built(recipes, stage)
    folder = model_folder(recipes.save(recipe, module, "saved"))
    kind: Any = AutoModelForMaskedLM if stage == "bert" else AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(REPORTS["v0"])["input_ids"] == recipe.tokenizer(REPORTS["v0"])["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        recipe.tokenizer.pad_token_id,
        recipe.tokenizer.eos_token_id,
    )
    assert model.config.pad_token_id == tokenizer.pad_token_id
    if stage == "decoder":
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_muon_takes_matrices_between_layers(recipes: Recipes) -> None:
    for stage in KINDS:
        recipe, module = built(recipes, stage, training__optimizer={"name": "muon", "lr": 1e-3})
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = recipe.parameter_groups(module)
        assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())
        muon = {names[id(p)] for g in groups if g["use_muon"] for p in g["params"]}
        assert len(muon) == 2 * (6 if stage == "bert" else 7)  # matrices of a layer
        assert not [name for name in muon if "embed" in name or "lm_head" in name or "cls" in name]


def test_the_tokenizer_learns_from_the_training_split_alone(recipes: Recipes) -> None:
    other = [row.model_copy(update={"id": f"{row.id}t", "case": "t", "split": "test", "volume": "t.npy",
                                    "report": "xylophone " * 9, "answer": "xylophone", "options": None})
             for row in ROWS]  # fmt: skip
    from mllm3d.data.manifest import write_manifest

    before = built(recipes, "bert")[0].tokenizer.get_vocab(), built(recipes, "decoder")[0].tokenizer.get_vocab()
    write_manifest(recipes.folder / "manifest.jsonl", [*ROWS, *other])
    after = built(recipes, "bert")[0].tokenizer.get_vocab(), built(recipes, "decoder")[0].tokenizer.get_vocab()
    assert before == after


# --- batches and losses -------------------------------------------------------------------------------------


def test_an_encoder_reads_reports_one_a_row(recipes: Recipes) -> None:
    recipe, _ = built(recipes, "bert")
    batch = recipe.collate(single())
    lengths = [len(recipe.tokenizer(report)["input_ids"]) for report in REPORTS.values()]
    assert batch["attention_mask"].sum(1).tolist() == lengths and len(set(lengths)) == 2
    assert recipe.counts(batch) == {"tokens": sum(lengths), "volumes": 2}
    assert recipe.sample_ids(batch) == ["q0", "q2"]


def test_hidden_words_are_a_share_of_those_that_are_no_marks(recipes: Recipes) -> None:
    recipe, _ = built(recipes, "bert")
    special = recipe.tokenizer.all_special_ids
    ids = torch.randint(len(special), len(recipe.tokenizer), (400, 50))
    ids[:, 0], ids[:, 40:] = special[0], recipe.tokenizer.pad_token_id
    mask = (ids != recipe.tokenizer.pad_token_id).long()
    torch.manual_seed(0)
    hidden, again = (recipe._hidden_words(ids, mask) for _ in range(2))
    assert not hidden[:, 0].any() and not hidden[:, 40:].any() and not torch.equal(hidden, again)
    # 400 x 39 draws: the share is within four deviations, 4 sqrt(0.15 x 0.85 / 15600) = 0.011.
    assert hidden[:, 1:40].float().mean().item() == pytest.approx(MASKED, abs=0.012)


def test_validation_hides_the_same_words_and_draws_nothing(recipes: Recipes) -> None:
    recipe, module = built(recipes, "bert")
    module.eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        values = [run(recipe, module, single())[2].terms["ce"].value for _ in range(2)]
    assert torch.equal(*values) and torch.equal(torch.get_rng_state(), before)
    run(recipe, module, single())
    assert not torch.equal(torch.get_rng_state(), before)


def test_masked_cross_entropy_is_summed_over_the_hidden_words(recipes: Recipes) -> None:
    recipe, module = built(recipes, "bert")
    module.eval()
    batch = recipe.collate([item._replace(rows=item.rows[:1] * 5) for item in items()])
    torch.manual_seed(3)
    hidden = recipe._hidden_words(batch["input_ids"], batch["attention_mask"])
    torch.manual_seed(3)
    output = recipe.losses(module, batch, 0, 10, {})
    shown = batch["input_ids"].masked_fill(hidden, recipe.tokenizer.mask_token_id)
    logits = module(input_ids=shown, attention_mask=batch["attention_mask"]).logits
    expected = cross_entropy(logits[hidden], batch["input_ids"][hidden], reduction="sum")
    term, (total, count) = output.terms["ce"], output.metrics["per_word"]
    assert hidden.sum() > 3 and count == hidden.sum() and term.per == "tokens"
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert term.value.item() == pytest.approx(expected.item() / MASKED, rel=1e-5)


def test_a_decoder_reads_texts_end_to_end(recipes: Recipes) -> None:
    recipe, module = built(recipes, "decoder")
    batch = recipe.collate(items())
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width = recipe.settings.max_length
    assert ids.shape[1] == width and ids.shape[0] > 1
    texts = recipe.tokenizer.decode(ids.flatten()[mask.flatten() == 1]).split("<|endoftext|>")
    assert texts[-1] == "" and len(texts) == len(ROWS) + 1
    assert texts[1] == "Which organ holds it? Choices: A. liver B. left kidney C. spleen A. liver"
    assert all(text.endswith(" " + target_text(row)) for text, row in zip(texts[:-1], ROWS, strict=True))
    assert recipe.counts(batch) == {"tokens": int(mask.sum()), "volumes": 2}
    assert (mask.flatten().diff() <= 0).all()  # padding comes last
    _, _, output = run(recipe, module, items())
    logits = module(input_ids=ids).logits[:, :-1]
    wanted = mask[:, 1:] == 1
    expected = cross_entropy(logits[wanted], ids[:, 1:][wanted], reduction="sum")
    assert output.terms["ce"].value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.metrics["per_word"][1] == wanted.sum()


def test_an_answer_is_a_lesson_for_the_later_stages(recipes: Recipes) -> None:
    """The decoder's tokens of question and answer are those that a Med3DVLM reads behind its image tokens."""
    recipe, _ = built(recipes, "decoder")
    later = recipes.projector()
    later.build()
    row = later.collate(items())["input_ids"][1]
    text = "".join(recipe.texts_of(ROWS[1]))
    ends = (later.processor.image_token_id, later.processor.tokenizer.pad_token_id)
    read = [int(i) for i in row if int(i) not in ends]
    assert later.processor.tokenizer.decode(read) == f"{text}<|endoftext|>"


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [None, "", "  \n"])
def test_an_encoder_needs_reports(recipes: Recipes, report: str | None) -> None:
    rows = [row.model_copy(update={"report": report}) for row in ROWS]
    with pytest.raises(UserError, match="^row q0: report: is missing; choose rows that have one with data.where$"):
        recipes.of("bert").check_rows(rows)
    recipes.of("decoder").check_rows(rows)


def test_a_text_model_learns_on_every_stage_of_its_kind(recipes: Recipes) -> None:
    """A few steps on the same batch make the loss of its words fall."""
    for stage in KINDS:
        recipe, module = built(recipes, stage)
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        losses = []
        for _ in range(12):
            _, counts, output = run(recipe, module, given(stage))
            total, count = output.metrics["per_word"]
            losses.append(float(total) / max(float(count), 1.0))
            (output.terms["ce"].value / counts["tokens"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.8 * losses[0] or stage == "bert", losses


def test_settings_are_checked(recipes: Recipes) -> None:
    with pytest.raises(UserError, match="model.kind"):
        recipes.recipe("med3dvlm.text", {"kind": "both"})
    for heads in (3, 128):
        with pytest.raises(UserError, match=f"hidden_size: 128 is not {heads} heads times an even number"):
            recipes.recipe("med3dvlm.text", {"kind": "decoder", "heads": heads})
