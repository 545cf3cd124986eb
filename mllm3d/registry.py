"""Names of recipes, adapters and converters, and where they live.

These strings are the only place where `mllm3d` knows model packages. What they name is imported on use, so
that `mllm3d --help` stays quick and a missing model package is an error only for those who ask for it.
"""

import difflib
import importlib
from typing import Any

from mllm3d.errors import UserError

RECIPES: dict[str, str] = {
    "med3dvlm.contrastive": "med3dvlm.recipes.contrastive:Contrastive",
    "med3dvlm.finetune": "med3dvlm.recipes.language:Finetune",
    "med3dvlm.projector": "med3dvlm.recipes.language:ProjectorRecipe",
    "med3dvlm.text": "med3dvlm.recipes.text:Text",
    "medpruner.slicewise": "medpruner.recipes.evaluation:Slicewise",
    "photon.backbone": "photon.recipes.backbone:Backbone",
    "photon.phase1": "photon.recipes.phases:Phase1",
    "photon.phase2": "photon.recipes.phases:Phase2",
}
"""`recipe:` of a config -> "module:class" of an `mllm3d.training.recipe.Recipe`."""

ADAPTERS: dict[str, str] = {
    "gemma3": "medpruner.recipes.adapter:SlicewiseAdapter",
    "med3dvlm": "med3dvlm.recipes.adapter:Med3DVLMAdapter",
    "photon": "photon.recipes.adapter:PhotonAdapter",
    "qwen2_5_vl": "medpruner.recipes.adapter:SlicewiseAdapter",
    "qwen3_vl": "medpruner.recipes.adapter:SlicewiseAdapter",
}
"""`model_type` of a checkpoint's config.json -> "module:class" of an `mllm3d.inference.adapter.Adapter`."""

EMBEDDERS: dict[str, str] = {"med3dclip": "med3dvlm.recipes.adapter:Med3DCLIPAdapter"}
"""`model_type` of a checkpoint's config.json -> "module:class" of an `mllm3d.inference.adapter.Embedder`."""

EMBEDDING_RECIPES = {"med3dvlm.contrastive"}
"""Recipes whose models are embedders: their evaluation is retrieval."""

CONVERTERS: dict[str, str] = {
    "gguf": "mllm3d.release.gguf:Gguf",
    "med3dvlm": "med3dvlm.published:PublishedMed3DVLM",
    "photon": "photon.published:PublishedPhoton",
    "qwen2_5_vl": "photon.slicewise:SlicewisePhoton",
}
"""Format of published checkpoints -> "module:class" of a `Converter` or `Reader` of `mllm3d.release.convert`."""


def recipe_class(name: str) -> Any:
    """The recipe class of this name. Raises `UserError` with the nearest name where there is none."""
    return _resolve(name, RECIPES, "recipe")


def adapter_class(model_type: str) -> Any:
    """The inference adapter for checkpoints of this `model_type`. Raises `UserError` for an unknown one."""
    return _resolve(model_type, ADAPTERS, "model_type")


def embedder_class(model_type: str) -> Any:
    """The embedder for checkpoints of this `model_type`. Raises `UserError` for an unknown one."""
    return _resolve(model_type, EMBEDDERS, "model_type")


def converter_class(name: str) -> Any:
    """The converter of published checkpoints of this name. Raises `UserError` for an unknown one."""
    return _resolve(name, CONVERTERS, "published format")


def _resolve(name: str, table: dict[str, str], what: str) -> Any:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{what} {name!r}: unknown{hint} (known: {', '.join(sorted(table))})")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
