"""Statistics of kept tokens (Photon Tables 11 and 12) on masks of eight tokens, all figures worked out by hand."""

from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from mllm3d.config import EvaluationConfig
from mllm3d.data.manifest import Row
from mllm3d.errors import UserError
from mllm3d.evaluation.masks import KeptTokens, pack_kept
from mllm3d.evaluation.predictions import Sample
from mllm3d.evaluation.regions import Region, named_regions
from mllm3d.evaluation.retention import Coverage, ModeRetention, Retention, jaccard_dissimilarity, measure
from mllm3d.evaluation.retention_tables import retention_markdown, summary
from tests.evaluation.test_evaluation_masks import boxes

GRID, VOXELS = (1, 2, 4), (2, 2, 2)
LIVER, CYST = 5, 9
MAPS = {"first": np.zeros((2, 4, 8), np.uint8), "second": np.zeros((2, 4, 8), np.uint8)}
# Tokens 0 to 3 are the upper row (H = 0, 1), two voxels of W each; 4 to 7 the lower one.
MAPS["first"][:, :2, :4] = LIVER  # all of tokens 0 and 1 ...
MAPS["first"][0, 0, 4] = LIVER  # ... and one of eight voxels of token 2
MAPS["first"][0, 2:4, 0] = CYST  # two voxels of token 4
MAPS["first"][1, 3, 7] = CYST  # one of token 7
MAPS["second"][:, :2, :2] = LIVER  # token 0; no cyst
ORGANS = {"liver": str(LIVER), "kidneys": str(CYST)}


def mask(tokens: Iterable[int], count: int = 8) -> np.ndarray:
    return np.isin(np.arange(count), list(tokens))


def kept_tokens(tokens: Iterable[int], prior: Iterable[int] | None = None) -> KeptTokens:
    """Of one volume of eight tokens, or of two where `prior` names tokens of the earlier one."""
    masks = [mask(each) for each in (prior, tokens) if each is not None]
    packed = pack_kept(np.concatenate(masks), [boxes(GRID, VOXELS)] * len(masks))
    assert packed is not None
    return packed


Asked = tuple[Row, Sample]


def ask(
    volume: str,
    organ: str | None,
    tokens: Iterable[int] | None,
    *,
    task: str = "existence",
    prior: Sequence[int] | None = None,
    labels: bool = True,
    **meta: str | int | None,
) -> Asked:
    row = Row(
        id=f"{volume}-{organ}-{tokens}-{task}-{meta}",
        case="one patient",  # whose scans are not compared with each other
        split="test",
        volume=volume,
        question="?",
        answer="yes",
        task=task,
        labels=f"labels/{volume}" if labels else None,
        meta={"organ": organ, "organ_labels": ORGANS.get(organ or ""), **meta},
    )
    kept = list(tokens or ())
    before, after = 8 * (1 + (prior is not None)), len(kept) + len(prior or ())
    sample = Sample(
        id=row.id, case=row.case, task=task, subtask=None, question="?", options=None, reference="yes",
        prediction="yes", keep_rate=after / before, tokens_before=before, tokens_after=after, seconds=1.0,
        kept=None if tokens is None else kept_tokens(kept, prior),
    )  # fmt: skip
    return row, sample


FIVE = [
    ask("first", "liver", (0, 1, 3, 4)),
    ask("first", "kidneys", (0, 4)),
    ask("first", "liver", (1, 2, 4, 5), task="size"),
    ask("second", "liver", (0,)),
    ask("second", "kidneys", (0,)),
]


def statistics(asked: Sequence[Asked], share: float = 0.0, mode: str = "scheduled") -> ModeRetention:
    rows, samples = [row for row, _ in asked], [sample for _, sample in asked]
    named = [named_regions(row, EvaluationConfig()) for row in rows]
    return measure({mode: samples}, rows, named, lambda row: MAPS[row.volume], share)[mode]


def coverage(found: ModeRetention, of: str, name: str | None) -> Coverage:
    (only,) = [each for each in found.coverage if (each.of, each.name) == (of, name)]
    return only


def test_tokens_per_task_and_organ() -> None:
    found = {(each.task, each.organ): each for each in statistics(FIVE).tasks}
    assert list(found) == [
        *[("existence", None), ("existence", "kidneys"), ("existence", "liver")],
        *[("size", None), ("size", "liver")],
    ]
    assert found["existence", None].questions == 4
    assert found["existence", None].tokens == (4 + 2 + 1 + 1) / 4
    assert found["existence", None].keep_rate == (4 + 2 + 1 + 1) / 32
    assert found["existence", None].organ_tokens is None
    liver = found["existence", "liver"]
    assert (liver.questions, liver.tokens, liver.organ_tokens) == (2, 2.5, 1.5)  # tokens 0 and 1, and token 0
    assert found["existence", "kidneys"].organ_tokens == 1  # token 4; the second volume has no cyst


