"""Where every token of a batch stands once padding is gone and each volume's prefix is there only once.

Legend: R rows (one question each), L row length, G groups (rows that share their volumes), N visual tokens of
a group, T tokens of the packed sequence, Q instruction tokens.

A row is ``[system ... <|vision_start|> <|video_pad|> x N <|vision_end|>] [question, answer]``: the *prefix*
up to the last ``<|vision_end|>`` and the *suffix* after it. Rows of one group have the same prefix. All of this
is index arithmetic on token ids and belongs on the CPU, in the collator: a forward pass then needs one host
synchronisation, for the number of tokens that stayed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that mark the parts of a row (config.json holds them)."""

    video: int
    vision_end: int
    turn_end: int
    user_turn: tuple[int, ...] = ()


TextAfter = Literal["maximum", "plane"]


@dataclass(frozen=True)
class Geometry:
    """What rotary positions depend on.

    Attributes:
        merge: patches merged in plane. temporal_step: from one depth slab to the next.
        text_after: where text goes on behind a volume: after the largest position on any axis (``maximum``: Qwen2-VL's
            M-RoPE, what the backbones were trained with), or after the largest in plane (``plane``: transformers 5).
    """

    merge: int
    temporal_step: float
    text_after: TextAfter = "maximum"


@dataclass(frozen=True)
class VolumeGrid:
    """A volume's grid (depth, height, width) in patches, and which of its tokens are there.

    ``present``: their raster numbers, ascending; None for all.
    """

    grid: tuple[int, int, int]
    present: Tensor | None = None

    def tokens(self, merge: int) -> int:
        """How many of its tokens are there."""
        t, h, w = self.grid
        return t * h * w // merge**2 if self.present is None else len(self.present)


@dataclass(frozen=True)
class Layout:
    """Index tables of one packed batch. Tensors are on one device; lists stay on the host."""

    prefix_lengths: list[int]
    suffix_lengths: list[list[int]]
    visual_counts: list[int]
    row_order: list[int]
    """Row of the input for each suffix in packed order."""
    source: Tensor
    """(T) index into ``input_ids.flatten()``."""
    positions: Tensor
    """(3, T) rotary positions: time, height, width."""
    visual: Tensor
    """(sum of N) packed index of every visual token, group by group."""
    row_tokens: Tensor
    """(R, L) packed index of each row's own sequence, prefix first, -1 behind its end. Rows in packed order."""
    row_visual: Tensor
    """(R, L) which visual token of its group stands there, -1 for text."""
    visual_at: Tensor
    """(R, N) packed index of each row's visual tokens, -1 behind their end."""
    instruction: Tensor
    """(R, Q) packed index of the instruction tokens, -1 behind their end."""
    predicts: Tensor
    """(A) packed index of the tokens whose successor carries a label."""
    targets: Tensor
    """(A) those labels."""
    last: Tensor
    """(R) packed index of each row's last token."""
    next_position: Tensor
    """(R) rotary position of the first token to be generated."""
    label_rows: Tensor
    """(A) row, in packed order, of each label."""
    labelled: bool = False
    """Whether labels were given, be it that none of them predicts anything."""

    def to(self, device: torch.device | str) -> "Layout":
        """The same tables with their tensors on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    @property
    def rows(self) -> int:
        return len(self.row_order)

    @property
    def sees(self) -> Tensor:
        """(R) bool, which rows have visual tokens."""
        return (self.visual_at >= 0).any(1)

    @property
    def chooses(self) -> Tensor:
        """(R) bool, which rows have visual tokens and a question to choose them by."""
        return self.sees & (self.instruction >= 0).any(1)

    def in_input_order(self, values: Tensor) -> Tensor:
        """(R, ...) from packed order to the order of the input's rows."""
        found = torch.empty_like(values)
        found[self.row_order] = values
        return found


