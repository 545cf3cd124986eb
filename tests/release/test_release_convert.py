"""Published Photon checkpoints become ours and, bit for bit, what they were."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from mllm3d import cli
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import open_checkpoint
from mllm3d.registry import adapter_class, converter_class
from mllm3d.release.convert import convert_from, convert_to
from photon import PhotonConfig, PhotonForConditionalGeneration, PhotonProcessor
from photon.building import read_model
from photon.published import listed, published_name
from photon.tokenization import CHAT_TEMPLATE, train_tokenizer
from tests.release.published_photon import (
    ATP,
    DEPTH,
    EMBEDDING,
    HEAD,
    KERNEL,
    SHARDS,
    published_shapes,
    write_published,
)

TEXTS = ["Is there a pleural effusion?", "Which side is it on?", "yes", "no", "left", "two"]
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def published(tmp_path: Path, tokenizer: Any) -> Build:
    """Writes a published folder (see ``write_published``)."""
    return lambda name="Photon-S2", **kind: write_published(tmp_path / name, tokenizer, **kind)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the weights of an unsharded folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def bits(weights: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        k: (w.dtype, tuple(w.shape), w.contiguous().view(torch.uint8).numpy().tobytes()) for k, w in weights.items()
    }


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {key: w for file in sorted(folder.glob("*.safetensors")) for key, w in load_file(file).items()}


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["S1", "S2"])
def test_there_and_back_is_what_it_was(
    published: Build, tmp_path: Path, tied: bool, sharded: bool, scheduled: bool
) -> None:
    source = published(tied=tied, sharded=sharded, scheduled=scheduled)
    ours = convert_from("photon", source, tmp_path / "ours")
    assert (f"{ATP}.pos_proj.weight" in weights_of(ours / "published")) == scheduled
    back = convert_to("photon", ours, tmp_path / "back")
    assert bits(weights_of(back)) == bits(weights_of(source))
    assert files(back) == files(source)


def test_a_weight_that_is_stored_though_tied_stays_so(published: Build, tmp_path: Path) -> None:
    source = published()
    rewrite(source, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    ours = convert_from("photon", source, tmp_path / "ours")
    read_model(ours)
    assert files(convert_to("photon", ours, tmp_path / "back")) == files(source)


def test_shards_stay_shards_and_keep_their_dtype(published: Build, tmp_path: Path) -> None:
    ours = convert_from("photon", published(sharded=True), tmp_path / "ours")
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(SHARDS)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights_of(ours).values())
    assert index["weight_map"].keys() == weights_of(ours).keys()
    for name in SHARDS:
        with safe_open(ours / name, framework="pt") as content:
            assert content.metadata() == {"format": "pt"}
        # safetensors itself would leave them to their owner alone
        assert (ours / name).stat().st_mode == (ours / "config.json").stat().st_mode
    assert {key for key, w in weights_of(ours).items() if w.dtype == torch.float32} == {
        f"model.threshold_predictors.0.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }


def test_other_files_keep_their_bytes_or_are_named(published: Build, tmp_path: Path, capsys: Any) -> None:
    source = published()
    (source / "training_args.bin").write_bytes(b"\x80\x04.")
    (source / ".cache").mkdir()
    (source / "adapter.safetensors").write_bytes(b"")
    ours = convert_from("photon", source, tmp_path / "ours")
    said = capsys.readouterr().out
    assert "pickles can run code when loaded: training_args.bin\n" in said
    assert "not carried over: .cache, adapter.safetensors\n" in said
    assert f"{ATP}.pos_proj.weight" in said
    for name in ("README.md", "config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (ours / "published" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(path.name for path in ours.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "preprocessing.json",
        "processor_config.json", "published", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


# --- the converted model ------------------------------------------------------------------------------------


def test_the_library_itself_reads_the_same_weights_from_those_names(published: Build, tmp_path: Path) -> None:
    """Transformers knows how 4.51 named Qwen2.5-VL's weights: an answer that does not come from our table."""
    source = published(scheduled=False, tied=False)
    ours = weights_of(convert_from("photon", source, tmp_path / "ours"))
    rewrite(source, lambda weights: weights.update({"visual.patch_embed.proj.weight": weights.pop(KERNEL)}))
    values = json.loads((source / "config.json").read_text())
    values["vision_config"] |= {"in_channels": 1, "temporal_patch_size": 14}
    del values["auto_map"]
    (source / "config.json").write_text(json.dumps(values))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    expected = model.state_dict()
    kernel = "model.visual.patch_embed.proj.weight"
    expected[kernel] = expected[kernel].flatten(1)
    assert bits(ours) == bits(expected)


