"""Where the slices of a prompt are, and what a pruned prompt consists of.

Legend: B rows of a batch, L columns (tokens of the prompt), S slices of a volume, M tokens of a slice.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """What the tower encodes apart: an image, or a temporal patch (two frames) of a video.

    Attributes:
        row, start: where its first token stands in the prompts (B, L).
        tokens: M, how many tokens it has. grid: (h, w) of these tokens.
        region: columns [begin, end) that leave the prompt with it: its label and its markers too.
    """

    row: int
    start: int
    grid: tuple[int, int]
    region: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def end(self) -> int:
        """Column behind its last token."""
        return self.start + self.tokens


Volume = list[Slice]
"""The slices that are compared to each other, in their order."""


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one slice in a row, before labels are known; part: the video it is of, -1 for an image."""

    row: int
    start: int
    grid: tuple[int, int]
    part: int = -1

    @property
    def end(self) -> int:
        return self.start + self.grid[0] * self.grid[1]


def volumes_of(runs: Sequence[Run], label_tokens: int) -> list[Volume]:
    """Runs in the order of the prompt, as volumes.

    Slices of a video are a volume. Images are one volume as long as they are of one size and the text between two
    of them is not longer than ``label_tokens``: that text is the later one's label.
    """
    volumes: list[Volume] = []
    before: Run | None = None
    for run in runs:
        gap = run.start - before.end if before is not None else 0
        same = (
            before is not None
            and (before.row, before.grid, before.part) == (run.row, run.grid, run.part)
            and (run.part >= 0 or gap <= label_tokens)
        )
        # The end marker behind the slice before stays, ours goes: what is left reads as if we had not been there.
        marker = int(same and gap > 0)
        region = (before.end + marker, run.end + marker) if same and before is not None else (run.start, run.end)
        item = Slice(run.row, run.start, run.grid, region)
        if same:
            volumes[-1].append(item)
        else:
            volumes.append([item])
        before = run
    return volumes


Grid = tuple[int, int, int]
"""(T, H, W) of what is shown, in tokens."""


def volumes_in(
    ids: Tensor, token: int, grids: Sequence[Grid], images: Sequence[bool], label_tokens: int
) -> list[Volume]:
    """Volumes of prompts (B, L) whose visual ``token`` stands for what is shown, row after row.

    Args:
        grids: of each image and video. images: which of them are images.
        label_tokens: see :func:`volumes_of`.

    Raises:
        ValueError: the placeholders do not fit what is shown, or those of a slice are torn apart.
    """
    found: list[Volume] = []
    first = 0
    for row, of_row in enumerate(ids):
        columns = (of_row == token).nonzero()[:, 0].tolist()
        last, count = first, 0
        while count < len(columns) and last < len(grids):
            count += math.prod(grids[last])
            last += 1
        if count != len(columns):
            raise ValueError(f"input_ids: {len(columns)} placeholders in row {row}, {count} visual tokens in the grids")
        found += volumes_of(list(_runs(columns, row, grids[first:last], images[first:last])), label_tokens)
        first = last
    if first < len(grids):
        raise ValueError(f"input_ids: no placeholders for the last {len(grids) - first} of the images or videos")
    return found


def _runs(columns: Sequence[int], row: int, grids: Sequence[Grid], images: Sequence[bool]) -> Iterator[Run]:
    """Of a row, from the columns of its placeholders."""
    at = 0
    for part, ((t, h, w), image) in enumerate(zip(grids, images, strict=True)):
        for _ in range(t):
            if columns[at + h * w - 1] - columns[at] != h * w - 1:
                raise ValueError(f"input_ids: the placeholders of a slice in row {row} do not stand side by side")
            yield Run(row, columns[at], (h, w), -1 if image else part)
            at += h * w


def taken(values: Tensor, flags: Tensor) -> Tensor:
    """The rows that are flagged (bool, on any device); where all are, the values themselves and no copy."""
    return values if bool(flags.all()) else values[flags.to(values.device)]


@dataclass
class Pruned:
    """One volume after pruning.

    Attributes:
        slices: bool (S,), which stayed.
        tokens: bool (S, M), which stayed of each; none where the slice went. Centres of clusters are among them.
        centres: int (S,), how many of them are centres of clusters.
    """

    slices: Tensor
    tokens: Tensor
    centres: Tensor

    @classmethod
    def empty(cls, volume: Volume) -> "Pruned":
        """Nothing stayed yet."""
        count, tokens = len(volume), volume[0].tokens
        none = torch.zeros(count, tokens, dtype=torch.bool)
        return cls(torch.zeros(count, dtype=torch.bool), none, torch.zeros(count, dtype=torch.long))


@dataclass
class Report:
    """What one call kept and how long it took.

    Attributes:
        volumes: in the order of the prompts.
        seconds: wall time of ``tower`` (without reading attention), ``pruner`` (reading attention, choosing,
            merging) and ``prompt`` (building the shorter prompt).
        columns: for each row the columns (of the given prompt) that the model saw.
    """

    volumes: list[Pruned] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    columns: list[Tensor] = field(default_factory=list)

    @property
    def slice_rate(self) -> float:
        """Share of the slices that stayed."""
        return self._share(lambda v: v.slices)

    @property
    def token_rate(self) -> float:
        """Share of the tokens that stayed within slices that stayed."""
        return self._share(lambda v: v.tokens[v.slices])

    @property
    def rate(self) -> float:
        """Share of all tokens that stayed."""
        return self._share(lambda v: v.tokens)

    def _share(self, part: Callable[[Pruned], Tensor]) -> float:
        flags = [part(volume).flatten() for volume in self.volumes]
        return float(torch.cat(flags).float().mean()) if sum(map(len, flags)) else 1.0
