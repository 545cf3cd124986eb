"""Text of questions and answers, and which option an answer means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm3d.data.prompts import parse_choice, question_text, target_text
from tests.data.scans import row

OPTIONS = ["Axial", "Because of noise", "3.5 cm", "No"]


def test_texts() -> None:
    plain = row(answer="a nodule")
    assert (question_text(plain), target_text(plain)) == ("Is there a nodule?", "a nodule")
    choice = row(options=["No", "Yes"])
    assert question_text(choice) == "Is there a nodule?\nA. No\nB. Yes"
    assert target_text(choice) == "B. Yes"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A", 0),
        ("B.", 1),
        ("(C)", 2),
        ("D)", 3),
        ("C: 3.5 cm", 2),
        ("C 3.5 cm", 2),
        (" b. because  of NOISE. ", None),  # a small letter isn't one of the letters
        ("B. because  of NOISE. ", 1),
        ("axial", 0),
        ("3.5 cm.", 2),
        ("No", 3),
        ("Because", None),
        ("Axial view", None),
        ("A large mass", None),
        ("B. Axial", None),
        ("E", None),
        ("a", None),
        ("A or B", None),
        ("None", None),
        ("The answer is A", None),
        ("", None),
    ],
)
def test_parse_choice(text: str, wanted: int | None) -> None:
    assert parse_choice(text, OPTIONS) == wanted


def test_an_option_that_is_another_ones_letter_is_ambiguous() -> None:
    assert parse_choice("B", ["B", "C"]) is None
    assert parse_choice("A. B", ["B", "C"]) == 0
    assert parse_choice("A", ["A", "B"]) == 0


@given(
    st.lists(st.text("abcAB .1", min_size=1).filter(str.strip), min_size=2, max_size=26, unique=True),
    st.data(),
)
def test_a_target_is_read_back_or_is_ambiguous(options: list[str], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(options) - 1))
    target = target_text(row(options=options, answer=options[index]))
    assert parse_choice(target, options) in (index, None)


def test_targets_of_usual_options_are_read_back() -> None:
    for n, option in enumerate(OPTIONS):
        assert parse_choice(target_text(row(options=OPTIONS, answer=option)), OPTIONS) == n