def built_by_hand(source: Path, config: PhotonConfig) -> PhotonForConditionalGeneration:
    """The model of a published folder's weights, put in their places one by one."""
    model, weights = PhotonForConditionalGeneration(config), weights_of(source)
    model.get_parameter("model.visual.patch_embed.proj.weight").data = weights.pop(KERNEL).float().flatten(1)
    parts: dict[str, Any] = {"visual.": model.model.visual, "model.": model.model.language_model, "": model}
    for key, weight in weights.items():
        if f"{ATP}.predictor.mlp" in key:
            place = model.get_parameter(f"model.threshold_predictors.0.mlp.{key.split('.mlp.')[1]}")
        elif "pos_proj" in key:
            continue
        else:
            prefix = next(prefix for prefix in parts if key.startswith(prefix))
            place = parts[prefix].get_parameter(key.removeprefix(prefix))
        place.data = weight.float()
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_the_converted_model_computes_what_the_weights_say(published: Build, tmp_path: Path, tied: bool) -> None:
    source = published(tied=tied)
    folder = convert_from("photon", source, tmp_path / "ours")
    model = PhotonForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = PhotonProcessor.from_pretrained(folder)
    volume = torch.rand(28, 56, 56, generator=torch.Generator().manual_seed(1))
    inputs = processor([volume], [{"role": "user", "content": TEXTS[0]}])
    with torch.inference_mode():
        found = model(**inputs)
        expected = built_by_hand(source, model.config)(**inputs)
    assert torch.equal(found.logits, expected.logits)  # the same weights and the same program
    assert found.kept is not None and torch.equal(found.kept, expected.kept)


def test_the_configuration_is_the_published_one_with_photons_patches(
    published: Build, tmp_path: Path, tokenizer: Any
) -> None:
    config = PhotonConfig.from_pretrained(convert_from("photon", published(), tmp_path / "ours"))
    assert (config.patches.size, config.patches.channels, config.patches.merge) == ((14, 14, 14), 1, 2)
    assert config.geometry.temporal_step == 28  # 14 slices at one a second, two rotary steps a second
    assert config.scheduling_layers == (2,)  # read in layer 1, which is the second
    rope = config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["mrope_section"], rope["rope_type"]) == (500.0, [1, 1, 2], "default")
    assert (config.text_config.rms_norm_eps, config.tie_word_embeddings, config.dtype) == (1e-6, True, torch.bfloat16)
    # published files do not say how a turn begins and ends; their tokenizer does
    assert config.turn_end_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(config.user_turn_token_ids).strip() == "<|im_start|>user"
    assert not hasattr(config, "auto_map") and config.architectures == ["PhotonForConditionalGeneration"]
    unscheduled = convert_from("photon", published("Photon-S1", scheduled=False), tmp_path / "s1")
    assert PhotonConfig.from_pretrained(unscheduled).scheduling is None


def test_a_nested_configuration_says_the_same(published: Build, tmp_path: Path) -> None:
    source = published()
    flat = PhotonConfig.from_pretrained(convert_from("photon", source, tmp_path / "flat"))
    values = json.loads((source / "config.json").read_text())
    outside = [name for name in values if name.endswith("_token_id") and name[0] in "iv"]
    outside += ["vision_config", "torch_dtype", "architectures", "auto_map"]
    nested = {name: values.pop(name) for name in outside}
    nested |= {"model_type": "photon_vl", "text_config": values | {"model_type": "qwen2_5_vl_text"}}
    (source / "config.json").write_text(json.dumps(nested))
    again = PhotonConfig.from_pretrained(convert_from("photon", source, tmp_path / "nested"))
    assert again.to_dict() == flat.to_dict()


def test_another_width_and_place_of_the_predictor_are_read_off_the_weights(published: Build, tmp_path: Path) -> None:
    source = published()

    def move(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if ".atp." in key]:
            weights[key.replace(".1.", ".4.", 1)] = weights.pop(key)
        first = "model.layers.4.atp.predictor.mlp"
        weights |= {f"{first}.0.weight": torch.ones(6, 12), f"{first}.0.bias": torch.ones(6)}
        weights |= {f"{first}.2.weight": torch.ones(1, 6)}

    rewrite(source, move)
    ours = convert_from("photon", source, tmp_path / "ours")
    model = read_model(ours)
    assert model.config.scheduling_layers == (5,)
    assert model.get_parameter("model.threshold_predictors.0.mlp.0.weight").shape == (6, 12)
    assert files(convert_to("photon", ours, tmp_path / "back")) == files(source)


