"""`mllm3d data check`: reads every row and every file of a manifest and reports all problems at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mllm3d.data.images import read_image, read_video
from mllm3d.data.manifest import Problem, Row, parse_manifest, volume_path
from mllm3d.data.orientation import corners_mm
from mllm3d.data.volumes import Volume, content_hash, digest, read_labels, read_volume
from mllm3d.errors import UserError

_SAMPLE = 1_000_000  # voxels that the look at a volume's values takes

Numbered = Sequence[tuple[int, Row]]


class _File(NamedTuple):
    """A path in a manifest and what it should be: `CT`, `MR`, `labels`, `image` or `video`."""

    path: str
    kind: str


class _Facts(NamedTuple):
    """What reading a file showed: `message` if it is wrong, else its content and where its corners lie."""

    message: str | None = None
    content: str = ""
    corners: np.ndarray | None = None


def check_manifest(path: str | Path, workers: int = 0) -> list[Problem]:
    """All problems of a manifest, by line; empty if there are none. Each distinct file is read once.

    `workers` processes read files (0: this one). Raises `UserError` only if the manifest itself can't be
    read.
    """
    path = Path(path)
    rows, problems = parse_manifest(path)
    problems += _leaks(rows, "case", lambda row: {row.case: f"case {row.case!r}"})
    problems += _leaks(rows, "report", lambda row: {" ".join((row.report or "").casefold().split()): "the report"})
    problems += _check_files(rows, path.parent, workers)
    return sorted(problems)


def value_problem(array: np.ndarray, modality: str) -> str | None:
    """Why the values of an image can't be those of its modality, or None. CT must be in HU: air at -1,000."""
    lowest, highest = float(array.min()), float(array.max())
    if modality == "MR":
        if lowest <= -900 and highest >= 100:
            return f"values from {lowest:g} to {highest:g} look like HU; is the modality CT?"
        return None
    if lowest >= 0 and highest <= 1:
        return f"values from {lowest:g} to {highest:g} are not HU but scaled; give the CT before windowing"
    if lowest >= -200 or highest > 32000:
        return f"values from {lowest:g} to {highest:g} are not HU (air is -1000); apply slope and intercept"
    bright = float(np.percentile(array.ravel()[:: max(1, array.size // _SAMPLE)], 99.5))
    if bright < -200:
        return f"99.5 % of the values are below {bright:g}: HU were probably rescaled twice; undo one of them"
    return None


def _leaks(rows: Numbered, field: str, values: Callable[[Row], Mapping[str, str]]) -> list[Problem]:
    """The same value in two splits: a problem at the first row of the later split.

    values: what may not be in two splits ("" is no value), and what to call it.
    """
    first: dict[str, tuple[int, str]] = {}
    told: set[str] = set()
    problems = []
    uses = [(line, row, *found) for line, row in rows for found in values(row).items() if found[0]]
    for line, row, found, what in uses:
        earlier, split = first.setdefault(found, (line, row.split))
        if split != row.split and found not in told:
            told.add(found)
            message = f"{what} is also in split {split!r} (line {earlier}); keep it in one split"
            problems.append(Problem(line, field, message))
    return problems


def _check_files(rows: Numbered, root: Path, workers: int) -> list[Problem]:
    uses = [(line, field, file) for line, row in rows for field, file in _files(row)]
    first: dict[_File, tuple[int, str]] = {}
    for line, field, file in uses:
        first.setdefault(file, (line, field))
    jobs = [partial(_look, volume_path(root, file.path), file.kind) for file in first]
    facts = dict(zip(first, _run(jobs, workers), strict=True))
    counts = Counter(file for _, _, file in uses)
    problems = []
    for file, (line, field) in first.items():
        if message := facts[file].message:
            used = f" (in {counts[file]} rows)" if counts[file] > 1 else ""
            problems.append(Problem(line, field, message + used))
    for field, kinds in SHOWN.items():
        problems += _leaks(rows, field, partial(_contents, facts, kinds))
    return problems + _misplaced_maps(rows, facts)


SHOWN = {"volume": {"CT": "volume", "MR": "volume"}, "images": {"image": "image {}"}, "video": {"video": "video"}}
"""Field -> kinds of its files, and what to call one."""


def _contents(facts: Mapping[_File, _Facts], kinds: Mapping[str, str], row: Row) -> dict[str, str]:
    """What a row's files of these kinds hold, with names."""
    files = [file for _, file in _files(row) if file.kind in kinds]
    return {facts[file].content: f"the {kinds[file.kind].format(file.path)}" for file in files}


def _files(row: Row) -> list[tuple[str, _File]]:
    """Fields of a row that name a file, and how to look at it."""
    found = []
    if row.volume is not None:
        found.append(("volume", _File(row.volume, row.modality)))
    found += [("images", _File(path, "image")) for path in row.images or ()]
    if row.video is not None:
        found.append(("video", _File(row.video, "video")))
    if row.prior is not None:
        found.append(("prior", _File(row.prior, row.modality)))
    if row.labels is not None:
        found.append(("labels", _File(row.labels, "labels")))
    return found


def _misplaced_maps(rows: Numbered, facts: dict[_File, _Facts]) -> list[Problem]:
    pairs: dict[tuple[_File, _File], int] = {}
    for line, row in rows:
        if row.volume is not None and row.labels is not None:
            pairs.setdefault((_File(row.volume, row.modality), _File(row.labels, "labels")), line)
    problems = []
    for (scan, labels), line in pairs.items():
        a, b = facts[scan].corners, facts[labels].corners
        if a is not None and b is not None and not np.allclose(a, b, atol=0.1):
            message = f"{labels.path} has another grid than {scan.path}; resample it onto the scan"
            problems.append(Problem(line, "labels", message))
    return problems


def _run(jobs: Sequence[Callable[[], _Facts]], workers: int) -> list[_Facts]:
    def shown(results: Iterable[_Facts]) -> list[_Facts]:
        return list(tqdm(results, total=len(jobs), desc="files", unit="", disable=None))

    if workers == 0:
        return shown(job() for job in jobs)
    with ProcessPoolExecutor(workers) as pool:
        return shown(pool.map(_call, jobs, chunksize=4))


def _call(job: Callable[[], _Facts]) -> _Facts:
    return job()


def _look(path: Path, kind: str) -> _Facts:
    try:
        if kind == "labels":
            return _Facts(corners=_corners(read_labels(path)))
        if kind == "image":
            return _Facts(content=_pixel_hash(read_image(path)))
        if kind == "video":
            return _Facts(content=_pixel_hash(read_video(path)))
        volume = read_volume(path)
    except UserError as error:
        return _Facts(str(error))
    if message := value_problem(volume.array, kind):
        return _Facts(f"{path}: {message}")
    return _Facts(None, content_hash(path), _corners(volume))


def _pixel_hash(pixels: np.ndarray) -> str:
    """Of what is shown, whatever the format it is stored in."""
    return digest(repr(pixels.shape).encode(), pixels.tobytes())


def _corners(volume: Volume) -> np.ndarray:
    """Shape, then first and last voxel in RAS mm: equal for volumes on one grid, however they are stored."""
    shape = volume.array.shape
    return np.concatenate([shape, corners_mm(shape, volume.source_affine @ volume.to_source).ravel()])
