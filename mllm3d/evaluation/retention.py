"""Statistics of the kept tokens (Photon A.3.2): how many per task, how different between organs, how much of a
labelled region they cover. They come from the predictions and the manifest's label maps alone.

Shapes: labels (D, H, W) on the model's grid; masks (d, h, w) in tokens of the question's volume, or flat (tokens,)
of all its images and its video; a prior scan's tokens count in numbers of tokens, not in dissimilarity and coverage.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations_with_replacement

import numpy as np
from pydantic import Field

from mllm3d.config import Settings
from mllm3d.data.manifest import Row, Study
from mllm3d.evaluation.masks import KeptTokens, labels_per_token
from mllm3d.evaluation.predictions import Sample
from mllm3d.evaluation.regions import KINDS, Named, Of

LabelMap = Callable[[Row], np.ndarray]


class TaskRetention(Settings):
    """One task's questions, or those of it that are about one organ (Photon Table 11, left)."""

    task: str = Field(description="Task.")
    organ: str | None = Field(description="Organ that the questions are about; null: all questions of the task.")
    questions: int = Field(description="Questions.")
    tokens: float = Field(description="Mean visual tokens kept per question.")
    keep_rate: float = Field(description="Mean share of visual tokens kept.")
    organ_tokens: float | None = Field(description="Mean kept tokens that hold the organ, where a label map tells.")


class Dissimilarity(Settings):
    """1 - |A and B| / |A or B| of two questions' kept tokens on one volume (Photon Table 11, right)."""

    organs: tuple[str, str] = Field(description="What the two are about; the same twice: two questions about it.")
    volumes: int = Field(description="Volumes with such a pair.")
    pairs: int = Field(description="Pairs of questions.")
    value: float = Field(description="Mean over volumes of the mean over their pairs.")
    random: float = Field(description="The same at the overlap that is expected of random masks of the same sizes.")


class Coverage(Settings):
    """How much of a region the tokens keep that were kept for questions naming it (Photon Table 12)."""

    of: Of = Field(description="Kind of region.")
    name: str | None = Field(description="Region; null: all of this kind.")
    questions: int = Field(description="Questions that name it, on volumes that have it.")
    absent: int = Field(description="Questions that name it, on volumes where no token holds it: not counted below.")
    volumes: int = Field(description="Volumes that have it.")
    blocks: int = Field(description="Tokens that hold it, over all questions.")
    pooled: float | None = Field(description="Share of these tokens that was kept, over all questions; null: of none.")
    per_volume: float | None = Field(description="Mean over volumes of their shares.")
    voxels: float | None = Field(description="Share of the region's voxels in kept tokens, over all questions.")
    random: float | None = Field(description="`pooled` as expected of as many random tokens.")
    random_per_volume: float | None = Field(description="`per_volume` as expected of as many random tokens.")
    others: float | None = Field(
        description="`pooled` of the tokens that were kept for the volume's questions about other regions of this "
        "kind: by how much the question matters. null: there are none."
    )


class ModeRetention(Settings):
    """One mode of answering."""

    questions: int = Field(description="Questions whose kept tokens are known.")
    without_mask: int = Field(description="Questions whose kept tokens were not recorded; `tasks` counts them too.")
    without_labels: int = Field(description="Questions that name a region with label ids but have no label map.")
    tasks: list[TaskRetention] = Field(description="Kept tokens per task.")
    dissimilarity: list[Dissimilarity] = Field(description="Between questions about organs of one volume.")
    coverage: list[Coverage] = Field(description="Per region.")


class Retention(Settings):
    """retention.json."""

    split: str = Field(description="Split of the manifest.")
    fingerprint: str = Field(description="As in results.json.")
    block_share: float = Field(description="Share of a token's voxels that a region must fill; 0: any voxel.")
    modes: dict[str, ModeRetention] = Field(description="Per mode of answering.")


@dataclass(frozen=True)
class Question:
    """An answered question, what it names, and which tokens of its volume it kept (None: not recorded)."""

    row: Row
    sample: Sample
    named: Named
    mask: np.ndarray | None


@dataclass(frozen=True)
class Hit:
    """One question's region: tokens and voxels of it, kept and in all.

    others: mean of its tokens that are kept for the volume's questions about other regions of the kind; None
    without any.
    """

    question: Question
    of: Of
    kept_blocks: int
    blocks: int
    kept_voxels: int
    voxels: int
    others: float | None

    @property
    def name(self) -> str:
        return self.question.named[self.of].name


