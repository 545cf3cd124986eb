"""Ask a checkpoint every question of a split in every mode, go on where it stopped, score the files."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mllm3d.config import Config, EvaluationMode
from mllm3d.data.cache import VolumeCache
from mllm3d.data.dataset import load_pixels
from mllm3d.data.manifest import Row, Study, read_manifest, select, volume_path
from mllm3d.data.preprocess import Prepared
from mllm3d.errors import UserError
from mllm3d.evaluation.masks import KeptTokens, pack_kept
from mllm3d.evaluation.predictions import Sample, append, read
from mllm3d.evaluation.regions import named_regions
from mllm3d.evaluation.results import Results
from mllm3d.evaluation.retention import Retention, measure
from mllm3d.evaluation.retention_tables import print_retention, write_retention
from mllm3d.evaluation.scoring import TableRow, score, summarise
from mllm3d.evaluation.tables import print_table, write_results
from mllm3d.inference.adapter import Mode
from mllm3d.inference.checkpoint import fingerprint
from mllm3d.inference.predictor import Answer, Predictor

ORIGIN = "origin.json"


@dataclass(frozen=True)
class Shown:
    """A study as the model is asked about it."""

    volumes: Sequence[Prepared]  # a prior scan first
    images: Sequence[np.ndarray]
    videos: Sequence[np.ndarray]

    def emptied(self) -> "Shown":
        """Nothing to see, all else alike: the lowest value of the window everywhere, and black pixels."""
        volumes = [replace(item, array=np.full_like(item.array, item.array.min())) for item in self.volumes]
        return Shown(volumes, *([np.zeros_like(item) for item in items] for items in (self.images, self.videos)))


@dataclass(frozen=True)
class Work:
    """Questions about the same study that are answered in one call."""

    study: Study
    prior: str | None
    modality: str
    rows: tuple[Row, ...]


def evaluate(config: Config, checkpoint: Path | None = None, device: str | None = None) -> Results:
    """Answer, score, print the table and write RUN/evaluation/SPLIT.

    That folder holds predictions-MODE.jsonl, results.json, retention.json and table.md.

    checkpoint: a released folder or a step; by default the run's newest. Predictions that another checkpoint
    or manifest left in the folder are moved beside it, never mixed in.
    """
    train, rows = _rows(config)
    named = [named_regions(row, config.evaluation) for row in rows]  # here: a mistake is found before any answer
    predictor = Predictor.load(checkpoint or config.asked, device, pruner=config.evaluation.pruner)
    _warn_of_other_preprocessing(config, predictor)
    folder = config.run.output / "evaluation" / config.data.eval_split
    origin = _origin(config, predictor)
    open_folder(folder, origin)
    cache = VolumeCache(config.data.cache or config.data.manifest.parent / ".cache")
    _answer_all(config, predictor, cache, rows, folder)
    samples: dict[str, list[Sample]] = {
        mode: _in_order(read(predictions_file(folder, mode)), rows) for mode in config.evaluation.modes
    }
    results = Results(
        checkpoint=predictor.checkpoint.name,
        fingerprint=origin["fingerprint"],
        split=config.data.eval_split,
        date=datetime.now(UTC).date().isoformat(),
        device=predictor.device,
        modes={mode: summarise(items) for mode, items in samples.items()},
        rows=[*_as_trained(config, samples, train), *score(samples, train)],
    )
    write_results(results, folder)
    print_table(results)
    label_map = partial(_label_map, config.data.manifest.parent, predictor, cache)
    share = config.evaluation.block_share
    modes = measure(samples, rows, named, label_map, share)
    retention = Retention(split=results.split, fingerprint=results.fingerprint, block_share=share, modes=modes)
    write_retention(retention, results, folder)
    print_retention(retention)
    return results


def _label_map(root: Path, predictor: Predictor, cache: VolumeCache, row: Row) -> np.ndarray:
    """A row's label map on the grid of its preprocessed volume; root: the manifest's folder."""
    assert row.volume is not None and row.labels is not None
    settings = predictor.volume_config(row.modality)
    volume = cache.get(volume_path(root, row.volume), settings)
    return cache.get_labels(volume_path(root, row.labels), settings, like=volume)


def _as_trained(config: Config, samples: Mapping[str, Sequence[Sample]], train: Sequence[Row]) -> list[TableRow]:
    """Task rows over the kinds of questions that the run was trained on, where more than those were asked."""
    data = config.data
    if config.evaluation.where is None or config.evaluation.where == data.where:
        return []
    everything = read_manifest(data.manifest)
    learned = _if_any(everything, data.train_split, data.where)
    asked = {row.id for row in _if_any(everything, data.eval_split, data.where)}
    chosen = {mode: [item for item in items if item.id in asked] for mode, items in samples.items()}
    if not any(chosen.values()) or all(len(chosen[mode]) == len(items) for mode, items in samples.items()):
        return []
    rows = [row for row in score(chosen, learned if train else []) if row.subtask is None]
    return [row.model_copy(update={"task": f"{row.task}, as trained"}) for row in rows]


def _if_any(rows: Sequence[Row], split: str, where: Mapping[str, Sequence[str]]) -> list[Row]:
    """`select`, where nothing to select is no mistake: this comes after the last answer."""
    try:
        return select(rows, split, where)
    except UserError:
        return []


def predictions_file(folder: Path, mode: str) -> Path:
    """Where a mode's predictions are."""
    return folder / f"predictions-{mode}.jsonl"


