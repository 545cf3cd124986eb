"""From volumes and texts to the tensors that Med3DVLM takes.

Legend: B volumes, R rows (one question each), L row length, N image tokens of a volume.

A row is N ``<im_patch>``, the question as plain text, a space, the answer, and the end token: no chat template, and a
BOS token only where the tokenizer itself begins with one. ``prompt_style: template`` puts image tokens and question
into a user's turn of the tokenizer's chat template instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.splicing import IMAGE_TOKEN

logger = logging.get_logger(__name__)

Array = np.ndarray | Tensor
PromptStyle = Literal["plain", "template"]
IGNORE = -100
OVERSHOOT = 0.01
"""By how much an interpolated voxel may be outside of [0, 1]."""


def with_choices(question: str, choices: Sequence[str]) -> str:
    """``Question? Choices: A. first B. second``."""
    listed = " ".join(choice(choices, index) for index in range(len(choices)))
    return f"{question} Choices: {listed}" if choices else question


def choice(choices: Sequence[str], index: int) -> str:
    """The answer to a closed question: ``B. second``."""
    return f"{ascii_uppercase[index]}. {choices[index]}"


@dataclass
class VolumeTexts:
    """A volume and what is asked about it.

    Attributes:
        texts: (question, answer) pairs; the answer is None where it is to be generated.
        volume: ``(D, H, W)`` with values in [0, 1], or None where its features are given to the model.
    """

    texts: Sequence[tuple[str, str | None]]
    volume: Array | None = None


@dataclass
class Row:
    """Token ids of one row and their labels, and how many tokens of the answer were cut off."""

    ids: list[int]
    labels: list[int] = field(default_factory=list)
    cut: int = 0


class Med3DVLMProcessor(ProcessorMixin):
    """Tokenizer, prompts and volume size of one checkpoint.

    Attributes:
        size: (depth, height, width) of the volumes. image_tokens: N.
        max_length: tokens of a row, image tokens included. A question that leaves no room for an answer is an error.
            An answer that is too long loses its end, and with it the end token, so that nothing teaches to stop
            there; a warning says so once. ``long_answers: error`` makes that an error too.
        prompt_style: ``plain`` or ``template``.
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        size: Sequence[int] = (128, 256, 256),
        image_tokens: int = 256,
        max_length: int = 512,
        long_answers: str = "cut",
        prompt_style: PromptStyle = "plain",
        chat_template: str | None = None,
    ) -> None:
        self.size = list(size)
        self.image_tokens = image_tokens
        self.max_length = max_length
        self.long_answers = long_answers
        self.prompt_style = prompt_style
        if prompt_style not in get_args(PromptStyle):
            raise ValueError(f"prompt_style: {prompt_style!r} is not one of {', '.join(get_args(PromptStyle))}")
        if long_answers not in ("cut", "error"):
            raise ValueError(f"long_answers: {long_answers!r} is not one of cut, error")
        super().__init__(tokenizer, chat_template=chat_template)
        if tokenizer is not None:
            self.image_token_id = image_token_id(tokenizer)
            if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
                raise ValueError("tokenizer: needs an end token and a padding token; set eos_token and pad_token")

    @classmethod
    def from_config(cls, config: Med3DVLMConfig, tokenizer: Any, **settings: Any) -> "Med3DVLMProcessor":
        """The processor that fits a model.

        Raises:
            ValueError: the tokenizer has no ``<im_patch>``, or another id for it than the model.
        """
        found = image_token_id(tokenizer)
        if found != config.image_token_id:
            raise ValueError(
                f"tokenizer: {IMAGE_TOKEN} is {found}, in config.json image_token_id is {config.image_token_id}; "
                "take the tokenizer of the model's folder"
            )
        return cls(tokenizer, (config.encoder_config or {})["size"], config.image_tokens, **settings)

    def __call__(
        self,
        volumes: Array | Sequence[Array] | None = None,
        text: str | Sequence[str] | None = None,
        group_index: Sequence[int] | None = None,
        image: bool = True,
        padding_side: str = "left",
    ) -> BatchFeature:
        """Prompts to generate from.

        Args:
            volumes: ``(D, H, W)`` or several; None where features are given to the model instead.
            text: one question or several. All are about the one volume, or each is about its own.
            group_index: the number of each question's volume, where neither is so.
            image: False for questions without image tokens.

        Raises:
            ValueError: no question; volumes of another size or not in [0, 1]; a question that is too long.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise ValueError("text: at least one question is needed")
        if volumes is not None and not image:
            raise ValueError("volumes: given with image=False; leave one of them out")
        several = _several(volumes)
        batch = self._pad([self.row(question, image=image) for question in texts], padding_side)
        del batch["labels"]
        if several:
            batch["volumes"] = self.stack(several)
        if group_index is None and len(several) == 1:
            group_index = [0] * len(texts)
        if group_index is not None:
            batch["group_index"] = torch.tensor(list(group_index))
        return BatchFeature(batch)

    def batch(self, groups: Sequence[VolumeTexts], padding_side: str = "right") -> dict[str, Tensor]:
        """Tensors of several groups, for training.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (answers and their end tokens), ``group_index``, and
            ``volumes`` ``(B, 1, D, H, W)`` if the groups have them.

        Raises:
            ValueError: some groups have volumes and some don't, or as for :meth:`__call__`.
        """
        rows = [self.row(question, answer) for group in groups for question, answer in group.texts]
        if not rows:
            raise ValueError("groups: no question in any of them")
        if any(row.cut for row in rows):
            logger.warning_once(
                f"answers longer than max_length {self.max_length} allows lose their end; raise max_length to keep it"
            )
        batch = self._pad(rows, padding_side)
        batch["group_index"] = torch.tensor([g for g, group in enumerate(groups) for _ in group.texts])
        volumes = [group.volume for group in groups if group.volume is not None]
        if volumes and len(volumes) != len(groups):
            raise ValueError(f"groups: {len(volumes)} of {len(groups)} have a volume; give all or none")
        if volumes:
            batch["volumes"] = self.stack(volumes)
        return batch

    def stack(self, volumes: Sequence[Array]) -> Tensor:
        """See :func:`stack_volumes`."""
        return stack_volumes(volumes, self.size)

    def row(self, question: str, answer: str | None = None, image: bool = True) -> Row:
        """Ids and labels of one question, with its answer if there is one.

        Raises:
            ValueError: the question leaves no room for an answer, or says ``<im_patch>`` itself.
        """
        prompt = self._prompt(question, image)
        room = self.max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"question: {len(prompt)} tokens with {self.image_tokens if image else 0} image tokens leave no room "
                f"for an answer in max_length {self.max_length}; shorten it or raise max_length: {question[:60]!r}"
            )
        if answer is None:
            return Row(prompt, [IGNORE] * len(prompt))
        # The space belongs to the answer's first word, as in running text.
        lead = " " if self.prompt_style == "plain" else ""
        whole = self._ids(lead + answer) + [self.tokenizer.eos_token_id]
        target, cut = whole[:room], max(0, len(whole) - room)
        if cut and self.long_answers == "error":
            raise ValueError(f"answer: {cut} tokens more than max_length {self.max_length} allows: {answer[:60]!r}")
        return Row(prompt + target, [IGNORE] * len(prompt) + target, cut)

    def _prompt(self, question: str, image: bool) -> list[int]:
        """Ids of the prompt, image tokens repeated."""
        text = (IMAGE_TOKEN if image else "") + question
        start: list[int] = []
        if self.prompt_style == "template":
            turn = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        else:
            usual = self.tokenizer("x")["input_ids"]
            start = usual[:1] if usual[0] == self.tokenizer.bos_token_id else []
        ids = self._ids(text)
        if ids.count(self.image_token_id) != int(image):
            raise ValueError(f"question: {IMAGE_TOKEN} in its text; leave it out, the processor puts it there")
        repeats = {self.image_token_id: self.image_tokens}
        return start + [i for i in ids for _ in range(repeats.get(i, 1))]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pad(self, rows: list[Row], side: str) -> dict[str, Tensor]:
        """Rows of unequal length as tensors."""
        width = max(len(row.ids) for row in rows)

        def stack(values: list[list[int]], fill: int) -> Tensor:
            pads = [[fill] * (width - len(v)) for v in values]
            return torch.tensor([p + v if side == "left" else v + p for p, v in zip(pads, values, strict=True)])

        return {
            "input_ids": stack([row.ids for row in rows], self.tokenizer.pad_token_id),
            "attention_mask": stack([[1] * len(row.ids) for row in rows], 0),
            "labels": stack([row.labels for row in rows], IGNORE),
        }


def stack_volumes(volumes: Sequence[Array], size: Sequence[int]) -> Tensor:
    """Volumes ``(D, H, W)`` as ``(B, 1, D, H, W)`` float32.

    Raises:
        ValueError: one has another size, or values outside of [0, 1].
    """
    checked = [_checked(torch.as_tensor(volume), tuple(size), number) for number, volume in enumerate(volumes)]
    return torch.stack(checked)[:, None]


def _checked(volume: Tensor, size: tuple[int, ...], number: int) -> Tensor:
    if tuple(volume.shape) != size:
        raise ValueError(
            f"volumes: number {number} is {tuple(volume.shape)}, this model reads {size} (depth, height, width); "
            "resize it"
        )
    low, high = float(volume.min()), float(volume.max())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # also where one is not a number
        raise ValueError(f"volumes: number {number} has values from {low:g} to {high:g}; scale them to 0 to 1")
    return volume.float()


def image_token_id(tokenizer: Any) -> int:
    """Id of ``<im_patch>``.

    Raises:
        ValueError: the tokenizer does not have it.
    """
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found is None or found == tokenizer.unk_token_id:
        raise ValueError(
            f"tokenizer: has no {IMAGE_TOKEN}; take the one of the model's folder, or add it "
            "(med3dvlm.building.add_image_token)"
        )
    return int(found)


def _several(volumes: Any) -> list[Array]:
    """A list of volumes from one volume, a list of them, an array with an axis for them, or None."""
    if volumes is None:
        return []
    is_one = getattr(volumes, "ndim", 4) <= 3
    return [volumes] if is_one else list(volumes)
