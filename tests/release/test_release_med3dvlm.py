"""Published Med3DVLM checkpoints become ours and, bit for bit, what they were."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from med3dvlm import Med3DCLIPConfig, Med3DCLIPModel, Med3DVLMConfig, Med3DVLMForConditionalGeneration
from med3dvlm.building import add_image_token, read_model
from med3dvlm.dcformer import VARIANTS
from med3dvlm.encoders import build_encoder
from med3dvlm.published import PREFIXES, encoder_of, from_published, our_shapes, published_name, to_published
from med3dvlm.recipes.text import word_pieces
from mllm3d import cli
from mllm3d.inference.checkpoint import open_checkpoint
from mllm3d.registry import adapter_class, embedder_class
from mllm3d.release.convert import convert_from, convert_to
from tests.med3dvlm.tiny_med3dvlm import tiny_tokenizer
from tests.release.published_med3dvlm import CLIP_CONFIG, VLM_CONFIG, clip_shapes, vlm_shapes, write_clip, write_vlm
from tests.release.test_release_convert import drop, files, put, refuses, rewrite

SIZE = (32, 64, 96)
KINDS = ("clip", "vlm")
Write = Callable[..., Path]


@pytest.fixture
def published(tmp_path: Path) -> Write:
    """Writes the folder of one of the two models."""

    def write(kind: str, **changes: Any) -> Path:
        if kind == "clip":
            return write_clip(tmp_path / "published", word_pieces(["a mass in the liver", "no finding"], 40, 16))
        tokenizer = tiny_tokenizer()
        add_image_token(tokenizer)
        return write_vlm(tmp_path / "published", tokenizer, **changes)

    return write


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_what_it_was(published: Write, tmp_path: Path, kind: str) -> None:
    source = published(kind)
    ours = convert_from("med3dvlm", source, tmp_path / "ours")
    assert files(convert_to("med3dvlm", ours, tmp_path / "back")) == files(source)


def test_scalars_get_an_axis(published: Write, tmp_path: Path) -> None:
    source = published("clip")
    before = load_file(source / "model.safetensors")
    after = load_file(convert_from("med3dvlm", source, tmp_path / "ours") / "model.safetensors")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert after[key].shape == ((1,) if key in ("t_prime", "bias") else weight.shape)
        assert torch.equal(after[key].flatten(), weight.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_our_own_takes_the_published_names_and_comes_back(
    published: Write, tmp_path: Path, kind: str
) -> None:
    ours = convert_from("med3dvlm", published(kind), tmp_path / "ours")
    shutil.rmtree(ours / "published")  # as after a training run
    theirs = convert_to("med3dvlm", ours, tmp_path / "theirs")
    shapes = {key: tuple(weight.shape) for key, weight in load_file(theirs / "model.safetensors").items()}
    assert shapes == (clip_shapes() if kind == "clip" else vlm_shapes())
    expected = CLIP_CONFIG if kind == "clip" else VLM_CONFIG
    values = json.loads((theirs / "config.json").read_text())
    same = {"architectures", "model_type", "input_size", "hidden_size", "loss_type", "vision_encoder", "vision_tower"}
    same |= {"mm_projector_type", "num_key_value_heads", "vocab_size", "torch_dtype"} - {"torch_dtype"}
    assert {key: values[key] for key in same & expected.keys()} == {
        key: expected[key] for key in same & expected.keys()
    }
    again = convert_from("med3dvlm", theirs, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((ours / "config.json").read_text())


def test_real_sizes_fit_without_a_weight_in_memory() -> None:
    """Shapes of the paper's models: DCFormer-small at 128 x 256 x 256, ClinicalBERT, a Qwen2.5 of one layer."""
    with torch.device("meta"):
        small = build_encoder({"name": "dcformer-small", "size": [128, 256, 256]}).spec
    clip = Med3DCLIPConfig(encoder=small, text_config={"vocab_size": 119547})
    vlm = Med3DVLMConfig(text_config={"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1,
                                      "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
                         encoder_config=small, splice="published")  # fmt: skip
    for config in (clip, vlm):
        conversion = to_published(config, our_shapes(config))
        values = {key: value for key, value in json.loads(conversion.config).items() if key != "med3d"}
        back = from_published(values, conversion.shapes)
        assert back.shapes == our_shapes(config)
        assert back.volume["shape"] == [128, 256, 256]
    found = json.loads(back.config)
    assert found["encoder_config"]["name"] == "dcformer-small"
    assert (found["encoder_config"]["widths"], found["encoder_config"]["layers"]) == (
        list(VARIANTS["small"].widths), list(VARIANTS["small"].layers),
    )  # fmt: skip
    assert found["projector_config"] == {"name": "2xMLP-Mixer-H", "low": [256, 384], "high": [32, 768], "mixed_tokens": 256}  # fmt: skip # noqa: E501


def test_no_two_weights_get_one_name() -> None:
    for kind, shapes in (("med3dvlm", vlm_shapes()), ("med3dclip", clip_shapes())):
        ours = our_shapes_of(kind)
        assert {published_name(key, kind) for key in ours} == shapes.keys()
        assert len(ours) == len(shapes)
    assert PREFIXES["med3dclip"] == {}


def our_shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    values, shapes = (CLIP_CONFIG, clip_shapes()) if kind == "med3dclip" else (VLM_CONFIG, vlm_shapes())
    return from_published(values, shapes).shapes


# --- the converted models -----------------------------------------------------------------------------------


def test_the_contrastive_model_computes_what_the_weights_say(published: Write, tmp_path: Path) -> None:
    source = published("clip")
    folder = convert_from("med3dvlm", source, tmp_path / "ours")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.volume.shape == SIZE and checkpoint.volume.window_percentile == (0.0, 100.0)
    embedder = embedder_class(checkpoint.model_type).load(folder, torch.device("cpu"), torch.float32)
    volume = np.random.default_rng(0).random(SIZE, np.float32)
    weights = load_file(source / "model.safetensors")
    encoder = encoder_of(clip_shapes(), "vision_encoder.", CLIP_CONFIG).to_empty(device="cpu").eval()
    prefix = "vision_encoder."
    encoder.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})
    with torch.inference_mode():
        tokens = encoder(torch.from_numpy(volume)[None, None]).high.mean(1)
        expected = tokens @ weights["mm_vision_proj.weight"].T + weights["mm_vision_proj.bias"]
    expected = expected / expected.norm()
    # The same operations but for the order of sums in float32.
    np.testing.assert_allclose(embedder.embed_volumes([volume]), expected.numpy(), atol=1e-5)
    one, other = embedder.embed_texts(["a mass in the liver", "no finding"])
    assert one.shape == (10,) and not np.allclose(one, other, atol=1e-3)
    model = Med3DCLIPModel.from_pretrained(folder)
    assert (model.t_prime.item(), model.bias.item()) == (weights["t_prime"].item(), weights["bias"].item())


