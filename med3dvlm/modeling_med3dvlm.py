"""Med3DVLM: a language model that reads image tokens of 3D volumes among its text.

Legend: B volumes, R rows (one question each), L row length, N image tokens of a volume, D width of the language model,
A label tokens, V vocabulary, P length of what rows share.

What differs from joining the three parts by hand:
- rows that share a volume (``group_index``) share its encoding, and, where the language model lets them, also what it
  computes for the image tokens: these stand before the question, so that all rows of a volume see them alike;
- features that were computed once and kept (``features``) do in place of volumes;
- behind shared image tokens, rows of much different length go through the language model apart
  (:mod:`med3dvlm.buckets`), so that a question is not padded to the length of a report;
- logits are computed where there is a label, or for the last token.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from med3dvlm.buckets import length_buckets
from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.encoders import build_encoder
from med3dvlm.features import Features, VolumeEncoder
from med3dvlm.lora import MARK, inject
from med3dvlm.projectors import Projector
from med3dvlm.splicing import IMAGE_TOKEN, image_places, splice_in

IGNORE = -100
PARTS = ("encoder", "projector", "embeddings", "language_model", "lora")
"""What can be trained or frozen: ``embeddings`` are the language model's input embeddings, ``language_model`` is the
rest of it without adapters, ``lora`` the adapters."""


@dataclass
class Med3DVLMOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: mean cross-entropy over the label tokens (fp32).
        logits: ``(A, V)`` at the label positions, row by row, or ``(R, 1, V)`` for the last tokens.
        token_losses, targets: ``(A)`` cross-entropy and id of each label token.
        image_embeds: ``(B, N, D)`` as they entered the language model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    targets: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclass
class Embedded:
    """Rows as the language model reads them.

    Attributes:
        embeds: ``(R, L, D)``. mask: ``(R, L)``, 1 where there is a token. image: ``(B, N, D)``, None without volumes.
        owner: ``(R)``, the volume of each row. shared: how many tokens after the padding on the left are the same for
            all rows of a volume, and at the same places; 0 if that is not so, or nothing is gained.
    """

    embeds: Tensor
    mask: Tensor
    image: Tensor | None = None
    owner: Tensor | None = None
    shared: int = 0

    @property
    def position_ids(self) -> Tensor:
        """``(R, L)``, padding not counted."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)


