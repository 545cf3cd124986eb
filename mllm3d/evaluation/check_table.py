"""Fail where a table does not show what it must: `python -m mllm3d.evaluation.check_table results.json ...`.

Over the named findings the scheduled model has to beat the best text-only rule and its own answers on the
zeroed volume by a margin, at a keep rate that is low enough, and the rows it is to be compared with have to
be there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm3d.errors import UserError
from mllm3d.evaluation.results import Results, read_results
from mllm3d.evaluation.scoring import TableRow

NEEDED = ("scheduled", "none", "random", "zeroed")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the table holds, 1 if it does not, 2 for a file that cannot be read; one line either way."""
    parser = argparse.ArgumentParser(
        prog="mllm3d.evaluation.check_table", description="Fail where a table does not hold."
    )
    parser.add_argument("results", type=Path, help="results.json of an evaluation")
    parser.add_argument("--task", required=True, help="task whose sub-tasks are the findings")
    parser.add_argument("--margin", type=float, required=True, help="points of accuracy")
    parser.add_argument("--max-keep", type=float, required=True, help="highest mean keep rate")
    parser.add_argument("--subtasks", type=lambda text: text.split(","), help="findings that count, default: all")
    args = parser.parse_args(arguments)
    try:
        holds, line = check(read_results(args.results), args.task, args.margin, args.max_keep, args.subtasks)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(line, file=sys.stdout if holds else sys.stderr)
    return 0 if holds else 1


def check(
    results: Results, task: str, margin: float, max_keep: float, subtasks: Sequence[str] | None = None
) -> tuple[bool, str]:
    """Whether the claim holds, and one line with the figures. margin: in points (hundredths)."""
    missing = [mode for mode in NEEDED if mode not in results.modes]
    if missing:
        return False, f"{task}: no {', '.join(missing)} in the table; add them to evaluation.modes"
    rows = _findings(results, task, subtasks)
    if not rows[0].text_only:
        return False, f"{task}: no text-only majority in the table; the manifest needs its training split"
    text_only = 100 * max(float(np.mean([row.text_only[rule] for row in rows])) for rule in rows[0].text_only)
    scores = {mode: 100 * float(np.mean([row.modes[mode].value for row in rows])) for mode in NEEDED}
    keep = float(np.mean([row.modes["scheduled"].keep_rate for row in rows]))
    figures = (
        f"{task} over {len(rows)} findings: scheduled {scores['scheduled']:.1f}, text-only {text_only:.1f}, "
        f"zeroed {scores['zeroed']:.1f}, none {scores['none']:.1f}, random {scores['random']:.1f}, "
        f"keep rate {keep:.3f}"
    )
    if scores["scheduled"] < max(text_only, scores["zeroed"]) + margin:
        return False, f"{figures}; wanted {margin:g} points over text-only and zeroed"
    if keep > max_keep:
        return False, f"{figures}; wanted a keep rate of at most {max_keep:g}"
    return True, figures


def _findings(results: Results, task: str, subtasks: Sequence[str] | None) -> list[TableRow]:
    of_task = {row.subtask: row for row in results.rows if row.task == task and row.subtask is not None}
    if not of_task:
        known = sorted({row.task for row in results.rows if row.subtask is not None})
        raise UserError(f"--task {task}: no sub-tasks of it in the table; known: {', '.join(known) or 'none'}")
    for name in subtasks or ():
        if name not in of_task:
            raise UserError(f"--subtasks {name}: not in the table; known: {', '.join(map(str, of_task))}")
    return [of_task[name] for name in subtasks or of_task]


if __name__ == "__main__":
    sys.exit(main())
