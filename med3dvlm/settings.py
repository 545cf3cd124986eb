"""Settings that config.json keeps as mappings."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def settings_from(kind: type[Kind], values: Mapping[str, Any], name: str) -> Kind:
    """A dataclass from a mapping; ``name`` is the mapping's own.

    Raises:
        ValueError: naming a key that the dataclass does not have, or what the dataclass refuses.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**values)