def test_dissimilarity_between_and_within_organs() -> None:
    between, within = (
        next(each for each in statistics(FIVE).dissimilarity if each.organs == organs)
        for organs in (("kidneys", "liver"), ("liver", "liver"))
    )
    # First volume: {0,1,3,4} and {0,4} share 2 of 4, {1,2,4,5} and {0,4} share 1 of 5. Second: the same token.
    assert (between.volumes, between.pairs) == (2, 3)
    assert between.value == pytest.approx(((1 / 2 + 4 / 5) / 2 + 0) / 2)
    # Random masks of 4 and 2 of 8 tokens share 1 on average, of 5; single tokens share 1/8 of 15/8.
    assert between.random == pytest.approx((4 / 5 + 14 / 15) / 2)
    assert (within.volumes, within.pairs) == (1, 1)  # a question is not compared with itself
    assert within.value == pytest.approx(4 / 6) and within.random == pytest.approx(1 - 2 / 6)
    assert len(statistics(FIVE).dissimilarity) == 2  # no volume has two questions about the kidneys


def test_dissimilarity_does_not_mix_volumes_or_count_unnamed_organs() -> None:
    asked = [ask("first", "liver", (0, 1)), ask("second", "kidneys", (0, 1)), ask("first", None, (5,))]
    assert statistics(asked).dissimilarity == []


def test_of_images_all_count_and_beside_a_volume_they_do_not() -> None:
    """Two images (or a prior and a current scan) of eight tokens: both questions keep the same of the second."""
    asked = [ask("first", "liver", (0,), prior=(0, 1)), ask("first", "kidneys", (0,), prior=(4,))]
    assert statistics(asked).dissimilarity[0].value == 0
    without = {"volume": None, "labels": None, "images": ["1.png", "2.png"]}
    shown = [(row.model_copy(update=without), sample) for row, sample in asked]
    (found,) = statistics(shown).dissimilarity
    assert found.value == pytest.approx(3 / 4)  # {0, 1, 8} and {4, 8} share one of four


def test_jaccard_of_every_pair() -> None:
    first = np.stack([mask(()), mask((0, 1)), mask(range(8))])
    value, random = jaccard_dissimilarity(first, np.stack([mask(()), mask((1, 2, 3, 4))]))
    np.testing.assert_allclose(value, [[0, 1], [1, 1 - 1 / 5], [1, 1 / 2]])
    np.testing.assert_allclose(random, [[0, 1], [1, 1 - 1 / 5], [1, 1 / 2]])


def test_random_masks_are_as_dissimilar_as_expected() -> None:
    rng = np.random.default_rng(0)
    first, second = (np.stack([rng.permutation(mask(range(size), 200)) for _ in range(300)]) for size in (80, 30))
    value, random = jaccard_dissimilarity(first, second)
    # 90,000 pairs with a deviation of 0.03 each, dependent within 300 rows and columns: 0.03 / sqrt(300) = 0.002.
    assert value.mean() == pytest.approx(random.mean(), abs=0.006)


def test_coverage_of_an_organ() -> None:
    found = statistics(FIVE)
    liver = coverage(found, "organ", "liver")
    # Held by tokens 0, 1, 2 of the first volume: kept {0,1} and {1,2}; by token 0 of the second: kept.
    assert (liver.questions, liver.volumes, liver.absent, liver.blocks) == (3, 2, 0, 3 + 3 + 1)
    assert liver.pooled == pytest.approx((2 + 2 + 1) / 7)
    assert liver.per_volume == pytest.approx(((2 + 2) / 6 + 1) / 2)
    assert liver.voxels == pytest.approx((16 + 9 + 8) / (17 + 17 + 8))
    assert liver.random == pytest.approx((3 * 4 / 8 + 3 * 4 / 8 + 1 * 1 / 8) / 7)
    assert liver.random_per_volume == pytest.approx((4 / 8 + 1 / 8) / 2)
    # The questions about the kidneys keep {0, 4}, one of three tokens of the liver, and in the second volume {0}.
    assert liver.others == pytest.approx((1 + 1 + 1) / 7)
    kidneys = coverage(found, "organ", "kidneys")
    assert (kidneys.questions, kidneys.volumes, kidneys.absent) == (1, 1, 1)
    assert kidneys.pooled == kidneys.per_volume == 1 / 2 and kidneys.voxels == pytest.approx(2 / 3)
    assert kidneys.others == pytest.approx(1 / 2)  # both questions about the liver keep token 4 and not 7
    every = coverage(found, "organ", None)
    assert every.pooled == pytest.approx((5 + 1) / 9) and (every.questions, every.absent) == (4, 1)
    assert every.per_volume == pytest.approx(((2 + 2 + 1) / 8 + 1) / 2)


