"""What a slice-wise model must offer to be pruned.

Legend: B rows, L columns, S slices of a volume, M tokens of a slice, P pixels of a token, N all tokens of the slices
that are encoded, g patches of a token, C width of the language model, V width of the tower, d width of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from medpruner.slices import Volume
from medpruner.towers import Reading

Inputs = dict[str, Any]
"""Keyword arguments of a model's ``forward`` or ``generate``."""


@dataclass(frozen=True)
class Encoded:
    """What the tower says of some slices, which follow each other as they do in the prompts.

    Attributes:
        features: (N, C), what the language model reads.
        deep: further features (N, C) for its lower layers (Qwen3-VL's deep-stack), or none.
        patches: (N, g, V), the tokens' patches before the projector.
        deep_patches: the same of ``deep``.
        readings: block -> attention received (N,) and keys (N, d), averaged over the patches of each token.
        reading_seconds: wall time that reading took, within the tower's.
    """

    features: Tensor
    deep: list[Tensor]
    patches: Tensor
    deep_patches: list[Tensor]
    readings: dict[int, Reading]
    reading_seconds: float


class Backbone(Protocol):
    """One model, as its public modules."""

    pixel_keys: ClassVar[tuple[str, ...]]
    """Inputs that hold pixels; what has none of them is not pruned."""

    returns_prompt: ClassVar[bool]
    """Whether what its ``generate`` returns begins with the prompt."""

    def __init__(self, model: nn.Module) -> None: ...

    @property
    def depth(self) -> int:
        """Blocks of the tower."""
        ...

    def volumes(self, inputs: Inputs, label_tokens: int) -> list[Volume]:
        """Where the slices stand in the prompts. Raises `ValueError` if prompt and pixels do not fit."""
        ...

    def pixels(self, inputs: Inputs, volumes: Sequence[Volume]) -> list[Tensor]:
        """(S, M, P) normalised pixels of each volume."""
        ...

    def encode(self, inputs: Inputs, wanted: Sequence[Tensor], blocks: Sequence[int]) -> Encoded:
        """Run the tower on the wanted slices (bool (S,) for each volume) and read these blocks of it."""
        ...

    def project(self, patches: Tensor, deep: int | None = None) -> Tensor:
        """The projector: (N, g, V) -> (N, C); deep: which of the deep-stack's instead."""
        ...

    def embed(self, inputs: Inputs) -> Tensor:
        """(B, L, C) embeddings of the prompts, with anything where visual tokens will stand."""
        ...

    def positions(self, inputs: Inputs) -> Tensor:
        """Rotary positions of the whole prompts: (B, L), or (3, B, L) for time, height and width."""
        ...

    def prompt(self, given: Inputs, columns: "Columns", visual: Tensor) -> Inputs:
        """Further inputs of the shorter prompt that only this model has. visual: bool (B, L'), where they stand."""
        ...

    def generate(self, own: Callable[..., Any], shorter: Inputs) -> Any:
        """The model's ``own`` generate on a shorter prompt, given as embeddings."""
        ...

    def stack(self, model: nn.Module, visual: Tensor, deep: list[Tensor]) -> Callable[[], None]:
        """Give the language model its deep-stack features at the next prefill; the call takes that back."""
        ...


Columns = Callable[[Tensor, int], Tensor]
"""Takes (B, L) and a fill value, gives (B, L'): the columns that stay, rows padded on the left."""