def test_med3dvlm_answers(published: Write, tmp_path: Path) -> None:
    folder = convert_from("med3dvlm", published("vlm"), tmp_path / "ours")
    model = read_model(folder)
    assert (model.config.splice, model.config.image_tokens, model.config.lora) == ("published", 8, None)
    assert model.config.text_config.rms_norm_eps == 1e-5
    assert model.config.text_config.rope_parameters["rope_theta"] == 500.0
    checkpoint = open_checkpoint(folder)
    adapter = adapter_class(checkpoint.model_type).load(folder, torch.device("cpu"), torch.float32)
    volume = np.random.default_rng(0).random(SIZE, np.float32)
    (answer,) = adapter.answer([volume], ["Is there a mass?"], "none", 3, 0)
    assert answer.tokens_before == 8 and 1 <= answer.new_tokens <= 3


@pytest.mark.parametrize("stored", [False, True], ids=["not stored", "stored"])
def test_a_tied_head(published: Write, tmp_path: Path, stored: bool) -> None:
    source = published("vlm", tied=True)
    if stored:
        rewrite(source, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    ours = convert_from("med3dvlm", source, tmp_path / "ours")
    model = Med3DVLMForConditionalGeneration.from_pretrained(ours)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert files(convert_to("med3dvlm", ours, tmp_path / "back")) == files(source)
    if stored:
        rewrite(source, lambda w: w.update({"lm_head.weight": w["lm_head.weight"] + 1}))
        refuses("ties lm_head.weight", partial(convert_from, "med3dvlm", source, tmp_path / "again"), tmp_path)


# --- errors -------------------------------------------------------------------------------------------------


MLP = "model.mm_projector.low_mixer.1.mlp2.mm_projector.1.1.weight"
TOWER = "model.vision_tower.vision_tower.encoder"
RUNNING = "vision_encoder.encoder.s2.1.dwconv.c3.1.running_mean"


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("clip", drop("t_prime"), "1 missing: t_prime"),
        ("clip", drop("t_prime", "bias"), "2 missing: t_prime, bias"),
        ("clip", drop(RUNNING), f"1 missing: {RUNNING}"),
        ("clip", put("logit_scale"), "1 not expected: logit_scale"),
        ("clip", put("bias", 1), "1 of another shape: bias (1,) for ()"),
        ("clip", put("t_prime", 1), "not a published checkpoint but one in our format already"),
        ("clip", put("mm_language_proj.weight", 10, 63), "mm_language_proj.weight (10, 63) for (10, 64)"),
        ("clip", drop("language_encoder.transformer.layer.0.ffn.lin1.weight"), "the text encoder is no DistilBERT"),
        ("clip", drop("mm_vision_proj.weight"), "neither mm_vision_proj.weight nor model.mm_projector.* in it"),
        ("clip", drop("vision_encoder.encoder.s0.0.0.c1.0.weight"), "no DCFormer under vision_encoder.encoder"),
        ("vlm", drop(MLP), f"1 missing: {MLP}"),
        ("vlm", drop("model.norm.weight", "lm_head.weight"), "2 missing: "),
        ("vlm", put("model.layers.0.extra", 1), "1 not expected: model.layers.0.extra"),
        ("vlm", put(f"{TOWER}.s4.0.scale", 11), f"1 of another shape: {TOWER}.s4.0.scale (11,) for (12,)"),
        ("vlm", put("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 32), "LoRA adapters apart; merge them"),
        ("vlm", put("projector.low_mixer.0.ln1.weight", 8), "one in our format already"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(published: Write, tmp_path: Path, kind: str, change: Any, says: str) -> None:
    source = published(kind)
    rewrite(source, change)
    refuses(says, partial(convert_from, "med3dvlm", source, tmp_path / "ours"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "file", "text", "says"),
    [
        ("clip", "config.json", None, "config.json: missing or damaged"),
        ("vlm", "config.json", "{", "config.json: missing or damaged"),
        ("vlm", "config.json", "[]", "config.json: not a mapping"),
        ("vlm", "config.json", json.dumps({**VLM_CONFIG, "hidden_size": "wide"}), "config.json: "),
        ("vlm", "config.json", json.dumps({**VLM_CONFIG, "input_size": [64, 64, 32]}), "of another shape: model.mm"),
        ("clip", "tokenizer.json", None, "tokenizer.json: missing or damaged"),
        ("vlm", "tokenizer.json", "{", "tokenizer.json: missing or damaged"),
    ],
)  # fmt: skip
def test_files_beside_the_weights(
    published: Write, tmp_path: Path, kind: str, file: str, text: str | None, says: str
) -> None:
    source = published(kind)
    (source / file).unlink()
    if text is not None:
        (source / file).write_text(text)
    refuses(says, partial(convert_from, "med3dvlm", source, tmp_path / "ours"), tmp_path)


def test_a_tokenizer_of_another_model(published: Write, tmp_path: Path) -> None:
    source = published("vlm")
    convert = partial(convert_from, "med3dvlm", source, tmp_path / "ours")
    tiny_tokenizer().save_pretrained(source)
    refuses("<im_patch>", convert, tmp_path)
    larger = tiny_tokenizer()
    add_image_token(larger)
    larger.add_tokens([f"word{n}" for n in range(30)])
    larger.save_pretrained(source)
    refuses("291 words, the model knows 280; copy the right one", convert, tmp_path)


def test_pickles_are_never_read(published: Write, tmp_path: Path) -> None:
    source = published("clip")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    says = "so are never read; download the safetensors files, or convert the pickle on a machine that you trust"
    refuses(says, partial(convert_from, "med3dvlm", source, tmp_path / "ours"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("vlm", {"splice": "correct"}, "splice is correct; the authors' code would put image tokens elsewhere"),
        ("vlm", {"lora": {"rank": 2}}, "published checkpoints have none apart; use mllm3d release --merge-lora"),
        ("vlm", {"projector_config": {"name": "2xMLP-H"}}, "projector 2xMLP-H; published checkpoints have MLP mixers"),
        ("vlm", {"text_config": {"model_type": "llama"}}, "text_config is of llama; published ones are of qwen2"),
        ("clip", {"contrastive": {"loss": "clip"}}, "contrastive.loss is clip; published checkpoints are of siglip"),
        ("clip", {"encoder": {"name": "vit3d"}}, "encoder vit3d; published checkpoints have DCFormer"),
        ("clip", {"encoder": {"name": "dcformer-nano", "residual": True}}, "DCFormer without residual"),
        ("clip", {"projection_dim": 9}, "4 of another shape: mm_vision_proj.weight"),
        ("clip", {"projection_dim": "x"}, "config.json: "),
        ("clip", {"model_type": "photon"}, "a model of type 'photon'; name a model of med3dclip or med3dvlm"),
    ],
)  # fmt: skip
def test_what_the_published_format_cannot_say(
    published: Write, tmp_path: Path, kind: str, changes: dict[str, Any], says: str
) -> None:
    ours = convert_from("med3dvlm", published(kind), tmp_path / "ours")
    change_config(ours, **changes)
    refuses(says, partial(convert_to, "med3dvlm", ours, tmp_path / "back"), tmp_path)


def test_the_command_line_converts_both_ways(published: Write, tmp_path: Path, capsys: Any) -> None:
    source, ours, back = str(published("clip")), str(tmp_path / "ours"), str(tmp_path / "back")
    assert cli.main(["convert", "--from", "med3dvlm", source, ours]) == 0
    assert cli.main(["convert", "--to", "med3dvlm", ours, back]) == 0
    assert files(Path(back)) == files(Path(source))
    assert "260 weights" in capsys.readouterr().out
