"""Closed questions come in blocks, so that no rule that reads only the text can beat chance.

A block is K questions to K different cases of one split that read the same to the letter: same phrasing, same
options in the same order. Each option is the right answer of exactly one of them. Whatever a text-only rule
answers, it is right once per block: exactly 1/K, in every split, for every phrasing, option set and letter.
Rows that find no block are dropped (yes/no questions) or asked openly (all others).
"""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

APART = 0.25
"""Numbers among the options of one question differ by at least this share of the larger one."""


@dataclass(frozen=True)
class Candidate:
    """One question that could be asked of one case, with its right answer."""

    case: str
    value: str | float | bool
    text: str


Block = tuple[Candidate, ...]


def category_blocks(
    candidates: Sequence[Candidate], options: int, rng: random.Random
) -> tuple[list[Block], list[Candidate]]:
    """Split candidates into blocks of up to ``options`` different answers; also returns what is left over.

    Full blocks are made first, from the answers with most candidates left; smaller blocks (two answers at
    least) use what remains.
    """
    pools: dict[str, list[Candidate]] = {}
    for candidate in rng.sample(list(candidates), len(candidates)):
        pools.setdefault(candidate.text, []).append(candidate)
    blocks: list[Block] = []
    for size in range(options, 1, -1):
        while len(filled := [text for text, pool in pools.items() if pool]) >= size:
            filled.sort(key=lambda text: (-len(pools[text]), text))
            blocks.append(tuple(pools[text].pop() for text in filled[:size]))
    return blocks, [candidate for pool in pools.values() for candidate in pool]


def far_apart(first: float, second: float) -> bool:
    """Whether two numbers may stand among the options of one question."""
    return abs(first - second) >= APART * max(abs(first), abs(second)) and first != second


def number_blocks(
    candidates: Sequence[Candidate], options: int, rng: random.Random
) -> tuple[list[Block], list[Candidate]]:
    """As ``category_blocks`` for numbers: the values of a block are pairwise ``far_apart``.

    No distractor is invented, because one outside the cases' own values would stand out: where these span too
    little for four numbers a quarter apart, blocks are smaller.
    """
    left = rng.sample(list(candidates), len(candidates))
    left.sort(key=lambda candidate: float(candidate.value))  # stable: ties keep their drawn order
    blocks: list[Block] = []
    for size in range(options, 1, -1):
        values = [float(candidate.value) for candidate in left]
        chains: list[list[int]] = []
        low, high = 0, len(left) // size
        while low < high:  # if n blocks can be made, so can fewer: bisect for the most
            middle = (low + high + 1) // 2
            found = _chains(values, size, middle)
            low, high, chains = (middle, high, found) if found else (low, middle - 1, chains)
        blocks += [tuple(left[index] for index in chain) for chain in chains]
        taken = {index for chain in chains for index in chain}
        left = [candidate for index, candidate in enumerate(left) if index not in taken]
    return blocks, left


def _chains(values: Sequence[float], size: int, count: int) -> list[list[int]] | None:
    """``count`` chains of ``size`` rising, far apart places in sorted ``values``; None if that's too many.

    All chains grow together from the lowest values, each by the next value that is far enough away. It is
    enough that neighbours are far apart: sorted numbers further along are further still.
    """
    chains = [[start] for start in range(count)]
    place = count
    for _ in range(size - 1):
        for chain in chains:
            while place < len(values) and not far_apart(values[chain[-1]], values[place]):
                place += 1
            if place == len(values):
                return None
            chain.append(place)
            place += 1
    return chains


def skew(candidates: Sequence[Candidate], majority: float, rng: random.Random, key: Hashable = None) -> list[Candidate]:
    """Drop candidates until the commonest answer makes up ``majority`` of them (the biased version).

    ``key`` names the answer that is to be the majority; None takes the commonest.
    """
    pools: dict[str, list[Candidate]] = {}
    for candidate in rng.sample(list(candidates), len(candidates)):
        pools.setdefault(candidate.text, []).append(candidate)
    if not pools:
        return []
    top = key if key in pools else max(sorted(pools), key=lambda text: len(pools[text]))
    rest = [candidate for text, pool in pools.items() if text != top for candidate in pool]
    rest_share = round(len(pools[str(top)]) * (1 - majority) / majority)
    return pools[str(top)] + rng.sample(rest, min(len(rest), rest_share))
