"""The contrastive model: what its features are, its files, its text towers, and mistakes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from med3dvlm import Med3DCLIPConfig, Med3DCLIPModel, Med3DCLIPOutput
from med3dvlm.contrastive import contrastive_sum
from med3dvlm.encoders import build_encoder
from tests.med3dvlm.tiny_clip import BERT, DISTILBERT, ENCODER, SIZE, pairs, tiny_clip, tiny_config

PUBLISHED = ("vision_encoder", "language_encoder", "mm_vision_proj", "mm_language_proj", "t_prime", "bias")


def loss_of(model: Med3DCLIPModel, output: Med3DCLIPOutput) -> torch.Tensor:
    image, text, t_prime = output.image_embeds, output.text_embeds, output.t_prime
    assert image is not None and text is not None and t_prime is not None
    return contrastive_sum(image, text, t_prime, output.bias, model.config.contrastive_settings)


def unit_rows(values: torch.Tensor) -> torch.Tensor:
    return values / values.pow(2).sum(1, keepdim=True).sqrt()


@pytest.fixture
def model() -> Med3DCLIPModel:
    return tiny_clip().eval()


def test_features_are_the_papers(model: Med3DCLIPModel) -> None:
    """Mean of the last stage's tokens and the [CLS] token, each mapped and normalised."""
    model, given = model.double(), pairs(3)
    tokens = model.vision_encoder(given["volumes"].double()).high
    assert tokens.shape == (3, *model.vision_encoder.high_shape)
    mapped = linear(tokens.mean(1), model.mm_vision_proj.weight, model.mm_vision_proj.bias)
    torch.testing.assert_close(model.encode_image(given["volumes"]), unit_rows(mapped))
    hidden = model.language_encoder(given["input_ids"], given["attention_mask"]).last_hidden_state
    mapped = linear(hidden[:, 0], model.mm_language_proj.weight, model.mm_language_proj.bias)
    torch.testing.assert_close(model.encode_text(given["input_ids"], given["attention_mask"]), unit_rows(mapped))


def test_padding_changes_no_text(model: Med3DCLIPModel) -> None:
    """Each text by itself, without its padding; rounding differs with the shapes."""
    given = pairs(4)
    together = model.encode_text(given["input_ids"], given["attention_mask"])
    for row, length in enumerate(given["attention_mask"].sum(1).tolist()):
        alone = model.encode_text(given["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_the_output_is_what_the_loss_needs(model: Med3DCLIPModel) -> None:
    output = model(**pairs(3))
    assert output.t_prime.shape == output.bias.shape == ()
    loss_of(model, output).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == set()
    assert model.t_prime.grad is not None and model.t_prime.grad.abs() > 0


@pytest.mark.parametrize(
    ("contrastive", "t_prime", "bias"),
    [({}, 2.6593, 0.0), ({"start": "original"}, 2.3026, -10.0), ({"loss": "clip"}, 2.6593, None)],
)
def test_temperature_and_bias_at_the_start(contrastive: dict[str, Any], t_prime: float, bias: float | None) -> None:
    model = tiny_clip(contrastive=contrastive)
    assert model.t_prime.tolist() == pytest.approx([t_prime], abs=1e-4)
    assert (None if model.bias is None else model.bias.tolist()) == (None if bias is None else [bias])
    assert ("bias" in model.state_dict()) == (bias is not None)


def test_bfloat16_features_are_normalised_in_float32(model: Med3DCLIPModel) -> None:
    exact = model(**pairs(3))
    output = model.to(torch.bfloat16)(**pairs(3))
    for name in ("image_embeds", "text_embeds"):
        found = output[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)
        # bfloat16 has 8 bits; a few roundings one after the other.
        assert float((found - exact[name]).detach().norm(dim=1).max()) < 0.1
    loss_of(model, output).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_fresh_model_has_the_encoders_own_initial_weights() -> None:
    """Not the library's, which draws every convolution and linear map again."""
    torch.manual_seed(5)
    fresh = Med3DCLIPModel(tiny_config()).vision_encoder.state_dict()
    torch.manual_seed(5)
    own = build_encoder(ENCODER).state_dict()
    assert own.keys() == fresh.keys() and all(torch.equal(own[name], fresh[name]) for name in own)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"contrastive": {"loss": "clip", "chunk": 7}}, {"text_config": BERT}])
