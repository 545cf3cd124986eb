"""Rows of similar length together."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from med3dvlm.buckets import length_buckets


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.floats(1, 4))
def test_each_row_is_in_one_bucket_of_similar_lengths(lengths: list[int], most: float) -> None:
    buckets = length_buckets(torch.tensor(lengths), most)
    rows = [bucket.tolist() for bucket in buckets]
    assert sorted(row for bucket in rows for row in bucket) == list(range(len(lengths)))
    assert all(bucket == sorted(bucket) for bucket in rows)
    ends = [(min(lengths[row] for row in bucket), max(lengths[row] for row in bucket)) for bucket in rows]
    assert all(longest <= most * shortest for shortest, longest in ends)
    # As few as can be: each bucket's shortest row is too long for the bucket before.
    assert all(ends[n][0] > most * ends[n - 1][0] for n in range(1, len(ends)))


def test_a_report_goes_apart_from_questions() -> None:
    assert [bucket.tolist() for bucket in length_buckets(torch.tensor([30, 280, 21, 40, 300]))] == [[0, 2, 3], [1, 4]]
    assert [bucket.tolist() for bucket in length_buckets(torch.tensor([7, 7]))] == [[0, 1]]
