"""Photon: Qwen2.5-VL reading 3D volumes, with visual tokens dropped per question.

Legend: R rows (one question each), L row length, T packed tokens, S packed tokens after dropping, D width,
N visual tokens of a volume, A label tokens, V vocabulary.

What differs from ``Qwen2_5_VLForConditionalGeneration``:
- rows that share a volume (``group_index``) share its vision pass and its prefix; nothing is padded;
- after ``scheduling_layer`` decoder layers each row goes on with its own kept tokens (Photon Sec. 3.2-3.3);
- logits are computed where there is a label, or for the last token.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel, Qwen2_5_VLTextModel
from transformers.utils import ModelOutput

from photon.attention import ATTENTION_NAME, Plan, RowsPlan, TreePlan
from photon.configuration_photon import PhotonConfig
from photon.packing import Layout, pack
from photon.scheduling import (
    PredictorLinear,
    Retention,
    ThresholdPredictor,
    decide,
    instruction_weights,
    join,
    saliency_logits,
    weighted_query,
)
from photon.surrogate import DropTokens
from photon.vision import PhotonVisionTower

Reduction = Literal["none", "soft", "hard"]


@dataclass
class PhotonOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: mean cross-entropy over the label tokens (fp32).
        logits: ``(A, V)`` at the label positions in packed order, or ``(R, 1, V)`` for the last tokens.
        token_losses: ``(A)`` cross-entropy of each label token.
        past_key_values: the cache, when asked for.
        keep_rate: ``(R)`` share of the visual tokens that stayed.
        mean_probability: ``(R)`` r of Eq. 18, with gradient.
        kept: ``(R, N)`` bool.
        visual_embeds: ``(tokens of all volumes, D)`` as they entered the decoder.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    past_key_values: Cache | None = None
    keep_rate: Tensor | None = None
    mean_probability: Tensor | None = None
    kept: Tensor | None = None
    visual_embeds: Tensor | None = None


@dataclass
class Sequences:
    """The packed sequences above the scheduling layer, one per row.

    Attributes:
        index: ``(S)`` packed index below the scheduling layer of each token.
        cell: ``(S)`` its place in the flattened ``(R, N)`` of the rows' visual tokens, -1 for text.
        lengths: tokens of each row.
        moved: ``(T)`` where a suffix token now stands (prefix tokens may stand in several places).
    """

    index: Tensor
    cell: Tensor
    lengths: list[int]
    moved: Tensor


@dataclass
class DecodeState:
    """What decoding needs beside keys and values: rows are padded, and layers differ in length.

    Attributes:
        masks: per decoder layer ``(R, keys)`` bool.
        position: ``(R)`` rotary position of the next token.
    """

    masks: list[Tensor]
    position: Tensor


def _select(layout: Layout, kept: Tensor) -> Sequences:
    """Each row's text and kept visual tokens, end to end. The lengths cost the pass's one host synchronisation."""
    row_visual = layout.row_visual
    stays = torch.where(row_visual < 0, True, kept.gather(1, row_visual.clamp(min=0)))
    stays = stays & (layout.row_tokens >= 0)
    lengths = stays.sum(1).tolist()
    flat = torch.nonzero_static(stays.flatten(), size=sum(lengths))[:, 0]
    index = layout.row_tokens.flatten()[flat]
    ordinal = row_visual.flatten()[flat]
    cell = torch.where(ordinal < 0, -1, flat // row_visual.shape[1] * kept.shape[1] + ordinal)
    moved = torch.zeros_like(layout.source).scatter_(0, index, torch.arange(len(index), device=index.device))
    return Sequences(index, cell, lengths, moved)


def _pad_keys(keys: Tensor, table: Tensor) -> Tensor:
    """Packed ``(J, T, E)`` as padded ``(R, J, L, E)`` by an index table ``(R, L)`` with -1 for padding."""
    return keys[:, table.clamp(min=0)].transpose(0, 1)


def _length_table(lengths: list[int], device: torch.device) -> Tensor:
    """Index table ``(R, longest)`` of sequences that lie end to end, -1 behind each end."""
    size = torch.tensor(lengths, device=device)
    column = torch.arange(max(lengths), device=device)
    return torch.where(column < size[:, None], column + (size.cumsum(0) - size)[:, None], -1)


class PhotonPreTrainedModel(Qwen2_5_VLPreTrainedModel):
    """Initialization of what Qwen2.5-VL does not have."""

    config_class = PhotonConfig
    config: PhotonConfig

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PredictorLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class PhotonModel(PhotonPreTrainedModel):
    """Vision tower, decoder and threshold predictor, without the language-model head."""

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config)
        self.visual = PhotonVisionTower.from_config(config)
        self.language_model = Qwen2_5_VLTextModel._from_config(config.text_config)
        self.language_model.config._attn_implementation = ATTENTION_NAME
        self.scheduling = config.scheduling_settings
        self.threshold_predictor: ThresholdPredictor | None = None
        if self.scheduling is not None and self.scheduling.keep_ratio is None:
            width = self.scheduling.predictor_width or max(1, config.text_config.hidden_size // 8)
            scale, bias = self.scheduling.threshold_scale, self.scheduling.predictor_bias
            self.threshold_predictor = ThresholdPredictor(width, scale, bias)
        self.post_init()

    def embed(self, input_ids: Tensor, layout: Layout, visual_embeds: Tensor | None) -> Tensor:
        """Packed embeddings ``(T, D)`` with the volumes' tokens in their places (Photon Eq. 2)."""
        embeds = self.language_model.embed_tokens(input_ids.flatten()[layout.source])
        if visual_embeds is None:
            return embeds
        if len(visual_embeds) != len(layout.visual):
            raise ValueError(f"pixel_values_videos: {len(visual_embeds)} tokens for {len(layout.visual)} places")
        return embeds.index_copy(0, layout.visual, visual_embeds.to(embeds.dtype))

    def run(self, hidden: Tensor, layers: range, rotary: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """Decoder ``layers`` over packed ``(T, D)`` with rotary tables ``(1, T, E)``."""
        x = hidden[None]
        for i in layers:
            x = self.language_model.layers[i](x, attention_mask=None, position_embeddings=rotary, plan=plan)
        return x[0]

    def schedule(self, layout: Layout, watched: tuple[Tensor, Tensor], random_seeds: Tensor | None) -> Retention:
        """Which visual tokens each row keeps (Eq. 3-9), from the queries and keys of the scheduling layer."""
        assert self.scheduling is not None
        query, key = (x.detach().float() if self.scheduling.detach else x.float() for x in watched)
        present = layout.instruction >= 0
        places = layout.instruction.clamp(min=0)
        asked_q = query[:, places].permute(1, 2, 0, 3)  # (R, Q, H, E)
        weights = instruction_weights(asked_q, key[:, places].permute(1, 2, 0, 3), present)
        question = weighted_query(asked_q, weights, key.shape[0])
        visual_keys = key[:, layout.visual].split(layout.visual_counts, dim=1)
        questions = question.split([len(s) for s in layout.suffix_lengths])
        logits = [saliency_logits(q, k) for q, k in zip(questions, visual_keys, strict=True)]
        if len(set(layout.visual_counts)) == 1:  # usual: all volumes have as many tokens
            logits = [torch.cat(logits)]
        sizes = [len(u) for u in logits]
        seeds = [None] * len(sizes) if random_seeds is None else random_seeds[layout.row_order].split(sizes)
        asked = present.any(1).split(sizes)
        return join([self._decide(*row) for row in zip(logits, asked, seeds, strict=True)])

    def _decide(self, logits: Tensor, asked: Tensor, random_seeds: Tensor | None) -> Retention:
        assert self.scheduling is not None
        if logits.shape[1] == 0:  # rows without a volume
            nothing = torch.zeros_like(logits, dtype=torch.bool)
            return Retention(nothing, logits, logits.new_zeros(len(logits)), logits, nothing)
        return decide(logits, asked, self.threshold_predictor, self.scheduling, random_seeds)

    def drop(
        self, hidden: Tensor, layout: Layout, retention: Retention, soft: bool, weights: "LossWeights | None"
    ) -> tuple[Tensor, Sequences]:
        """The sequences above the scheduling layer and their hidden states ``(S, D)``.

        In the soft stage nothing is dropped and visual tokens are multiplied by q; in the hard stage the mask is
        straight-through (Eq. 10) with the surrogate gradient (Eq. 11-17).
        """
        if soft:
            sequences = _select(layout, retention.valid)
            q = F.pad(retention.probability.flatten(), (0, 1), value=1.0)  # the last entry serves text
            return hidden[sequences.index] * q[sequences.cell, None].to(hidden.dtype), sequences
        sequences = _select(layout, retention.kept)
        if not (torch.is_grad_enabled() and retention.probability.requires_grad):
            return hidden[sequences.index], sequences
        assert self.scheduling is not None
        weights = weights or LossWeights(1 / max(1, len(layout.targets)), 1 / layout.rows)
        labels = torch.bincount(layout.label_rows, minlength=layout.rows).clamp(min=1)
        dropped = DropTokens.apply(
            hidden, retention.probability, sequences.index, sequences.cell, retention.kept, retention.valid,
            1 / (labels * weights.token), weights.row, self.scheduling.surrogate,
        )  # fmt: skip
        return dropped, sequences

    def forward(
        self,
        input_ids: Tensor,
        layout: Layout,
        visual_embeds: Tensor | None,
        reduction: Reduction = "hard",
        random_seeds: Tensor | None = None,
        weights: "LossWeights | None" = None,
        record: bool = False,
    ) -> "Packed":
        """Decode a packed batch up to (and without) the final norm. See :class:`Packed`."""
        hidden = self.embed(input_ids, layout, visual_embeds)
        rotary = self.language_model.rotary_emb(hidden[None], layout.positions[:, None])
        layers = self.config.text_config.num_hidden_layers
        scheduled = self.scheduling is not None and reduction != "none" and len(layout.visual) > 0
        split = self.config.scheduling_layer if scheduled else layers
        tree = TreePlan(layout.prefix_lengths, layout.suffix_lengths, record, watch=split - 1 if scheduled else None)
        hidden = self.run(hidden, range(split), rotary, tree)
        if not scheduled:
            return Packed(hidden, None, None, tree.keys_values, split)
        assert tree.watched is not None
        retention = self.schedule(layout, tree.watched, random_seeds)
        hidden, sequences = self.drop(hidden, layout, retention, reduction == "soft", weights)
        rows = RowsPlan(sequences.lengths, record)
        own_rotary = (rotary[0][:, sequences.index], rotary[1][:, sequences.index])
        hidden = self.run(hidden, range(split, layers), own_rotary, rows)
        return Packed(hidden, sequences, retention, {**tree.keys_values, **rows.keys_values}, split)


@dataclass(frozen=True)
class LossWeights:
    """What one label token and one question weigh in the loss that is differentiated (see ``DropTokens``)."""

    token: float
    row: float


@dataclass
class Packed:
    """The decoder's last hidden states and what is needed to read them.

    Attributes:
        hidden: ``(T, D)``, or ``(S, D)`` after dropping.
        sequences: the sequences after dropping; None when nothing was scheduled.
        retention: the decision, rows in packed order.
        keys_values: per layer, when recorded.
        split: first layer that saw the short sequences.
    """

    hidden: Tensor
    sequences: Sequences | None
    retention: Retention | None
    keys_values: dict[int, tuple[Tensor, Tensor]]
    split: int

    def at(self, index: Tensor) -> Tensor:
        """Hidden states of suffix tokens by their packed index."""
        return self.hidden[index if self.sequences is None else self.sequences.moved[index]]


class PhotonForConditionalGeneration(PhotonPreTrainedModel, GenerationMixin):
    """Photon with its language-model head; loads and saves like any transformers model."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _supports_attention_backend = False

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config)
        self.model = PhotonModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.language_model.embed_tokens = value

    def layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        video_grid_thw: Tensor | None,
        group_index: Tensor | None,
        labels: Tensor | None,
    ) -> Layout:
        """Index tables of a batch (see :func:`photon.packing.pack`); a collator makes them on the host."""
        grids = [] if video_grid_thw is None else video_grid_thw.tolist()
        return pack(
            input_ids,
            attention_mask,
            grids,
            group_index,
            labels,
            self.config.special_tokens,
            self.config.geometry,
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        group_index: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        layout: Layout | None = None,
        reduction: Reduction = "hard",
        random_seeds: Tensor | None = None,
        weights: LossWeights | None = None,
        **kwargs: Any,
    ) -> PhotonOutput:
        """One pass over rows of text about volumes.

        Args:
            input_ids, attention_mask, labels: ``(R, L)``; labels are -100 where nothing is predicted.
            pixel_values_videos: ``(patches of all volumes, C d h w)``, group by group.
            video_grid_thw: ``(volumes, 3)`` patches along depth, height, width.
            group_index: ``(R)``; rows with the same value share their volumes and the text before them.
                Without it every row has its own.
            layout: index tables of this batch, if the collator made them already.
            reduction: ``none`` keeps every token, ``soft`` weighs them by q, ``hard`` drops.
            random_seeds: ``(R)``; when given, as many tokens as saliency would drop are dropped at random.
            weights: see :class:`LossWeights`; by default those of this batch's own mean.

        Raises:
            ValueError: volumes and visual tokens do not match (see :func:`photon.packing.pack`).
        """
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return self._decode(input_ids, past_key_values)
        if layout is None:
            layout = self.layout(input_ids, attention_mask, video_grid_thw, group_index, labels)
        layout = layout.to(input_ids.device)
        visual = None
        if pixel_values_videos is not None:
            assert video_grid_thw is not None
            visual = self.model.visual.encode(pixel_values_videos, video_grid_thw)
        record = bool(use_cache)
        packed = self.model(input_ids, layout, visual, reduction, random_seeds, weights, record)
        output = PhotonOutput(visual_embeds=visual)
        self._add_retention(output, packed, layout)
        wanted = layout.last if labels is None and not len(layout.targets) else layout.predicts
        logits = self.lm_head(self.model.language_model.norm(packed.at(wanted)))
        if len(layout.targets):
            output.token_losses = F.cross_entropy(logits.float(), layout.targets, reduction="none")
            output.loss, output.logits = output.token_losses.mean(), logits
        else:
            output.logits = logits[self._input_order(layout)][:, None]
        if record:
            output.past_key_values = self._fill(past_key_values, packed, layout)
        return output

    @staticmethod
    def _input_order(layout: Layout) -> list[int]:
        """Packed place of each row of the input."""
        order = [0] * layout.rows
        for place, row in enumerate(layout.row_order):
            order[row] = place
        return order

    def _add_retention(self, output: PhotonOutput, packed: Packed, layout: Layout) -> None:
        """Keep rates and masks, rows in the order of the input."""
        if packed.retention is not None:
            order = self._input_order(layout)
            output.keep_rate = packed.retention.keep_rate()[order]
            output.mean_probability = packed.retention.mean_probability()[order]
            output.kept = packed.retention.kept[order]

    def _fill(self, cache: Cache | None, packed: Packed, layout: Layout) -> Cache:
        """Write the keys and values of every layer into ``cache``, one padded row per row of the input.

        Below the scheduling layer a row keeps its whole sequence (what answers saw in training), above it only
        what stayed.
        """
        cache = DynamicCache() if cache is None else cache
        order = self._input_order(layout)
        below = layout.row_tokens[order]
        above = below
        if packed.sequences is not None:
            above = _length_table(packed.sequences.lengths, below.device)[order]
        masks = []
        for layer, (key, value) in sorted(packed.keys_values.items()):
            table = below if layer < packed.split else above
            cache.update(_pad_keys(key, table), _pad_keys(value, table), layer)
            masks.append(table >= 0)
        cache.photon = DecodeState(masks, layout.next_position[order])
        return cache

    def _decode(self, input_ids: Tensor, cache: Cache) -> PhotonOutput:
        """One more token per row, ``(R, 1)``, on a cache that :meth:`_fill` began."""
        state: DecodeState = cache.photon
        if input_ids.shape[1] != 1:
            raise ValueError(f"input_ids: {input_ids.shape[1]} tokens on a filled cache, expected 1")
        text = self.model.language_model
        x = text.embed_tokens(input_ids)
        rotary = text.rotary_emb(x, state.position[None, :, None].expand(3, -1, 1))
        for i, layer in enumerate(text.layers):
            state.masks[i] = F.pad(state.masks[i], (0, 1), value=True)
            mask = state.masks[i][:, None, None]
            x = layer(x, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, plan=None)
        state.position = state.position + 1
        return PhotonOutput(logits=self.lm_head(text.norm(x)), past_key_values=cache)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole prompt at first, then one token at a time; positions live with the cache."""
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values, "use_cache": True}
        names = (
            "attention_mask", "pixel_values_videos", "video_grid_thw", "group_index", "reduction", "random_seeds",
        )  # fmt: skip
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return {"input_ids": input_ids, "past_key_values": past_key_values, "use_cache": True, **given}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams and samples repeat the rows, never the volumes: repeated rows join the group of the first."""
        assert input_ids is not None
        if expand_size > 1:
            if kwargs.get("group_index") is None:
                kwargs["group_index"] = torch.arange(len(input_ids), device=input_ids.device)
            for name in ("attention_mask", "group_index", "random_seeds"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name].repeat_interleave(expand_size, dim=0)
            input_ids = input_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, kwargs