class Med3DVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Encoder, projector and language model.

    The projector and the adapters train, everything else is frozen until :meth:`set_trainable` says otherwise.

    Args:
        config: of the whole model. encoder, language_model: parts that are there already, with their weights (see
            :func:`med3dvlm.building.med3dvlm_from`).

    Raises:
        ValueError: encoder and projector do not fit, or see :func:`med3dvlm.lora.inject`.
    """

    config_class = Med3DVLMConfig
    config: Med3DVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: Med3DVLMConfig,
        encoder: VolumeEncoder | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        if language_model is None:
            dtype = torch.get_default_dtype()
            language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        if encoder is None:
            encoder = build_encoder(dict(config.encoder_config or {}))
        self.encoder: Any = encoder
        made_for, given = config.projector, (tuple(encoder.low_shape), tuple(encoder.high_shape))
        if given != (made_for.low, made_for.high):
            raise ValueError(
                f"projector_config: made for low {made_for.low} and high {made_for.high}, the encoder gives {given[0]} "
                f"and {given[1]}; take the encoder of the projector's model, or train a projector for this one"
            )
        self.projector = Projector(made_for, language_model.get_input_embeddings().embedding_dim)
        self.language_model: Any = language_model
        config.text_config = language_model.config
        self.post_init()
        if config.lora_settings is not None:
            inject(self.language_model, config.lora_settings)
        self.trainable: tuple[str, ...] = ()
        self.set_trainable(*self._usual_parts())

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in the library, but strict, and with the same parts frozen as in a model that is built.

        Raises:
            ValueError: a weight is missing, is not expected or has another shape. OSError: it cannot be read.
        """
        kwargs = {"use_safetensors": True, **kwargs, "ignore_mismatched_sizes": True}  # they are in the report
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
        if wrong:
            named = "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:3])}" for name, keys in wrong.items())
            raise ValueError(f"the weights do not fit config.json ({named}); export the checkpoint again")
        model.set_trainable(*model.trainable)
        return (model, report) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Encoder and projector initialize themselves, and no checkpoint may lack a weight of theirs."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    # --- what trains ---------------------------------------------------------------------------------------

    def _usual_parts(self) -> tuple[str, ...]:
        return ("projector",) if self.config.lora is None else ("projector", "lora")

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by part; each of them once."""
        found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        found["encoder"] += self.encoder.parameters()
        found["projector"] += self.projector.parameters()
        embeddings = {id(p) for p in self.get_input_embeddings().parameters()}
        for name, parameter in self.language_model.named_parameters():
            part = "lora" if MARK in name else "embeddings" if id(parameter) in embeddings else "language_model"
            found[part].append(parameter)
        return found

    def set_trainable(self, *parts: str) -> None:
        """Train these of ``PARTS`` and freeze the others. A frozen encoder stays in eval mode.

        Raises:
            ValueError: an unknown part, or ``lora`` without adapters.
        """
        found = self.parts()
        wrong = [part for part in parts if part not in PARTS]
        if wrong:
            raise ValueError(f"trainable parts: {', '.join(wrong)}: unknown; known: {', '.join(PARTS)}")
        if "lora" in parts and not found["lora"]:
            raise ValueError("trainable parts: lora: the model has no adapters; call add_lora first")
        for part, parameters in found.items():
            for parameter in parameters:
                parameter.requires_grad_(part in parts)
        if "encoder" in parts:
            self.encoder.unfreeze().train(self.training)
        else:
            self.encoder.freeze()
        self.trainable = tuple(part for part in PARTS if part in parts)

    # --- from volumes to rows ------------------------------------------------------------------------------

    def encode(self, volumes: Tensor) -> Features:
        """Features of volumes ``(B, 1, D, H, W)`` with values in [0, 1], to be kept or given to :meth:`forward`.

        Raises:
            ValueError: the volumes have another size than the encoder is made for.
        """
        dtype = next(self.encoder.parameters()).dtype
        return self.encoder(volumes.to(dtype))

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        volumes: Tensor | None = None,
        features: tuple[Tensor, Tensor] | None = None,
        group_index: Tensor | None = None,
    ) -> Embedded:
        """Rows with image tokens in their places. Arguments and errors as in :meth:`forward`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds = self.get_input_embeddings()(input_ids)
        if volumes is not None and features is not None:
            raise ValueError("volumes, features: both are given; give one of them")
        if volumes is not None:
            features = self.encode(volumes)
        config = self.config
        if features is None:
            if bool((input_ids == config.image_token_id).any()):
                raise ValueError(f"input_ids: {IMAGE_TOKEN} without a volume; give volumes or features")
            return Embedded(embeds, mask)
        places = image_places(input_ids, mask, config.image_token_id, config.image_tokens, config.splice)
        dtype = next(self.projector.parameters()).dtype
        image = self.projector(*(stream.to(dtype) for stream in features))
        owner = _owners(group_index, len(input_ids), len(image), input_ids.device)
        shared = _shared(input_ids, mask, places) if len(image) < len(input_ids) else 0
        return Embedded(splice_in(embeds, image[owner], places), mask, image, owner, shared)

    # --- the language model --------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        volumes: Tensor | None = None,
        features: tuple[Tensor, Tensor] | None = None,
        group_index: Tensor | None = None,
        share_prefix: bool = True,
        **kwargs: Any,
    ) -> Med3DVLMOutput:
        """One pass over rows of text about volumes.

        Args:
            input_ids, attention_mask, labels: ``(R, L)``; labels are -100 where nothing is predicted.
            volumes: ``(B, 1, D, H, W)`` of the encoder's size, values in [0, 1].
            features: in place of volumes, what :meth:`encode` gave of them: ``(B, tokens, width)`` low and high.
                With neither, the rows are text alone.
            group_index: ``(R)``, the number of each row's volume. Without it each row has its own.
            share_prefix: compute the image tokens once for all rows of a volume, where that is possible: not with
                padding on the left, with labels on image tokens, under activation checkpointing or ZeRO-3, or in
                layers that keep something else than all keys and values. Nothing but rounding depends on it (and the
                draws of dropout, if there is any).
            kwargs: for the language model.

        Raises:
            ValueError: volumes of another size, features of another encoder, or rows that do not fit them.
        """
        rows = self.embed(input_ids, attention_mask, volumes, features, group_index)
        output = Med3DVLMOutput(image_embeds=rows.image)
        wanted = _last(rows.mask) if labels is None else F.pad(labels[:, 1:] != IGNORE, (0, 1))
        prefix = None
        if share_prefix and rows.shared and bool(rows.mask[:, 0].all() & ~wanted[:, : rows.shared].any()):
            prefix = self._prefix_cache(rows)
        usual = {"use_cache": prefix is not None, "return_dict": True, **kwargs}
        if prefix is None:
            inputs = {"inputs_embeds": rows.embeds, "attention_mask": rows.mask, **self._positions(rows)}
            output.logits = self._logits(wanted, {**inputs, **usual})
        else:
            output.logits = self._after_prefix(rows, prefix, wanted, usual)
        if labels is None:
            output.logits = output.logits[:, None]
            return output
        output.targets = labels[:, 1:][wanted[:, :-1]]
        output.token_losses = F.cross_entropy(output.logits.float(), output.targets, reduction="none")
        output.loss = output.token_losses.sum() / max(1, len(output.targets))
        return output

    def _positions(self, rows: Embedded) -> dict[str, Tensor]:
        """Positions, for language models that take them."""
        taken = "position_ids" in inspect.signature(self.language_model.forward).parameters
        return {"position_ids": rows.position_ids} if taken else {}

    def _prefix_cache(self, rows: Embedded) -> DynamicCache | None:
        """Keys and values of the first ``rows.shared`` tokens of each volume; None where that cannot be."""
        checkpointed = (getattr(module, "gradient_checkpointing", False) for module in self.language_model.modules())
        if not rows.shared or (self.training and any(checkpointed)):  # such layers keep no cache
            return None
        if any(hasattr(parameter, "ds_id") for parameter in self.language_model.parameters()):
            return None  # under ZeRO-3 all ranks have to run the same modules equally often
        cache = self._empty_cache()
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            return None
        assert rows.image is not None and rows.owner is not None
        # Any row of a volume will do.
        example = torch.zeros(len(rows.image), dtype=torch.long, device=rows.owner.device)
        example[rows.owner] = torch.arange(len(rows.owner), device=rows.owner.device)
        place = _first(rows.mask)[example] + torch.arange(rows.shared, device=rows.mask.device)
        prefix = rows.embeds[example[:, None], place]
        mask = torch.ones(prefix.shape[:2], dtype=rows.mask.dtype, device=prefix.device)
        self.language_model.base_model(
            inputs_embeds=prefix, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True
        )
        return cache

    def _empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self.language_model.config.get_text_config(decoder=True))

    def _rows_of(self, prefix: DynamicCache, owner: Tensor) -> DynamicCache:
        """Keys and values of volumes, once for each row about them: ``owner`` (G)."""
        cache = self._empty_cache()
        for number, layer in enumerate(prefix.layers):
            cache.update(layer.keys[owner], layer.values[owner], number)
        return cache

    def _after_prefix(self, rows: Embedded, prefix: DynamicCache, wanted: Tensor, usual: dict[str, Any]) -> Tensor:
        """``(A, V)`` logits once the shared tokens are computed, rows of similar length at a time.

        Arguments of the caller's own may be one for each row: then all rows go together.
        """
        assert rows.owner is not None
        lengths, start = rows.mask.long().sum(1), rows.shared
        together = any(isinstance(value, Tensor) for value in usual.values())
        everyone = torch.arange(len(lengths), device=lengths.device)
        parts, places = [], []
        for own in [everyone] if together else length_buckets(lengths - start):
            end = wanted.shape[1] if together else int(lengths[own].max())
            whole = {"inputs_embeds": rows.embeds, **self._positions(rows)}
            inputs: dict[str, Any] = {name: value[own, start:end] for name, value in whole.items()}
            cache = self._rows_of(prefix, rows.owner[own])
            inputs |= {"attention_mask": rows.mask[own, :end], "past_key_values": cache}
            here = wanted[own, start:end]
            parts.append(self._logits(here, {**inputs, **usual}))
            row, place = here.nonzero(as_tuple=True)
            places.append(own[row] * wanted.shape[1] + place)
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(places).argsort()]

    def _logits(self, wanted: Tensor, inputs: dict[str, Any]) -> Tensor:
        """``(A, V)`` logits of the language model at the wanted places ``(G, L)``, row by row."""
        with _only_at(self.get_output_embeddings(), wanted):
            return self.language_model(**inputs).logits[0]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        volumes: Tensor | None = None,
        features: tuple[Tensor, Tensor] | None = None,
        group_index: Tensor | None = None,
        share_prefix: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Answers, by the language model's own ``generate``; ``kwargs`` are that method's.

        Prompts of unequal length are padded on the left. The other arguments are those of :meth:`forward`.

        Returns:
            As in the library: ``(R, L + new)`` ids, prompts first, or an output object with them as ``sequences``.

        Raises:
            ValueError: as in :meth:`forward`, and for prompts that end with padding.
        """
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask: a prompt ends with padding; pad on the left to generate")
        rows = self.embed(input_ids, attention_mask, volumes, features, group_index)
        settings = copy.deepcopy(kwargs.pop("generation_config", None) or self.generation_config)
        kwargs = settings.update(**kwargs)  # what is left is for the language model
        copies = [getattr(settings, name) or 1 for name in ("num_beams", "num_return_sequences")]
        ids = input_ids
        share_prefix = share_prefix and max(copies) == 1 and kwargs.get("past_key_values") is None
        if share_prefix and (prefix := self._prefix_cache(rows)) is not None:
            assert rows.owner is not None
            # Padding goes between the shared tokens and the rest, as the cache of the first comes first.
            order = _padding_inside(rows.mask, rows.shared)
            ids, rows.mask = ids.gather(1, order), rows.mask.gather(1, order)
            rows.embeds = rows.embeds.gather(1, order[..., None].expand_as(rows.embeds))
            kwargs["past_key_values"] = self._rows_of(prefix, rows.owner)
        found = self.language_model.generate(
            ids, inputs_embeds=rows.embeds, attention_mask=rows.mask, generation_config=settings, **kwargs
        )
        if ids is not input_ids:
            (found if isinstance(found, Tensor) else found.sequences)[:, : input_ids.shape[1]] = input_ids
        return found


def _owners(group_index: Tensor | None, rows: int, volumes: int, device: torch.device) -> Tensor:
    """The volume of each row, checked."""
    if group_index is None:
        if rows != volumes:
            raise ValueError(f"group_index: missing for {rows} rows about {volumes} volumes; say whose each row is")
        return torch.arange(rows, device=device)
    if group_index.shape != (rows,) or not bool(((group_index >= 0) & (group_index < volumes)).all()):
        raise ValueError(f"group_index: {group_index.tolist()} for {rows} rows about volumes 0 to {volumes - 1}")
    return group_index


def _first(mask: Tensor) -> Tensor:
    """``(R, 1)``, the place of each row's first token."""
    return mask.long().argmax(1, keepdim=True)


