"""The table of an evaluation, for the terminal and as markdown: the model beside what needs no volume."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mllm3d.evaluation.results import Results
from mllm3d.evaluation.scoring import ModeSummary, TableRow

WIDTH = 120
HEADERS = {"none": "no dropping", "random": "random, same rate", "zeroed": "volume zeroed"}
# Tasks whose sub-tasks are findings, each shown in its own row.
PER_FINDING = ("existence", "existence detection")


def cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, scores in percent."""
    header = ["task", "questions", "chance", "text-only majority"]
    for mode, summary in results.modes.items():
        if mode == "scheduled":
            header += [f"scheduled (keep rate {summary.keep_rate:.2f})", "95 % interval"]
        else:
            header.append(HEADERS.get(mode, mode))
    shown = [row for row in results.rows if row.subtask is None or _is_finding(row)]
    return header, [_row(row, list(results.modes)) for row in shown]


def footer(results: Results) -> list[str]:
    """One line per mode: visual tokens before and after, seconds per question, in total, and per token."""
    lines = [f"checkpoint {results.checkpoint}, split {results.split}, {results.device}, {results.date}"]
    for mode, summary in results.modes.items():
        lines.append(
            f"{mode}: {summary.tokens_before:.1f} visual tokens before, {summary.tokens_after:.1f} after; "
            f"{summary.seconds_per_question:.3f} s per question, {summary.seconds_total:.1f} s in total"
            + _per_token(summary)
        )
    if any(summary.seconds_to_first_token is not None for summary in results.modes.values()):
        lines.append(
            "first token: counted from the start of a call, which answers several questions of a volume at once"
        )
    if any(row.metric != "accuracy" for row in results.rows):
        lines.append("MRA: mean relative accuracy; mixed: mean over sub-tasks, some by accuracy and some by MRA")
    return lines


def to_markdown(results: Results) -> str:
    """The table and its footer."""
    lines = [*markdown_table(*cells(results)), "", *(f"- {line}" for line in footer(results))]
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines; all columns but the first stand on the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def print_table(results: Results) -> None:
    """The same on the terminal."""
    print_rows(*cells(results))
    for text in footer(results):
        print(text)


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal, at least WIDTH columns wide: one with cut names says nothing."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(header):
        if number:  # figures and words stay whole, a heading of several words may be broken
            longest = max(len(text) for text in [*name.split(), *(line[number] for line in rows)])
            table.add_column(name, justify="right", min_width=longest, max_width=12)
        else:
            table.add_column(name, no_wrap=True)
    for line in rows:
        table.add_row(*(Text(cell) for cell in line))
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(table)


def write_results(results: Results, folder: Path) -> None:
    """results.json and table.md."""
    write_files({"results.json": results.model_dump_json(indent=2) + "\n", "table.md": to_markdown(results)}, folder)


def write_files(contents: Mapping[str, str], folder: Path) -> None:
    """Files by name, each visible only when it is complete."""
    for name, content in contents.items():
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(folder / name)


def _per_token(summary: ModeSummary) -> str:
    """Waiting for the first token and for each further one, where it was measured."""
    first, further = summary.seconds_to_first_token, summary.seconds_per_further_token
    text = "" if first is None else f"; {first:.3f} s to the first token"
    return text if further is None else f"{text}, {further:.4f} s per further token"


def _is_finding(row: TableRow) -> bool:
    return row.task.replace("_", " ").casefold() in PER_FINDING


def _row(row: TableRow, modes: Sequence[str]) -> list[str]:
    mark = {"accuracy": "", "mean relative accuracy": " (MRA)", "both": " (mixed)"}[row.metric]
    line = [f"· {row.subtask}" if row.subtask else f"{row.task}{mark}", str(row.questions)]
    best = row.best_text_only
    line += [_percent(row.chance), "-" if best is None else _percent(best)]
    for mode in modes:
        cell = row.modes[mode]
        line.append(_percent(cell.value))
        if mode == "scheduled":
            line.append(f"{_percent(cell.low)}-{_percent(cell.high)}")
    return line


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
