"""From volumes and chat messages to the tensors that Photon takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from photon.configuration_photon import PhotonConfig
from photon.geometry import PatchGeometry
from photon.packing import IGNORE
from photon.patch_embedding import patchify

Messages = list[dict[str, str]]
VOLUME_TEXT = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass
class VolumeChats:
    """One volume (or a prior and a current one) and the conversations about it.

    Attributes:
        volumes: ``(D, H, W)`` arrays in model units, the current scan last.
        chats: conversations of ``{"role", "content"}``; the volumes stand before the first user text.
    """

    volumes: Sequence[np.ndarray | Tensor]
    chats: list[Messages]


class PhotonProcessor(ProcessorMixin):
    """Tokenizer and patch geometry of one checkpoint.

    Attributes:
        patch_size, channels, merge_size, slices_per_frame: see :class:`photon.geometry.PatchGeometry`.
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        patch_size: Sequence[int] = (14, 14, 14),
        channels: int = 1,
        merge_size: int = 2,
        slices_per_frame: int = 1,
        chat_template: str | None = None,
    ) -> None:
        self.patch_size = list(patch_size)
        self.channels = channels
        self.merge_size = merge_size
        self.slices_per_frame = slices_per_frame
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def from_config(cls, config: PhotonConfig, tokenizer: Any) -> "PhotonProcessor":
        """The processor that fits a model."""
        patches = config.patches
        return cls(tokenizer, patches.size, patches.channels, patches.merge, patches.slices_per_frame)

    @property
    def geometry(self) -> PatchGeometry:
        """How volumes are cut."""
        depth, height, width = self.patch_size
        return PatchGeometry((depth, height, width), self.channels, self.merge_size, self.slices_per_frame)

    def __call__(
        self,
        volumes: Sequence[np.ndarray | Tensor] | None = None,
        messages: Messages | list[Messages] | None = None,
        padding_side: str = "left",
    ) -> BatchFeature:
        """Conversations about one volume (or a prior and a current one), ready for ``generate``.

        Args:
            volumes: ``(D, H, W)`` arrays in model units, the current scan last; none for plain text.
            messages: one conversation, or several about the same volumes.
        """
        if not messages:
            raise ValueError("messages: at least one conversation is needed")
        chats = [messages] if isinstance(messages[0], dict) else messages
        batch = self.batch([VolumeChats(volumes or [], list(chats))], padding_side)
        del batch["labels"]
        return BatchFeature(batch)

    def batch(self, groups: list[VolumeChats], padding_side: str = "right") -> dict[str, Tensor]:
        """Tensors of several groups; rows of one group share its volumes.

        A last message by the assistant is a target: its tokens and the end of its turn become labels.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels``, ``group_index``, and with volumes
            ``pixel_values_videos`` and ``video_grid_thw`` (see ``PhotonForConditionalGeneration.forward``).
        """
        rows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        patches, grids = [], []
        for g, group in enumerate(groups):
            cut = [patchify(torch.as_tensor(v), self.geometry) for v in group.volumes]
            patches += [p for p, _ in cut]
            grids += [grid for _, grid in cut]
            counts = [t * h * w // self.merge_size**2 for _, (t, h, w) in cut]
            rows += [self._row(chat, counts) for chat in group.chats]
            owners += [g] * len(group.chats)
        batch = self._pad(rows, padding_side)
        batch["group_index"] = torch.tensor(owners)
        if patches:
            batch["pixel_values_videos"] = torch.cat(patches)
            batch["video_grid_thw"] = torch.tensor(grids)
        return batch

    def _row(self, chat: Messages, counts: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation about volumes of ``counts`` tokens."""
        chat = [dict(m) for m in chat]
        answer = chat.pop()["content"] if chat[-1]["role"] == "assistant" else None
        first = next((m for m in chat if m["role"] == "user"), None)
        if first is None:
            raise ValueError("messages: no user turn")
        first["content"] = VOLUME_TEXT * len(counts) + first["content"]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = self._expand(self.tokenizer(text, add_special_tokens=False)["input_ids"], counts)
        if answer is None:
            return ids, [IGNORE] * len(ids)
        target = self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return ids + target, [IGNORE] * len(ids) + target

    def _expand(self, ids: list[int], counts: list[int]) -> list[int]:
        """Repeat each ``<|video_pad|>`` to the tokens of its volume."""
        pad = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        if ids.count(pad) != len(counts):
            raise ValueError(f"messages: {ids.count(pad)} <|video_pad|> in the text for {len(counts)} volumes")
        remaining = iter(counts)
        return [x for i in ids for x in ([i] * next(remaining) if i == pad else [i])]

    def _pad(self, rows: list[tuple[list[int], list[int]]], side: str) -> dict[str, Tensor]:
        """Rows of unequal length as tensors."""
        width = max(len(ids) for ids, _ in rows)

        def stack(values: list[list[int]], fill: int) -> Tensor:
            padded = [
                [fill] * (width - len(v)) + v if side == "left" else v + [fill] * (width - len(v)) for v in values
            ]
            return torch.tensor(padded)

        return {
            "input_ids": stack([ids for ids, _ in rows], self.tokenizer.pad_token_id),
            "attention_mask": stack([[1] * len(ids) for ids, _ in rows], 0),
            "labels": stack([labels for _, labels in rows], IGNORE),
        }