@pytest.mark.parametrize(("share", "pooled"), [(0.125, 5 / 7), (0.126, 4 / 5), (1.0, 4 / 5)])
def test_a_token_holds_what_fills_a_share_of_it(share: float, pooled: float) -> None:
    """Token 2 has one liver voxel of eight; without it {0,1}, {1} of {0,1} and {0} of {0} are kept."""
    liver = coverage(statistics(FIVE, share), "organ", "liver")
    assert liver.pooled == pytest.approx(pooled)
    assert liver.voxels == pytest.approx(33 / 42)  # not a matter of tokens
    assert coverage(statistics(FIVE, 0.5), "organ", "kidneys").absent == 2


def test_a_share_is_of_the_voxels_that_a_token_has_in_the_volume() -> None:
    """The last token reaches past the volume: of its eight voxels the volume has four, all liver."""
    labels = np.zeros((2, 4, 7), np.uint8)
    labels[:, :2, 6] = LIVER
    row, sample = ask("cut", "liver", (3,))
    named = [named_regions(row, EvaluationConfig())]
    found = measure({"scheduled": [sample]}, [row], named, lambda _: labels, 0.9)["scheduled"]
    assert coverage(found, "organ", "liver").pooled == 1


def test_coverage_of_the_finding_named() -> None:
    asked = [
        ask("first", "liver", (4, 5), finding="cyst", finding_labels=CYST),
        ask("first", None, (6, 7), finding="cyst", finding_labels=CYST),
        ask("second", None, (6, 7), finding="cyst", finding_labels=CYST),
        ask("first", None, (0,), finding="liver and cyst", finding_labels=f"{LIVER},{CYST}"),
        ask("first", None, (0,), finding="fatty liver"),  # has no label: not measured
        ask("first", None, (0, 1, 4), finding_labels=LIVER),  # has no name
    ]
    found = statistics(asked)
    assert [each.name for each in found.coverage if each.of == "finding"] == [None, "cyst", "label 5", "liver and cyst"]
    cyst = coverage(found, "finding", "cyst")
    assert (cyst.questions, cyst.absent, cyst.pooled, cyst.random) == (2, 1, 2 / 4, 2 / 8)
    assert cyst.voxels == pytest.approx((2 + 1) / 6)
    assert cyst.others == pytest.approx(1 / 2)  # of label 5 alone: "liver and cyst" shares a label
    assert coverage(found, "finding", "liver and cyst").others is None  # every other one shares a label with it
    assert coverage(found, "finding", None).pooled == pytest.approx((2 + 1 + 2) / (4 + 5 + 3))


def test_tokens_of_a_prior_scan_count_in_numbers_alone() -> None:
    asked = [ask("first", "liver", (0, 1), prior=(5, 6, 7)), ask("first", "kidneys", (0, 1), prior=(1, 2))]
    found = statistics(asked)
    assert found.tasks[0].tokens == (5 + 4) / 2 and found.tasks[0].keep_rate == (5 / 16 + 4 / 16) / 2
    assert found.dissimilarity[0].value == 0
    liver = coverage(found, "organ", "liver")
    assert liver.pooled == pytest.approx(2 / 3)
    assert liver.random == pytest.approx(5 / 16)  # as the mode `random` draws: from both scans


def test_what_is_left_out_is_counted_and_said() -> None:
    asked = [*FIVE, ask("first", "liver", None), ask("first", "liver", (2,), labels=False)]
    asked.append(ask("first", None, (2,), labels=False))  # names nothing, so no map of it is missing
    found = statistics(asked)
    assert (found.questions, found.without_mask, found.without_labels) == (7, 1, 1)
    assert coverage(found, "organ", "liver").questions == 3
    retention = Retention(split="test", fingerprint="f", block_share=0.0, modes={"scheduled": found})
    for lines in (retention_markdown(retention), summary(retention)):
        assert any("not recorded which tokens they kept: 1" in line for line in lines)
        assert any("their row has no label map: 1" in line for line in lines)


