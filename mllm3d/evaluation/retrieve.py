"""`mllm3d embed` and `mllm3d retrieve`: an index of a manifest's volumes and reports, and what is found in it."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mllm3d.data.cache import VolumeCache
from mllm3d.data.manifest import Row, read_manifest, select, volume_path
from mllm3d.data.volumes import read_volume
from mllm3d.errors import UserError
from mllm3d.evaluation.retrieval import (
    INDEX,
    Hit,
    Identity,
    Item,
    Tower,
    check_identity,
    identity_of,
    read_index,
    search,
    write_index,
)
from mllm3d.inference.embedding import EmbeddingModel

SHOWN = 100
"""So many characters of a report are printed."""


# --- making an index ----------------------------------------------------------------------------------------


def embed_command(args: argparse.Namespace) -> int:
    """Make an index. Reads from args: checkpoint, manifest, split, out, where, cache, device."""
    items = embed(
        args.checkpoint,
        args.manifest,
        args.split,
        args.out,
        where=_filter(args.where or ()),
        cache=args.cache,
        device=args.device,
    )
    reports = sum(item.text is not None for item in items)
    print(f"{args.out}: {len(items)} volumes, {reports} of them with a report")
    return 0


def embed(
    checkpoint: Path,
    manifest: Path,
    split: str,
    out: Path,
    *,
    where: Mapping[str, Sequence[str]] | None = None,
    cache: Path | None = None,
    device: str | None = None,
) -> list[Item]:
    """Embed the volumes of a split, and their reports if all have one, and store them in the folder `out`.

    cache: of preprocessed volumes, by default `.cache` beside the manifest. Returns the items, in the order in which
    the manifest first names them.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / INDEX).is_file())):
        raise UserError(f"{out}: exists already and is no index; name another folder")
    rows = one_per_volume(select(read_manifest(manifest), split, where))
    model = EmbeddingModel.load(checkpoint, device)
    embeddings = embed_rows(model, rows, manifest.parent, VolumeCache(cache or manifest.parent / ".cache"))
    items = items_of(rows)
    write_index(out, identity_in(out, model), items, embeddings)
    return items


def _filter(given: Sequence[str]) -> dict[str, list[str]]:
    """`--where task=report,vqa` as `data.where` has it."""
    for text in given:
        if "=" not in text:
            raise UserError(f"--where {text}: give KEY=VALUE, or KEY=VALUE,VALUE")
    return {key: values.split(",") for key, _, values in (text.partition("=") for text in given)}


def one_per_volume(rows: Sequence[Row]) -> list[Row]:
    """The first row with a report of each volume, or else its first row; volumes as they are first named."""
    found: dict[str, Row] = {}
    several = []
    for row in rows:
        if row.volume is None:
            raise UserError(f"row {row.id}: has no volume; choose rows that have one with a filter")
        before = found.setdefault(row.volume, row)
        if report_of(before) is None and report_of(row) is not None:
            found[row.volume] = row
        elif report_of(row) not in (None, report_of(before)):
            several.append(row.id)
    if several:
        print(
            f"warning: {len(several)} rows have another report than an earlier row of their volume, which counts "
            f"(first: {several[0]})",
            file=sys.stderr,
        )
    return list(found.values())


def report_of(row: Row) -> str | None:
    """A row's report, None if there is none or nothing in it."""
    return row.report if (row.report or "").strip() else None


def items_of(rows: Sequence[Row]) -> list[Item]:
    """What can be found, one for each row."""
    return [Item(id=row.id, case=row.case, volume=row.volume, text=report_of(row)) for row in rows]


def embed_rows(model: EmbeddingModel, rows: Sequence[Row], root: Path, cache: VolumeCache) -> dict[Tower, np.ndarray]:
    """Embeddings of the rows' volumes, and of their reports if all have one.

    root: the manifest's folder.
    """
    texts = [text for text in map(report_of, rows) if text is not None]
    if 0 < len(texts) < len(rows):
        first = next(row.id for row in rows if report_of(row) is None)
        print(
            f"warning: {len(rows) - len(texts)} of {len(rows)} volumes have no report (first: row {first}), so that "
            "reports cannot be searched; leave these rows out to search reports",
            file=sys.stderr,
        )
    images = []
    for row in tqdm(rows, unit="volume", desc="embed"):
        assert row.volume is not None
        prepared = cache.get(volume_path(root, row.volume), model.volume_config(row.modality))
        images.append(model.embed_volume(prepared.array))
    found: dict[Tower, np.ndarray] = {"image": np.stack(images)}
    if len(texts) == len(rows):
        with tqdm(total=len(set(texts)), unit="report", desc="embed") as bar:
            found["text"] = model.embed_texts(texts, bar.update)
    return found


