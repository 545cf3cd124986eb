"""Photon over Qwen3-VL against the transformers model: logits, generation, deep-stack features, weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from photon import PhotonForConditionalGeneration, PhotonProcessor
from photon.building import read_model, with_patches, with_scheduling
from photon.packing import rope_positions, volume_grids
from photon.patch_embedding import PIXELS, Scale, patchify
from photon.processing_photon import VolumeChats
from photon.scheduling import SchedulingSettings
from photon.stream import LossWeights
from tests.parity.test_scheduling_equations import plain_logits, plain_weights
from tests.photon.conftest import turn
from tests.photon.test_photon_groups import gradients, total_loss
from tests.photon.tiny_qwen3 import enlarge, qwen3_values, tiny_qwen3

QUESTIONS = [("Is there a pleural effusion?", "yes"), ("Which side is it on?", "left"), ("How many lesions?", "two")]
# The same products in another order, in float32.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def made(tokenizer: Any, tmp_path_factory: Any) -> tuple[Qwen3VLForConditionalGeneration, Any, Any]:
    """A random Qwen3-VL with its own 2-frame, 3-channel patches, Photon read from its files, and their folder."""
    torch.manual_seed(0)
    qwen = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**qwen3_values(tokenizer))).eval()
    enlarge(qwen)
    folder = tmp_path_factory.mktemp("qwen3")
    qwen.save_pretrained(folder)
    photon = read_model(folder).eval()
    known = tiny_qwen3(tokenizer)[0].config
    photon.config.turn_end_token_id = known.turn_end_token_id
    photon.config.user_turn_token_ids = known.user_turn_token_ids
    return qwen, photon, folder


@pytest.fixture
def pair(made: Any, tokenizer: Any) -> tuple[Qwen3VLForConditionalGeneration, Any, PhotonProcessor]:
    qwen, photon, _ = made
    return qwen, photon, PhotonProcessor.from_config(photon.config, tokenizer)


def volume(depth: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.rand(depth, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def inputs_for_qwen(batch: dict[str, Any], qwen: Any) -> dict[str, Any]:
    ids = batch["input_ids"]
    names = ("input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw")
    kinds = (ids == qwen.config.video_token_id).int() * 2
    return {**{name: batch[name] for name in names}, "mm_token_type_ids": kinds}


def plain_positions(ids: list[int], grids: list[list[int]], video: int) -> Tensor:
    """Text counts up; a token of slab s, row y, column x is at (s, y, x) from where the text stopped."""
    columns: list[tuple[int, int, int]] = []
    at, place, remaining = 0, 0, [(t, h // 2, w // 2) for t, h, w in grids]
    while at < len(ids):
        if ids[at] == video:
            t, h, w = remaining.pop(0)
            columns += [(place + s, place + y, place + x) for s in range(t) for y in range(h) for x in range(w)]
            at, place = at + t * h * w, place + max(h, w)
        else:
            columns.append((place, place, place))
            at, place = at + 1, place + 1
    return torch.tensor(columns).T


def positions_of(batch: dict[str, Any], video: int) -> Tensor:
    """Of a padded batch with one volume per row: ``(3, R, L)``."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    for row, grid in enumerate(batch["video_grid_thw"].tolist()):
        positions[:, row, mask[row]] = plain_positions(ids[row][mask[row]].tolist(), [grid], video)
    return positions


