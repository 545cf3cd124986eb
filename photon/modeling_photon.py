"""Photon: Qwen2.5-VL or Qwen3-VL reading 3D volumes, with visual tokens dropped per question.

Legend: R rows (one question each), L row length, T packed tokens, S packed tokens after dropping, D width,
N visual tokens of a volume, A label tokens, V vocabulary.

What differs from the backbones' own models:
- rows that share a volume (``group_index``) share its vision pass and its prefix; nothing is padded;
- after each of ``scheduling_layers`` each row goes on with its own kept tokens (Photon Sec. 3.2-3.3);
- logits are computed where there is a label, or for the last token.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
from transformers.utils import ModelOutput, logging

from photon.attention import ATTENTION_NAME, Plan, RowsPlan, ScorePlan, TreePlan
from photon.configuration_photon import PhotonConfig
from photon.decoding import DecodeState, EarlyCache, EncodedPrefix, KeysValues, Stage, fill
from photon.packing import Layout, pack
from photon.scheduling import (
    Chance,
    PredictorLinear,
    Retention,
    ThresholdPredictor,
    decide,
    instruction_weights,
    saliency_logits,
    weighted_query,
)
from photon.stream import GradientScale, LossWeights, Stream, advance, drop, select, unite, weigh
from photon.vision import TOWERS

logger = logging.get_logger(__name__)

TEXT_MODELS: dict[str, Any] = {"qwen2_5_vl_text": Qwen2_5_VLTextModel, "qwen3_vl_text": Qwen3VLTextModel}
"""By the ``model_type`` of a text configuration."""

Reduction = Literal["none", "soft", "hard"]
Flip = Literal["none", "replace", "add"]
Selection = Literal["saliency", "random"]


@dataclass
class PhotonOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: mean cross-entropy over the label tokens (fp32).
        logits: ``(A, V)`` at the label positions in packed order, or ``(R, 1, V)`` for the last tokens.
        token_losses: ``(A)`` cross-entropy of each label token.
        flipped_losses: ``(A)`` the same under the inverted mask, with ``flip="add"``.
        past_key_values: the cache, when asked for.
        keep_rate: ``(R)`` share of the visual tokens that stayed, or would have, where the mask was inverted.
        mean_probability: ``(R, drops)`` r of Eq. 18 at each scheduling layer, with gradient.
        kept: ``(R, N)`` bool, after the last drop; with ``flip="replace"`` before it is inverted.
        visual_embeds: ``(tokens of all volumes, D)`` as they entered the decoder.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    flipped_losses: Tensor | None = None
    past_key_values: Cache | None = None
    keep_rate: Tensor | None = None
    mean_probability: Tensor | None = None
    kept: Tensor | None = None
    visual_embeds: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """How one pass through the decoder treats visual tokens.

    Attributes:
        reduction: ``none`` keeps every token, ``soft`` weighs them by q, ``hard`` drops.
        chance: what is drawn at random in the decision, if anything is.
        flip: ``replace`` goes on with the inverted mask (Eq. 20); ``add`` has copies of all rows with it besides.
        learn: whether the decision gets a gradient; not on flipped and perturbed batches.
        weights: see :class:`LossWeights`; by default those of this batch's own mean.
        record: keep keys and values.
        prefix: an encoded volume to start from.
    """

    reduction: Reduction = "hard"
    chance: Chance | None = None
    flip: Flip = "none"
    learn: bool = True
    weights: LossWeights | None = None
    record: bool = False
    prefix: EncodedPrefix | None = None


@dataclass
class Decoded:
    """The decoder's last hidden states and what is needed to read them.

    Attributes:
        stream: the last stream, with its hidden states before the final norm.
        stages: the streams' layers. retentions: the decisions between them, rows in packed order.
        keys_values: per layer, when recorded. prefix: for another question, when recorded for one volume.
    """

    stream: Stream
    stages: list[Stage]
    retentions: list[Retention]
    keys_values: KeysValues
    prefix: EncodedPrefix | None = None

    def at(self, index: Tensor) -> Tensor:
        """Hidden states of suffix tokens by their index on entering the decoder."""
        return self.stream.hidden[self.stream.moved[index]]

    def flipped_at(self, index: Tensor) -> Tensor:
        """The same of the copies with the inverted mask."""
        assert self.stream.flipped_moved is not None
        return self.stream.hidden[self.stream.flipped_moved[index]]


def reaching(hidden: Tensor, unused: Tensor) -> Tensor:
    """``hidden``, with a gradient of zero for ``unused``.

    Under ZeRO-3 all ranks have to go back through the same modules, also through those that a batch has no use for.
    """
    return hidden + 0 * unused.sum().to(hidden.dtype)


class PhotonPreTrainedModel(PreTrainedModel):
    """What the library has to know of Photon, and the initialization of what the backbones do not have."""

    config_class = PhotonConfig
    config: PhotonConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLVisionBlock",
        "Qwen3VLTextDecoderLayer",
        "Qwen3VLVisionBlock",
    ]
    _supports_sdpa = True
    _supports_attention_backend = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PredictorLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class PhotonModel(PhotonPreTrainedModel):
    """Vision tower, decoder and threshold predictors (one per scheduling layer), without the head."""

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.visual = TOWERS[vision.model_type](vision, config.patches.voxels)
        self.language_model = TEXT_MODELS[text.model_type]._from_config(text)
        self.language_model.config._attn_implementation = ATTENTION_NAME
        self.scheduling = config.scheduling_settings
        self.threshold_predictors = nn.ModuleList()
        if self.scheduling is not None and self.scheduling.predicts:
            width = self.scheduling.predictor_width or max(1, text.hidden_size // 8)
            scale, bias = self.scheduling.threshold_scale, self.scheduling.predictor_bias
            self.threshold_predictors.extend(ThresholdPredictor(width, scale, bias) for _ in config.scheduling_layers)
        self.post_init()

    def embed(self, input_ids: Tensor, layout: Layout, visual_embeds: Tensor | None) -> Tensor:
        """``(T, D)`` embeddings in packed order, visual tokens in place (Photon Eq. 2)."""
        embeds = self.language_model.embed_tokens(input_ids.flatten()[layout.source])
        if visual_embeds is None:
            return embeds
        if len(layout.visual) == 0:
            return reaching(embeds, visual_embeds)  # of an empty volume
        if len(visual_embeds) != len(layout.visual):
            raise ValueError(f"pixel_values_videos: {len(visual_embeds)} tokens for {len(layout.visual)} places")
        return embeds.index_copy(0, layout.visual, visual_embeds.to(embeds.dtype))

    def run(
        self,
        hidden: Tensor,
        layers: range,
        rotary: tuple[Tensor, Tensor],
        plan: Plan,
        ordinal: Tensor,
        deepstack: list[Tensor],
    ) -> Tensor:
        """Decoder ``layers`` over packed ``(S, D)``; ``deepstack`` features enter after the first layers."""
        x = hidden[None]
        for i in layers:
            x = self.language_model.layers[i](x, attention_mask=None, position_embeddings=rotary, plan=plan)
            if i < len(deepstack):
                # The row of zeros behind the features is text's, whose ordinal is -1.
                x = x + F.pad(deepstack[i], (0, 0, 0, 1))[ordinal].to(x.dtype)
        return x[0]

    def probe(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Queries and keys of layer 0, before it runs."""
        layer, plan = self.language_model.layers[0], ScorePlan(watch=0)
        x = layer.input_layernorm(stream.hidden[None])
        layer.self_attn(x, attention_mask=None, position_embeddings=stream.rotary, plan=plan)
        assert plan.watched is not None
        return plan.watched

    def schedule(
        self, number: int, stream: Stream, layout: Layout, watched: tuple[Tensor, Tensor], chance: Chance | None
    ) -> Retention:
        """Which visual tokens each row keeps (Eq. 3-9), from queries ``(H, S, E)`` and keys ``(J, S, E)``.

        ``number``: of the scheduling layer, from 0.
        """
        assert self.scheduling is not None
        query, key = (x.detach().float() if self.scheduling.detach else x.float() for x in watched)
        present = stream.instruction >= 0
        places = stream.instruction.clamp(min=0)
        asked_q = query[:, places].permute(1, 2, 0, 3)  # (R, Q, H, E)
        own_keys = key[:, places].permute(1, 2, 0, 3)
        s = self.scheduling
        weights = instruction_weights(asked_q, own_keys, present, s.self_affinity, s.centrality_floor)
        question = weighted_query(asked_q, weights, key.shape[0])
        if stream.lengths is None:  # rows of a group read the same keys
            parts = zip(
                question.split([len(s) for s in layout.suffix_lengths]),
                key[:, layout.visual].split(layout.visual_counts, dim=1),
                strict=True,
            )
            width = stream.valid.shape[1]
            logits = torch.cat([F.pad(u, (0, width - u.shape[1])) for u in (saliency_logits(q, k) for q, k in parts)])
        else:
            logits = torch.einsum("rje,jrne->rn", question, key[:, stream.visual_at.clamp(min=0)])
        predictor: Any = self.threshold_predictors[number] if self.scheduling.predicts else None
        return decide(logits, stream.valid, present.any(1), predictor, self.scheduling, chance)

    def reduce(self, stream: Stream, retention: Retention, layout: Layout, how: Pass) -> Stream:
        """The stream above a scheduling layer.

        In the soft stage nothing is dropped and visual tokens are multiplied by q; in the hard stage the mask is
        straight-through (Eq. 10) with the surrogate gradient (Eq. 11-17).
        """
        assert self.scheduling is not None
        if how.reduction == "soft":
            chosen = select(stream, retention.valid)
            return advance(stream, chosen, weigh(stream, chosen, retention))
        if how.flip == "replace":
            chosen = select(stream, retention.flipped())
            return advance(stream, chosen, stream.hidden[chosen.index])
        chosen = select(stream, retention.kept, retention.rescued)
        if chosen.counts[0]:
            logger.warning_once("a question kept no visual token (no q above 0.5); its most probable one stays")
        scale, surrogate = GradientScale.of(layout, how.weights), self.scheduling.surrogate
        if self.scheduling.upper_layers == "union" and how.flip == "none":
            return unite(stream, chosen, retention, layout, scale, surrogate)
        hidden = drop(stream, chosen, retention, scale, surrogate)
        if how.flip == "none":
            return advance(stream, chosen, hidden)
        flipped = select(stream, retention.flipped())
        return advance(stream, chosen, torch.cat([hidden, stream.hidden[flipped.index]]), flipped)

    def forward(
        self, input_ids: Tensor, layout: Layout, visual_embeds: Tensor | None, deepstack: list[Tensor], how: Pass
    ) -> Decoded:
        """Decode a packed batch up to (and without) the final norm."""
        layers = self.config.text_config.num_hidden_layers
        drops = () if self.scheduling is None or how.reduction == "none" else self.config.scheduling_layers
        if how.flip == "add" and len(drops) > 1:
            raise ValueError("flip: add needs a single scheduling layer; use replace with several")
        if len(drops) > 1 and self.scheduling is not None and self.scheduling.upper_layers == "union":
            raise ValueError("scheduling.upper_layers: union needs a single scheduling layer; use own with several")
        bounds = [*drops, layers]
        stream, plan, encoded = self._enter(input_ids, layout, visual_embeds, deepstack, bounds[0], how)
        deepstack = deepstack if how.prefix is None else how.prefix.deepstack
        stages, keys_values, retentions = [Stage.of(stream, 0)], dict(plan.keys_values), []
        for number, (start, end) in enumerate(zip(drops, bounds[1:], strict=False)):
            watched = self.probe(stream) if start == 0 else plan.watched
            assert watched is not None
            retention = self.schedule(number, stream, layout, watched, how.chance)
            probability, learns = retention.probability, how.learn and how.flip != "replace"
            if not learns:
                retention.probability = probability.detach()
            retentions.append(retention)
            stream = self.reduce(stream, retention, layout, how)
            if not learns:
                stream.hidden = reaching(stream.hidden, probability)
            assert stream.lengths is not None
            plan = RowsPlan(stream.lengths, how.record, watch=end - 1)
            if stream.tree is not None:
                prefixes, visible = stream.tree
                plan = TreePlan(prefixes, layout.suffix_lengths, how.record, visible=visible)
            stream.hidden = self.run(stream.hidden, range(start, end), stream.rotary, plan, stream.ordinal, deepstack)
            stages.append(Stage.of(stream, start))
            keys_values |= plan.keys_values
        return Decoded(stream, stages, retentions, keys_values, encoded)

    def _enter(
        self,
        input_ids: Tensor,
        layout: Layout,
        visual_embeds: Tensor | None,
        deepstack: list[Tensor],
        end: int,
        how: Pass,
    ) -> tuple[Stream, Plan, EncodedPrefix | None]:
        """Layers 0 to ``end``, in which rows share their prefix; the prefix itself may be there already."""
        length, stored = sum(layout.prefix_lengths), how.prefix
        prefix_ids, prefix_positions = input_ids.flatten()[layout.source[:length]], layout.positions[:, :length]
        if stored is not None:
            stored.must_fit(prefix_ids, prefix_positions, layout.prefix_lengths, end)
            hidden = self.language_model.embed_tokens(input_ids.flatten()[layout.source[length:]])
        else:
            hidden = self.embed(input_ids, layout, visual_embeds)
        rotary = self.language_model.rotary_emb(hidden[None], layout.positions[:, None])
        watch, stored_keys = end - 1, None if stored is None else stored.keys_values
        plan = TreePlan(layout.prefix_lengths, layout.suffix_lengths, how.record, watch, stored_keys)
        whole = Stream.enter(hidden, rotary, layout)
        first = 0 if stored is None else length
        own_rotary = (rotary[0][:, first:], rotary[1][:, first:])
        hidden = self.run(hidden, range(end), own_rotary, plan, whole.ordinal[first:], deepstack)
        whole.hidden = hidden if stored is None else torch.cat([stored.hidden, hidden])
        encoded = stored
        if how.record and stored is None and len(layout.prefix_lengths) == 1 and length:
            kept = {i: (k[:, :length], v[:, :length]) for i, (k, v) in plan.keys_values.items()}
            encoded = EncodedPrefix(prefix_ids, prefix_positions, whole.hidden[:length], kept, end, deepstack)
        return whole, plan, encoded


