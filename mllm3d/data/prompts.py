"""How a row becomes text: question as asked, answer as trained, and a choice read back from an answer."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from mllm3d.data.manifest import Row


def question_text(row: Row) -> str:
    """The question, with one line per option: `A. first`."""
    return with_options(row.question, row.options)


def with_options(question: str, options: Sequence[str] | None) -> str:
    """As `question_text`."""
    choices = options or ()
    return "\n".join([question, *(choice_text(choices, index) for index in range(len(choices)))])


def target_text(row: Row) -> str:
    """What a model should answer: the answer, or `B. text` if there are options."""
    if row.options is None:
        return row.answer
    return choice_text(row.options, row.options.index(row.answer))


def choice_text(options: Sequence[str], index: int) -> str:
    """An option with its letter: `B. text`."""
    return f"{ascii_uppercase[index]}. {options[index]}"


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """Which option an answer means; None unless it says so without a doubt.

    Taken are a capital letter alone (`B`, `B.`, `(B)`), a letter with its own option's text (`B. text`), and
    an option's text alone. So "Axial" is not A, "Because" is not B, and a letter with another option's text
    is nothing.
    """
    meanings = {index for index, option in enumerate(options) if _plain(option) == _plain(text)}
    match = re.fullmatch(r"\(?([A-Z])(?:[.:)]+|(?=\s|$))\s*(.*)", text.strip(), flags=re.DOTALL)
    if match and (index := ascii_uppercase.index(match[1])) < len(options):
        rest = match[2]
        if not rest or _plain(rest) == _plain(options[index]):
            meanings.add(index)
    return meanings.pop() if len(meanings) == 1 else None


def _plain(text: str) -> str:
    """Without regard to case, runs of spaces, and a full stop at the end."""
    return " ".join(text.split()).casefold().removesuffix(".").strip()
