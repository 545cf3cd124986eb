"""`med3dvlm.text`: a small encoder or decoder of text from nothing, for runs without pretrained weights.

The encoder (BERT) fills in masked words of the reports, the decoder (Qwen2) goes on with reports and with questions and
their answers, without having seen a volume. Both learn from the training split alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from med3dvlm.processing_med3dvlm import with_choices
from med3dvlm.recipes.base import is_hidden
from mllm3d.config import Settings
from mllm3d.data.dataset import GroupItem
from mllm3d.data.manifest import Row, read_manifest, select
from mllm3d.data.prompts import target_text
from mllm3d.errors import UserError
from mllm3d.training.huggingface import save_pretrained
from mllm3d.training.optim import parameter_groups
from mllm3d.training.recipe import Batch, Description, ParameterGroup, Recipe, StepOutput, Term

IGNORE = -100
MASKED = 0.15
"""Share of the words that an encoder has to fill in."""


class TextSettings(Settings):
    """Shapes of a small text model."""

    kind: Literal["encoder", "decoder"] = Field(description="encoder: BERT on reports. decoder: Qwen2 on all texts.")
    vocabulary: int = Field(default=2000, gt=300, description="Tokens at most.")
    hidden_size: int = Field(default=128, gt=0, description="Width.")
    layers: int = Field(default=3, gt=0, description="Layers.")
    heads: int = Field(default=4, gt=0, description="Attention heads.")
    mlp: int = Field(default=384, gt=0, description="Hidden width of the feed-forward parts.")
    max_length: int = Field(default=384, gt=0, description="Tokens of a text; longer ones lose their end.")

    @model_validator(mode="after")
    def _heads_are_even(self) -> Self:
        if self.hidden_size % (2 * self.heads):  # rotary positions turn pairs
            raise ValueError(f"hidden_size: {self.hidden_size} is not {self.heads} heads times an even number")
        return self


class Text(Recipe):
    """`med3dvlm.text`."""

    Settings: ClassVar[type[Settings]] = TextSettings
    wants_volumes: ClassVar[bool] = False
    tokenizer: PreTrainedTokenizerFast

    @property
    def settings(self) -> TextSettings:
        return self.config.model  # type: ignore[return-value]

    def check_rows(self, rows: Sequence[Row]) -> None:
        super().check_rows(rows)
        if self.settings.kind == "encoder" and (
            row := next((row for row in rows if not (row.report or "").strip()), None)
        ):
            raise UserError(f"row {row.id}: report: is missing; choose rows that have one with data.where")

    def build(self, meta: bool = False) -> nn.Module:
        s = self.settings
        if meta:
            with torch.device("meta"):
                return self._model(s.vocabulary, 0)
        data = self.config.data
        rows = select(read_manifest(data.manifest), data.train_split, data.where, data.limit_volumes)
        texts = {text for row in rows for text in self.texts_of(row)}
        self.tokenizer = (word_pieces if s.kind == "encoder" else byte_pairs)(texts, s.vocabulary, s.max_length)
        return self._model(len(self.tokenizer), self.tokenizer.pad_token_id)

    def _model(self, vocabulary: int, padding: int) -> PreTrainedModel:
        s = self.settings
        shapes: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": s.hidden_size,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "intermediate_size": s.mlp,
            # 0.02 is meant for widths above a thousand.
            "initializer_range": s.hidden_size**-0.5,
            "pad_token_id": padding,
        }
        if s.kind == "encoder":
            return BertForMaskedLM(BertConfig(**shapes, max_position_embeddings=s.max_length))
        end = None if not hasattr(self, "tokenizer") else self.tokenizer.eos_token_id
        config = Qwen2Config(
            **shapes, num_key_value_heads=s.heads, tie_word_embeddings=True, bos_token_id=None, eos_token_id=end
        )
        return Qwen2ForCausalLM(config)

    def texts_of(self, row: Row) -> list[str]:
        """The report for an encoder; question and answer for a decoder, as the later stages write them."""
        if self.settings.kind == "encoder":
            return [row.report or ""]
        return [with_choices(row.question, row.options or ()), " " + target_text(row)]

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        return parameter_groups(model, self.config.training.optimizer, is_hidden=is_hidden)

    def collate(self, items: list[GroupItem]) -> Batch:
        rows = [row for item in items for row in item.rows]
        texts = ["".join(self.texts_of(row)) for row in rows]
        if self.settings.kind == "encoder":
            found = self.tokenizer(texts, padding=True, truncation=True, max_length=self.settings.max_length)
            batch = {name: torch.tensor(found[name]) for name in ("input_ids", "attention_mask")}
        else:
            batch = self._end_to_end(texts)
        return {**batch, "volumes": len(items), "ids": [row.id for row in rows]}

    def _end_to_end(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts one behind the other, each with its end token, cut into rows of `max_length`; padding in the last."""
        width, end, padding = self.settings.max_length, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        ids = [token for text in texts for token in [*self.tokenizer(text)["input_ids"], end]]
        missing = -len(ids) % width
        rows = torch.tensor(ids + [padding] * missing).view(-1, width)
        return {"input_ids": rows, "attention_mask": (torch.arange(rows.numel()).view_as(rows) < len(ids)).long()}

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens = int(batch["attention_mask"].sum())
        return {"tokens": tokens, "volumes": batch["volumes"]}

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.settings.kind == "encoder":
            hidden = self._hidden_words(ids, mask)
            logits = model(input_ids=ids.masked_fill(hidden, self.tokenizer.mask_token_id), attention_mask=mask).logits
            losses, count = _cross_entropy(logits, ids.masked_fill(~hidden, IGNORE))
            # By the words of this batch, of which it is a fixed share, and not by the masked ones of all ranks.
            return StepOutput({"ce": Term(losses / MASKED, "tokens")}, {"per_word": (losses.detach(), count)})
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        losses, count = _cross_entropy(logits, ids.masked_fill(mask == 0, IGNORE)[:, 1:])
        return StepOutput({"ce": Term(losses, "tokens")}, {"per_word": (losses.detach(), count)})

    def _hidden_words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Which words are to be filled in; drawn from torch's state, which checkpoints keep, while training."""
        generator = None if torch.is_grad_enabled() else torch.Generator().manual_seed(0)
        drawn = torch.rand(ids.shape, generator=generator).to(ids.device) < MASKED
        special = torch.tensor(self.tokenizer.all_special_ids, device=ids.device)
        return drawn & (mask != 0) & ~torch.isin(ids, special)

    def save(self, module: nn.Module, state_dict: dict[str, Tensor] | None, directory: Any) -> None:
        save_pretrained(module, self.tokenizer, state_dict, directory)

    def describe(self) -> Description:
        return Description()


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the targets, and how many there are."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return losses, (targets != IGNORE).sum()


def word_pieces(texts: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """BERT's tokenizer, trained on these texts; their order does not matter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()

    def piece_tokenizer(vocabulary: dict[str, int] | None = None) -> Tokenizer:
        core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        core.normalizer, core.pre_tokenizer, core.decoder = normalizer, splitter, decoders.WordPiece()
        return core

    texts = sorted(texts)
    words = (word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    # The library numbers letters within words in a random order, and what is as frequent follows their numbers: ranks
    # and resumed runs would have other tokenizers. As special tokens they have an order.
    within = sorted({f"##{letter}" for word in words for letter in word[1:]})
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*special, *within], show_progress=False)
    trained = piece_tokenizer()
    trained.train_from_iterator(texts, trainer)
    core = piece_tokenizer(trained.get_vocab())
    end, start = ((token, special.index(token)) for token in ("[SEP]", "[CLS]"))
    core.post_processor = processors.BertProcessing(end, start)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=max_length,
    )  # fmt: skip


def byte_pairs(texts: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like GPT-2's, trained on these texts; their order does not matter."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sorted(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<pad>", model_max_length=max_length
    )
