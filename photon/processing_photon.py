"""From volumes, images, videos and chat messages to the tensors that Photon takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from photon.background import body_tokens
from photon.configuration_photon import PhotonConfig
from photon.geometry import PatchGeometry, Size3
from photon.media import PixelReader
from photon.packing import IGNORE
from photon.patch_embedding import PixelScale, Scale, patchify, usual_pixels

Array = np.ndarray | Tensor
Messages = list[dict[str, Any]]
"""``{"role", "content"}``; the content is text, or a list of ``{"type": "text", "text"}``."""
VOLUME_TEXT = "<|vision_start|><|video_pad|><|vision_end|>"
"""Stands for an image too: the model replaces the embedding of ``<|video_pad|>``, so nothing hangs on its id."""


@dataclass
class VolumeChats:
    """What conversations are about (mostly one volume, or a prior and a current one), and the conversations.

    Attributes:
        volumes: ``(D, H, W)`` arrays in model units, the current scan last.
        chats: conversations of ``{"role", "content"}``. Volumes, then images, then videos stand before the first
            user text.
        images: ``(H, W)`` or ``(H, W, 3)`` uint8 arrays. videos: ``(T, H, W)`` or ``(T, H, W, 3)``.
    """

    volumes: Sequence[Array]
    chats: list[Messages]
    images: Sequence[Array] = ()
    videos: Sequence[Array] = ()


@dataclass
class _Cut:
    """Patches of those tokens that are ``present``, a bool for each token of the whole ``grid``."""

    patches: Tensor
    grid: Size3
    present: Tensor


class PhotonProcessor(ProcessorMixin):
    """Tokenizer and patch geometry of one checkpoint.

    Attributes:
        patch_size, channels, merge_size, slices_per_frame: see :class:`photon.geometry.PatchGeometry`.
        pixel_mean, pixel_std: scale of images and videos by channel, ``(x / 255 - mean) / std``. See
            :func:`photon.patch_embedding.usual_pixels` for what they are by default.
        min_pixels, max_pixels: size of an image or a video's frame; outside of it they are resized.
        skip_background: leave out tokens of volumes that are air outside of the body: voxels up to this value, in
            model units, are air. None leaves out nothing.
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
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        min_pixels: int = 56 * 56,
        max_pixels: int = 28 * 28 * 1280,
        skip_background: float | None = None,
    ) -> None:
        self.patch_size = list(patch_size)
        self.channels = channels
        self.merge_size = merge_size
        self.slices_per_frame = slices_per_frame
        usual = usual_pixels(channels)
        self.pixel_mean = [s.mean for s in usual] if pixel_mean is None else list(pixel_mean)
        self.pixel_std = [s.std for s in usual] if pixel_std is None else list(pixel_std)
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.skip_background = skip_background
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def from_config(
        cls,
        config: PhotonConfig,
        tokenizer: Any,
        pixels: PixelScale | None = None,
        skip_background: float | None = None,
    ) -> "PhotonProcessor":
        """The processor that fits a model.

        ``pixels``: scale of images and videos; for a model that reads grey volumes it should be that of the volumes.
        """
        patches = config.patches
        pixels = pixels or usual_pixels(patches.channels, config.vision_config.model_type)
        return cls(
            tokenizer,
            patches.size,
            patches.channels,
            patches.merge,
            patches.slices_per_frame,
            pixel_mean=[scale.mean for scale in pixels],
            pixel_std=[scale.std for scale in pixels],
            skip_background=skip_background,
        )

    @property
    def geometry(self) -> PatchGeometry:
        """How volumes are cut."""
        depth, height, width = self.patch_size
        return PatchGeometry((depth, height, width), self.channels, self.merge_size, self.slices_per_frame)

    @property
    def reader(self) -> PixelReader:
        """How images and videos are cut."""
        scale = [Scale(*s) for s in zip(self.pixel_mean, self.pixel_std, strict=True)]
        return PixelReader(self.geometry, scale, self.min_pixels, self.max_pixels)

    def __call__(
        self,
        volumes: Sequence[Array] | None = None,
        messages: Messages | list[Messages] | None = None,
        padding_side: str = "left",
        images: Sequence[Array] = (),
        videos: Sequence[Array] = (),
    ) -> BatchFeature:
        """Conversations about one volume (or a prior and a current one), ready for ``generate``.

        Args:
            volumes: ``(D, H, W)`` arrays in model units, the current scan last; none for plain text.
            messages: one conversation, or several about the same volumes.
            images, videos: uint8, see :class:`VolumeChats`.
        """
        if not messages:
            raise ValueError("messages: at least one conversation is needed")
        chats = [messages] if isinstance(messages[0], dict) else messages
        batch = self.batch([VolumeChats(volumes or [], list(chats), images, videos)], padding_side)
        del batch["labels"]
        return BatchFeature(batch)

    def batch(self, groups: list[VolumeChats], padding_side: str = "right") -> dict[str, Tensor]:
        """Tensors of several groups; rows of one group share its volumes.

        A last message by the assistant is a target: its tokens and the end of its turn become labels.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels``, ``group_index``, and with volumes, images or videos
            ``pixel_values_videos`` and ``video_grid_thw`` of all of them, and with ``skip_background`` also
            ``token_index`` (see ``PhotonForConditionalGeneration.forward``).

        Raises:
            ValueError: an image or video is not as :class:`VolumeChats` says.
        """
        rows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        cuts: list[_Cut] = []
        for g, group in enumerate(groups):
            cut = self._cut(group)
            cuts += cut
            counts = [int(c.present.sum()) for c in cut]
            rows += [self._row(chat, counts) for chat in group.chats]
            owners += [g] * len(group.chats)
        batch = self._pad(rows, padding_side)
        batch["group_index"] = torch.tensor(owners)
        if cuts:
            batch["pixel_values_videos"] = torch.cat([c.patches for c in cuts])
            batch["video_grid_thw"] = torch.tensor([c.grid for c in cuts])
            if self.skip_background is not None:
                batch["token_index"] = torch.cat([c.present for c in cuts]).nonzero()[:, 0]
        return batch

    def _cut(self, group: VolumeChats) -> list[_Cut]:
        """A group's volumes, images and videos."""
        merge, reader = self.merge_size, self.reader
        given = [torch.as_tensor(volume) for volume in group.volumes]
        if not all(bool(volume.isfinite().all()) for volume in given):
            raise ValueError("volumes: voxels that are nan or infinite; correct the scan")
        volumes = [patchify(volume, self.geometry) for volume in given]
        pixels = [*map(reader.image, group.images), *map(reader.video, group.videos)]
        cuts = [_Cut(p, grid, torch.ones(len(p) // merge**2, dtype=torch.bool)) for p, grid in volumes + pixels]
        if self.skip_background is not None:
            for cut in cuts[: len(volumes)]:
                cut.present = body_tokens(cut.patches, cut.grid, merge, self.skip_background)
                cut.patches = cut.patches[cut.present.repeat_interleave(merge**2)]
        return cuts

    def _row(self, chat: Messages, counts: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation about volumes of ``counts`` tokens."""
        chat = [{**m, "content": self._text(m["content"])} for m in chat]
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

    def _text(self, content: Any) -> str:
        """A message's text, checked: the tokens that mark turns and volumes are not for it to write."""
        if not isinstance(content, str):
            if not isinstance(content, list) or any(not isinstance(part.get("text"), str) for part in content):
                raise ValueError("messages: content must be text, or parts of type text; volumes are given apart")
            content = "".join(part["text"] for part in content)
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        if found := next((token for token in special if token in content), None):
            raise ValueError(f"messages: {found} in a text; take it out, it marks turns and volumes")
        return content

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
