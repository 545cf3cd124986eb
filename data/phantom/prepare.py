"""Draw phantom cases and write them as a data set: volumes, label maps, reports, questions.

    python data/phantom/prepare.py --out DIR --cases 100 --seed 0

README.md beside this file tells what is in the folder. The same arguments give the same bytes, whatever
the number of workers.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

try:
    from mllm3d.data.manifest import Row, write_manifest
    from mllm3d.errors import UserError
except ModuleNotFoundError:
    sys.exit("prepare.py: mllm3d is not installed; run `pip install .` in the repository's root")

from ask import Entry, make_rows
from atlas import Atlas
from facts import Facts, Scan, facts_of
from questions import EVERYTHING, TASKS
from report import write_report
from scene import Case, SceneOptions, draw, draw_pair
from storage import ORIENTATIONS, stored_spacing, write_nifti

VERSION = 2
"""Of the drawing and the questions together: data sets of one version and seed are alike."""

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Job:
    """One case to draw: everything that decides its bytes."""

    index: int
    seed: int
    split: str
    paired: bool
    options: SceneOptions
    atlas: tuple[Path, Path] | None = None
    """A label map and the JSON file with its names, painted instead of the drawn anatomy."""

    @property
    def case(self) -> str:
        return f"case_{self.index:05d}"

    @property
    def case_seed(self) -> int:
        return int(np.random.SeedSequence([self.seed, self.index]).generate_state(1)[0])


@cache
def load_atlas(label_map: Path, names: Path) -> Atlas:
    """Read once per process, not once per case."""
    return Atlas.load(label_map, names)


def plan_jobs(
    cases: int,
    seed: int,
    shares: Sequence[float],
    priors: float,
    options: SceneOptions,
    atlas: tuple[Path, Path] | None = None,
) -> list[Job]:
    """Which case goes to which split and which ones get a prior scan: exact shares, drawn by the seed."""
    order = list(range(cases))
    random.Random(f"{seed}|split").shuffle(order)
    ends = [round(cases * sum(shares[: part + 1])) for part in range(len(shares))]
    jobs = []
    for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False):
        paired = round(priors * (end - start))
        for place, index in enumerate(order[start:end]):
            jobs.append(Job(index, seed, split, place < paired, options, atlas))
    return sorted(jobs, key=lambda job: job.index)


def make_case(job: Job, root: Path) -> tuple[Entry, dict[str, object]]:
    """Draw a case, write its files under ``root``, measure it, and write its report."""
    scans = draw_scans(job)
    names = (f"{job.case}_prior", job.case)[-len(scans) :]
    kept = [_keep(case, name, root, job) for case, name in zip(scans, names, strict=True)]
    facts = facts_of(kept[-1], prior=kept[0] if job.paired else None)
    entry = Entry(
        case=job.case,
        split=job.split,
        volume=f"volumes/{job.case}.nii.gz",
        labels=f"labels/{job.case}.nii.gz",
        prior=f"volumes/{names[0]}.nii.gz" if job.paired else None,
        facts=facts,
        report=write_report(facts, random.Random(f"{job.seed}|wording|{job.case}")),
    )
    metadata = {
        "case": job.case,
        "split": job.split,
        "seed": job.case_seed,
        "findings": {name: facts.present(name) for name in EVERYTHING},
        "report": entry.report,
        "scans": {name: _metadata(scan) for name, scan in zip(names, kept, strict=True)},
    }
    return entry, metadata


def draw_scans(job: Job) -> tuple[Case, ...]:
    """The current scan, with the prior one before it if the case has one."""
    if job.atlas is not None:
        atlas = load_atlas(*job.atlas)
        pair, single = atlas.draw_pair, atlas.draw
    else:
        pair, single = draw_pair, draw
    return pair(job.case_seed, job.options) if job.paired else (single(job.case_seed, job.options),)


def _keep(case: Case, name: str, root: Path, job: Job) -> Scan:
    """Write a scan and its label map in a stored orientation of their own."""
    orientation = random.Random(f"{job.seed}|orientation|{name}").choice(ORIENTATIONS)
    spacing = stored_spacing(case.spacing_mm)
    for folder, array in (("volumes", case.image), ("labels", case.labels)):
        write_nifti(array, spacing, orientation, root / folder / f"{name}.nii.gz")
    return Scan(case.labels, spacing, case.painted_hu, case.phase)


def _metadata(scan: Scan) -> dict[str, object]:
    return {"phase": scan.phase, "painted_hu": scan.painted_hu}


def run_jobs(
    work: Callable[[Job], tuple[Entry, dict[str, object]]], jobs: Sequence[Job], workers: int
) -> list[tuple[Entry, dict[str, object]]]:
    """All jobs in order, in this process or in ``workers`` of their own, with a progress bar."""
    if workers <= 1:
        one_thread()
        return _watched(map(work, jobs), len(jobs))
    # spawn: a forked child of a process with threads (tests, notebooks) can hang.
    with multiprocessing.get_context("spawn").Pool(workers, initializer=one_thread) as pool:
        return _watched(pool.imap(work, jobs, chunksize=max(1, min(8, len(jobs) // workers))), len(jobs))


def _watched(results: Iterable[tuple[Entry, dict[str, object]]], total: int) -> list[tuple[Entry, dict[str, object]]]:
    return list(tqdm(results, total=total, desc="phantoms", unit="case", disable=None))


def one_thread() -> None:
    """ITK filters on volumes this small lose time to their own threads."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def write_dataset(args: argparse.Namespace, root: Path) -> str:
    """Draw and write everything under ``root``; returns a line that says what was written."""
    for folder in ("volumes", "labels"):
        (root / folder).mkdir(parents=True)
    atlas = (args.atlas, args.atlas_names) if args.atlas else None
    if atlas:
        load_atlas(*atlas)  # a bad atlas is reported here, before any worker starts
    absent = {name: 0.0 for name in EVERYTHING if args.findings and name not in args.findings}
    options = SceneOptions(shape=args.shape, prevalence=absent, lesion_scale=args.lesion_scale)
    jobs = plan_jobs(args.cases, args.seed, args.splits, args.priors, options, atlas)
    made = run_jobs(partial(make_case, root=root), jobs, args.workers)
    entries = [entry for entry, _ in made]
    rows = make_rows(entries, args.seed, args.tasks, args.biased)
    if not rows:
        named = " ".join(args.tasks)
        raise UserError(f"--tasks {named}: {args.cases} cases give no question of them; give more --cases")
    write_manifest(root / "manifest.jsonl", rows)
    lines = [json.dumps(metadata) + "\n" for _, metadata in made]
    (root / "cases.jsonl").write_text("".join(lines), encoding="utf-8")
    summary = summarise(args, entries, rows)
    (root / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    paired = sum(job.paired for job in jobs)
    return f"{len(entries)} cases ({paired} with a prior scan), {len(rows)} questions"


def summarise(args: argparse.Namespace, entries: Sequence[Entry], rows: Sequence[Row]) -> dict[str, object]:
    """dataset.json: how the data set was made, and what is in it."""
    facts: list[Facts] = [entry.facts for entry in entries]
    return {
        "name": "phantom",
        "source": "drawn by data/phantom/prepare.py" + (f" on the anatomy of {args.atlas.name}" if args.atlas else ""),
        "licence": "that of the atlas, and Apache-2.0" if args.atlas else "Apache-2.0",
        "version": VERSION,
        "seed": args.seed,
        "biased": args.biased,
        "shape": list(args.shape),
        "lesion_scale": args.lesion_scale,
        "atlas": args.atlas.name if args.atlas else None,
        "cases": len(entries),
        "cases_with_prior": sum(entry.prior is not None for entry in entries),
        "splits": dict(Counter(entry.split for entry in entries)),
        "questions": dict(Counter(row.task for row in rows)),
        "closed_questions": dict(Counter(row.task for row in rows if row.meta["closed"])),
        "prevalence": {name: round(sum(known.present(name) for known in facts) / len(facts), 3) for name in EVERYTHING},
        "phases": dict(sorted(Counter(known.phase for known in facts).items())),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    try:
        check(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # An interrupted run leaves nothing behind that looks like a data set.
        with tempfile.TemporaryDirectory(prefix=f".{args.out.name}-", dir=args.out.parent) as scratch:
            root = Path(scratch) / args.out.name
            done = write_dataset(args, root)
            root.rename(args.out)
    except UserError as error:
        sys.exit(f"prepare.py: {error}")
    except OSError as error:
        sys.exit(f"prepare.py: {error.filename or args.out}: {error.strerror}")
    print(f"{args.out / 'manifest.jsonl'}: {done}")


def check(args: argparse.Namespace) -> None:
    """Raise a one-line error for arguments that cannot work."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out}: exists already; remove it or choose another folder")
    if args.cases < 1:
        raise UserError(f"--cases {args.cases}: at least 1 is needed")
    if len(args.splits) != 3 or min(args.splits) < 0 or abs(sum(args.splits) - 1) > 1e-6:
        raise UserError(f"--splits {args.splits}: give three shares that add up to 1, e.g. 0.8,0.1,0.1")
    if not 0 <= args.priors <= 1:
        raise UserError(f"--priors {args.priors}: a share between 0 and 1 is needed")
    if (args.atlas is None) != (args.atlas_names is None):
        raise UserError("--atlas, --atlas-names: give both, or neither")
    if len(args.shape) != 3 or min(args.shape) < 16:
        raise UserError(f"--shape {args.shape}: give D,H,W of at least 16 voxels each, e.g. 56,112,112")
    if not 0.5 <= args.lesion_scale <= 2:
        raise UserError(f"--lesion-scale {args.lesion_scale}: a number between 0.5 and 2 is needed")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; must not exist yet")
    add("--cases", type=int, required=True, help="number of patients")
    add("--seed", type=int, required=True, help="the same seed gives the same bytes")
    add("--splits", type=_numbers(float), default=(0.8, 0.1, 0.1), help="train,validation,test: 0.8,0.1,0.1")
    add("--priors", type=float, default=0.25, help="share of cases that have a prior scan (default 0.25)")
    add("--shape", type=_numbers(int), default=(56, 112, 112), help="nominal D,H,W (default 56,112,112)")
    add("--biased", action="store_true", help="with shortcuts like 3D-RAD's: see README.md")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    add("--findings", nargs="+", choices=EVERYTHING, metavar="FINDING", help="draw and ask about only these")
    add("--lesion-scale", type=float, default=1.0, help="diameters of round lesions times this, 0.5 to 2 (default 1)")
    add("--atlas", type=Path, help="label map (NIfTI, ...) whose anatomy is painted instead of ellipsoids")
    add("--atlas-names", type=Path, help="JSON: label value -> name, for --atlas")
    add("--workers", type=int, default=2, help="processes (default 2)")
    return parser.parse_args(arguments)


def _numbers(of: type) -> Callable[[str], tuple[float, ...]]:
    def read(text: str) -> tuple[float, ...]:
        return tuple(of(part) for part in text.split(","))

    read.__name__ = "list of numbers"  # argparse names it in its error
    return read


if __name__ == "__main__":
    main()
