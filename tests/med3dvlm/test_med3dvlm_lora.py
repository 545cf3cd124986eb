"""Adapters: where they go, what they change, how they are saved and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from med3dvlm.lora import LoraSettings, add_lora, merge_lora
from med3dvlm.processing_med3dvlm import VolumeTexts
from tests.med3dvlm.tiny_med3dvlm import ANSWERS, QUESTIONS, tiny, tiny_language_model, volumes

SMALL = LoraSettings(rank=4, alpha=12)


def batch_of(processor: Any) -> dict[str, torch.Tensor]:
    return processor.batch([VolumeTexts(list(zip(QUESTIONS, ANSWERS, strict=True)), volumes(1)[0])])


def stirred(model: Any) -> Any:
    """Adapters that do something: the second factor starts at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def test_the_papers_settings() -> None:
    settings = LoraSettings()
    assert (settings.rank, settings.alpha, settings.dropout) == (16, 32, 0.05)
    names = {target.removesuffix("_proj") for target in settings.targets}
    assert names == {"q", "k", "v", "o", "gate", "up", "down"}
    assert LoraSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_fresh_adapters_change_nothing_and_train_beside_the_projector() -> None:
    model, processor = tiny()
    batch = batch_of(processor)
    expected = model(**batch).token_losses
    add_lora(model, LoraSettings())
    assert torch.equal(model(**batch).token_losses, expected)
    assert model.trainable == ("projector", "lora")
    found = adapters(model)
    assert len(found) == 2 * 7 * 2  # layers, targets, factors
    assert {tuple(v.shape) for n, v in found.items() if ".q_proj.lora_A." in n} == {(16, 32)}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(found) | {f"projector.{n}" for n, _ in model.projector.named_parameters()}
    model.train()(**batch).loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n in found if ".lora_B." in n} <= grads <= trained


def test_an_adapter_adds_a_scaled_product() -> None:
    """Eq. 8, W = W0 + B A, which LoRA scales by alpha / r."""
    model, _ = tiny()
    add_lora(model, SMALL)
    layer = stirred(model).language_model.model.layers[1].mlp.up_proj
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 32)
    expected = x @ (layer.get_base_layer().weight + 12 / 4 * second @ first).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_of_adapters_is_off_in_eval_mode() -> None:
    model, processor = tiny()
    add_lora(model, LoraSettings(rank=4, dropout=0.5))
    batch = batch_of(processor)
    stirred(model)
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    model.train()
    assert not torch.equal(model(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_adapters_are_saved_apart_and_come_back_exactly(kind: str, tmp_path: Path) -> None:
    model, processor = tiny(kind, lora=SMALL)
    stirred(model)
    batch = batch_of(processor)
    expected = model(**batch)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        keys = set(stored.keys())
    prefix = "language_model.model.layers.0.self_attn.q_proj."
    assert {prefix + "base_layer.weight", prefix + "lora_A.default.weight", prefix + "lora_B.default.weight"} <= keys
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert loaded.config.lora == SMALL.to_dict()
    own = loaded.state_dict()
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    # The same numbers, but the file puts them at other places in memory, and sums may run in another order.
    torch.testing.assert_close(loaded(**batch).token_losses, expected.token_losses, rtol=1e-5, atol=1e-5)
    assert loaded.trainable == ("projector", "lora")
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_merging_keeps_the_answers_and_needs_no_peft_after(kind: str, tmp_path: Path) -> None:
    model, processor = tiny(kind)
    plain = model.state_dict()
    plain_names = set(plain)
    weight = "language_model.model.layers.0.self_attn.q_proj.weight"
    before = plain[weight].clone()
    add_lora(model, SMALL)
    stirred(model)
    batch = batch_of(processor)
    expected = model(**batch).token_losses
    merge_lora(model)
    assert set(model.state_dict()) == plain_names and model.config.lora is None
    assert not torch.equal(model.state_dict()[weight], before)
    # The product is added before instead of after the multiplication.
    torch.testing.assert_close(model(**batch).token_losses, expected, rtol=1e-4, atol=1e-4)
    assert model.trainable == ("projector",)
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"projector"}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).token_losses, model(**batch).token_losses, rtol=1e-5, atol=1e-5)
    merge_lora(model)  # nothing to merge
    add_lora(model, SMALL)  # and new adapters can follow


def test_generation_with_adapters() -> None:
    model, processor = tiny(lora=SMALL)
    prompts = processor(volumes(1)[0], QUESTIONS)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    fresh = model.generate(**prompts, **how)
    adapted = stirred(model).generate(**prompts, **how)
    assert not torch.equal(fresh, adapted)
    merge_lora(model)
    assert torch.equal(model.generate(**prompts, **how), adapted)


def test_targets_of_another_family() -> None:
    model, _ = tiny("gpt2")
    add_lora(model, LoraSettings(targets=("c_attn", "c_fc")))
    assert len(adapters(model)) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_projj",), "no layer is called q_projj; the linear layers are q_proj, k_proj, v_proj, o_proj, gate_proj"),
        (("q_proj", "c_attn", "c_fc"), "no layer is called c_attn, c_fc; "),
        (("input_layernorm",), "no layer is called input_layernorm"),
    ],
)
def test_targets_that_match_nothing(targets: tuple[str, ...], message: str) -> None:
    model, _ = tiny()
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoraSettings(targets=targets))
    assert model.config.lora is None and not adapters(model)


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny(lora=SMALL)
    with pytest.raises(ValueError, match="has adapters already; merge them first"):
        add_lora(model, SMALL)
    with pytest.raises(ValueError, match="targets: none"):
        LoraSettings(targets=())
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match="needs the package peft"):
        tiny(lora=SMALL)
    assert tiny_language_model() is not None  # without adapters nothing needs it
