"""What a manifest's row says about the organ and the finding that its question names.

Convention: `meta.organ` names the organ, and `meta.organ_labels` lists its ids in the row's label map, as an
integer or as text ("10,11"); likewise `meta.finding` and `meta.finding_labels`. The words `organ` and
`finding` are settings (`evaluation.organ_key`, `evaluation.finding_key`).
"""

from typing import Literal, NamedTuple

from mllm3d.config import EvaluationConfig
from mllm3d.data.manifest import Row
from mllm3d.data.volumes import UNKNOWN_LABEL
from mllm3d.errors import UserError

Of = Literal["organ", "finding"]
KINDS: tuple[Of, Of] = ("organ", "finding")
LAST_LABEL = UNKNOWN_LABEL - 1


class Region(NamedTuple):
    """A named part of a volume; without label ids it can be compared with others but not be measured."""

    name: str
    labels: tuple[int, ...]

    def is_apart_from(self, other: "Region") -> bool:
        """Whether it is another region that shares no label with it."""
        return self.name != other.name and not set(self.labels) & set(other.labels)


Named = dict[Of, Region]
"""What one question names: an organ, a finding, both or neither."""


def named_regions(row: Row, settings: EvaluationConfig) -> Named:
    """What the row's question names. Raises `UserError` for label ids that are none."""
    found: Named = {}
    for kind, key in zip(KINDS, (settings.organ_key, settings.finding_key), strict=True):
        name, labels = row.meta.get(key), _labels(row, f"{key}_labels")
        if labels or (name and kind == "organ"):
            found[kind] = Region(str(name) if name else f"label {','.join(map(str, labels))}", labels)
    return found


def _labels(row: Row, key: str) -> tuple[int, ...]:
    given = row.meta.get(key)
    parts = [] if given is None else str(given).split(",")
    try:
        labels = tuple(sorted({int(part) for part in parts}))
        if any(not 0 < label <= LAST_LABEL for label in labels):
            raise ValueError(f"{labels} are not in range")
    except ValueError as error:
        raise UserError(
            f"row {row.id}: meta.{key}: {given!r} are no ids of a label map; give whole numbers from 1 to "
            f'{LAST_LABEL}, several with commas: "10,11"'
        ) from error
    return labels
