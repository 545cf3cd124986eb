"""Recall, zero-shot figures and the index, against loops that do what the words say."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.evaluation.retrieval import (
    EMBEDDINGS,
    INDEX,
    ITEMS,
    Identity,
    Item,
    area_under_curve,
    ensemble,
    identity_of,
    read_index,
    recalls,
    search,
    write_index,
    zero_shot,
    zero_shot_scores,
)
from mllm3d.inference.checkpoint import Checkpoint


def embeddings(items: int, width: int = 7, noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts that are somewhat alike, of any length, in float32."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(items, width))
    text = image + noise * rng.normal(size=(items, width))
    return image.astype(np.float32), (3 * text).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def plain_recall(queries: np.ndarray, candidates: np.ndarray, k: int) -> float:
    """Expected share of hits over all orders of what ties; two candidates tie exactly if they are equal."""
    total = 0.0
    for i, query in enumerate(queries):
        own = cosine(query, candidates[i])
        others = [other for j, other in enumerate(candidates) if j != i]
        tied = sum(np.array_equal(other, candidates[i]) for other in others)
        above = sum(not np.array_equal(o, candidates[i]) and cosine(query, o) > own for o in others)
        places = range(above + 1, above + tied + 2)
        total += sum(place <= k for place in places) / len(places)
    return total / len(queries)


# --- recall -------------------------------------------------------------------------------------------------


def test_recall_is_what_the_words_say() -> None:
    image, text = embeddings(40)
    text[30:36] = text[5]  # one report six times besides, once where it belongs
    image[20] = image[21]
    (row,) = recalls(image, text, sizes=[40], ks=(1, 3, 10))
    for k in (1, 3, 10):
        assert row.image_to_text[k] == pytest.approx(plain_recall(image, text, k), abs=1e-12)
        assert row.text_to_image[k] == pytest.approx(plain_recall(text, image, k), abs=1e-12)
        assert row.chance[k] == k / 40
    assert 0.2 < row.image_to_text[1] < row.image_to_text[3] < row.image_to_text[10] < 1
    assert row.image_to_text != row.text_to_image


def test_without_ties_it_is_the_published_recall() -> None:
    """The share of rows of the score matrix whose diagonal entry is among the k largest."""
    image, text = embeddings(150)
    (row,) = recalls(image, text, sizes=[150])
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text)]
    scores = units[0] @ units[1].T
    for k in (1, 5, 10):
        top = np.argsort(-scores, axis=1)[:, :k]
        assert row.image_to_text[k] == pytest.approx((top == np.arange(150)[:, None]).any(1).mean())


@pytest.mark.parametrize("width", [1, 16, 100, 768])
def test_a_model_that_says_the_same_of_everything_is_at_chance(width: int) -> None:
    """In whatever chunks: a matrix product alone sets equal columns apart, by where they stand."""
    same = np.tile(np.random.default_rng(width).normal(size=width), (61, 1))
    image = np.random.default_rng(0).normal(size=(61, width))
    for chunk in (1, 7, 512):
        (row,) = recalls(image, same, chunk=chunk)
        assert row.image_to_text == row.chance == {1: 1 / 61, 5: 5 / 61, 10: 10 / 61}
        (row,) = recalls(same, image, chunk=chunk)
        assert row.text_to_image == row.chance


def test_a_report_that_occurs_twice_counts_half() -> None:
    """M3D's reports repeat: which of two equal ones is found first is a matter of chance."""
    perfect = np.eye(10)
    perfect[9] = perfect[0]
    (row,) = recalls(perfect, perfect, ks=(1, 2))
    assert row.image_to_text == {1: pytest.approx(0.9), 2: 1.0}


def test_neither_chunks_nor_the_items_order_change_anything() -> None:
    image, text = embeddings(61, width=9)
    text[40:50] = text[0]
    expected = recalls(image, text)
    order = np.random.default_rng(1).permutation(61)
    for chunk in (1, 13, 61):
        assert recalls(image, text, chunk=chunk) == expected
    (shuffled,) = recalls(image[order], text[order])
    for k in (1, 5, 10):
        assert shuffled.image_to_text[k] == pytest.approx(expected[0].image_to_text[k], abs=1e-12)


def test_sizes_are_the_first_items() -> None:
    image, text = embeddings(520)
    rows = recalls(image, text)
    assert [row.items for row in rows] == [100, 500]  # those of the tables that there are items for
    assert rows[0] == recalls(image[:100], text[:100])[0]
    assert [row.items for row in recalls(image[:30], text[:30])] == [30]


