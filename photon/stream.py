"""The packed tokens on their way through the decoder, and how they get fewer.

Legend: R rows (one question each), L tokens of a row, N visual tokens of a row, Q instruction tokens, T packed
tokens as they entered the decoder, P packed tokens before a drop, S after it, D width, E head width, A labels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from photon.packing import Layout
from photon.scheduling import Retention
from photon.surrogate import DropTokens, SurrogateSettings

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LossWeights:
    """What one label token and one question weigh in the loss that is differentiated (see ``DropTokens``)."""

    token: float
    row: float


@dataclass
class Stream:
    """The packed tokens between two drops.

    Attributes:
        hidden: ``(S, D)``. rotary: cosines and sines, ``(1, S, E)`` each.
        lengths: tokens of each sequence, one per row, after the first drop; None while rows share their prefix.
        row_tokens: ``(R, L)`` index of each row's tokens, -1 behind their end.
        row_visual: ``(R, L)`` which visual token of its row stands there, -1 for text.
        visual_at: ``(R, N)`` index of each visual token, -1 where it is gone.
        instruction: ``(R, Q)`` index of the instruction tokens, -1 behind their end.
        ordinal: ``(S)`` number of a visual token among those of all volumes, -1 for text.
        moved: ``(T)`` where a suffix token now stands (prefix tokens may stand in several places).
        source: ``(S)`` index in the stream before; None for the first.
        flipped_moved: ``moved`` for the copies that have the inverted mask (Eq. 20); None without them.
        tree: where rows share their kept tokens: tokens of each group's prefix, and which of them each of its rows
            sees, ``(K, tokens)`` bool.
    """

    hidden: Tensor
    rotary: Rotary
    lengths: list[int] | None
    row_tokens: Tensor
    row_visual: Tensor
    visual_at: Tensor
    instruction: Tensor
    ordinal: Tensor
    moved: Tensor
    source: Tensor | None = None
    flipped_moved: Tensor | None = None
    tree: tuple[list[int], list[Tensor]] | None = None

    @classmethod
    def enter(cls, hidden: Tensor, rotary: Rotary, layout: Layout) -> "Stream":
        """All tokens, each group's prefix once."""
        ordinal = torch.full_like(layout.source, -1)
        ordinal[layout.visual] = torch.arange(len(layout.visual), device=ordinal.device)
        # At least one column, so that rows without a volume pass through the same modules as others.
        at = layout.visual_at if layout.visual_at.shape[1] else F.pad(layout.visual_at, (0, 1), value=-1)
        return cls(
            hidden,
            rotary,
            None,
            layout.row_tokens,
            layout.row_visual,
            at,
            layout.instruction,
            ordinal,
            torch.arange(len(ordinal), device=ordinal.device),
        )

    @property
    def valid(self) -> Tensor:
        """``(R, N)`` bool, which visual tokens are there."""
        return self.visual_at >= 0


@dataclass
class Chosen:
    """Each row's text and its chosen visual tokens, end to end.

    Attributes:
        index: ``(S)`` index in the stream before. cell: ``(S)`` place in the flattened ``(R, N)``, -1 for text.
        ordinal: ``(S)`` which visual token of its row, -1 for text.
        lengths: tokens of each row. counts: further numbers that came along to the host.
    """

    index: Tensor
    cell: Tensor
    ordinal: Tensor
    lengths: list[int]
    counts: list[int]