def at_labels(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    rows, columns = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    return logits[rows, columns]


def two_volumes(slabs: int) -> list[VolumeChats]:
    return [
        VolumeChats([volume(2 * slabs, 24, 16)], [turn(*QUESTIONS[0])]),
        VolumeChats([volume(2, 16, 40, seed=2)], [turn(*QUESTIONS[1])]),
    ]


# --- without dropping ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_of_single_slabs_equal_those_of_transformers(pair: Any) -> None:
    qwen, photon, processor = pair
    batch = processor.batch(two_volumes(1))
    expected = qwen(**inputs_for_qwen(batch, qwen)).logits
    torch.testing.assert_close(photon(**batch).logits, at_labels(expected, batch), **CLOSE)


@torch.no_grad()
def test_logits_of_several_slabs_equal_those_of_transformers(pair: Any) -> None:
    """Its own processor makes each slab a frame with a time stamp; here the slabs are one block in time order."""
    qwen, photon, processor = pair
    batch = processor.batch(two_volumes(3))
    positions = positions_of(batch, qwen.config.video_token_id)
    expected = qwen(**inputs_for_qwen(batch, qwen), position_ids=positions).logits
    torch.testing.assert_close(photon(**batch).logits, at_labels(expected, batch), **CLOSE)
    # The comparison sees positions: frames on top of each other give something else.
    stacked = positions.clone()
    stacked[0, :, :] = stacked[1, :, :]
    other = qwen(**inputs_for_qwen(batch, qwen), position_ids=stacked).logits
    assert (at_labels(other, batch) - at_labels(expected, batch)).abs().max() > 1e-2


@torch.no_grad()
def test_logits_of_images_equal_those_of_transformers(pair: Any) -> None:
    """Images go in as the library's own: other token, other keyword, several in one conversation."""
    qwen, photon, processor = pair
    processor.min_pixels = 64
    images = [torch.randint(256, size, dtype=torch.uint8) for size in ((16, 24, 3), (32, 8, 3), (24, 24))]
    batch = processor.batch([VolumeChats([], [turn(*QUESTIONS[0])], images)])
    ids = batch["input_ids"].clone()
    ids[ids == qwen.config.video_token_id] = qwen.config.image_token_id
    expected = qwen(
        input_ids=ids,
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values_videos"],
        image_grid_thw=batch["video_grid_thw"],
        mm_token_type_ids=(ids == qwen.config.image_token_id).int(),
    ).logits
    torch.testing.assert_close(photon(**batch).logits, at_labels(expected, batch), **CLOSE)


def test_positions_of_slabs(pair: Any) -> None:
    qwen, photon, processor = pair
    batch = processor.batch([VolumeChats([volume(6, 24, 16), volume(4, 8, 32)], [turn(*QUESTIONS[0])])])
    grids, config = batch["video_grid_thw"].tolist(), photon.config
    ids = batch["input_ids"][0].tolist()
    found = rope_positions(ids, volume_grids(grids, None, 2), config.special_tokens, config.geometry)
    assert torch.equal(found, plain_positions(ids, grids, qwen.config.video_token_id))


@torch.no_grad()
def test_greedy_generation_of_a_single_slab_equals_that_of_transformers(pair: Any) -> None:
    qwen, photon, processor = pair
    prompts = [turn(question) for question, _ in QUESTIONS[:2]]
    batch = processor([volume(2, 24, 16)], prompts)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = photon.generate(**batch, **settings)
    for row, prompt in enumerate(prompts):
        alone = processor([volume(2, 24, 16)], prompt)
        assert torch.equal(qwen.generate(**inputs_for_qwen(alone, qwen), **settings)[0, -6:], found[row, -6:])


@torch.no_grad()
def test_greedy_generation_of_slabs_equals_growing_text_in_transformers(pair: Any) -> None:
    qwen, photon, processor = pair
    batch = dict(processor([volume(6, 24, 16)], turn(QUESTIONS[0][0])))
    found = photon.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for _ in range(6):
        positions = positions_of(batch, qwen.config.video_token_id)
        logits = qwen(**inputs_for_qwen(batch, qwen), position_ids=positions).logits
        batch["input_ids"] = torch.cat([batch["input_ids"], logits[:, -1:].argmax(-1)], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert torch.equal(found, batch["input_ids"])


# --- weights ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_have_the_librarys_names_and_go_back_unchanged(pair: Any) -> None:
    qwen, photon, processor = pair
    theirs, ours = qwen.state_dict(), photon.state_dict()
    assert ours.keys() == theirs.keys()
    assert any("deepstack_merger_list.2.linear_fc2.bias" in name for name in ours)
    again = Qwen3VLForConditionalGeneration(qwen.config).eval()
    again.load_state_dict({name: weight.view_as(theirs[name]) for name, weight in ours.items()})
    assert all(torch.equal(weight, theirs[name]) for name, weight in again.state_dict().items())


def test_a_saved_model_gives_the_same_logits_through_the_auto_classes(pair: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, photon, processor = pair
    scheduled = with_scheduling(photon, SchedulingSettings(layers=(1,), predictor_bias=0.0)).eval()
    scheduled.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch = processor.batch(two_volumes(3))
    again, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, PhotonForConditionalGeneration) and isinstance(reader, PhotonProcessor)
    assert again.config.text_config.model_type == "qwen3_vl_text"
    assert torch.equal(again(**batch).logits, scheduled(**batch).logits)
    assert torch.equal(read_model(tmp_path)(**batch).logits, scheduled(**batch).logits)
    assert reader.pixel_mean == [0.5] * 3 and reader.geometry == processor.geometry


@pytest.mark.parametrize(
    "name",
    [
        "model.visual.deepstack_merger_list.1.linear_fc1.bias",
        "model.visual.patch_embed.proj.bias",
        "model.visual.pos_embed.weight",
        "model.language_model.layers.3.self_attn.q_norm.weight",
    ],
)
def test_a_missing_weight_is_named(made: Any, tmp_path: Any, name: str) -> None:
    from safetensors.torch import load_file, save_file

    _, _, folder = made
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_model(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("pixels", [None, (Scale(0.1, 0.5), Scale(0.2, 0.6), Scale(0.4, 0.9))])
def test_an_inflated_model_equals_its_slice_video_model(tokenizer: Any, pixels: Any) -> None:
    """Also where a volume's mean is not the pixels': the bias takes up what that leaves."""
    frames, processor = tiny_qwen3(tokenizer, slices_per_frame=2)
    scale = Scale(0.3, 0.7)
    volumetric = with_patches(frames, (4, 4, 4), 1, "inflate", scale, pixels)
    grey, chats = torch.rand(8, 24, 32), [turn(q, a) for q, a in QUESTIONS]
    batch = processor.batch([VolumeChats([grey], chats)])
    coloured = torch.stack([(grey - s.mean) / s.std for s in pixels or PIXELS["qwen3_vl_vision"]])
    batch["pixel_values_videos"], _ = patchify(coloured, processor.geometry)
    again = PhotonProcessor.from_config(volumetric.config, tokenizer)
    found = volumetric(**again.batch([VolumeChats([(grey - scale.mean) / scale.std], chats)]))
    torch.testing.assert_close(found.logits, frames(**batch).logits, **CLOSE)
    assert volumetric.config.geometry == frames.config.geometry  # slabs count one, however thick they are


# --- deep-stack and dropping --------------------------------------------------------------------------------

LAYERS: list[tuple[int, ...]] = [(0,), (1,), (2,), (3,), (0, 1), (1, 3), (0, 2, 4)]


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS)
def test_keeping_everything_equals_no_dropping(pair: Any, layers: tuple[int, ...]) -> None:
    _, photon, processor = pair
    keeping = with_scheduling(photon, SchedulingSettings(layers=layers, keep_ratio=1.0)).eval()
    batch = processor.batch([VolumeChats([volume(6, 24, 16)], [turn(q, a) for q, a in QUESTIONS])])
    found = keeping(**batch)
    assert found.keep_rate.tolist() == [1.0] * 3
    torch.testing.assert_close(found.logits, photon(**batch).logits, **CLOSE)


def saliency(layer: Any, x: Tensor, rotary: tuple[Tensor, Tensor], asked: Tensor, visual: Tensor) -> Tensor:
    """u of Eq. 5 from a decoder layer's own modules: x (1, L, D), bool (L) of question and visual tokens."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

    attention, x = layer.self_attn, layer.input_layernorm(x)
    shape = (1, x.shape[1], -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(x).view(shape)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(x).view(shape)).transpose(1, 2)
    query, key = (y[0].transpose(0, 1).double().numpy() for y in apply_rotary_pos_emb(query, key, *rotary))
    weights = plain_weights(query[asked], key[asked])
    return torch.from_numpy(plain_logits(query[asked], key[visual], weights))


def plain_dropping(qwen: Any, batch: dict[str, Any], asked: Tensor, layers: tuple[int, ...], ratio: float) -> Any:
    """One row through the library's modules: features of the visual tokens that are left are added to them.

    Returns the hidden states before the final norm, where the text stands in them, and which visual tokens are left.
    """
    model, ids = qwen.model.language_model, batch["input_ids"][0]
    tower = qwen.model.visual(batch["pixel_values_videos"], batch["video_grid_thw"])
    visual = ids == qwen.config.video_token_id
    embeds = model.embed_tokens(ids)
    embeds[visual] = tower.pooler_output
    features = [torch.zeros_like(embeds) for _ in tower.deepstack_features]
    for whole, feature in zip(features, tower.deepstack_features, strict=True):
        whole[visual] = feature
    positions = plain_positions(ids.tolist(), batch["video_grid_thw"].tolist(), qwen.config.video_token_id)
    there = torch.arange(len(ids))
    x, scores = embeds[None], torch.zeros(0)
    for i, layer in enumerate(model.layers):
        rotary = model.rotary_emb(x, positions[:, None, there])
        if i == 0 and 0 in layers:
            scores = saliency(layer, x, rotary, asked[there], visual[there])
        if i in layers:
            places = visual[there].nonzero()[:, 0]
            count = max(1, round(ratio * len(places)))
            left = set(places[scores.topk(count).indices].tolist())
            stay = [p for p in range(len(there)) if not visual[there[p]] or p in left]
            x, there = x[:, stay], there[stay]
            rotary = model.rotary_emb(x, positions[:, None, there])
        scores = saliency(layer, x, rotary, asked[there], visual[there])
        causal = torch.full((len(there), len(there)), -torch.inf).triu(1)[None, None]
        x = layer(x, attention_mask=causal, position_embeddings=rotary)
        if i < len(features):
            x = x + features[i][there]
    kept = torch.isin(visual.nonzero()[:, 0], there)
    return x[0], there, kept


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS)
def test_kept_tokens_get_their_own_features_above_and_below_a_drop(pair: Any, layers: tuple[int, ...]) -> None:
    qwen, photon, processor = pair
    dropping = with_scheduling(photon, SchedulingSettings(layers=layers, keep_ratio=0.4)).eval()
    for question, answer in QUESTIONS[:2]:
        batch = processor.batch([VolumeChats([volume(6, 24, 16)], [turn(question, answer)])])
        layout = dropping.layout(batch["input_ids"], batch["attention_mask"], batch["video_grid_thw"], None, None)
        asked = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
        asked[layout.source[layout.instruction[0]]] = True
        found = dropping(**batch)
        x, there, kept = plain_dropping(qwen, batch, asked, layers, 0.4)
        assert torch.equal(found.kept[0], kept)
        assert 0 < kept.sum() < len(kept)
        predicts = torch.isin(there, (batch["labels"][0, 1:] != -100).nonzero()[:, 0])
        expected = qwen.lm_head(qwen.model.language_model.norm(x[predicts]))
        torch.testing.assert_close(found.logits, expected, **CLOSE)


@pytest.mark.parametrize("layers", [(0,), (1,), (1, 3)])
def test_a_shared_volume_gives_the_loss_and_gradients_of_separate_samples(
    tokenizer: Any, layers: tuple[int, ...]
) -> None:
    model, processor = tiny_qwen3(tokenizer, scheduling={"layers": layers, "predictor_bias": 0.0})
    groups = [VolumeChats([v], [turn(q, a) for q, a in QUESTIONS]) for v in (volume(4, 24, 16), volume(2, 16, 8))]
    batch = processor.batch(groups)
    weights = LossWeights(1 / int((batch["labels"] != -100).sum()), 1 / 6)
    loss = total_loss(model, batch, "hard", weights)
    loss.backward()
    shared, apart = gradients(model), 0.0
    for group in groups:
        for chat in group.chats:
            one = total_loss(model, processor.batch([VolumeChats(group.volumes, [chat])]), "hard", weights)
            one.backward()
            apart += one.item()
    separate = gradients(model)
    assert loss.item() == pytest.approx(apart, rel=1e-5)
    assert shared.keys() == separate.keys() == dict(model.named_parameters()).keys()
    for name, gradient in shared.items():
        # float32 sums in another order: a few units in the sixth digit of the largest entry.
        scale = float(separate[name].abs().max())
        assert torch.allclose(gradient, separate[name], rtol=1e-4, atol=2e-5 * scale + 1e-9), name
    assert all(shared[name].abs().max() > 0 for name in shared if "deepstack" in name and "weight" in name)


def test_a_batch_without_a_volume_still_gives_every_parameter_a_gradient(tokenizer: Any) -> None:
    """So that no rank waits for another: the recipe gives such a batch an empty token of no consequence."""
    model, processor = tiny_qwen3(tokenizer)
    batch = processor.batch([VolumeChats([], [turn(*QUESTIONS[0])])])
    alone = model(**batch).loss
    layout = model.layout(batch["input_ids"], batch["attention_mask"], None, None, batch["labels"])
    token = torch.zeros(4, model.config.patches.voxels)
    inputs = {"pixel_values_videos": token, "video_grid_thw": torch.tensor([[1, 2, 2]])}
    with_token = model(input_ids=batch["input_ids"], layout=layout, **inputs)
    torch.testing.assert_close(with_token.loss, alone)
    with_token.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None and "threshold" not in name]
    assert missing == []


@torch.no_grad()
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 3)])
def test_decoding_step_by_step_gives_the_teacher_forced_logits(tokenizer: Any, layers: tuple[int, ...]) -> None:
    model, processor = tiny_qwen3(tokenizer, scheduling={"layers": layers, "predictor_bias": 0.0})
    model.eval()
    scan, question = volume(6, 24, 16), QUESTIONS[0][0]
    prompt = dict(processor([scan], turn(question)))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    result = model.generate(**prompt, **settings, output_logits=True, return_dict_in_generate=True)
    labels = torch.full_like(result.sequences, -100)
    labels[0, -5:] = result.sequences[0, -5:]
    inputs = {name: prompt[name] for name in ("pixel_values_videos", "video_grid_thw")}
    forced = model(input_ids=result.sequences, labels=labels, **inputs)
    assert 0 < forced.keep_rate < 1
    torch.testing.assert_close(forced.logits, torch.stack(result.logits, dim=1)[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("layers", [(0,), (1,), (1, 3)])
def test_an_encoded_volume_keeps_its_features_for_another_question(tokenizer: Any, layers: tuple[int, ...]) -> None:
    model, processor = tiny_qwen3(tokenizer, scheduling={"layers": layers, "predictor_bias": 0.0})
    scan = volume(6, 24, 16)
    first = model(**processor([scan], turn(QUESTIONS[0][0])), use_cache=True)
    second = dict(processor([scan], turn(QUESTIONS[1][0])))
    expected = model(**second)
    del second["pixel_values_videos"]
    found = model(**second, prefix=first.past_key_values.photon.prefix)
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)


@pytest.mark.parametrize("reduction", ["none", "soft", "hard"])
def test_bfloat16_runs_and_stays_near(tokenizer: Any, reduction: str) -> None:
    model, processor = tiny_qwen3(tokenizer, scheduling={"layers": [1], "predictor_bias": 0.0})
    batch = processor.batch([VolumeChats([volume(6, 24, 16)], [turn(q, a) for q, a in QUESTIONS])])
    exact = model(**batch, reduction=reduction).loss.item()
    output = model.bfloat16()(**batch, reduction=reduction)
    output.loss.backward()
    # bfloat16 keeps 8 bits: five layers of width 64 with enlarged weights stay within a tenth.
    assert output.loss.item() == pytest.approx(exact, rel=0.1)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