def test_what_cannot_be_compared_is_named() -> None:
    image, text = embeddings(12)
    spoilt = text.copy()
    spoilt[7, 2] = np.nan
    with pytest.raises(UserError, match="text embeddings: row 7 is zero or not finite"):
        recalls(image, spoilt)
    with pytest.raises(UserError, match="image embeddings: row 0 is zero"):
        recalls(np.zeros_like(image), text)
    with pytest.raises(UserError, match=r"images \(12, 7\) and texts \(11, 7\); give one row"):
        recalls(image, text[:11])
    with pytest.raises(UserError, match="retrieval over 100 items: there are 12; choose a smaller"):
        recalls(image, text, sizes=[100])
    with pytest.raises(UserError, match=r"shape \(0, 7\); give one row"):
        recalls(image[:0], text[:0])


# --- zero-shot classification -------------------------------------------------------------------------------


def test_prompts_are_averaged_after_they_are_normalised() -> None:
    prompts = np.array([[10.0, 0.0], [0.0, 0.1]])
    np.testing.assert_allclose(ensemble(prompts), [0.5**0.5, 0.5**0.5])


def test_scores_tell_which_prompts_are_nearer() -> None:
    image, _ = embeddings(20)
    present, absent = (embeddings(3, seed=seed)[0] for seed in (1, 2))
    scores = zero_shot_scores(image, present, absent)
    for row, score in zip(image, scores, strict=True):
        assert score == pytest.approx(cosine(row, ensemble(present)) - cosine(row, ensemble(absent)))


@pytest.mark.parametrize("width", [16, 100, 257, 1000])
def test_equal_images_score_the_same(width: int) -> None:
    rng = np.random.default_rng(width)
    same, prompts = np.tile(rng.normal(size=width), (61, 1)), rng.normal(size=(2, width))
    for count in (7, 61):
        assert len(set(zero_shot_scores(same[:count], prompts[:1], prompts[1:]).tolist())) == 1


def test_figures_of_a_finding_by_hand() -> None:
    scores = np.array([0.9, 0.2, -0.1, 0.2, -0.5, 0.0])
    labels = np.array([True, True, True, False, False, False])
    found = zero_shot(scores, labels)
    # Of 9 pairs: 0.9 wins 3; 0.2 wins 2 and ties 1; -0.1 wins 1.
    assert found.auc == pytest.approx(6.5 / 9)
    assert (found.sensitivity, found.specificity) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.balanced_accuracy == pytest.approx(2 / 3)
    assert (found.positives, found.negatives) == (3, 3)
    at = zero_shot(scores, labels, threshold=0.2)  # at the threshold is not above it
    assert (at.sensitivity, at.specificity) == (pytest.approx(1 / 3), 1.0)


def test_area_under_the_curve_is_the_share_of_pairs() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(0, 6, 50) / 4, rng.random(50) < 0.3
    pairs = [(p > n) + (p == n) / 2 for p, n in product(scores[labels], scores[~labels])]
    assert area_under_curve(scores, labels) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert area_under_curve(np.ones(50), labels) == 0.5


def test_a_finding_that_all_or_none_have_is_refused() -> None:
    for labels in (np.ones(4, bool), np.zeros(4, bool)):
        with pytest.raises(UserError, match="labels say yes; give a label for each score, some yes and some no"):
            zero_shot(np.arange(4.0), labels)


# --- the index ----------------------------------------------------------------------------------------------

VOLUME = VolumeConfig(shape=(8, 16, 16))
IDENTITY = Identity(name="step_4", model="abc", width=7, volume=VOLUME)
CHECKPOINT_FILES = {"config.json": '{"model_type": "med3dclip"}', "model.safetensors": "weights"}