def identity_in(folder: Path, model: EmbeddingModel) -> Identity:
    """The model's identity for an index in `folder`, with the way from there to the checkpoint."""
    way = os.path.relpath(model.checkpoint.model.resolve(), folder.resolve())
    return identity_of(model.checkpoint, model.width).model_copy(update={"checkpoint": Path(way).as_posix()})


# --- searching it -------------------------------------------------------------------------------------------


def retrieve_command(args: argparse.Namespace) -> int:
    """Print what `retrieve` returns, as JSON or as text.

    Reads from args: index, text, volume, checkpoint, k, among, modality, device, json.
    """
    output = retrieve(
        args.index,
        text=args.text,
        volume=args.volume,
        checkpoint=args.checkpoint,
        k=args.k,
        among=args.among,
        modality=args.modality,
        device=args.device,
    )
    if args.json:
        print(json.dumps(output, ensure_ascii=False, indent=2))
        return 0
    for result in output["results"]:
        print(f"{result['rank']:>3}  {result['cosine']:7.4f}  {result['case']}  {result['volume'] or '-'}")
        if result["report"]:
            print(f"     {_beginning(result['report'])}")
    return 0


def retrieve(
    index: Path,
    *,
    text: str | None = None,
    volume: Path | None = None,
    checkpoint: Path | None = None,
    k: int = 5,
    among: Tower = "image",
    modality: str = "ct",
    device: str | None = None,
) -> dict[str, Any]:
    """The `k` items of an index that are nearest to a text or to a scan.

    among: whether the items' volumes or their reports are compared. checkpoint: by default where the one was that the
    index was made with. modality: `ct` or `mr`, of the scan.
    Returns what `--json` prints: query, among, index, checkpoint, and results, the nearest first.
    """
    if (text is None) == (volume is None):
        raise UserError("--text, --volume: give one of them")
    if text is not None and not text.strip():
        raise UserError("--text: empty; say what to look for")
    if k < 1:
        raise UserError(f"-k {k}: give 1 or more")
    stored = read_index(index)
    scan = None if volume is None else read_volume(volume)
    model = EmbeddingModel.load(checkpoint or _remembered(index, stored.identity), device)
    check_identity(index, stored.identity, identity_of(model.checkpoint, model.width))
    if scan is None:
        query = model.embed_texts([text or ""])
    else:
        query = model.embed_volume(model.prepare(scan, modality.upper()).array)[None]
    (hits,) = search(stored, query, k, among)
    return {
        "query": {"text": text} if scan is None else {"volume": str(volume)},
        "among": among,
        "index": str(index),
        "checkpoint": model.checkpoint.name,
        "results": [_result(rank, hit) for rank, hit in enumerate(hits, start=1)],
    }


def _remembered(index: Path, identity: Identity) -> Path:
    """Where the checkpoint of an index is, as the index has it."""
    if identity.checkpoint is None:
        raise UserError(f"{index}: does not say where {identity.name} is, which it was made with; give --checkpoint")
    path = Path(os.path.normpath(index.resolve() / identity.checkpoint))
    if not path.is_dir():
        raise UserError(f"{index}: was made with {identity.name}, which is no longer at {path}; give --checkpoint")
    return path


def _result(rank: int, hit: Hit) -> dict[str, Any]:
    item = hit.item
    cosine = round(hit.score, 6)
    return {
        "rank": rank,
        "cosine": cosine,
        "id": item.id,
        "case": item.case,
        "volume": item.volume,
        "report": item.text,
    }


def _beginning(report: str) -> str:
    """In one line."""
    line = " ".join(report.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3].rstrip()}..."
