"""Projectors: from an encoder's two streams of tokens to image tokens of a language model (Med3DVLM Sec. 3.2.2).

Legend: B batch, T tokens of a stream, E width of a stream, N image tokens, D width of the language model.

Four settings of one module, the rows of the paper's Tables 6-8:

- ``2xMLP``: the high stream; each token through two linear layers with a GELU between them.
- ``2xMLP-H``: both streams, each through an MLP of its own; low tokens, then high tokens.
- ``1xMLP-Mixer-H``, ``2xMLP-Mixer-H``: both streams, each through one or two mixer layers (Eq. 6-7); low, then high.

The paper names the MLP rows and no more. They are read here as follows: the number counts linear layers, as in the
MLP projectors that the paper compares with (M3D-LaMed) and as in ``mm_projector`` inside the published mixers; an MLP
does not mix tokens, so that each stream keeps its own number: 32 image tokens and 288 for DCFormer-small, where the
mixers make 256.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor, cat, nn

from med3dvlm.settings import settings_from

Shape = tuple[int, int]
"""(tokens, width) of a stream."""

PUBLISHED_TOKENS = 256


class Kind(NamedTuple):
    """What a projector's name says: mixers or MLPs, how many layers, and whether it reads the low stream too."""

    mixer: bool
    layers: int
    hybrid: bool


KINDS = {
    "2xMLP": Kind(mixer=False, layers=2, hybrid=False),
    "2xMLP-H": Kind(mixer=False, layers=2, hybrid=True),
    "1xMLP-Mixer-H": Kind(mixer=True, layers=1, hybrid=True),
    "2xMLP-Mixer-H": Kind(mixer=True, layers=2, hybrid=True),
}


@dataclass(frozen=True)
class ProjectorSettings:
    """Which projector, and the shapes that it is made for.

    Attributes:
        name: one of ``KINDS``.
        low, high: (tokens, width) of the encoder's two outputs.
        mixed_tokens: image tokens that a mixer makes, half of them from each stream; MLPs make one of each token.

    Raises:
        ValueError: an unknown name, or numbers that no projector can have.
    """

    name: str = "2xMLP-Mixer-H"
    low: Shape = (256, 384)
    high: Shape = (32, 768)
    mixed_tokens: int = PUBLISHED_TOKENS

    def __post_init__(self) -> None:
        for stream in ("low", "high"):  # JSON has lists
            object.__setattr__(self, stream, tuple(getattr(self, stream)))
            if len(getattr(self, stream)) != 2 or min(getattr(self, stream)) < 1:
                raise ValueError(f"projector: {stream}: {getattr(self, stream)} is not (tokens, width)")
        if self.name not in KINDS:
            raise ValueError(f"projector: {self.name!r} is not one of {', '.join(KINDS)}")
        if self.mixed_tokens < 2 or self.mixed_tokens % 2:
            raise ValueError(f"projector: mixed_tokens: {self.mixed_tokens} is not an even number from 2 on")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ProjectorSettings":
        """From config.json. Raises ``ValueError`` for an unknown key."""
        return settings_from(cls, values, "projector")

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        values = asdict(self)
        return {**values, "low": list(self.low), "high": list(self.high)}

    @property
    def kind(self) -> Kind:
        """What the name says."""
        return KINDS[self.name]

    @property
    def tokens(self) -> int:
        """N, how many image tokens come out."""
        if self.kind.mixer:
            return self.mixed_tokens
        return self.high[0] + (self.low[0] if self.kind.hybrid else 0)


def steps(start: int, target: int, layers: int) -> list[int]:
    """A size after each of ``layers``: growing, the last ones double; shrinking, all take away the same.

    This gives the published sizes: tokens 256 -> 192 -> 128 and 32 -> 64 -> 128, widths 384 -> 1792 -> 3584.
    """
    if start < target:
        return [max(start, target >> (layers - i)) for i in range(1, layers)] + [target]
    return [start - (start - target) * i // layers for i in range(1, layers + 1)]


class MLP(nn.Module):
    """Linear, then ``layers - 1`` times GELU and linear: ``(..., size_in) -> (..., size_out)``."""

    def __init__(self, size_in: int, size_out: int, layers: int = 2) -> None:
        super().__init__()
        more = [nn.Sequential(nn.GELU(), nn.Linear(size_out, size_out)) for _ in range(layers - 1)]
        self.mm_projector = nn.Sequential(nn.Linear(size_in, size_out), *more)

    def forward(self, x: Tensor) -> Tensor:
        return self.mm_projector(x)


class MixerLayer(nn.Module):
    """Tokens mixed, then channels, each behind a layer norm and without residuals (Med3DVLM Eq. 6-7)."""

    def __init__(self, before: Shape, after: Shape) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(before[1])
        self.mlp1 = MLP(before[0], after[0])
        self.ln2 = nn.LayerNorm(before[1])
        self.mlp2 = MLP(before[1], after[1])

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *before) -> (B, *after)``."""
        mixed = self.mlp1(self.ln1(x).mT).mT
        return self.mlp2(self.ln2(mixed))


def _mixer(stream: Shape, target: Shape, layers: int) -> nn.Sequential:
    sizes = [stream, *zip(*(steps(a, b, layers) for a, b in zip(stream, target, strict=True)), strict=True)]
    return nn.Sequential(*(MixerLayer(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))


class Projector(nn.Module):
    """Image tokens from the features of volumes.

    Args:
        settings: which projector, for which streams. width: D.
    """

    def __init__(self, settings: ProjectorSettings, width: int) -> None:
        super().__init__()
        self.settings = settings
        kind, half = settings.kind, (settings.mixed_tokens // 2, width)
        if kind.mixer:
            self.low_mixer = _mixer(settings.low, half, kind.layers)
            self.high_mixer = _mixer(settings.high, half, kind.layers)
            return
        if kind.hybrid:
            self.low_mlp = MLP(settings.low[1], width, kind.layers)
        self.high_mlp = MLP(settings.high[1], width, kind.layers)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """``(B, T_low, E_low), (B, T_high, E_high) -> (B, N, D)``.

        Raises:
            ValueError: the features are not of the shapes that this projector is made for.
        """
        self._check(low, high)
        if not self.settings.kind.hybrid:
            return self.high_mlp(high)
        if self.settings.kind.mixer:
            return cat([self.low_mixer(low), self.high_mixer(high)], dim=1)
        return cat([self.low_mlp(low), self.high_mlp(high)], dim=1)

    def _check(self, low: Tensor, high: Tensor) -> None:
        found = tuple(low.shape[1:]), tuple(high.shape[1:])
        made_for = self.settings.low, self.settings.high
        if found != made_for or len(low) != len(high):
            raise ValueError(
                f"features: low {tuple(low.shape)} and high {tuple(high.shape)}, the projector is made for volumes of "
                f"{made_for[0]} and {made_for[1]}; encode them with this model's encoder"
            )
