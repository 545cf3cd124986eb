"""Finding images by text and texts by image: recall, zero-shot classification, and an index on disk.

All scores are cosines, computed in float64 once for each distinct vector, so that equal vectors have exactly equal
scores, wherever they stand and in whatever chunks they come.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mllm3d.config import Settings, VolumeConfig
from mllm3d.config.messages import first_problem
from mllm3d.data.files import write_atomically
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import Checkpoint, fingerprint

SIZES = (100, 500, 1000, 2000)
"""Of the paper's tables: the first so many items of the test split."""
KS = (1, 5, 10)
CHUNK = 512
"""Queries that are compared with everything at a time."""

EMBEDDINGS, ITEMS, INDEX = "embeddings.safetensors", "items.jsonl", "index.json"
FORMAT = 1

Tower = Literal["image", "text"]


# --- recall -------------------------------------------------------------------------------------------------


class Recall(Settings):
    """One row of the retrieval tables, R@k by k in [0, 1]."""

    items: int = Field(description="The first so many items, each with one image and one text.")
    image_to_text: dict[int, float] = Field(description="Share of the images whose text is among the first k texts.")
    text_to_image: dict[int, float] = Field(description="Share of the texts whose image is among the first k images.")
    chance: dict[int, float] = Field(description="The same if the order were drawn at random.")


def recalls(
    image: np.ndarray, text: np.ndarray, sizes: Sequence[int] | None = None, ks: Sequence[int] = KS, chunk: int = CHUNK
) -> list[Recall]:
    """Recall both ways among the first n items, for each n.

    Ties: where t other candidates score exactly what the right one does and g score more, its place is drawn among
    g + 1, ..., g + 1 + t, and R@k counts the probability that it is at most k: the expectation over all orders. So a
    model that says the same of everything has chance level, and a report that occurs twice counts half at k = 1.

    The published code calls image to text (asked with an image) IR and text to image TR; the legend of the paper's
    tables, "IR: image retrieval", can be read the other way round.

    Args:
        image, text: (items, width) embeddings, row i of both of the same item; any length of rows.
        sizes: by default those of `SIZES` that there are items for, or else all items.

    Raises:
        UserError: embeddings that are not finite, zero or of other shapes; a size that there are too few items for.
    """
    images, texts = _unit(image, "image embeddings"), _unit(text, "text embeddings")
    if images.shape != texts.shape:
        raise UserError(
            f"embeddings: images {images.shape} and texts {texts.shape}; give one row of both for each item"
        )
    count = len(images)
    if sizes is None:
        sizes = [size for size in SIZES if size <= count] or [count]
    for size in sizes:
        if not 0 < size <= count:
            raise UserError(f"retrieval over {size} items: there are {count}; choose a smaller size")
    found = []
    for size in sizes:
        x, y = images[:size], texts[:size]
        there, back = _hits(x, y, ks, chunk), _hits(y, x, ks, chunk)
        chance = {k: min(k / size, 1.0) for k in ks}
        found.append(Recall(items=size, image_to_text=there, text_to_image=back, chance=chance))
    return found


def _hits(queries: np.ndarray, candidates: np.ndarray, ks: Sequence[int], chunk: int) -> dict[int, float]:
    """Mean over queries of the probability that candidate i is among the first k for query i."""
    distinct, place, copies = np.unique(candidates, axis=0, return_inverse=True, return_counts=True)
    place = place.reshape(-1)
    hits = np.empty((len(ks), len(queries)))
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ distinct.T
        own = np.take_along_axis(scores, place[start : start + chunk, None], 1)
        greater = (scores > own) @ copies
        tied = (scores == own) @ copies  # the right one among them
        hits[:, start : start + chunk] = np.clip((np.array(ks)[:, None] - greater) / tied, 0, 1)
    return {k: math.fsum(row) / len(queries) for k, row in zip(ks, hits, strict=True)}


def _unit(rows: np.ndarray, what: str) -> np.ndarray:
    """(n, width) in float64, each row divided by its length."""
    exact = np.asarray(rows, np.float64)
    if exact.ndim != 2 or not exact.size:
        raise UserError(f"{what}: shape {exact.shape}; give one row for each item, and at least one")
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    wrong = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(wrong):
        raise UserError(f"{what}: row {wrong[0]} is zero or not finite; look at this item, then embed it again")
    unit: np.ndarray = exact / lengths
    return unit


# --- zero-shot classification -------------------------------------------------------------------------------