def group_by_study(rows: Sequence[Row], batch_questions: int) -> list[Work]:
    """Rows of the same study together, at most `batch_questions` a call, in the manifest's order."""
    groups: dict[tuple[Study, str | None, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[(row.study, row.prior, row.modality)].append(row)
    return [
        Work(*key, tuple(members[start : start + batch_questions]))
        for key, members in groups.items()
        for start in range(0, len(members), batch_questions)
    ]


def _rows(config: Config) -> tuple[list[Row], list[Row]]:
    """Rows that the baselines are fitted on (none if the manifest has no such split), and rows to answer."""
    data, evaluation = config.data, config.evaluation
    everything = read_manifest(data.manifest)

    def chosen(split: str, limit: int | None = None) -> list[Row]:
        return select(everything, split, data.where if evaluation.where is None else evaluation.where, limit)

    rows = chosen(data.eval_split, evaluation.limit_volumes)
    try:
        return chosen(data.train_split), rows
    except UserError as error:
        print(f"warning: {error}: no text-only baseline can be fitted", file=sys.stderr)
        return [], rows


def _answer_all(config: Config, predictor: Predictor, cache: VolumeCache, rows: Sequence[Row], folder: Path) -> None:
    """Study by study, so that each is read once for all modes and questions."""
    modes, root = config.evaluation.modes, config.data.manifest.parent
    done = {mode: {sample.id for sample in read(predictions_file(folder, mode))} for mode in modes}
    finished = sum(row.id in done[mode] for mode in modes for row in rows)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(rows) * len(modes), initial=finished, unit="question", desc="eval"))
        streams = {
            mode: stack.enter_context(predictions_file(folder, mode).open("a", encoding="utf-8")) for mode in modes
        }
        for work in group_by_study(rows, config.evaluation.batch_questions):
            shown: Shown | None = None
            for mode in modes:
                open_rows = [row for row in work.rows if row.id not in done[mode]]
                if not open_rows:
                    continue
                if shown is None:
                    shown = _read(work, root, predictor, cache)
                append(streams[mode], _answer(config, predictor, shown, open_rows, mode))
                bar.update(len(open_rows))


def _read(work: Work, root: Path, predictor: Predictor, cache: VolumeCache) -> Shown:
    settings = predictor.volume_config(work.modality)
    names = [name for name in (work.prior, work.study.volume) if name is not None]
    return Shown([cache.get(volume_path(root, name), settings) for name in names], *load_pixels(work.study, root))


