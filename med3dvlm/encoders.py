"""Image encoders by name: ``dcformer-small``, ``vit3d``, ``timm:<model>``.

All map ``(B, C, D, H, W)`` in [0, 1] to :class:`~med3dvlm.features.Features`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from med3dvlm.dcformer import VARIANTS, DCFormer
from med3dvlm.features import Features, VolumeEncoder
from med3dvlm.slicewise import PREFIX, SliceEncoder
from med3dvlm.vit3d import ViT3D

__all__ = ["NAMES", "Features", "VolumeEncoder", "build_encoder"]

NAMES = (*(f"dcformer-{variant}" for variant in VARIANTS), "vit3d")
"""All but timm's models."""


def build_encoder(spec: str | Mapping[str, Any]) -> VolumeEncoder:
    """The encoder that a specification describes.

    Args:
        spec: a name, or a mapping of ``name`` and any of that encoder's settings: ``size`` (depth, height, width) and
            ``channels`` of every one, and what the constructor of its class takes; ``layers`` and ``widths``, say,
            make a DCFormer of any shape. The result's own ``spec`` is complete and can be saved.

    Raises:
        ValueError: an unknown name or setting, or values that the encoder refuses.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.get("name")
    if not isinstance(name, str):
        raise ValueError(f"encoder: no name is given; take one of {', '.join(NAMES)} or {PREFIX}<model>")
    kind, defaults = _kind(name)
    known = list(inspect.signature(kind).parameters)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f", the nearest name is {near[0]}" if near else ""
            raise ValueError(f"encoder: {name} has no setting {key!r}{hint}; it has {', '.join(known)}")
    return kind(**{**defaults, **given})


def _kind(name: str) -> tuple[Callable[..., VolumeEncoder], dict[str, Any]]:
    """The class behind a name, and what the name says about its settings."""
    family, _, variant = name.partition("-")
    if family == "dcformer" and variant in VARIANTS:
        return DCFormer, asdict(VARIANTS[variant])
    if name == "vit3d":
        return ViT3D, {}
    if name.startswith(PREFIX) and name != PREFIX:
        return SliceEncoder, {}
    near = difflib.get_close_matches(name, NAMES, 1)
    hint = f"the nearest name is {near[0]}" if near else f"take one of {', '.join(NAMES)} or {PREFIX}<model>"
    raise ValueError(f"encoder: {name!r} is not known; {hint}")
