"""The statistics of kept tokens as tables in table.md, and as a few lines for the terminal."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm3d.evaluation.results import Results
from mllm3d.evaluation.retention import Coverage, Dissimilarity, ModeRetention, Retention
from mllm3d.evaluation.tables import markdown_table, to_markdown, write_files


def write_retention(retention: Retention, results: Results, folder: Path) -> None:
    """retention.json, and table.md with a section of it below the scores."""
    table = "\n".join([to_markdown(results), *retention_markdown(retention)])
    write_files({"retention.json": retention.model_dump_json(indent=2) + "\n", "table.md": table}, folder)


def print_retention(retention: Retention) -> None:
    """What the section says, in a few lines."""
    for line in summary(retention):
        print(line)


def shown_mode(retention: Retention) -> str | None:
    """`scheduled`, or the first mode that drops tokens; None without one."""
    return next((mode for mode in ("scheduled", *retention.modes) if mode in retention.modes), None)


def retention_markdown(retention: Retention) -> list[str]:
    """Lines of the section; none if no mode drops tokens."""
    mode = shown_mode(retention)
    if mode is None:
        return []
    found = retention.modes[mode]
    lines = [f"## Kept tokens ({mode})", "", *markdown_table(*_tasks(found))]
    if found.dissimilarity:
        header = ["organs", "volumes", "pairs", "Jaccard dissimilarity", "random masks of the same sizes"]
        lines += ["", *markdown_table(header, [_pair(each) for each in found.dissimilarity])]
    if found.coverage:
        header = ["region", "questions", "volumes", "absent", "coverage", "random tokens", "other questions"]
        header += ["mean per volume", "random tokens per volume", "voxels"]
        lines += ["", *markdown_table(header, [_region(each) for each in found.coverage])]
    return [*lines, "", *(f"- {line}" for line in (*_legend(retention, found), *_left_out(found))), ""]


def summary(retention: Retention) -> list[str]:
    """One line per statistic that there is."""
    mode = shown_mode(retention)
    if mode is None:
        return []
    found, lines = retention.modes[mode], []
    for each in found.coverage:
        if each.name is None and each.pooled is not None and each.random is not None:
            lines.append(
                f"{mode}: {_percent(each.pooled)} % of the tokens that hold the {each.of} asked about are kept, "
                f"{_percent(each.random)} % expected of random tokens{_others(each)} ({each.questions} questions)"
            )
    between = [each for each in found.dissimilarity if each.organs[0] != each.organs[1]]
    within = [each for each in found.dissimilarity if each.organs[0] == each.organs[1]]
    for where, pairs in (("about two organs", between), ("about one organ", within)):
        if pairs:
            value, random = (float(np.mean([getattr(each, name) for each in pairs])) for name in ("value", "random"))
            lines.append(
                f"{mode}: Jaccard dissimilarity of the tokens kept for questions {where}: {value:.2f}, "
                f"of random masks {random:.2f}"
            )
    return [*lines, *(f"{mode}: {line}" for line in _left_out(found))]


def _tasks(found: ModeRetention) -> tuple[list[str], list[list[str]]]:
    """A row per task; a column per organ with the mean tokens kept for questions about it, and of the organ itself."""
    organs = sorted({each.organ for each in found.tasks if each.organ is not None})
    tokens = {
        (each.task, each.organ): f"{each.tokens:.1f}"
        + ("" if each.organ_tokens is None else f" ({each.organ_tokens:.1f})")
        for each in found.tasks
    }
    rows = [
        [each.task, str(each.questions), f"{each.tokens:.1f}", f"{each.keep_rate:.3f}"]
        + [tokens.get((each.task, organ), "-") for organ in organs]
        for each in found.tasks
        if each.organ is None
    ]
    return ["task", "questions", "tokens kept", "keep rate", *organs], rows


def _pair(each: Dissimilarity) -> list[str]:
    first, second = each.organs
    name = f"{first}, two questions" if first == second else f"{first} and {second}"
    return [name, str(each.volumes), str(each.pairs), f"{each.value:.3f}", f"{each.random:.3f}"]


def _region(each: Coverage) -> list[str]:
    shares = (each.pooled, each.random, each.others, each.per_volume, each.random_per_volume, each.voxels)
    name = f"· {each.name}" if each.name else f"every {each.of}"
    counts = (each.questions, each.volumes, each.absent)
    return [name, *map(str, counts), *("-" if share is None else _percent(share) for share in shares)]


def _legend(retention: Retention, found: ModeRetention) -> list[str]:
    lines = []
    if any(each.organ is not None for each in found.tasks):
        lines.append(
            "columns of organs: mean tokens kept for the task's questions about the organ; in brackets, over volumes "
            "whose label map shows it, those of them that hold the organ"
        )
    if found.dissimilarity:
        lines.append("Jaccard dissimilarity: 1 - |A and B| / |A or B| of the tokens kept for two questions of a volume")
    if found.coverage:
        held = f"at least {100 * retention.block_share:g} % of" if retention.block_share else "any of"
        lines.append(
            "coverage, in percent: kept among the tokens that hold the region a question is about "
            f"({held} their voxels); random tokens: as expected of as many drawn at random; other questions: "
            "by the tokens kept for the volume's questions about other regions of the kind; absent: questions left "
            "out, as no token of the volume holds the region; voxels: the region's voxels in kept tokens"
        )
    return lines


def _left_out(found: ModeRetention) -> Sequence[str]:
    lines = []
    if found.without_mask:
        lines.append(f"questions left out because it is not recorded which tokens they kept: {found.without_mask}")
    if found.without_labels:
        lines.append(f"questions without coverage because their row has no label map: {found.without_labels}")
    return lines


def _others(each: Coverage) -> str:
    return "" if each.others is None else f", {_percent(each.others)} % kept for other questions"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
