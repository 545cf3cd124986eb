"""A slice-wise model that prunes: ``attach`` and ``detach``.

The model stays the one it was; its ``forward`` is hooked and its ``generate`` wrapped. A call with pixels becomes a
call with the embeddings of a shorter prompt: slices that go never enter the tower, tokens that go never enter the
language model, and what stays keeps the positions it had in the whole prompt.

Legend: B rows, L columns of the given prompt, L' of the shorter one, S slices of a volume, M tokens of a slice,
N tokens of the slices that were encoded, C width of the language model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from medpruner.backbones import backbone_of
from medpruner.backbones.base import Backbone, Encoded, Inputs
from medpruner.clustering import Clusters, merge
from medpruner.methods import Method, method_of
from medpruner.settings import MedPruner, PruningSettings
from medpruner.slices import Pruned, Report, Slice, Volume
from medpruner.towers import Reading, clock

NAME = "medpruner"
"""Attribute of a model that prunes."""


@dataclass(frozen=True)
class _Kept:
    """What is left of a volume: its slices that were encoded, their tokens (bool (S, M)), and the features of these
    tokens, one after the other, with those of the deep-stack behind."""

    items: list[Slice]
    tokens: Tensor
    features: list[Tensor]


class Pruner:
    """What ``attach`` puts into ``model.medpruner``.

    Attributes:
        settings: the method and what it was told.
        report: of the last call that had pixels; None before the first.
    """

    def __init__(self, model: nn.Module, settings: PruningSettings) -> None:
        self.backbone: Backbone = backbone_of(model)
        self.settings = settings
        self.report: Report | None = None
        method_of(settings, self.backbone.depth)  # what is wrong is said now
        self._model = cast(Any, model)
        self._generate = self._model.generate
        self._hook = model.register_forward_pre_hook(self._forward, with_kwargs=True)
        self._model.generate = self.generate

    def remove(self) -> None:
        """Take hook and wrapper away."""
        self._hook.remove()
        del self._model.generate

    def _forward(self, _module: nn.Module, args: Any, kwargs: Inputs) -> Any:
        if args and any(kwargs.get(key) is not None for key in self.backbone.pixel_keys):
            raise ValueError("a pruned model takes its inputs by name: model(**inputs)")
        if not self._shows(kwargs):
            return None
        inputs, visual, deep = self.prune(kwargs)
        del inputs["input_ids"]  # embeddings stand for them
        done = self.backbone.stack(self._model, visual, deep)

        def clear(*_: Any) -> None:
            done()
            handle.remove()

        handle = self._model.register_forward_hook(clear, always_call=True)
        return args, inputs

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """``generate`` of the model on the shorter prompt; the tokens it returns begin with the whole prompt."""
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if not self._shows(kwargs):
            return self._generate(**kwargs)
        given = kwargs["input_ids"]
        shorter, visual, deep = self.prune(kwargs)
        done = self.backbone.stack(self._model, visual, deep)
        try:
            out = self.backbone.generate(self._generate, shorter)
        finally:
            done()
        if not self.backbone.returns_prompt:
            return out
        sequences = out if isinstance(out, Tensor) else out.sequences
        width = shorter["input_ids"].shape[1]
        whole = torch.cat([given.repeat_interleave(len(sequences) // len(given), 0), sequences[:, width:]], 1)
        if isinstance(out, Tensor):
            return whole
        out.sequences = whole
        return out

    def _shows(self, kwargs: Inputs) -> bool:
        shows = any(kwargs.get(key) is not None for key in self.backbone.pixel_keys)
        past = kwargs.get("past_key_values")
        if shows and past is not None and past.get_seq_length():
            raise ValueError("past_key_values: pixels behind a filled cache can't be pruned; start a new prompt")
        if shows and kwargs.get("input_ids") is None:
            raise ValueError("input_ids: missing; a pruned model finds its slices by the prompt's placeholders")
        return shows

    # --- one call -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(self, inputs: Inputs) -> tuple[Inputs, Tensor, list[Tensor]]:
        """The inputs of the shorter prompt, with embeddings instead of pixels.

        Returns:
            the inputs, where visual tokens stand in them (bool (B, L')), and the deep-stack's features of these, row
            by row.
        """
        volumes = self.backbone.volumes(inputs, self.settings.label_tokens)
        device = inputs["input_ids"].device
        method = method_of(self.settings, self.backbone.depth)
        start = clock(device)
        stay = [method.slices(pixels).cpu() for pixels in self.backbone.pixels(inputs, volumes)]
        filtered = clock(device)
        wanted = [torch.ones_like(flags) for flags in stay] if self._encodes_all else stay
        encoded = self.backbone.encode(inputs, wanted, method.blocks)
        encoded_at = clock(device)
        report = Report([Pruned.empty(volume) for volume in volumes])
        kept = self._choose(volumes, stay, wanted, encoded, method, report)
        chosen = clock(device)
        result = self._shorten(inputs, volumes, stay, kept, report)
        report.seconds = {
            "tower": encoded_at - filtered - encoded.reading_seconds,
            "pruner": filtered - start + encoded.reading_seconds + chosen - encoded_at,
            "prompt": clock(device) - chosen,
        }
        self.report = report
        return result

    @property
    def _encodes_all(self) -> bool:
        return isinstance(self.settings, MedPruner) and self.settings.encode_dropped

    @property
    def _tokens_of_dropped(self) -> int:
        return self.settings.dropped_tokens if isinstance(self.settings, MedPruner) else 0

    def _choose(
        self,
        volumes: Sequence[Volume],
        stay: Sequence[Tensor],
        wanted: Sequence[Tensor],
        encoded: Encoded,
        method: Method,
        report: Report,
    ) -> list[_Kept]:
        """Volume by volume, in the order of what was encoded."""
        found, at = [], 0
        for v, volume in enumerate(volumes):
            items = [item for item, flag in zip(volume, wanted[v].tolist(), strict=True) if flag]
            rows = slice(at, at + len(items) * volume[0].tokens)
            at = rows.stop
            stays = stay[v][wanted[v]].to(encoded.features.device)
            readings = {
                b: Reading(*(x[rows].unflatten(0, (len(items), -1))[stays] for x in (r.received, r.keys)))
                for b, r in encoded.readings.items()
            }
            choice = method.tokens(v, int(stays.sum()), volume[0].grid, readings)
            tokens = (torch.arange(volume[0].tokens) < self._tokens_of_dropped).repeat(len(items), 1).to(stays.device)
            tokens[stays] = choice.tokens.to(stays.device)
            found.append(_Kept(items, tokens, self._features(encoded, rows, stays, tokens, choice.clusters)))
            pruned = report.volumes[v]
            pruned.slices |= stay[v]
            pruned.tokens[wanted[v]] = tokens.cpu()
            if choice.clusters is not None:
                owners = choice.clusters.centres.cpu() // volume[0].tokens
                pruned.centres[stay[v]] = torch.bincount(owners, minlength=int(stays.sum()))
        return found

    def _features(
        self, encoded: Encoded, rows: slice, stays: Tensor, tokens: Tensor, merged: Clusters | None
    ) -> list[Tensor]:
        """A volume's features and those of the deep-stack, of the tokens that stay; centres hold their clusters."""
        layers = [layer[rows].unflatten(0, tokens.shape) for layer in (encoded.features, *encoded.deep)]
        if merged is None or not len(merged.members):
            return [layer[tokens] for layer in layers]
        before_projector = isinstance(self.settings, MedPruner) and self.settings.features == "tower"
        found = []
        for index, layer in enumerate(layers):
            features = layer[stays].flatten(0, 1)
            if before_projector:
                patches = [encoded.patches, *encoded.deep_patches][index][rows].unflatten(0, tokens.shape)[stays]
                centres = merge(patches.flatten(0, 1).flatten(1), merged).unflatten(1, patches.shape[2:])
                centres = self.backbone.project(centres, None if index == 0 else index - 1)
            else:
                centres = merge(features, merged)
            features[merged.centres] = centres.to(features.dtype)
            whole = layer.clone()
            whole[stays] = features.view_as(whole[stays])
            found.append(whole[tokens])
        return found

    def _shorten(
        self,
        inputs: Inputs,
        volumes: Sequence[Volume],
        stay: Sequence[Tensor],
        kept: Sequence[_Kept],
        report: Report,
    ) -> tuple[Inputs, Tensor, list[Tensor]]:
        """The columns that stay, moved to the right end of a narrower prompt."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        stays = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().clone()
        visual = torch.zeros_like(stays)
        for volume, flags in zip(volumes, stay, strict=True):
            for item, flag in zip(volume, flags.tolist(), strict=True):
                first, last = (item.start, item.end) if flag or self._tokens_of_dropped else item.region
                stays[item.row, first:last] = False
        for of in kept:
            for item, tokens in zip(of.items, of.tokens.to(visual.device), strict=True):
                visual[item.row, item.start : item.end] = tokens
        stays |= visual
        embeds, layers = self._placed(inputs, visual, kept)
        report.columns = [row.nonzero()[:, 0].cpu() for row in stays]
        order, filled = _to_the_right(stays)

        def columns(values: Tensor, fill: float) -> Tensor:
            taken = values.gather(1, order)
            return taken.masked_fill(~filled, fill)

        positions = self.backbone.positions(inputs)
        shorter = {k: v for k, v in inputs.items() if k not in _REPLACED and not k.endswith("_grid_thw")}
        for key in self.backbone.pixel_keys:
            shorter.pop(key, None)
        seen = columns(visual, False)
        shorter |= {
            "input_ids": columns(ids, 0),
            "inputs_embeds": embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
            * filled[..., None].to(embeds.dtype),
            "attention_mask": filled.long(),
            "position_ids": _moved(positions, columns, filled),
            **self.backbone.prompt(inputs, columns, seen),
        }
        if inputs.get("labels") is not None:
            shorter["labels"] = columns(inputs["labels"], -100)
        return shorter, seen, layers

    def _placed(self, inputs: Inputs, visual: Tensor, kept: Sequence[_Kept]) -> tuple[Tensor, list[Tensor]]:
        """Embeddings (B, L, C) with the features at their places, and the deep-stack's row by row."""
        embeds = self.backbone.embed(inputs).clone()
        by_place = sorted(kept, key=lambda of: (of.items[0].row, of.items[0].start))
        layers = [torch.cat(parts) for parts in zip(*(of.features for of in by_place), strict=True)]
        embeds[visual] = layers[0].to(embeds)
        return embeds, layers[1:]


_REPLACED = ("input_ids", "attention_mask", "position_ids", "labels", "mm_token_type_ids", "second_per_grid_ts")


def _to_the_right(stays: Tensor) -> tuple[Tensor, Tensor]:
    """Which column comes where, rows ending together: index (B, L') and bool (B, L'), false where nothing is."""
    counts = stays.sum(1)
    width = int(counts.max())
    order = torch.argsort(stays.long(), dim=1, stable=True)[:, -width:]  # what stays comes last, in its order
    filled = torch.arange(width, device=stays.device) >= (width - counts)[:, None]
    return order, filled


def _moved(positions: Tensor, columns: Callable[[Tensor, float], Tensor], filled: Tensor) -> Tensor:
    """Rotary positions of what stays: (B, L'), or (4, B, L') with the text's own in front, as transformers has it."""
    if positions.ndim == 2:
        return columns(positions, 0)
    text = (filled.long().cumsum(1) - 1).clamp(min=0)
    return torch.stack([text, *(columns(axis, 0) for axis in positions)])


def attach(model: nn.Module, settings: PruningSettings | None = None) -> nn.Module:
    """Make a model prune, until :func:`detach`; it is the same object.

    ``model(**inputs)`` and ``model.generate(**inputs)`` take what they took. Logits are those of the shorter prompt;
    ``model.medpruner.report`` says what stayed.

    Args:
        settings: one of ``medpruner.settings``; by default MedPruner's own.

    Raises:
        ValueError: the model is of a kind that can't be pruned, prunes already, or has not the block to be read.
    """
    if getattr(model, NAME, None) is not None:
        raise ValueError("the model prunes already; detach it first")
    setattr(model, NAME, Pruner(model, settings or MedPruner()))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Give the model back as it was before :func:`attach`.

    Raises:
        ValueError: it does not prune.
    """
    pruner = getattr(model, NAME, None)
    if pruner is None:
        raise ValueError("the model does not prune; attach a method first")
    pruner.remove()
    delattr(model, NAME)
    return model