def volume_grids(grids: list[list[int]], token_index: Tensor | None, merge: int) -> list[VolumeGrid]:
    """Grids with their share of ``token_index``, whose numbers count through the whole grids of all volumes."""
    shapes = [(t, h, w) for t, h, w in grids]
    if token_index is None:
        return [VolumeGrid(shape) for shape in shapes]
    counts = [t * h * w // merge**2 for t, h, w in shapes]
    index = token_index.cpu()
    if len(index) and (bool((index.diff() <= 0).any()) or int(index[0]) < 0 or int(index[-1]) >= sum(counts)):
        raise ValueError(f"token_index: must ascend within 0..{sum(counts) - 1}, the tokens of {len(shapes)} volumes")
    found, start = [], 0
    for shape, count in zip(shapes, counts, strict=True):
        found.append(VolumeGrid(shape, index[(index >= start) & (index < start + count)] - start))
        start += count
    return found


def visual_runs(ids: list[int], token: int) -> list[tuple[int, int]]:
    """``(start, end)`` of every run of ``token`` in ``ids``."""
    runs, start = [], None
    for i, x in enumerate([*ids, -1]):
        if x == token and start is None:
            start = i
        elif x != token and start is not None:
            runs.append((start, i))
            start = None
    return runs


def rope_positions(
    ids: list[int],
    volumes: "list[VolumeGrid]",
    tokens: SpecialTokens,
    geometry: Geometry,
) -> Tensor:
    """Rotary positions of one unpadded row, as Qwen2.5-VL numbers them: ``(3, len(ids))``.

    Text counts up on all three axes; a volume's tokens take (slab * temporal_step, row, column) from where the
    text stopped, and the text behind continues as ``geometry.text_after`` says. Tokens that were left out as
    background change no other token's position.
    """
    parts: list[Tensor] = []
    at, position = 0, 0
    runs = visual_runs(ids, tokens.video)
    if len(runs) != len(volumes):
        raise ValueError(f"input_ids: {len(runs)} runs of <|video_pad|> for {len(volumes)} volumes")
    for (start, end), volume in zip(runs, volumes, strict=True):
        t, h, w = volume.grid[0], volume.grid[1] // geometry.merge, volume.grid[2] // geometry.merge
        if end - start != volume.tokens(geometry.merge):
            raise ValueError(
                f"input_ids: {end - start} <|video_pad|> tokens for a volume of {volume.tokens(geometry.merge)}; "
                "the text was truncated inside the volume, or the volume has another size"
            )
        parts.append(torch.arange(start - at).expand(3, -1) + position)
        position += start - at
        time = (torch.arange(t) * geometry.temporal_step).long()
        axes = torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
        parts.append((axes if volume.present is None else axes[:, volume.present]) + position)
        position += max(h, w) if geometry.text_after == "plane" else max(int(time[-1]) + 1, h, w)
        at = end
    parts.append(torch.arange(len(ids) - at).expand(3, -1) + position)
    return torch.cat(parts, dim=1)


def _prefix_length(ids: list[int], tokens: SpecialTokens) -> int:
    """Tokens up to and including the last ``<|vision_end|>``; 0 for a row without a volume."""
    return max((i + 1 for i, x in enumerate(ids) if x == tokens.vision_end), default=0)


def _instruction(suffix: list[int], tokens: SpecialTokens) -> list[int]:
    """The questions: what stands between the volume and the next end of a turn, and in later turns of the user.

    Never an answer, and nothing of the system's prompt.
    """
    ends = [i for i, x in enumerate(suffix) if x == tokens.turn_end] or [len(suffix)]
    found = list(range(ends[0]))
    header = list(tokens.user_turn)
    for last, end in zip(ends, [*ends[1:], len(suffix)], strict=True):
        begin = last + 1
        while begin < end and suffix[begin : begin + len(header)] != header:
            begin += 1
        found += range(begin + len(header) + 1, end) if header else []  # a line break stands behind the header
    return found


def _padded(rows: list[list[int]]) -> Tensor:
    """Rows of unequal length as one tensor, -1 behind the end."""
    width = max((len(r) for r in rows), default=0)
    return torch.tensor([r + [-1] * (width - len(r)) for r in rows], dtype=torch.long).reshape(len(rows), width)


@dataclass
class _Group:
    """Rows that share their volumes, and the ids of what they share."""

    rows: list[int]
    volumes: list[VolumeGrid]
    prefix: list[int]


def _groups(ids: list[list[int]], owners: list[int], volumes: list[VolumeGrid], tokens: SpecialTokens) -> list[_Group]:
    """Rows by group, each with its volumes' grids; volumes are listed in the order of the groups."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(owners):
        members.setdefault(group, []).append(row)
    groups, used = [], 0
    for group in sorted(members):
        rows = members[group]
        prefix = ids[rows[0]][: _prefix_length(ids[rows[0]], tokens)]
        for row in rows[1:]:
            if ids[row][: len(prefix)] != prefix or _prefix_length(ids[row], tokens) != len(prefix):
                raise ValueError(f"group_index: rows {rows[0]} and {row} share a volume but not the text before it")
        count = len(visual_runs(prefix, tokens.video))
        groups.append(_Group(rows, volumes[used : used + count], prefix))
        used += count
    if used != len(volumes):
        raise ValueError(f"video_grid_thw: {len(volumes)} volumes given, the rows show {used}")
    return groups


@dataclass
class _Tables:
    """The layout while it grows: prefixes first, then row by row. ``at`` is the next packed index."""

    tokens: SpecialTokens
    geometry: Geometry
    at: int = 0
    source: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    prefix_at: list[int] = field(default_factory=list)
    text_starts: list[int] = field(default_factory=list)
    visual: list[list[int]] = field(default_factory=list)
    row_order: list[int] = field(default_factory=list)
    row_tokens: list[list[int]] = field(default_factory=list)
    row_visual: list[list[int]] = field(default_factory=list)
    visual_at: list[list[int]] = field(default_factory=list)
    instruction: list[list[int]] = field(default_factory=list)
    labels: list[tuple[int, int, int]] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    next_position: list[int] = field(default_factory=list)

    def add_prefix(self, group: _Group, source: Tensor) -> None:
        """The volumes of a group and the text before and between them."""
        positions = rope_positions(group.prefix, group.volumes, self.tokens, self.geometry)
        self.source.append(source)
        self.positions.append(positions)
        self.prefix_at.append(self.at)
        # The last column is text (<|vision_end|>) and so the same on all three axes.
        self.text_starts.append(int(positions[0, -1]) + 1 if group.prefix else 0)
        self.visual.append([self.at + i for i, x in enumerate(group.prefix) if x == self.tokens.video])
        self.at += len(group.prefix)

    def add_row(
        self, g: int, row: int, prefix: list[int], suffix: list[int], labels: list[int], source: Tensor
    ) -> None:
        """One question (and answer) of group ``g``; ``labels`` as long as ``suffix``."""
        start, n, begin = self.text_starts[g], len(suffix), self.at
        self.source.append(source)
        self.positions.append(torch.arange(start, start + n).expand(3, -1))
        ordinal = {p: i for i, p in enumerate(self.visual[g])}
        shared = range(self.prefix_at[g], self.prefix_at[g] + len(prefix))
        self.row_tokens.append([*shared, *range(begin, begin + n)])
        self.row_visual.append([ordinal.get(p, -1) for p in shared] + [-1] * n)
        self.visual_at.append(self.visual[g])
        self.instruction.append([begin + i for i in _instruction(suffix, self.tokens)] if prefix else [])
        self.labels += [
            (begin + i, labels[i + 1], len(self.row_order)) for i in range(n - 1) if labels[i + 1] != IGNORE
        ]
        self.row_order.append(row)
        self.last.append(begin + n - 1)
        self.next_position.append(start + n)
        self.at += n


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    grids: list[list[int]],
    group_index: Tensor | None,
    labels: Tensor | None,
    tokens: SpecialTokens,
    geometry: Geometry,
    token_index: Tensor | None = None,
) -> Layout:
    """Lay a padded batch end to end, each group's prefix once.

    Args:
        input_ids: ``(R, L)``, padded left or right where ``attention_mask`` is 0.
        grids: (depth, height, width) in patches of each volume, group by group.
        group_index: ``(R)`` group of each row; each row is its own group if None.
        labels: ``(R, L)`` with -100 where nothing is predicted; only suffix tokens may carry one.
        token_index: numbers of the tokens that are there, counted through all volumes' grids; None for all.

    Raises:
        ValueError: visual tokens and volumes do not match, or rows of a group differ before the question.
    """
    rows, width = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    columns = [m.nonzero()[:, 0] for m in mask.bool().cpu()]
    ids = [row[c].tolist() for row, c in zip(input_ids.cpu(), columns, strict=True)]
    targets = [[IGNORE] * len(c) if labels is None else labels[r].cpu()[c].tolist() for r, c in enumerate(columns)]
    owners = list(range(rows)) if group_index is None else group_index.tolist()
    groups = _groups(ids, owners, volume_grids(grids, token_index, geometry.merge), tokens)

    tables = _Tables(tokens, geometry)
    for group in groups:
        first = group.rows[0]
        tables.add_prefix(group, first * width + columns[first][: len(group.prefix)])
    for g, group in enumerate(groups):
        n = len(group.prefix)
        for row in group.rows:
            if len(ids[row]) == n:
                raise ValueError(f"input_ids: row {row} has nothing after its volume")
            if n and any(x != IGNORE for x in targets[row][: n + 1]):
                raise ValueError(f"labels: row {row} has a label at or before its first question token")
            source = row * width + columns[row][n:]
            tables.add_row(g, row, group.prefix, ids[row][n:], targets[row][n:], source)
    return _finish(tables, groups, ids, labelled=labels is not None)


def _finish(tables: _Tables, groups: list[_Group], ids: list[list[int]], labelled: bool) -> Layout:
    """The grown lists as tensors."""
    predicts, targets, label_rows = zip(*tables.labels, strict=True) if tables.labels else ((), (), ())

    def index(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    return Layout(
        prefix_lengths=[len(g.prefix) for g in groups],
        suffix_lengths=[[len(ids[r]) - len(g.prefix) for r in g.rows] for g in groups],
        visual_counts=[len(v) for v in tables.visual],
        row_order=tables.row_order,
        source=torch.cat(tables.source),
        positions=torch.cat(tables.positions, dim=1),
        visual=index(i for v in tables.visual for i in v),
        row_tokens=_padded(tables.row_tokens),
        row_visual=_padded(tables.row_visual),
        visual_at=_padded(tables.visual_at),
        instruction=_padded(tables.instruction),
        predicts=index(predicts),
        targets=index(targets),
        label_rows=index(label_rows),
        labelled=labelled,
        last=index(tables.last),
        next_position=index(tables.next_position),
    )