def measure(
    samples: Mapping[str, Sequence[Sample]],
    rows: Sequence[Row],
    named: Sequence[Named],
    label_map: LabelMap,
    block_share: float,
) -> dict[str, ModeRetention]:
    """Statistics per mode, but for those that keep everything.

    samples: per mode in the order of `rows`; named: what each row names; label_map: a row's labels on the
    model's grid; block_share: share of a token's voxels that a region must fill to count as held by it (0: any).
    """
    questions = {
        mode: [_question(*item) for item in zip(rows, items, named, strict=True)]
        for mode, items in samples.items()
        if any(item.tokens_after < item.tokens_before for item in items)
    }
    hits = _hits(questions, label_map, block_share)
    return {mode: _mode(items, hits[mode]) for mode, items in questions.items()}


def _question(row: Row, sample: Sample, named: Named) -> Question:
    if sample.kept is None:
        return Question(row, sample, named, None)
    masks = sample.kept.masks()
    mask = masks[-1] if row.volume is not None else np.concatenate([mask.ravel() for mask in masks])
    return Question(row, sample, named, mask)


def _mode(questions: Sequence[Question], hits: Sequence[Hit]) -> ModeRetention:
    seen = [question for question in questions if question.mask is not None]
    return ModeRetention(
        questions=len(seen),
        without_mask=len(questions) - len(seen),
        without_labels=sum(item.row.labels is None and _has_labels(item) for item in seen),
        tasks=_tasks(questions, hits),
        dissimilarity=_dissimilarities(seen),
        coverage=_coverages(hits),
    )


def _has_labels(question: Question) -> bool:
    return any(region.labels for region in question.named.values())


# --- how many -----------------------------------------------------------------------------------------------


def _tasks(questions: Sequence[Question], hits: Sequence[Hit]) -> list[TaskRetention]:
    groups: dict[tuple[str, str | None], list[Question]] = defaultdict(list)
    for question in questions:
        groups[(question.row.task, None)].append(question)
        if "organ" in question.named:
            groups[(question.row.task, question.named["organ"].name)].append(question)
    order = {task: place for place, task in enumerate(dict.fromkeys(item.row.task for item in questions))}
    held: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for hit in hits:
        if hit.of == "organ" and hit.blocks:
            held[(hit.question.row.task, hit.name)].append(hit.kept_blocks)
    return [
        TaskRetention(
            task=task,
            organ=organ,
            questions=len(members),
            tokens=float(np.mean([item.sample.tokens_after for item in members])),
            keep_rate=float(np.mean([item.sample.keep_rate for item in members])),
            organ_tokens=float(np.mean(held[(task, organ)])) if held[(task, organ)] else None,
        )
        for (task, organ), members in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1] or ""))
    ]


# --- how different ------------------------------------------------------------------------------------------


