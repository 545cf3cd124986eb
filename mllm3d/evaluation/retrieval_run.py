"""The evaluation of a contrastive model: recall both ways, and findings told from prompts alone."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from mllm3d.config import Config, Settings
from mllm3d.data.cache import VolumeCache
from mllm3d.data.manifest import Row, read_manifest, select
from mllm3d.errors import UserError
from mllm3d.evaluation.retrieval import (
    INDEX,
    KS,
    Index,
    Recall,
    ZeroShot,
    identity_of,
    read_index,
    recalls,
    write_index,
    zero_shot,
    zero_shot_scores,
)
from mllm3d.evaluation.retrieve import embed_rows, identity_in, items_of, one_per_volume, report_of
from mllm3d.evaluation.runner import open_folder
from mllm3d.evaluation.tables import PER_FINDING, markdown_table, print_rows, write_files
from mllm3d.inference.checkpoint import fingerprint
from mllm3d.inference.embedding import EmbeddingModel

Prompts = Mapping[Literal["present", "absent"], Sequence[str]]
Labels = Mapping[str, Sequence[bool | None]]
"""Finding -> for each volume whether it is there; None where nobody says."""

YES, NO = {"yes", "true", "1", "1.0"}, {"no", "false", "0", "0.0"}
FEW = 100
"""Recall over fewer items says little: chance alone is above 1 %."""


class RetrievalResults(Settings):
    """One evaluation of one contrastive checkpoint on one split."""

    checkpoint: str = Field(description="Name of the step or released folder.")
    fingerprint: str = Field(description="Hash of its weights, configuration and preprocessing.")
    split: str = Field(description="Split of the manifest.")
    date: str = Field(description="Day of the evaluation, UTC.")
    device: str = Field(description="What it ran on.")
    items: int = Field(description="Volumes of the split, each with its report.")
    recall: list[Recall] = Field(description="R@k over the first so many items.")
    zero_shot: dict[str, ZeroShot] = Field(description="By finding.")
    unlabelled: dict[str, int] = Field(description="By finding: volumes that nobody has labelled, left out.")
    one_sided: list[str] = Field(description="Findings that all labelled volumes show, or none: without figures.")


def evaluate(config: Config, checkpoint: Path | None = None, device: str | None = None) -> RetrievalResults:
    """Embed a split, measure, print the tables and write RUN/evaluation/SPLIT.

    That folder holds results.json, table.md, and index, which `mllm3d retrieve` searches and the next evaluation of
    the same checkpoint reads instead of embedding again. What another checkpoint or manifest left is moved aside.

    checkpoint: a released folder or a step; by default the run's newest.
    """
    data, evaluation = config.data, config.evaluation
    if evaluation.pruner is not None:
        raise UserError("evaluation.pruner: is for slice-wise models that answer questions; leave it out")
    everything = read_manifest(data.manifest)
    where = data.where if evaluation.where is None else evaluation.where
    rows = one_per_volume(select(everything, data.eval_split, where, evaluation.limit_volumes))
    if missing := [row.id for row in rows if report_of(row) is None]:
        raise UserError(f"row {missing[0]}: report: is missing; choose rows that have one with evaluation.where")
    labels = labels_of(evaluation.zero_shot, everything, rows, evaluation.finding_key)
    model = EmbeddingModel.load(checkpoint or config.run.output, device)
    folder = config.run.output / "evaluation" / data.eval_split
    origin = {"checkpoint": model.checkpoint.name, "fingerprint": fingerprint(model.checkpoint)}
    open_folder(folder, origin | {"manifest": sha256(data.manifest.read_bytes()).hexdigest()[:16]})
    cache = VolumeCache(data.cache or data.manifest.parent / ".cache")
    index = _embedded(folder / "index", model, rows, data.manifest.parent, cache)
    results = RetrievalResults(
        **origin,
        split=data.eval_split,
        date=datetime.now(UTC).date().isoformat(),
        device=model.device,
        items=len(rows),
        recall=recalls(index.embeddings["image"], index.embeddings["text"]),
        zero_shot=_zero_shot(model, index.embeddings["image"], evaluation.zero_shot, labels),
        unlabelled={name: sum(label is None for label in found) for name, found in labels.items()},
        one_sided=[name for name, found in labels.items() if len(set(found) - {None}) < 2],
    )
    write_files({"results.json": results.model_dump_json(indent=2) + "\n", "table.md": to_markdown(results)}, folder)
    for header, lines in tables(results):
        print_rows(header, lines)
    print("\n".join(footer(results)))
    return results


def _embedded(folder: Path, model: EmbeddingModel, rows: Sequence[Row], root: Path, cache: VolumeCache) -> Index:
    """The index of these rows: the stored one if it is of this model and these rows."""
    items = items_of(rows)
    if (folder / INDEX).is_file():
        try:
            stored = read_index(folder, identity_of(model.checkpoint, model.width))
            if stored.items == items and stored.embeddings.keys() == {"image", "text"}:
                return stored
        except UserError as error:
            print(f"warning: {error}: embedding again", file=sys.stderr)
    write_index(folder, identity_in(folder, model), items, embed_rows(model, rows, root, cache))
    return read_index(folder)


# --- findings -----------------------------------------------------------------------------------------------


def labels_of(
    findings: Sequence[str] | Mapping[str, object], rows: Sequence[Row], items: Sequence[Row], key: str
) -> Labels:
    """What the manifest says of each item's volume.

    A label is in any row of the volume: in its meta under the finding's name (yes or no, true or false, 1 or 0), or as
    the answer to a question of a task called existence whose subtask, or meta under `key`, is the finding.

    Args:
        rows: of all tasks and splits. items: one row for each volume.

    Raises:
        UserError: rows that contradict each other, a label that is neither yes nor no, a finding without any label.
    """
    wanted = {item.volume for item in items}
    said: dict[str, dict[str, tuple[bool, str]]] = {name: {} for name in findings}
    named = set()
    for row in rows:
        if row.volume not in wanted:
            continue
        named |= row.meta.keys() | ({str(row.subtask)} if _asks_existence(row) else set())
        for name in findings:
            label = _label(row, name, key)
            if label is None:
                continue
            before, by = said[name].setdefault(str(row.volume), (label, row.id))
            if before != label:
                raise UserError(f"row {row.id}: says of {name} what row {by} denies; correct one of them")
    for name, found in said.items():
        if not found:
            near = difflib.get_close_matches(name, sorted(named), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"evaluation.zero_shot.{name}: no row says whether it is there; put it into their meta{hint}"
            )
    return {name: [found.get(str(item.volume), (None, ""))[0] for item in items] for name, found in said.items()}


def _label(row: Row, finding: str, key: str) -> bool | None:
    value: object = row.meta.get(finding)
    if value is None:
        asked = _asks_existence(row) and finding in (row.subtask, row.meta.get(key))
        answer = row.answer.strip().casefold()
        return answer in YES if asked and answer in YES | NO else None
    text = str(value).strip().casefold()
    if text not in YES | NO:
        raise UserError(f"row {row.id}: meta.{finding}: {value!r} is neither yes nor no, true nor false, 1 nor 0")
    return text in YES


def _asks_existence(row: Row) -> bool:
    return row.task.replace("_", " ").casefold() in PER_FINDING


def _zero_shot(
    model: EmbeddingModel,
    images: np.ndarray,
    findings: Mapping[str, Prompts],
    labels: Labels,
) -> dict[str, ZeroShot]:
    """Figures of the findings that some labelled volumes show and some do not."""
    found = {}
    for name, prompts in findings.items():
        known = np.array([label is not None for label in labels[name]])
        shown = np.array([label is True for label in labels[name]])[known]
        if shown.all() or not shown.any():
            continue
        present, absent = model.embed_texts(prompts["present"]), model.embed_texts(prompts["absent"])
        found[name] = zero_shot(zero_shot_scores(images[known], present, absent), shown)
    return found


# --- tables -------------------------------------------------------------------------------------------------


def tables(results: RetrievalResults) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table as text, in percent."""
    ways = ("image to text", "text to image", "chance")
    header = ["first items", *(f"{way} R@{k}" for way in ways for k in KS)]
    rows = [
        [str(row.items), *(_percent(way[k]) for way in (row.image_to_text, row.text_to_image, row.chance) for k in KS)]
        for row in results.recall
    ]
    if not results.zero_shot:
        return [(header, rows)]
    figures = ("auc", "balanced_accuracy", "sensitivity", "specificity")
    below = [
        [name, str(item.positives), str(item.negatives), *(_percent(getattr(item, figure)) for figure in figures)]
        for name, item in results.zero_shot.items()
    ]
    means = [np.mean([getattr(item, figure) for item in results.zero_shot.values()]) for figure in figures]
    below.append(["mean", "", "", *(_percent(float(mean)) for mean in means)])
    return [(header, rows), (["finding", "yes", "no", "AUC", "balanced accuracy", "sensitivity", "specificity"], below)]


def footer(results: RetrievalResults) -> list[str]:
    """What a reader has to know besides."""
    lines = [f"checkpoint {results.checkpoint}, split {results.split}, {results.device}, {results.date}"]
    lines.append(f"{results.items} volumes with reports; image to text: asked with an image, found among the texts")
    if results.items < FEW:
        lines.append(f"fewer than {FEW} items: compare with chance, and with no other table")
    if results.zero_shot:
        lines.append("findings: told from prompts alone; chance is 50 % for AUC and balanced accuracy")
    lines += [
        f"{name}: {count} volumes without a label left out" for name, count in results.unlabelled.items() if count
    ]
    lines += [f"{name}: all labelled volumes show it, or none: no figures" for name in results.one_sided]
    return lines


def to_markdown(results: RetrievalResults) -> str:
    """All tables and what is below them."""
    lines = [line for header, rows in tables(results) for line in (*markdown_table(header, rows), "")]
    return "\n".join([*lines, *(f"- {line}" for line in footer(results))]) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