def test_predict_and_phase_2_find_what_they_need(published: Build, tmp_path: Path) -> None:
    folder = convert_from("photon", published(sharded=True), tmp_path / "ours")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.volume == VolumeConfig(preset="photon")
    adapter = adapter_class(checkpoint.model_type).load(folder, torch.device("cpu"), torch.float32)
    volume = np.random.default_rng(0).random((28, 56, 56), np.float32)
    (answer,) = adapter.answer([volume], [TEXTS[0]], "scheduled", 2, 0)
    assert answer.tokens_before == 8 and answer.new_tokens <= 2


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.json"])
def test_older_places_of_the_chat_template(published: Build, tmp_path: Path, where: str) -> None:
    source = published()
    (source / "chat_template.jinja").unlink()
    values = json.loads((source / where).read_text()) if (source / where).is_file() else {}
    (source / where).write_text(json.dumps(values | {"chat_template": CHAT_TEMPLATE}))
    ours = convert_from("photon", source, tmp_path / "ours")
    assert PhotonProcessor.from_pretrained(ours).tokenizer.chat_template == CHAT_TEMPLATE
    assert files(convert_to("photon", ours, tmp_path / "back")) == files(source)


# --- our own models -----------------------------------------------------------------------------------------


def test_a_model_of_our_own_takes_the_published_names_and_comes_back(published: Build, tmp_path: Path) -> None:
    ours = convert_from("photon", published(), tmp_path / "ours")
    shutil.rmtree(ours / "published")  # as after a training run
    values = json.loads((ours / "config.json").read_text())
    values |= {"temporal_step": 3.0, "scheduling": values["scheduling"] | {"temperature": 0.5}}
    (ours / "config.json").write_text(json.dumps(values))
    theirs = convert_to("photon", ours, tmp_path / "theirs")
    expected = published_shapes(len(PhotonProcessor.from_pretrained(ours).tokenizer), tied=True, scheduled=True)
    del expected[f"{ATP}.pos_proj.weight"]
    assert {key: tuple(weight.shape) for key, weight in weights_of(theirs).items()} == expected
    again = convert_from("photon", theirs, tmp_path / "again")
    assert bits(weights_of(again)) == bits(weights_of(ours))
    assert PhotonConfig.from_pretrained(again).to_dict() == PhotonConfig.from_pretrained(ours).to_dict()
    assert (again / "tokenizer.json").read_bytes() == (ours / "tokenizer.json").read_bytes()


