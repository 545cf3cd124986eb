"""Images, several images, and videos through the processor that takes volumes (Photon A.3)."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from photon import PhotonProcessor
from photon.building import read_model, with_patches
from photon.geometry import PatchGeometry
from photon.media import PixelReader
from photon.patch_embedding import PIXELS, Scale, patchify
from photon.processing_photon import VolumeChats
from tests.photon.conftest import tiny_config, turn

CLIP = PIXELS["qwen2_5_vl_vision"]
QUESTION = turn("Is there a pleural effusion?", "yes")
# The same products in another order, in float32.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    """Smooth, so that resizing has something to keep."""
    random = np.random.default_rng(seed)
    waves = np.stack(np.meshgrid(*[np.linspace(0, random.uniform(2, 9), n) for n in shape], indexing="ij")).sum(0)
    return ((np.sin(waves) + 1) * 127).round().astype(np.uint8)


def max_reader(**changes: Any) -> PixelReader:
    """Of Photon Max, the backbone's own patches."""
    values = {
        "geometry": PatchGeometry((2, 14, 14), 3, 2),
        "scale": CLIP,
        "min_pixels": 784,
        "max_pixels": 28 * 28 * 16,
    }
    return PixelReader(**{**values, **changes})


# --- as the backbone's own processor does it ----------------------------------------------------------------


# Sizes that are whole tokens, that are not, and that are below and above the budget; colour and grey.
@pytest.mark.parametrize("shape", [(28, 56, 3), (45, 100, 3), (9, 20, 3), (200, 300, 3), (60, 44)])
def test_an_image_is_cut_as_by_qwens_processor(shape: tuple[int, ...]) -> None:
    reader, image = max_reader(), picture(*shape)
    theirs = Qwen2VLImageProcessorPil(min_pixels=reader.min_pixels, max_pixels=reader.max_pixels)
    expected = theirs(np.broadcast_to(image[:, :, None], (*shape, 3)) if len(shape) == 2 else image)
    patches, grid = reader.image(image)
    assert [list(grid)] == np.asarray(expected["image_grid_thw"]).tolist()
    whole = shape[0] % 28 == shape[1] % 28 == 0
    # Pillow and torch round after each axis: up to two of 255 levels apart, over the smallest deviation.
    atol = 1e-6 if whole else 2.01 / 255 / 0.261
    np.testing.assert_allclose(patches, np.asarray(expected["pixel_values"]), atol=atol)
    assert patches.std() > 0.5