def _answer(
    config: Config, predictor: Predictor, shown: Shown, rows: Sequence[Row], mode: EvaluationMode
) -> list[Sample]:
    model_mode: Mode = "scheduled" if mode == "zeroed" else mode
    if mode == "zeroed":
        shown = shown.emptied()
    start = time.perf_counter()
    answers = predictor.answer(
        shown.volumes,
        [predictor.wording(row.question, row.options) for row in rows],
        model_mode,
        config.evaluation.max_new_tokens,
        config.run.seed,
        shown.images,
        shown.videos,
    )
    seconds = (time.perf_counter() - start) / len(rows)
    return [
        Sample(
            id=row.id,
            case=row.case,
            task=row.task,
            subtask=row.subtask,
            question=row.question,
            options=row.options,
            reference=row.answer,
            prediction=answer.text,
            keep_rate=answer.keep_rate,
            tokens_before=answer.tokens_before,
            tokens_after=answer.tokens_after,
            seconds=seconds,
            seconds_first=answer.seconds_first,
            seconds_last=answer.seconds_total,
            new_tokens=answer.new_tokens,
            kept=_kept(predictor, answer, shown) if config.evaluation.keep_masks else None,
        )
        for row, answer in zip(rows, answers, strict=True)
    ]


def _kept(predictor: Predictor, answer: Answer, shown: Shown) -> KeptTokens | None:
    """Which tokens stayed; None where the model cannot say, or in a way that has no grid. Of a study that has
    volumes, only theirs, for these are what label maps are laid over."""
    if answer.kept is None:
        return None
    boxes = predictor.boxes([item.array.shape for item in shown.volumes], shown.images, shown.videos)
    boxes = boxes[: len(shown.volumes)] or boxes
    return pack_kept(answer.kept[: sum(map(len, boxes))], boxes)


def _in_order(samples: Sequence[Sample], rows: Sequence[Row]) -> list[Sample]:
    """The samples of these rows in their order; others (of an earlier, wider filter) are left out."""
    by_id = {sample.id: sample for sample in samples}
    return [by_id[row.id] for row in rows]


def _origin(config: Config, predictor: Predictor) -> dict[str, str]:
    """What predictions depend on; they may be continued only where it is the same."""
    pruner = config.evaluation.pruner
    return {
        "checkpoint": predictor.checkpoint.name,
        "fingerprint": fingerprint(predictor.checkpoint),
        "manifest": sha256(config.data.manifest.read_bytes()).hexdigest()[:16],
        "max_new_tokens": str(config.evaluation.max_new_tokens),
        "seed": str(config.run.seed),
        **({} if pruner is None else {"pruner": json.dumps(pruner, sort_keys=True)}),
    }


def open_folder(folder: Path, origin: dict[str, str]) -> None:
    """Make the folder, or keep it if its predictions have the same origin, else move it aside."""
    file = folder / ORIGIN
    if folder.is_dir() and any(folder.iterdir()):
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if before == origin:
            return
        name = before.get("checkpoint", "unknown")
        number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{name}.{n}").exists())
        aside = folder.with_name(f"{folder.name}.{name}.{number}")
        folder.rename(aside)
        print(
            f"evaluation: earlier predictions of another checkpoint or setting moved to {aside}",
            file=sys.stderr,
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _warn_of_other_preprocessing(config: Config, predictor: Predictor) -> None:
    ours, theirs = (volume.model_dump(exclude={"preset"}) for volume in (config.volume, predictor.checkpoint.volume))
    differing = [key for key in ours if ours[key] != theirs[key]]
    if differing and config.prepares_volumes:
        print(
            f"warning: {predictor.checkpoint.name}: trained with other volume.{', volume.'.join(differing)} "
            "than the config says; the checkpoint's own preprocessing is used",
            file=sys.stderr,
        )