def _last(mask: Tensor) -> Tensor:
    """``(R, L)`` bool, True at each row's last token."""
    return F.one_hot(mask.shape[1] - 1 - mask.flip(1).long().argmax(1), mask.shape[1]).bool()


def _shared(input_ids: Tensor, mask: Tensor, places: Tensor) -> int:
    """How many tokens rows with the same volume have in common: all before the last image token.

    The last one stays with the row: at least one token must, and what it predicts may be labelled.
    """
    before = places.long().cumsum(1) < places.sum(1, keepdim=True)  # the last image token is not there yet
    lengths = (before & (mask != 0)).sum(1)
    length = int(lengths[0])
    own = _first(mask) + torch.arange(length, device=mask.device)
    if bool((lengths != length).any()) or not bool(mask.gather(1, own).all()):
        return 0
    ids = input_ids.gather(1, own)
    return length if bool((ids == ids[:1]).all()) else 0


def _padding_inside(mask: Tensor, shared: int) -> Tensor:
    """``(R, L)`` order in which padding on the left comes after the first ``shared`` tokens instead."""
    padding, place = _first(mask), torch.arange(mask.shape[1], device=mask.device)[None]
    in_padding = (place >= shared) & (place < shared + padding)
    return torch.where(place < shared, place + padding, torch.where(in_padding, place - shared, place))


@contextmanager
def _only_at(head: nn.Module, wanted: Tensor) -> Iterator[None]:
    """The head reads hidden states ``(R, L, D)`` at the wanted places only, as ``(1, A, D)``.

    Through a hook, so that whatever else a language model does to its logits (scaling, capping) stays its own matter.
    """

    def pick(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][wanted][None], *arguments[1:])

    hook: Callable[..., Any] = pick
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