def test_a_saved_model_is_the_same_when_loaded(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny_clip(**settings).eval()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, Med3DCLIPConfig)
    assert config.contrastive_settings == model.config.contrastive_settings
    assert config.encoder == model.vision_encoder.spec and model.vision_encoder.spec.items() >= ENCODER.items()
    assert config.projection_dim == 6
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, Med3DCLIPModel) and not any(report.values())
    before, after = model(**pairs(2)), loaded(**pairs(2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    stored = load_file(tmp_path / "model.safetensors")
    assert {key.partition(".")[0] for key in stored} == set(PUBLISHED) - ({"bias"} if model.bias is None else set())


def test_a_model_loads_in_bfloat16(tmp_path: Path, model: Med3DCLIPModel) -> None:
    model.save_pretrained(tmp_path)
    loaded = Med3DCLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.mm_vision_proj.weight, model.mm_vision_proj.weight.bfloat16())


def test_weights_that_are_missing_in_a_file_are_fresh_ones(tmp_path: Path, model: Med3DCLIPModel) -> None:
    """And not memory that nobody has written: the library builds a model without memory first."""
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = [key for key in stored if key.startswith("vision_encoder.") and stored[key].is_floating_point()]
    gone = {names[0], names[-1], "t_prime", "mm_vision_proj.weight", "mm_vision_proj.bias"}
    save_file({k: v for k, v in stored.items() if k not in gone}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = Med3DCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == gone
    state = loaded.state_dict()
    assert all(torch.equal(state[key], stored[key]) for key in stored.keys() - gone)
    assert all(0 <= state[key].abs().max() < 2 for key in gone - {"t_prime"})
    assert state["t_prime"].item() == pytest.approx(2.6593, abs=1e-4)
    assert loaded.eval().encode_image(pairs(2)["volumes"]).isfinite().all()


def test_the_model_can_be_planned_without_memory() -> None:
    with torch.device("meta"):
        model = Med3DCLIPModel(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [*model.state_dict()] == [*tiny_clip().state_dict()]


# --- text towers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DISTILBERT, BERT])
def test_the_text_tower_comes_from_a_folder(tmp_path: Path, text: dict[str, Any]) -> None:
    """As saved with a head, as ClinicalBERT is; the head is left out, and BERT's pooler, which nothing reads."""
    torch.manual_seed(1)
    saved = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**text))
    saved.save_pretrained(tmp_path)
    model = Med3DCLIPModel.from_text_encoder(tmp_path, encoder=ENCODER, projection_dim=6)
    tower = model.language_encoder.state_dict()
    assert not [key for key in tower if "pooler" in key]
    weights = getattr(saved, saved.base_model_prefix).state_dict()
    assert tower.keys() == weights.keys() and all(torch.equal(tower[key], weights[key]) for key in tower)
    assert model(**pairs(2)).text_embeds.shape == (2, 6)
    assert model.t_prime.item() == pytest.approx(2.6593, abs=1e-4)


def test_a_text_tower_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    AutoModel.from_config(AutoConfig.for_model(**DISTILBERT)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = stored.pop("embeddings.LayerNorm.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    assert lost is not None
    with pytest.raises(ValueError, match=r"weights of the encoder are missing \(embeddings.LayerNorm.weight\); copy"):
        Med3DCLIPModel.from_text_encoder(tmp_path, encoder=ENCODER)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "t5"])
def test_a_model_that_is_no_encoder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"text_config.model_type: '{name}' is no encoder"):
        tiny_config(text_config={"model_type": name})


# --- frozen towers, mistakes --------------------------------------------------------------------------------


def test_a_frozen_tower_stays_in_eval_mode() -> None:
    model = tiny_clip()
    model.vision_encoder.requires_grad_(False)
    model.train()
    assert not model.vision_encoder.training and model.language_encoder.training
    model.vision_encoder.requires_grad_(True)
    model.language_encoder.requires_grad_(False)
    model.train()
    assert model.vision_encoder.training and not model.language_encoder.training


def test_wrong_volumes_and_texts_are_named(model: Med3DCLIPModel) -> None:
    with pytest.raises(ValueError, match="is made for"):
        model.encode_image(torch.zeros(1, 1, SIZE[0], SIZE[1], SIZE[2] // 2))
    with pytest.raises(ValueError, match="input_ids: 13 tokens for 12 positions; truncate the texts"):
        model.encode_text(torch.ones(1, 13, dtype=torch.long))


@pytest.mark.parametrize(
    ("contrastive", "said"),
    [
        ({"tau": 1}, "contrastive.tau: no such setting; known are loss, start, symmetric, chunk"),
        ({"loss": "nce"}, "contrastive.loss: 'nce' is not one of siglip, clip"),
    ],
)
def test_wrong_settings_are_named(contrastive: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_config(contrastive=contrastive)