class ZeroShot(Settings):
    """How well one finding is told from its prompts alone."""

    positives: int = Field(description="Images that show it.")
    negatives: int = Field(description="Images that do not.")
    auc: float = Field(description="Area under the ROC curve; equal scores count half.")
    sensitivity: float = Field(description="Share of the positives above the threshold.")
    specificity: float = Field(description="Share of the negatives at or below it.")
    balanced_accuracy: float = Field(description="Mean of the two.")


def ensemble(prompts: np.ndarray) -> np.ndarray:
    """(prompts, width) -> (width,): the mean of the normalised embeddings, normalised again."""
    mean = _unit(prompts, "prompt embeddings").mean(0, keepdims=True)
    return _unit(mean, "mean of the prompt embeddings")[0]


def zero_shot_scores(image: np.ndarray, present: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """(images,) cosine with the prompts that say a finding is there, minus that with those that say it is not.

    Above 0 the first are nearer. A softmax over the pair at any temperature has the same order and the same sign.

    Args:
        image: (images, width). present, absent: (prompts, width), one or several each, see `ensemble`.
    """
    direction = ensemble(present) - ensemble(absent)
    distinct, place = np.unique(_unit(image, "image embeddings"), axis=0, return_inverse=True)
    scores: np.ndarray = (distinct @ direction)[place.reshape(-1)]
    return scores


def zero_shot(scores: np.ndarray, labels: np.ndarray, threshold: float = 0.0) -> ZeroShot:
    """Figures of one finding. labels: (images,), true where it is there.

    Raises:
        UserError: all images show it, or none does.
    """
    labels = np.asarray(labels, bool)
    if labels.shape != np.shape(scores) or labels.all() or not labels.any():
        raise UserError(
            f"zero-shot classification: {np.size(scores)} scores, {int(labels.sum())} of {labels.size} labels say yes; "
            "give a label for each score, some yes and some no"
        )
    positive, negative = scores[labels], scores[~labels]
    sensitivity, specificity = float((positive > threshold).mean()), float((negative <= threshold).mean())
    return ZeroShot(
        positives=len(positive),
        negatives=len(negative),
        auc=area_under_curve(scores, labels),
        sensitivity=sensitivity,
        specificity=specificity,
        balanced_accuracy=(sensitivity + specificity) / 2,
    )


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive scores above a negative, plus half of that of a tie (Mann-Whitney's U)."""
    _, place, copies = np.unique(scores, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(copies) - (copies - 1) / 2
    positives = int(labels.sum())
    above = middle_rank[place.reshape(-1)][labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(labels) - positives)))


# --- an index on disk ---------------------------------------------------------------------------------------


class Identity(Settings):
    """What an index was made with; queries have to be made with the same."""

    name: str = Field(description="Checkpoint, as a reader recognises it.")
    model: str = Field(description="Hash over its configuration, weights and preprocessing.")
    width: int = Field(description="Width of the embeddings.")
    volume: VolumeConfig = Field(description="How volumes were prepared.")
    checkpoint: str | None = Field(
        default=None, description="Its folder, relative to the index; where it is does not count as a difference."
    )


class Item(Settings):
    """One thing that can be found: a volume, and its report where it has one."""

    id: str = Field(description="Id of the manifest's row.")
    case: str = Field(description="Patient.")
    volume: str | None = Field(description="Path of the volume, as the manifest has it.")
    text: str | None = Field(description="Report or caption.")


class _Header(Settings):
    """index.json. It is written last, with the hashes of the other two files."""

    format: int
    identity: Identity
    items: int
    towers: list[Tower]
    files: dict[str, str]


@dataclass(frozen=True)
class Index:
    """Items and, by tower, their (items, width) embeddings in float32, rows of length 1."""

    identity: Identity
    items: list[Item]
    embeddings: Mapping[Tower, np.ndarray]


class Hit(NamedTuple):
    """One thing that was found, and its cosine with the query."""

    item: Item
    score: float


def identity_of(checkpoint: Checkpoint, width: int) -> Identity:
    """The identity of what a checkpoint embeds."""
    return Identity(name=checkpoint.name, model=fingerprint(checkpoint), width=width, volume=checkpoint.volume)


def write_index(
    folder: Path, identity: Identity, items: Sequence[Item], embeddings: Mapping[Tower, np.ndarray]
) -> None:
    """Store an index, in place of an older one.

    An index that was only written in part is one that `read_index` refuses.

    Raises:
        UserError: the embeddings do not fit the items or the identity; the folder cannot be written.
    """
    rows = {tower: _unit(given, f"{tower} embeddings").astype(np.float32) for tower, given in embeddings.items()}
    for tower, values in rows.items():
        if values.shape != (len(items), identity.width):
            raise UserError(
                f"{folder}: {tower} embeddings {values.shape} for {len(items)} items of width {identity.width}; "
                "give one row for each item"
            )
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids) or not rows:
        raise UserError(f"{folder}: {len(ids)} items, {len(set(ids))} ids, {len(rows)} towers; give each item an id")
    files = {
        EMBEDDINGS: save({str(tower): values for tower, values in rows.items()}),
        ITEMS: "".join(item.model_dump_json() + "\n" for item in items).encode(),
    }
    hashes = {name: sha256(data).hexdigest() for name, data in files.items()}
    header = _Header(format=FORMAT, identity=identity, items=len(items), towers=sorted(rows), files=hashes)
    try:
        for name, data in [*files.items(), (INDEX, header.model_dump_json(indent=2).encode())]:
            write_atomically(folder / name, data)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; mend that and make the index again") from error