def plain_video(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) as Qwen's video processor cuts it, in loops: patches of 2 x 4 x 4, merged 2 x 2."""
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    x = (frames / 255 - np.array([s.mean for s in CLIP])) / np.array([s.std for s in CLIP])
    rows = []
    for t in range(0, x.shape[0], 2):
        for y in range(0, x.shape[1], 8):
            for z in range(0, x.shape[2], 8):
                for dy, dz in ((0, 0), (0, 4), (4, 0), (4, 4)):
                    patch = x[t : t + 2, y + dy : y + dy + 4, z + dz : z + dz + 4]
                    rows.append(patch.transpose(3, 0, 1, 2).flatten())
    return np.stack(rows)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_video_is_cut_into_slabs_of_frames_and_its_last_frame_is_repeated(count: int) -> None:
    reader = max_reader(geometry=PatchGeometry((2, 4, 4), 3, 2), min_pixels=64)
    frames = picture(count, 16, 24, 3)
    patches, grid = reader.video(frames)
    assert grid == (-(-count // 2), 4, 6)
    np.testing.assert_allclose(patches, plain_video(frames), atol=1e-6)


@pytest.fixture(scope="module")
def library(tokenizer: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    """A random Qwen2.5-VL with patches of 2 x 4 x 4 x 3, and Photon (Max) read from its files."""
    config = tiny_config(tokenizer, vision={"temporal_patch_size": 2, "in_channels": 3})
    values = config.to_dict()
    for name in ("scheduling", "slices_per_frame", "temporal_step", "text_after", "model_type"):
        values.pop(name)
    torch.manual_seed(0)
    qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**values)).eval()
    with torch.no_grad():
        for parameter in qwen.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    folder = tmp_path_factory.mktemp("qwen")
    qwen.save_pretrained(folder)
    photon = read_model(folder).eval()
    photon.config.text_after = "plane"  # as in the installed library
    photon.config.turn_end_token_id = config.turn_end_token_id
    photon.config.user_turn_token_ids = config.user_turn_token_ids
    return qwen, photon


@pytest.fixture
def processor(library: Any, tokenizer: Any) -> PhotonProcessor:
    made = PhotonProcessor.from_config(library[1].config, tokenizer)
    made.min_pixels, made.max_pixels = 64, 1024
    return made


def qwen_inputs(batch: dict[str, Any], qwen: Any, kind: str) -> dict[str, Any]:
    """The batch as the library's own image or video inputs."""
    ids, config = batch["input_ids"].clone(), qwen.config
    visual = ids == config.video_token_id
    shared = {"attention_mask": batch["attention_mask"], "mm_token_type_ids": visual.int() * (1 + (kind == "videos"))}
    if kind == "videos":
        times = torch.full((len(batch["video_grid_thw"]),), 2.0)  # two frames of one second
        names = ("pixel_values_videos", "video_grid_thw")
        return {**shared, "input_ids": ids, **{n: batch[n] for n in names}, "second_per_grid_ts": times}
    ids[visual] = config.image_token_id
    images = {"pixel_values": batch["pixel_values_videos"], "image_grid_thw": batch["video_grid_thw"]}
    return {**shared, "input_ids": ids, **images}


SHOWN: dict[str, list[np.ndarray]] = {
    "images": [picture(16, 24, 3), picture(40, 8), picture(30, 21, 3)],
    "videos": [picture(5, 16, 24, 3), picture(2, 24, 8, 3)],
}


@torch.no_grad()
@pytest.mark.parametrize("kind", SHOWN)
def test_logits_equal_those_of_transformers(library: Any, processor: PhotonProcessor, kind: str) -> None:
    qwen, photon = library
    other = turn("Which side is it on?", "left")
    groups = [VolumeChats([], [QUESTION], **{kind: SHOWN[kind]}), VolumeChats([], [other], **{kind: SHOWN[kind][:1]})]
    batch = processor.batch(groups)
    expected = qwen(**qwen_inputs(batch, qwen, kind)).logits
    rows, columns = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    torch.testing.assert_close(photon(**batch).logits, expected[rows, columns], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", SHOWN)
def test_greedy_answers_equal_those_of_transformers(library: Any, processor: PhotonProcessor, kind: str) -> None:
    qwen, photon = library
    shown: dict[str, Any] = {kind: SHOWN[kind]}
    prompt = processor(None, QUESTION[:1], **shown)
    length = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = qwen.generate(**qwen_inputs(prompt, qwen, kind), **length)[:, -5:]
    assert torch.equal(photon.generate(**prompt, **length)[:, -5:], expected)


# --- sizes and scales ---------------------------------------------------------------------------------------


@given(height=st.integers(1, 400), width=st.integers(1, 400), grey=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_size_becomes_whole_tokens_within_the_budget(height: int, width: int, grey: bool) -> None:
    reader = max_reader(geometry=PatchGeometry((2, 6, 4), 3, 2))  # units of 24 x 24 pixels
    image = np.zeros((height, width) if grey else (height, width, 3), np.uint8)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match=f"images: {height} x {width} pixels: .*aspect ratio"):
            reader.image(image)
        return
    patches, (t, h, w) = reader.image(image)
    assert t == 1 and len(patches) == h * w and h * 6 % 24 == w * 4 % 24 == 0
    # A side is at least one unit, so a thin image may exceed the budget.
    assert reader.min_pixels <= h * w * 24 <= reader.max_pixels or 24 in (h * 6, w * 4)


def test_a_grey_image_is_the_same_in_every_channel_and_a_colour_image_is_not() -> None:
    reader = max_reader(scale=[Scale(0, 1)] * 3)
    grey, _ = reader.image(picture(28, 56))
    same, _ = reader.image(np.repeat(picture(28, 56)[:, :, None], 3, axis=2))
    assert torch.equal(grey, same)
    red = np.zeros((28, 28, 3), np.uint8)
    red[:, :, 0] = 255
    patches, _ = reader.image(red)
    assert torch.equal(patches.unflatten(1, (3, -1)).mean((0, 2)), torch.tensor([1.0, 0.0, 0.0]))


def test_a_model_of_grey_patches_reads_an_image_as_one_slab_of_equal_slices() -> None:
    reader = PixelReader(PatchGeometry((14, 14, 14), 1, 2, 3), [Scale(0.5, 0.25)], 784, 10_000)
    image = picture(28, 56, 3)
    patches, grid = reader.image(image)
    assert grid == (1, 2, 4) and patches.shape == (8, 14**3)
    luma = torch.tensor((image / 255 @ np.array([0.299, 0.587, 0.114]) - 0.5) / 0.25)
    expected, _ = patchify(luma.expand(14, -1, -1), PatchGeometry((14, 14, 14), 1, 2))
    torch.testing.assert_close(patches.double(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_inflated_model_sees_an_image_as_the_model_it_came_from(library: Any, tokenizer: Any) -> None:
    """Inflation spreads each frame over its share of the depth: repeating the image is what keeps its meaning."""
    _, photon = library
    scale = Scale(0.0, 1.0)
    volumetric = with_patches(photon, (6, 4, 4), 1, "inflate", scale, [scale] * 3)
    found = []
    for model in (photon, volumetric):
        processor = PhotonProcessor.from_config(model.config, tokenizer, [scale] * model.config.patches.channels)
        processor.min_pixels = 64
        group = VolumeChats([], [QUESTION], [picture(16, 24), picture(8, 40)])
        found.append(model(**processor.batch([group])).logits)
    torch.testing.assert_close(*found, **CLOSE)


def test_the_usual_scales(tokenizer: Any) -> None:
    grey = PhotonProcessor.from_config(tiny_config(tokenizer), tokenizer)
    assert (grey.pixel_mean, grey.pixel_std) == ([0.0], [1.0])
    colour = PhotonProcessor.from_config(tiny_config(tokenizer, vision={"in_channels": 3}), tokenizer)
    assert colour.reader.scale == list(CLIP)
    given_scale = PhotonProcessor.from_config(tiny_config(tokenizer), tokenizer, [Scale(0.5, 0.25)])
    assert given_scale.reader.scale == [Scale(0.5, 0.25)]


def test_settings_are_saved_with_the_processor(processor: PhotonProcessor, tmp_path: Any) -> None:
    from transformers import AutoProcessor

    processor.skip_background = -0.9
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "photon"}')
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, PhotonProcessor)
    assert again.reader == processor.reader and again.skip_background == -0.9


# --- conversations and batches ------------------------------------------------------------------------------


def test_volumes_images_and_videos_stand_in_this_order(processor: PhotonProcessor, tokenizer: Any) -> None:
    group = VolumeChats([torch.zeros(4, 16, 8)], [QUESTION], [picture(8, 8), picture(8, 24)], [picture(4, 8, 16)])
    batch = processor.batch([group])
    assert batch["video_grid_thw"].tolist() == [[2, 4, 2], [1, 2, 2], [1, 2, 6], [2, 2, 4]]
    text = tokenizer.decode(batch["input_ids"][0])
    shown = "".join(f"<|vision_start|>{'<|video_pad|>' * n}<|vision_end|>" for n in (4, 1, 3, 4))
    assert f"<|im_start|>user\n{shown}Is there" in text
    assert len(batch["pixel_values_videos"]) == 4 * (4 + 1 + 3 + 4)


def test_all_kinds_go_in_one_batch_and_change_nothing_for_each_other(tiny: Any) -> None:
    """A study of unequal images, a video, a volume, both, and plain text; a grey model with token dropping."""
    model, processor = tiny()
    processor.min_pixels = 64
    study = [picture(20, 31, 3), picture(8, 40), picture(33, 17)]
    scan, film = torch.rand(6, 24, 16), picture(9, 16, 24, 3)
    chats = [QUESTION, turn("Which side is it on?", "left")]
    groups = [
        VolumeChats([], chats, study),
        VolumeChats([], chats, videos=[film]),
        VolumeChats([scan], chats),
        VolumeChats([scan], chats, study[:1]),
        VolumeChats([], chats),
    ]
    together = model(**processor.batch(groups)).token_losses
    alone = torch.cat([model(**processor.batch([group])).token_losses for group in groups])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    kept = model(**processor.batch(groups[:1])).keep_rate
    assert bool((kept < 1).all())


def test_each_image_of_a_study_matters_and_so_does_their_order(tiny: Any) -> None:
    model, processor = tiny()
    processor.min_pixels = 64
    study = [picture(16, 24, seed=seed) for seed in range(3)]
    batches = [[*study], study[::-1], study[:2], [study[0], study[1], 255 - study[2]]]
    losses = [model(**processor.batch([VolumeChats([], [QUESTION], images)])).loss.item() for images in batches]
    assert len({round(loss, 5) for loss in losses}) == len(losses)


def test_a_question_without_text_keeps_every_token_of_an_image(tiny: Any) -> None:
    model, processor = tiny()
    output = model(**processor.batch([VolumeChats([], [turn("", "no")], [picture(40, 60)])]))
    assert output.keep_rate.tolist() == [1.0]


def test_what_is_smaller_than_a_patch_is_one_token_or_enlarged(tiny: Any) -> None:
    model, processor = tiny()
    processor.min_pixels = 100
    batch = processor.batch([VolumeChats([torch.rand(1, 2, 3)], [QUESTION], [picture(2, 3)], [picture(1, 3, 2)])])
    # A volume is padded to one token (of 2 x 2 patches); pixels are enlarged to the smallest size allowed.
    assert batch["video_grid_thw"].tolist() == [[1, 2, 2], [1, 4, 4], [1, 4, 4]]
    assert bool(model(**batch).loss.isfinite())


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({"images": [np.zeros((8, 8), np.float32)]}, "images: torch.float32, expected uint8"),
        ({"images": [np.zeros((2, 8, 8, 3), np.uint8)]}, r"images: shape \(2, 8, 8, 3\), expected \(H, W\)"),
        ({"images": [np.zeros((8, 8, 4), np.uint8)]}, "images: 4 channels"),
        ({"images": [np.zeros((0, 8, 3), np.uint8)]}, "images: 0 x 8 pixels"),
        ({"videos": [np.zeros((8, 8), np.uint8)]}, r"videos: shape \(8, 8\), expected \(T, H, W\)"),
        ({"videos": [np.zeros((0, 8, 8, 3), np.uint8)]}, r"videos: shape \(0, 8, 8, 3\)"),
    ],
)
def test_pixels_of_another_kind_are_refused(processor: PhotonProcessor, shown: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(None, QUESTION[:1], **shown)


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 8, 8), (1, 1, 4, 8, 8)])
def test_volumes_of_other_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="volume: "):
        patchify(torch.zeros(shape), PatchGeometry((2, 4, 4), 3, 2))