def select(stream: Stream, kept: Tensor, *counts: Tensor) -> Chosen:
    """Choose tokens by ``kept`` (R, N). The lengths, and ``counts`` with them, cost one host synchronisation."""
    visual = stream.row_visual
    stays = torch.where(visual < 0, True, kept.gather(1, visual.clamp(min=0))) & (stream.row_tokens >= 0)
    numbers = torch.cat([stays.sum(1), *[count[None] for count in counts]]).tolist()
    lengths = numbers[: len(stays)]
    flat = torch.nonzero_static(stays.flatten(), size=sum(lengths))[:, 0]
    ordinal = visual.flatten()[flat]
    cell = torch.where(ordinal < 0, -1, flat // visual.shape[1] * kept.shape[1] + ordinal)
    return Chosen(stream.row_tokens.flatten()[flat], cell, ordinal, lengths, numbers[len(stays) :])


def length_table(lengths: list[int], device: torch.device) -> Tensor:
    """Index table ``(R, longest)`` of sequences that lie end to end, -1 behind each end."""
    size = torch.tensor(lengths).to(device, non_blocking=True)
    column = torch.arange(max(lengths), device=device)
    return torch.where(column < size[:, None], column + (size.cumsum(0) - size)[:, None], -1)


def advance(stream: Stream, chosen: Chosen, hidden: Tensor, flipped: Chosen | None = None) -> Stream:
    """The stream after a drop, with ``hidden`` (S, D) of the chosen tokens, those of ``flipped`` behind them."""
    device = hidden.device
    rows = length_table(chosen.lengths, device)
    moved = _places(stream, chosen.index, 0)
    index, lengths, copies = chosen.index, chosen.lengths, None
    if flipped is not None:
        copies = _places(stream, flipped.index, len(index))
        index, lengths = torch.cat([index, flipped.index]), lengths + flipped.lengths
    at = torch.full((stream.visual_at.numel() + 1,), -1, device=device)  # text falls into the last place
    at[chosen.cell] = torch.arange(len(chosen.cell), device=device)
    return Stream(
        hidden,
        (stream.rotary[0][:, index], stream.rotary[1][:, index]),
        lengths,
        rows,
        torch.where(rows < 0, -1, chosen.ordinal[rows.clamp(min=0)]),
        at[:-1].view_as(stream.visual_at),
        torch.where(stream.instruction < 0, -1, moved[stream.instruction.clamp(min=0)]),
        stream.ordinal[index],
        moved[stream.moved],
        chosen.index,
        None if copies is None else copies[stream.moved],
    )


def _places(stream: Stream, index: Tensor, start: int) -> Tensor:
    """``(P)`` where each token of the stream stands in the next one, whose tokens from ``start`` are ``index``."""
    places = torch.zeros(len(stream.hidden), dtype=torch.long, device=index.device)
    return places.scatter_(0, index, torch.arange(start, start + len(index), device=index.device))


def weigh(stream: Stream, chosen: Chosen, retention: Retention) -> Tensor:
    """Soft stage: ``(S, D)`` with visual tokens multiplied by q."""
    q = F.pad(retention.probability.flatten(), (0, 1), value=1.0)  # the last entry serves text
    return stream.hidden[chosen.index] * q[chosen.cell, None].to(stream.hidden.dtype)


def drop(
    stream: Stream, chosen: Chosen, retention: Retention, scale: "GradientScale", settings: SurrogateSettings
) -> Tensor:
    """Hard stage: ``(S, D)`` of the kept tokens, with the straight-through mask (Eq. 10-17)."""
    if not (torch.is_grad_enabled() and retention.probability.requires_grad):
        return stream.hidden[chosen.index]
    dropped: Tensor = DropTokens.apply(
        stream.hidden, retention.probability, chosen.index, chosen.cell, retention.kept, retention.valid,
        scale.samples, scale.row, settings,
    )  # fmt: skip
    return dropped


def unite(
    stream: Stream,
    chosen: Chosen,
    retention: Retention,
    layout: Layout,
    scale: "GradientScale",
    settings: SurrogateSettings,
) -> Stream:
    """The stream after a drop in which the rows of a group share all that any of them keeps (``upper_layers: union``).

    Packed as on entering: each group's prefix, now with the union, then its rows' texts. A token that several rows
    keep has one gradient; each row's surrogate takes an equal part of it.
    """
    device, kept = stream.hidden.device, retention.kept
    rows_of = [len(lengths) for lengths in layout.suffix_lengths]
    groups = [k[:, :n] for k, n in zip(kept.split(rows_of), layout.visual_counts, strict=True)]
    keepers = torch.ones(len(stream.hidden), device=device)  # rows that go on with a token; text is always there
    keepers[layout.visual] = torch.cat([k.sum(0) for k in groups]).to(keepers.dtype)
    passed = F.pad((keepers > 0).cumsum(0), (1, 0))
    bounds = torch.tensor([0, *layout.prefix_lengths]).cumsum(0).to(device)
    prefixes = passed[bounds].diff().tolist()
    size = sum(prefixes) + sum(map(sum, layout.suffix_lengths))
    index, moved = torch.nonzero_static(keepers > 0, size=size)[:, 0], passed[:-1]
    at = moved[chosen.index]
    hidden: Tensor = DropTokens.apply(
        stream.hidden, retention.probability, index, chosen.cell, kept, retention.valid,
        scale.samples, scale.row, settings, at, 1 / keepers[chosen.index],
    )  # fmt: skip
    rows = length_table(chosen.lengths, device)
    row_tokens = torch.where(rows < 0, -1, at[rows.clamp(min=0)])
    places = torch.full((stream.visual_at.numel() + 1,), -1, device=device)  # text falls into the last place
    places[chosen.cell] = at
    return Stream(
        hidden,
        (stream.rotary[0][:, index], stream.rotary[1][:, index]),
        chosen.lengths,
        row_tokens,
        torch.where(rows < 0, -1, chosen.ordinal[rows.clamp(min=0)]),
        places[:-1].view_as(stream.visual_at),
        torch.where(stream.instruction < 0, -1, moved[stream.instruction.clamp(min=0)]),
        stream.ordinal[index],
        moved[stream.moved],
        index,
        tree=(prefixes, _seen(layout, groups, prefixes, index)),
    )


def _seen(layout: Layout, groups: list[Tensor], prefixes: list[int], index: Tensor) -> list[Tensor]:
    """Which of its group's tokens ``index`` each row sees: all text, and what it keeps. ``(K, tokens)`` bool each."""
    number = torch.full((len(layout.source),), -1, device=index.device)
    for places in layout.visual.split(layout.visual_counts):
        number[places] = torch.arange(len(places), device=index.device)
    visible = []
    for kept, own in zip(groups, number[index[: sum(prefixes)]].split(prefixes), strict=True):
        with_text = F.pad(kept, (0, 1), value=True)  # the last column is text's, whose number is -1
        visible.append(with_text[:, own])
    return visible


@dataclass(frozen=True)
class GradientScale:
    """By what a row's gradient becomes that of its own mean loss ``(R)``, and a row's weight in the loss."""

    samples: Tensor
    row: float

    @classmethod
    def of(cls, layout: Layout, weights: LossWeights | None) -> "GradientScale":
        """For a loss with these weights; by default the mean over this batch."""
        weights = weights or LossWeights(1 / max(1, len(layout.targets)), 1 / layout.rows)
        labels = torch.bincount(layout.label_rows, minlength=layout.rows).clamp(min=1)
        return cls(1 / (labels * weights.token), weights.row)


def pad_rows(values: Tensor, table: Tensor) -> Tensor:
    """Packed ``(J, S, E)`` as padded ``(R, J, L, E)`` by an index table ``(R, L)`` with -1 for padding."""
    padded: Any = values[:, table.clamp(min=0)].transpose(0, 1)
    return padded