class PhotonForConditionalGeneration(PhotonPreTrainedModel, GenerationMixin):
    """Photon with its language-model head; loads and saves like any transformers model."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

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
        token_index: Tensor | None = None,
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
            token_index,
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
        token_index: Tensor | None = None,
        reduction: Reduction = "hard",
        selection: Selection | None = None,
        threshold_noise: float = 0.0,
        seeds: Tensor | None = None,
        flip: Flip = "none",
        learn_scheduling: bool = True,
        weights: LossWeights | None = None,
        early_cache: EarlyCache = "keep",
        prefix: EncodedPrefix | None = None,
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
            token_index: ``(tokens of all volumes)`` which of them are there, counted through all volumes' grids;
                without it all are (see ``PhotonProcessor.skip_background``).
            selection: ``random`` drops as many tokens as saliency would, but drawn at random; as the model was
                trained (``scheduling.selection``) if None.
            threshold_noise: multiply each threshold by 1 + x, x uniform within plus and minus this (A.2.7).
            seeds: ``(R)`` by which a row's draws are made; drawn themselves if None.
            reduction, flip, learn_scheduling, weights: see :class:`Pass`.
            early_cache: which keys and values of dropped tokens the layers below the drop keep for generation:
                ``keep`` all, as answers saw them in training, or ``evict`` (Photon Sec. 3.2).
            prefix: an encoded volume in place of ``pixel_values_videos``: ``past_key_values.photon.prefix`` of an
                earlier pass with a cache over one volume.

        Raises:
            ValueError: volumes and visual tokens do not match (see :func:`photon.packing.pack`).
        """
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return self._decode(input_ids, past_key_values)
        if layout is None:
            layout = self.layout(input_ids, attention_mask, video_grid_thw, group_index, labels, token_index)
        layout = layout.to(input_ids.device)
        visual, deepstack = None, []
        if pixel_values_videos is not None and prefix is None:
            assert video_grid_thw is not None
            visual, deepstack = self.model.visual.encode(pixel_values_videos, video_grid_thw, token_index)
        chance = self._chance(layout, selection, threshold_noise, seeds)
        how = Pass(reduction, chance, flip, learn_scheduling, weights, bool(use_cache), prefix)
        decoded = self.model(input_ids, layout, visual, deepstack, how)
        output = PhotonOutput(visual_embeds=visual)
        self._add_retention(output, decoded, layout)
        self._add_logits(output, decoded, layout)
        if use_cache:
            cache = DynamicCache() if past_key_values is None else past_key_values
            order = self._input_order(layout)
            length = input_ids.shape[1]
            cache.photon = fill(cache, decoded.keys_values, decoded.stages, layout, order, early_cache, length)
            cache.photon.prefix = decoded.prefix
            output.past_key_values = cache
        return output

    def _add_logits(self, output: PhotonOutput, decoded: Decoded, layout: Layout) -> None:
        """Logits and losses where there is a label, or, if labels were not given, the logits of the last tokens."""
        wanted = layout.predicts if layout.labelled else layout.last
        hidden, flipped = decoded.at(wanted), None
        if decoded.stream.flipped_moved is None:
            logits = self._logits(hidden)
        else:  # at once: under ZeRO-3 a rank with flips must not run the head more often than one without
            logits, flipped = self._logits(torch.cat([hidden, decoded.flipped_at(wanted)])).chunk(2)
        if layout.labelled:
            output.token_losses = F.cross_entropy(logits.float(), layout.targets, reduction="none")
            # 0 where all labels are -100, still with a graph.
            output.loss, output.logits = output.token_losses.sum() / max(1, len(layout.targets)), logits
        else:
            output.logits = logits[self._input_order(layout)][:, None]
        if flipped is not None:
            output.flipped_losses = F.cross_entropy(flipped.float(), layout.targets, reduction="none")

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.model.language_model.norm(hidden))

    def _chance(self, layout: Layout, selection: Selection | None, noise: float, seeds: Tensor | None) -> Chance | None:
        """What is drawn at random, by packed rows."""
        if not self._draws(selection, noise):
            return None
        if seeds is None:
            seeds = torch.randint(1 << 31, (layout.rows,))
        return Chance(seeds[layout.row_order], self._is_random(selection), noise)

    def _is_random(self, selection: Selection | None) -> bool:
        settings = self.model.scheduling
        return (selection or (settings and settings.selection)) == "random"

    def _draws(self, selection: Selection | None, noise: float) -> bool:
        """Whether anything is drawn at random."""
        return self._is_random(selection) or bool(noise)

    @staticmethod
    def _input_order(layout: Layout) -> list[int]:
        """Packed place of each row of the input."""
        order = [0] * layout.rows
        for place, row in enumerate(layout.row_order):
            order[row] = place
        return order

    def _add_retention(self, output: PhotonOutput, decoded: Decoded, layout: Layout) -> None:
        """Keep rates and masks, rows in the order of the input."""
        if decoded.retentions:
            order = self._input_order(layout)
            first, last = decoded.retentions[0], decoded.retentions[-1]
            output.kept = last.kept[order]
            output.keep_rate = last.kept.sum(1)[order] / first.valid.sum(1).clamp(min=1)[order]
            output.mean_probability = torch.stack([r.mean_probability() for r in decoded.retentions], 1)[order]

    def _decode(self, input_ids: Tensor, cache: Cache) -> PhotonOutput:
        """One more token per row, ``(R, 1)``, on a cache that :func:`photon.decoding.fill` began."""
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
        state.position, state.length = state.position + 1, state.length + 1
        return PhotonOutput(logits=self.lm_head(text.norm(x)), past_key_values=cache)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole prompt at first, then one token at a time; positions live with the cache."""
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            new = input_ids.shape[1] - past_key_values.photon.length
            if new != 1:
                raise ValueError(
                    f"past_key_values: {new} tokens are new to this cache, which takes one at a time; leave it out "
                    "and give the whole conversation, or ask on with prefix"
                )
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values, "use_cache": True}
        names = (
            "attention_mask", "pixel_values_videos", "video_grid_thw", "group_index", "token_index", "reduction",
            "selection", "threshold_noise", "seeds", "early_cache", "prefix",
        )  # fmt: skip
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return {"input_ids": input_ids, "past_key_values": past_key_values, "use_cache": True, **given}

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "assistant_model, prompt_lookup_num_tokens: rows have lost different tokens, so several new ones at a time "
            "are not supported; leave these out"
        )

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
            if kwargs.get("seeds") is None and self._draws(kwargs.get("selection"), kwargs.get("threshold_noise") or 0):
                # Beams change places in the cache, so all of a row's must keep the same tokens.
                kwargs["seeds"] = torch.randint(1 << 31, (len(input_ids),))
            for name in ("attention_mask", "group_index", "seeds"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name].repeat_interleave(expand_size, dim=0)
            input_ids = input_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, kwargs
