"""Kept tokens in a line of text and back, and voxels of a region per token: small grids counted by hand."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from mllm3d.errors import UserError
from mllm3d.evaluation.masks import KeptTokens, labels_per_token, pack_kept
from mllm3d.evaluation.predictions import read
from tests.evaluation.test_evaluation_scoring import sample

Size = tuple[int, int, int]


def boxes(grid: Size, size: Size) -> np.ndarray:
    """Boxes (tokens, 3, 2) of one size side by side, W fastest."""
    found = []
    for d, h, w in product(*map(range, grid)):
        found.append([[at * step, (at + 1) * step] for at, step in zip((d, h, w), size, strict=True)])
    return np.array(found)


def test_bits_by_hand() -> None:
    kept = np.zeros(10, bool)
    kept[[0, 9]] = True  # 1000 0000 | 0100 0000, which is 80 40 in hexadecimal
    packed = pack_kept(kept, [boxes((1, 2, 5), (3, 4, 5))])
    assert packed == KeptTokens(grids=((1, 2, 5),), voxels=(3, 4, 5), bits="gEA=")
    (mask,) = packed.masks()
    assert mask.shape == (1, 2, 5) and np.argwhere(mask).tolist() == [[0, 0, 0], [0, 1, 4]]


def test_volumes_follow_each_other_without_a_gap() -> None:
    grids: list[Size] = [(2, 3, 1), (1, 1, 5)]
    kept = np.random.default_rng(0).random(11) < 0.5
    packed = pack_kept(kept, [boxes(grid, (2, 2, 2)) for grid in grids])
    assert packed is not None
    read_back = KeptTokens.model_validate_json(packed.model_dump_json()).masks()
    assert [mask.shape for mask in read_back] == grids
    np.testing.assert_array_equal(np.concatenate([mask.ravel() for mask in read_back]), kept)


def test_a_thousand_tokens_take_168_characters() -> None:
    """What docs/evaluation.md and the setting's description say."""
    packed = pack_kept(np.ones(1000, bool), [boxes((10, 10, 10), (14, 28, 28))])
    assert packed is not None and len(packed.bits) == 168


@pytest.mark.parametrize("what", ["shuffled", "shifted", "overlapping", "two sizes", "no tokens"])
def test_tokens_that_are_no_boxes_side_by_side_have_no_record(what: str) -> None:
    lattice = boxes((2, 2, 2), (4, 4, 4))
    given = {
        "shuffled": [lattice[::-1]],
        "shifted": [lattice + 1],
        "overlapping": [lattice + np.array([0, 1])],
        "two sizes": [lattice, boxes((2, 2, 2), (4, 4, 5))],
        "no tokens": [lattice[:0]],
    }[what]
    assert pack_kept(np.ones(sum(map(len, given)), bool), given) is None


def test_a_mask_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="7 tokens in the answer, 8 boxes"):
        pack_kept(np.ones(7, bool), [boxes((2, 2, 2), (4, 4, 4))])


@pytest.mark.parametrize("bits", ["gEA", "gE!=", "gA==", "gEAA"], ids=["no padding", "letter", "short", "long"])
def test_damaged_bits_are_found_when_they_are_read(tmp_path: Path, bits: str) -> None:
    whole = {"grids": [[1, 2, 5]], "voxels": [1, 1, 1], "bits": bits}
    with pytest.raises(ValidationError, match="bits"):
        KeptTokens.model_validate(whole)
    good = sample("yes", "yes", kept={**whole, "bits": "gEA="}).model_dump_json()
    (tmp_path / "x.jsonl").write_text(good.replace("gEA=", bits) + "\n" + good + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl:1: not a prediction"):
        read(tmp_path / "x.jsonl")


def test_a_line_of_before_has_no_record() -> None:
    old = sample("yes", "yes").model_dump(exclude={"kept", "seconds_first", "seconds_last", "new_tokens"})
    assert type(sample("yes", "yes")).model_validate(old).kept is None


@pytest.mark.parametrize("grid", [(2, 2, 3), (1, 2, 2)], ids=["past the end", "rest left out"])
def test_labels_per_token_are_counted(grid: Size) -> None:
    labels = np.random.default_rng(1).choice([0, 7, 254], (3, 4, 5)).astype(np.uint8)
    kept = KeptTokens(grids=(grid,), voxels=(2, 2, 2), bits=["AA==", "AAA="][grid == (2, 2, 3)])
    expected = np.zeros((*grid, 255), int)
    for (d, h, w), label in np.ndenumerate(labels):
        if d // 2 < grid[0] and w // 2 < grid[2]:
            expected[d // 2, h // 2, w // 2, label] += 1
    np.testing.assert_array_equal(labels_per_token(labels, kept), expected)