def test_maps_are_read_once_and_only_where_needed() -> None:
    asked = [*FIVE, ask("third", None, (0,)), ask("fourth", "liver", (0,), labels=False)]
    rows, samples = [row for row, _ in asked], [sample for _, sample in asked]
    read: list[str] = []

    def label_map(row: Row) -> np.ndarray:
        read.append(row.volume)
        return MAPS[row.volume]

    named = [named_regions(row, EvaluationConfig()) for row in rows]
    everything = [sample.model_copy(update={"tokens_after": sample.tokens_before}) for sample in samples]
    answered = {"scheduled": samples, "none": everything, "zeroed": everything, "random": samples}
    modes = measure(answered, rows, named, label_map, 0.0)
    assert read == ["first", "second"]
    assert list(modes) == ["scheduled", "random"]  # there is nothing to say of modes that keep everything


def test_tables_show_the_figures() -> None:
    retention = Retention(split="test", fingerprint="f", block_share=0.0, modes={"scheduled": statistics(FIVE)})
    table = "\n".join(retention_markdown(retention))
    # Kidneys, liver: all tokens kept, and those of the organ: tokens 0 and 1, 0; of the second task 1 and 2.
    assert "| existence | 4 | 2.0 | 0.250 | 1.5 (1.0) | 2.5 (1.5) |" in table
    assert "| size | 1 | 4.0 | 0.500 | - | 4.0 (2.0) |" in table
    assert "in brackets, over volumes whose label map shows it, those of them that hold the organ" in table
    assert "| kidneys and liver | 2 | 3 | 0.325 | 0.867 |" in table
    assert "| liver, two questions | 1 | 1 | 0.667 | 0.667 |" in table
    assert "| · liver | 3 | 2 | 0 | 71.4 | 44.6 | 42.9 | 83.3 | 31.2 | 78.6 |" in table
    assert "(any of their voxels)" in table
    lines = summary(retention)
    assert lines[0] == (
        "scheduled: 66.7 % of the tokens that hold the organ asked about are kept, 40.3 % expected of random tokens, "
        "44.4 % kept for other questions (4 questions)"
    )
    assert "about two organs: 0.33, of random masks 0.87" in lines[1]
    half = retention.model_copy(update={"block_share": 0.5})
    assert "(at least 50 % of their voxels)" in "\n".join(retention_markdown(half))
    unlabelled = [ask("first", "liver", (0, 1, 3), labels=False)]
    retention = retention.model_copy(update={"modes": {"scheduled": statistics(unlabelled)}})
    assert "| existence | 1 | 3.0 | 0.375 | 3.0 |" in "\n".join(retention_markdown(retention))


def test_a_region_that_no_volume_has_shows_no_figures() -> None:
    retention = Retention(
        split="test", fingerprint="f", block_share=0.0, modes={"random": statistics([FIVE[-1]], mode="random")}
    )
    table = "\n".join(retention_markdown(retention))
    assert "## Kept tokens (random)" in table and "| · kidneys | 0 | 0 | 1 | - | - | - | - | - | - |" in table
    assert retention_markdown(retention.model_copy(update={"modes": {}})) == []


# --- what a row names ---------------------------------------------------------------------------------------


def test_regions_that_a_row_names() -> None:
    def named(**meta: str | int | float | bool | None) -> dict[str, Region]:
        row = FIVE[0][0].model_copy(update={"meta": meta})
        return dict(named_regions(row, EvaluationConfig(organ_key="structure")))

    assert named() == {} == named(organ="liver", organ_labels="5", finding="cyst")
    assert named(structure="liver") == {"organ": Region("liver", ())}
    assert named(structure="lungs", structure_labels="11, 10,11") == {"organ": Region("lungs", (10, 11))}
    assert named(structure=None, structure_labels=None, finding_labels=254) == {"finding": Region("label 254", (254,))}


@pytest.mark.parametrize("ids", ["liver", "10;11", "", 0, 255, "-1", 2.5, True])
def test_wrong_label_ids_name_row_and_key(ids: str | float | bool) -> None:
    row = FIVE[0][0].model_copy(update={"meta": {"organ": "liver", "organ_labels": ids}})
    with pytest.raises(UserError, match=r"row first-liver-.*: meta\.organ_labels: .* are no ids of a label map"):
        named_regions(row, EvaluationConfig())