def test_a_run_is_converted_by_its_newest_step(published: Build, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_7"
    step.mkdir(parents=True)
    convert_from("photon", published(sharded=True), step / "model")
    shutil.rmtree(step / "model" / "published")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_7")
    from_run = files(convert_to("photon", tmp_path / "run", tmp_path / "one"))
    assert from_run == files(convert_to("photon", step, tmp_path / "two"))
    assert set(SHARDS) < from_run.keys()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scheduling": {"layers": [0]}}, "layers: 0 has no name in published checkpoints"),
        ({"slices_per_frame": 2}, "published checkpoints have the 3D patch embedding of one channel"),
    ],
)
def test_what_the_published_format_cannot_say(
    published: Build, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    ours = convert_from("photon", published(), tmp_path / "ours")
    values = json.loads((ours / "config.json").read_text()) | changes
    (ours / "config.json").write_text(json.dumps(values))
    refuses(says, lambda: convert_to("photon", ours, tmp_path / "back"), tmp_path)


# --- errors -------------------------------------------------------------------------------------------------


def refuses(says: str, convert: Callable[[], Any], folder: Path) -> None:
    """One line with these words, and nothing left behind in ``folder``."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as error:
        convert()
    assert says in str(error.value) and "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before


def drop(*keys: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda weights: [weights.pop(key) for key in keys]


def put(key: str, *shape: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda weights: weights.update({key: torch.ones(shape)})


NORMS = [f"model.layers.{i}.input_layernorm.weight" for i in range(DEPTH)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("model.norm.weight"), "1 missing: model.norm.weight"),
        (drop(*NORMS), f"8 missing: {', '.join(NORMS[:5])} and 3 more"),
        (drop(f"{ATP}.predictor.mlp.2.bias"), f"1 missing: {ATP}.predictor.mlp.2.bias"),
        (drop(*[f"{ATP}.predictor.mlp.{x}" for x in ("0.weight", "0.bias", "2.weight", "2.bias")]), "4 missing"),
        (put("model.layers.0.extra", 1), "1 not expected: model.layers.0.extra"),
        (put("visual.patch_embed.proj.weight", 8, 3, 2, 14, 14), "1 not expected: visual.patch_embed.proj.weight"),
        (put("model.visual.merger.ln_q.weight", 32), "1 not expected: model.visual.merger.ln_q.weight"),
        (put("model.norm.weight", 31), "1 of another shape: model.norm.weight (31,) for (32,)"),
        (put(KERNEL, 32, 3, 14, 14, 14), "is not the shape (width, 1, depth, height, width)"),
        (put(KERNEL, 32, 2744), "is not the shape (width, 1, depth, height, width)"),
        (put(KERNEL, 31, 1, 14, 14, 14), f"1 of another shape: {KERNEL} (31, 1, 14, 14, 14) for (32, 1, 14, 14, 14)"),
        (put(HEAD, 300, 32), f"1 of another shape: {HEAD}"),
        (lambda w: w.update({HEAD: w[EMBEDDING] + 1}), f"ties {HEAD} to {EMBEDDING}, but they differ"),
    ],
)
def test_weights_that_do_not_fit(published: Build, tmp_path: Path, change: Any, says: str) -> None:
    source = published()
    rewrite(source, change)
    refuses(says, lambda: convert_from("photon", source, tmp_path / "ours"), tmp_path)


def test_an_untied_head_must_be_there(published: Build, tmp_path: Path) -> None:
    source = published(tied=False)
    rewrite(source, drop(HEAD))
    refuses(f"1 missing: {HEAD}", lambda: convert_from("photon", source, tmp_path / "ours"), tmp_path)


def test_other_checkpoints_are_told_apart(published: Build, tmp_path: Path) -> None:
    source = published()
    ours = convert_from("photon", source, tmp_path / "ours")
    refuses("in our format already", lambda: convert_from("photon", ours, tmp_path / "again"), tmp_path)
    refuses("no Photon model of ours", lambda: convert_to("photon", source, tmp_path / "again"), tmp_path)
    values = (ours / "config.json").read_text()
    for text in ("{", values.replace('"hidden_size": 32', '"hidden_size": "wide"')):
        (ours / "config.json").write_text(text)
        refuses("config.json: damaged", lambda: convert_to("photon", ours, tmp_path / "again"), tmp_path)
    rewrite(source, lambda weights: weights.update({"visual.patch_embed.proj.weight": weights.pop(KERNEL)}))
    says = "a Qwen2.5-VL checkpoint; train photon.phase1 from it"
    refuses(says, lambda: convert_from("photon", source, tmp_path / "again"), tmp_path)
    save_file({f"h.{i}": torch.ones(1) for i in range(7)}, source / "model.safetensors")
    says = f"no {KERNEL} in it, so it is no published Photon checkpoint; it has h.0, h.1, h.2, h.3, h.4 and 2 more"
    refuses(says, lambda: convert_from("photon", source, tmp_path / "again"), tmp_path)


def test_part_of_a_checkpoint(published: Build, tmp_path: Path) -> None:
    source = published(sharded=True)
    convert = partial(convert_from, "photon", source, tmp_path / "ours")
    index = source / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    second = [key for key, name in places.items() if name == SHARDS[1]]
    stored = load_file(source / SHARDS[1])
    (source / SHARDS[1]).unlink()
    says = (
        f"{SHARDS[1]}: not there, so {len(second)} weights are missing: {', '.join(second[:5])} and {len(second) - 5}"
    )
    refuses(says, convert, tmp_path)
    del stored[second[0]]
    save_file(stored, source / SHARDS[1])
    refuses(f"names them, but 1 weights are missing: {second[0]};", convert, tmp_path)
    (source / SHARDS[1]).write_bytes((source / SHARDS[0]).read_bytes())
    refuses(f"as {SHARDS[0]} has", convert, tmp_path)
    (source / SHARDS[1]).write_bytes((source / SHARDS[0]).read_bytes()[:-1])
    refuses(f"{SHARDS[1]}: damaged", convert, tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    refuses("index.json: damaged (a shard outside of the folder)", convert, tmp_path)
    index.write_text("{")
    refuses("index.json: damaged", convert, tmp_path)
    index.unlink()
    refuses("index.json: missing", convert, tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", None, "config.json: missing or damaged"),
        ("config.json", "{", "config.json: missing or damaged"),
        ("config.json", "[]", "config.json: not a mapping"),
        ("config.json", '{"model_type": "llama"}', "config.json: no vision_config in it"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("chat_template.jinja", None, "no chat template"),
        ("chat_template.json", "{", "chat_template.json: damaged"),
    ],
)
def test_files_beside_the_weights(published: Build, tmp_path: Path, file: str, text: str | None, says: str) -> None:
    source = published()
    (source / file).unlink(missing_ok=True)
    if text is not None:
        (source / file).write_text(text)
    if file == "chat_template.json":
        (source / "chat_template.jinja").unlink()
    refuses(says, lambda: convert_from("photon", source, tmp_path / "ours"), tmp_path)


def test_a_value_that_config_cannot_have(published: Build, tmp_path: Path) -> None:
    source = published()
    values = json.loads((source / "config.json").read_text()) | {"hidden_size": "wide"}
    (source / "config.json").write_text(json.dumps(values))
    refuses("config.json: ", lambda: convert_from("photon", source, tmp_path / "ours"), tmp_path)


def test_pickles_are_never_read(published: Build, tmp_path: Path) -> None:
    source = published()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    says = "only pickles (pytorch_model.bin), which can run code when loaded and so are never read"
    refuses(says, lambda: convert_from("photon", source, tmp_path / "ours"), tmp_path)
    (source / "pytorch_model.bin").unlink()
    refuses("no weights (model.safetensors", lambda: convert_from("photon", source, tmp_path / "ours"), tmp_path)


def test_folders_that_cannot_be_read_or_written(published: Build, tmp_path: Path) -> None:
    source = published()
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("x")
    for out in (full, full / "thesis.tex", source):
        refuses("exists already and is not empty", partial(convert_from, "photon", source, out), tmp_path)
    refuses("parent folder does not exist", lambda: convert_from("photon", source, tmp_path / "a" / "b"), tmp_path)
    refuses("no such folder", lambda: convert_from("photon", tmp_path / "nowhere", tmp_path / "ours"), tmp_path)
    refuses("did you mean 'photon'?", lambda: convert_from("foton", source, tmp_path / "ours"), tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (convert_from("photon", source, empty) / "config.json").is_file()


def test_a_full_disk_leaves_nothing_behind(published: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = published()

    def fail(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    says = f"{tmp_path / 'ours'}: model.safetensors: Error while serializing: I/O error: No space left"
    refuses(says, lambda: convert_from("photon", source, tmp_path / "ours"), tmp_path)


def test_a_way_back_that_was_tampered_with(published: Build, tmp_path: Path) -> None:
    ours = convert_from("photon", published(sharded=True), tmp_path / "ours")
    (ours / "published" / "extras.safetensors").unlink()
    refuses("names other weights than the model has: ", lambda: convert_to("photon", ours, tmp_path / "b"), tmp_path)


# --- names and the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.visual.patch_embed.proj.weight", "visual.vision_patch_embed.proj.weight"),
        ("model.visual.blocks.31.attn.qkv.bias", "visual.blocks.31.attn.qkv.bias"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.layers.35.mlp.up_proj.weight", "model.layers.35.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.threshold_predictors.0.mlp.0.weight", "model.layers.8.atp.predictor.mlp.0.weight"),
        ("model.threshold_predictors.1.mlp.2.bias", "model.layers.17.atp.predictor.mlp.2.bias"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names(ours: str, theirs: str) -> None:
    assert published_name(ours, (9, 18)) == theirs


def test_keys_are_listed_up_to_five() -> None:
    assert listed("abcde") == "a, b, c, d, e" and listed("abcdefg") == "a, b, c, d, e and 2 more"


def test_the_command(published: Build, tmp_path: Path, capsys: Any) -> None:
    source, ours, back = str(published()), str(tmp_path / "ours"), str(tmp_path / "back")
    assert cli.main(["convert", "--from", "photon", source, ours]) == 0
    assert cli.main(["convert", "--to", "photon", ours, back]) == 0
    assert files(Path(back)) == files(Path(source))
    assert "each accounted for" in capsys.readouterr().out
    assert cli.main(["convert", "--from", "photon", source, ours]) == 2
    assert capsys.readouterr().err.startswith(f"error: {ours}: exists already")
    for wrong in ([source, back], ["--from", "photon", "--to", "photon", source, back], ["--from", "photon", source]):
        with pytest.raises(SystemExit) as left:
            cli.main(["convert", *wrong])
        assert left.value.code == 2
    assert converter_class("photon").volume_preset == "photon"