def jaccard_dissimilarity(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 - |A and B| / |A or B| of every row of `first` with every row of `second`, and what is expected of
    random masks with as many tokens; 0 where both are empty.

    first: bool (a, tokens), second: bool (b, tokens). Returns float (a, b) twice.
    """
    a, b = (masks.astype(np.float64) for masks in (first, second))
    shared = a @ b.T
    sizes = a.sum(1)[:, None] + b.sum(1)[None]
    expected = np.outer(a.sum(1), b.sum(1)) / first.shape[1]

    def dissimilarity(overlap: np.ndarray) -> np.ndarray:
        union = sizes - overlap
        return 1 - np.divide(overlap, union, out=np.ones_like(union), where=union > 0)

    return dissimilarity(shared), dissimilarity(expected)


def _dissimilarities(questions: Sequence[Question]) -> list[Dissimilarity]:
    found: dict[tuple[str, str], list[tuple[int, float, float]]] = defaultdict(list)
    for organs in _by_study_and_organ(questions).values():
        for first, second in combinations_with_replacement(sorted(organs), 2):
            values = jaccard_dissimilarity(organs[first], organs[second])
            # Of one organ each pair of different questions once, a question with itself not at all.
            count = len(organs[first])
            where = np.triu_indices(count, 1) if first == second else np.nonzero(np.ones_like(values[0]))
            if len(where[0]):
                value, random = (float(each[where].mean()) for each in values)
                found[(first, second)].append((len(where[0]), value, random))
    return [
        Dissimilarity(
            organs=organs,
            volumes=len(volumes),
            pairs=sum(pairs for pairs, _, _ in volumes),
            value=float(np.mean([value for _, value, _ in volumes])),
            random=float(np.mean([random for _, _, random in volumes])),
        )
        for organs, volumes in sorted(found.items())
    ]


def _by_study_and_organ(questions: Sequence[Question]) -> dict[Study, dict[str, np.ndarray]]:
    """Study -> organ -> masks of the questions about it, bool (questions, tokens)."""
    groups: dict[Study, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for item in questions:
        if item.mask is not None and "organ" in item.named:
            groups[item.row.study][item.named["organ"].name].append(item.mask.ravel())
    return {key: {name: np.stack(masks) for name, masks in organs.items()} for key, organs in groups.items()}


# --- how much of a region -----------------------------------------------------------------------------------


def _hits(questions: Mapping[str, Sequence[Question]], label_map: LabelMap, share: float) -> dict[str, list[Hit]]:
    """Per mode, every region that a question names and a label map shows; each map is read once."""
    volumes: dict[tuple[Study, str], dict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for mode, items in questions.items():
        for item in items:
            if item.mask is not None and item.row.labels is not None:
                volumes[(item.row.study, item.row.labels)][mode].append(item)
    hits: dict[str, list[Hit]] = {mode: [] for mode in questions}
    for modes in volumes.values():
        first = next(iter(modes.values()))[0]
        if not any(map(_has_labels, chain(*modes.values()))):
            continue
        blocks = _Blocks(label_map(first.row), share)
        for mode, items in modes.items():
            hits[mode] += [
                blocks.hit(item, kind, items)
                for item in items
                for kind in KINDS
                if kind in item.named and item.named[kind].labels
            ]
    return hits


class _Blocks:
    """Tokens of one volume that hold a region; its voxels are counted once."""

    def __init__(self, labels: np.ndarray, share: float):
        self._labels, self._share = labels, share
        self._counts: np.ndarray | None = None  # per token and label

    def hit(self, question: Question, kind: Of, of_volume: Sequence[Question]) -> Hit:
        """What a question kept of a region, beside what the volume's questions about others keep."""
        assert question.sample.kept is not None and question.mask is not None
        region = question.named[kind]
        voxels, held = self._find(region.labels, question.sample.kept)
        others = [
            int((held & item.mask).sum())
            for item in of_volume
            if item.mask is not None and kind in item.named and item.named[kind].is_apart_from(region)
        ]
        return Hit(
            question,
            kind,
            kept_blocks=int((held & question.mask).sum()),
            blocks=int(held.sum()),
            kept_voxels=int(voxels[question.mask].sum()),
            voxels=int(voxels.sum()),
            others=float(np.mean(others)) if others else None,
        )

    def _find(self, labels: tuple[int, ...], kept: KeptTokens) -> tuple[np.ndarray, np.ndarray]:
        """Voxels of the region per token, and whether the token holds it: int and bool (d, h, w)."""
        if self._counts is None:
            self._counts = labels_per_token(self._labels, kept)
        voxels = self._counts[..., list(labels)].sum(axis=-1)
        return voxels, (voxels > 0) & (voxels >= self._share * self._counts.sum(axis=-1))


def _coverages(hits: Sequence[Hit]) -> list[Coverage]:
    """All regions of a kind, then each of them."""
    found = []
    for kind in KINDS:
        of_kind = [hit for hit in hits if hit.of == kind]
        names: list[str | None] = [None, *sorted({hit.name for hit in of_kind})]
        for name in names if of_kind else ():
            found.append(_coverage(kind, name, [hit for hit in of_kind if name in (None, hit.name)]))
    return found


def _coverage(kind: Of, name: str | None, hits: Sequence[Hit]) -> Coverage:
    present = [hit for hit in hits if hit.blocks]
    by_volume: dict[Study, list[Hit]] = defaultdict(list)
    for hit in present:
        by_volume[hit.question.row.study].append(hit)
    return Coverage(
        of=kind,
        name=name,
        questions=len(present),
        absent=len(hits) - len(present),
        volumes=len(by_volume),
        blocks=sum(hit.blocks for hit in present),
        pooled=_share((hit.kept_blocks, hit.blocks) for hit in present),
        per_volume=_mean(_share((hit.kept_blocks, hit.blocks) for hit in group) for group in by_volume.values()),
        voxels=_share((hit.kept_voxels, hit.voxels) for hit in present),
        random=_share(map(_expected, present)),
        random_per_volume=_mean(_share(map(_expected, group)) for group in by_volume.values()),
        others=_share((hit.others or 0.0, hit.blocks) for hit in present if hit.others is not None),
    )


def _expected(hit: Hit) -> tuple[float, float]:
    """Tokens of the region that as many random tokens would keep on average, and all tokens of it."""
    return hit.blocks * hit.question.sample.keep_rate, hit.blocks


def _share(parts: Iterable[tuple[float, float]]) -> float | None:
    """Sum of the first over sum of the second; None of nothing."""
    kept, total = np.array([*parts, (0.0, 0.0)]).sum(axis=0)
    return float(kept / total) if total else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