def read_index(folder: Path, identity: Identity | None = None) -> Index:
    """A stored index.

    Args:
        identity: of the model that will ask. None: not checked.

    Raises:
        UserError: there is none, it is damaged, or it is of another model.
    """
    header = _read_header(folder)
    if identity is not None:
        check_identity(folder, header.identity, identity)
    files = {}
    for name, expected in header.files.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}; make the index again") from error
        if sha256(files[name]).hexdigest() != expected:
            raise UserError(f"{folder / name}: not the file that belongs to {INDEX}; make the index again")
    try:
        items = [Item.model_validate_json(line) for line in files[ITEMS].splitlines()]
        stored = load(files[EMBEDDINGS])
        embeddings = {tower: stored[tower] for tower in header.towers}
    except (ValidationError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}: not an index of this version ({_first(error)}); make it again") from error
    if any(values.shape != (len(items), header.identity.width) for values in embeddings.values()):
        raise UserError(f"{folder}: embeddings and items differ in number or width; make the index again")
    return Index(header.identity, items, embeddings)


def _read_header(folder: Path) -> _Header:
    file = folder / INDEX
    if not file.is_file():
        raise UserError(f"{folder}: no index in it ({INDEX} is missing); name another folder or make the index")
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format') if isinstance(content, dict) else None}")
        return _Header.model_validate_json(json.dumps(content))
    except ValueError as error:
        raise UserError(f"{file}: not an index of this version ({_first(error)}); make it again") from error


def check_identity(folder: Path, stored: Identity, asking: Identity) -> None:
    """Raises `UserError` unless a model that asks is the one that an index in `folder` was made with."""
    # In the order in which a difference explains the most.
    if stored.width != asking.width:
        what = f"its embeddings have width {stored.width}, the model's {asking.width}"
    elif keys := _differing(stored.volume, asking.volume):
        what = f"its volumes were prepared otherwise: {', '.join(keys)}"
    elif stored.model != asking.model:
        what = "the weights or settings differ"
    else:
        return
    raise UserError(
        f"{folder}: an index of another model ({stored.name}, not {asking.name}: {what}); "
        f"make the index again, or ask with {stored.name}"
    )


def _differing(one: VolumeConfig, other: VolumeConfig) -> list[str]:
    """Settings that differ; a preset is only a name for the others."""
    mine, theirs = (volume.model_dump(exclude={"preset"}) for volume in (one, other))
    return [key for key in mine if mine[key] != theirs[key]]


def _first(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, ValidationError):
        return first_problem(error)
    return str(error).splitlines()[0]


def search(index: Index, queries: np.ndarray, k: int, tower: Tower = "image", chunk: int = CHUNK) -> list[list[Hit]]:
    """For each query the k items (all, if there are fewer) with the highest cosine, the best first.

    Items that score exactly alike come in the order in which they are stored.

    Args:
        queries: (queries, width) embeddings of texts or images.
        tower: whether the items' images or their texts are compared.

    Raises:
        UserError: the index has no such embeddings, or those of another model.
    """
    asked = _unit(queries, "queries")
    if tower not in index.embeddings:
        raise UserError(f"the index holds no {tower} embeddings; search its {' or '.join(index.embeddings)} embeddings")
    if asked.shape[1] != index.identity.width:
        raise UserError(
            f"queries of width {asked.shape[1]} for an index of another model ({index.identity.name}, width "
            f"{index.identity.width}); ask with {index.identity.name}"
        )
    distinct, place = np.unique(_unit(index.embeddings[tower], "index"), axis=0, return_inverse=True)
    found = []
    for start in range(0, len(asked), chunk):
        for scores in (asked[start : start + chunk] @ distinct.T)[:, place.reshape(-1)]:
            best = np.argsort(-scores, kind="stable")[:k]
            found.append([Hit(index.items[n], float(scores[n])) for n in best.tolist()])
    return found