def items(count: int) -> list[Item]:
    return [
        Item(id=f"r{n}", case=f"c{n // 2}", volume=f"v{n}.nii.gz", text=f"Befund {n}: größer\n" if n else None)
        for n in range(count)
    ]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Nine items; 3, 5 and 8 have equal images."""
    image, text = embeddings(9)
    image[[5, 8]] = image[3]
    write_index(tmp_path / "index", IDENTITY, items(9), {"image": image, "text": text})
    return tmp_path / "index"


def test_an_index_comes_back_as_it_was(index: Path) -> None:
    found = read_index(index, IDENTITY)
    assert found.identity == IDENTITY and found.items == items(9)
    for tower, given in zip(("image", "text"), embeddings(9), strict=True):
        expected = given[:3] / np.linalg.norm(given[:3], axis=1, keepdims=True)
        assert found.embeddings[tower].dtype == np.float32  # type: ignore[index]
        np.testing.assert_allclose(found.embeddings[tower][:3], expected, atol=1e-7)  # type: ignore[index]
    assert {path.name for path in index.iterdir()} == {EMBEDDINGS, ITEMS, INDEX}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_search_finds_the_nearest_first(index: Path, tower: str) -> None:
    stored = read_index(index)
    queries = embeddings(5, seed=4)[1]
    for query, hits in zip(queries, search(stored, queries, 4, tower, chunk=2), strict=True):  # type: ignore[arg-type]
        rows = stored.embeddings[tower]  # type: ignore[index]
        order = sorted(range(9), key=lambda n: (-round(cosine(query, rows[n]), 9), n))
        assert [hit.item.id for hit in hits] == [f"r{n}" for n in order[:4]]
        assert [hit.score for hit in hits] == pytest.approx([cosine(query, rows[n]) for n in order[:4]])


def test_equal_items_come_as_they_are_stored(index: Path) -> None:
    image = embeddings(9)[0]
    (hits,) = search(read_index(index), image[3:4], 20)
    assert len(hits) == 9  # all there are
    assert [hit.item.id for hit in hits[:3]] == ["r3", "r5", "r8"]
    assert len({hit.score for hit in hits[:3]}) == 1


def test_many_equal_items_do_too(tmp_path: Path) -> None:
    """Three vectors, twenty times each."""
    image = embeddings(3)[0]
    write_index(tmp_path, IDENTITY, items(60), {"image": np.tile(image, (20, 1))})
    (hits,) = search(read_index(tmp_path), image[:1], 20)
    assert [hit.item.id for hit in hits] == [f"r{n}" for n in range(0, 60, 3)]


def test_an_index_of_another_model_is_refused(index: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "its embeddings have width 7, the model's 9": {"width": 9},
        "its volumes were prepared otherwise: shape": {"volume": VolumeConfig(shape=(8, 16, 8)), "model": "x"},
        "the weights or settings differ": {"model": "abd"},
    }
    for said, change in cases.items():
        other = IDENTITY.model_copy(update={"name": "step_8", **change})
        with pytest.raises(UserError, match=rf"an index of another model \(step_4, not step_8: {said}\); make the"):
            read_index(index, other)
    read_index(index, IDENTITY.model_copy(update={"name": "moved"}))  # a name is no difference
    with pytest.raises(UserError, match="queries of width 6 for an index of another model"):
        search(read_index(index), np.ones((1, 6)), 3)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / EMBEDDINGS).read_bytes())
    data[-3] ^= 1
    (folder / EMBEDDINGS).write_bytes(data)


def stop_half_way(folder: Path) -> None:
    """As if a new index had got no further than its first file."""
    old = (folder / INDEX).read_bytes(), (folder / ITEMS).read_bytes()
    write_index(folder, IDENTITY, items(9), {"image": embeddings(9, seed=7)[0]})
    (folder / INDEX).write_bytes(old[0])
    (folder / ITEMS).write_bytes(old[1])


def change_format(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**content, "format": 2}))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (flip_a_byte, "embeddings.safetensors: not the file that belongs to index.json; make the index again"),
    (stop_half_way, "embeddings.safetensors: not the file that belongs to index.json"),
    (lambda folder: (folder / ITEMS).unlink(), "items.jsonl: No such file or directory; make the index again"),
    (lambda folder: (folder / INDEX).unlink(), r"no index in it \(index.json is missing\)"),
    (lambda folder: (folder / INDEX).write_text("{"), r"index.json: not an index of this version \("),
    (lambda folder: (folder / INDEX).write_text("[]"), "index.json: not an index of this version"),
    (lambda folder: (folder / INDEX).write_text('{"format": 1}'), "not an index of this version.*identity"),
    (change_format, r"index.json: not an index of this version \(format 2\); make it again"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_a_damaged_index_is_one_line(index: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(index)
    with pytest.raises(UserError, match=said) as caught:
        read_index(index)
    assert "\n" not in str(caught.value)


def test_an_index_can_be_made_again_in_its_place(index: Path) -> None:
    write_index(index, IDENTITY, items(3), {"image": embeddings(3)[0]})
    again = read_index(index)
    assert len(again.items) == 3 and again.embeddings.keys() == {"image"}
    with pytest.raises(UserError, match="the index holds no text embeddings; search its image embeddings"):
        search(again, np.ones((1, 7)), 1, "text")


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    image, _ = embeddings(4)
    with pytest.raises(UserError, match=r"image embeddings \(4, 7\) for 3 items of width 7"):
        write_index(tmp_path, IDENTITY, items(3), {"image": image})
    with pytest.raises(UserError, match="4 items, 3 ids"):
        write_index(tmp_path, IDENTITY, [*items(3), items(3)[0]], {"image": image})
    with pytest.raises(UserError, match="text embeddings: row 2 is zero"):
        write_index(tmp_path, IDENTITY, items(4), {"text": np.where(np.arange(4)[:, None] == 2, 0, image)})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: .*; mend that and make the index again"):
        write_index(tmp_path / "file", IDENTITY, items(4), {"image": image})


def test_the_identity_is_that_of_the_checkpoints_files(tmp_path: Path) -> None:
    for name, content in CHECKPOINT_FILES.items():
        (tmp_path / name).write_text(content)
    checkpoint = Checkpoint(tmp_path, "step_4", "med3dclip", VOLUME)
    before = identity_of(checkpoint, 7)
    assert (before.name, before.width, before.volume) == ("step_4", 7, VOLUME)
    (tmp_path / "model.safetensors").write_text("other weights")
    assert identity_of(checkpoint, 7).model != before.model
