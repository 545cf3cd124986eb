"""A small model with the module names and the calling conventions of Hulu-Med's published code, and prompts for it.

Written anew from those names: a tower with two-dimensional rotary positions, bilinear merging of patches, an MLP
projector, Qwen2 or Qwen3 behind; ``forward`` that takes pixels or embeddings; ``generate`` that refuses embeddings and
returns new tokens only; the dropping of tokens of videos that ``use_token_compression`` asks for.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from tests.medpruner.tiny_slicewise import EOS, louder

IMAGE, TIME, COMMA, LINE = 5, 6, 7, 8
PATCH = 4


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, rotary_pos_emb: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(hidden_states), "n (h d) -> h n d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = rotary_pos_emb.repeat(1, 2)
        q, k = (x * angles.cos().to(x) + self._half_turned(x) * angles.sin().to(x) for x in (q, k))
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
        mixed = torch.cat([F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts], 1)
        out: Tensor = self.out_proj(rearrange(mixed, "h n d -> n (h d)"))
        return out

    @staticmethod
    def _half_turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, rotary_pos_emb: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(
            self.layer_norm1(hidden_states), cu_seqlens=cu_seqlens, rotary_pos_emb=rotary_pos_emb
        )
        out: Tensor = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return out


class Tower(nn.Module):
    """Patches (p, 3 * PATCH**2), those of a merged token side by side -> merged features (N, V)."""

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 3) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.angles = width // heads // 4
        self.embeddings: Any = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, width, PATCH, PATCH)
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor, grid_sizes: Tensor, merge_sizes: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(pixel_values.unflatten(1, (3, PATCH, PATCH))).flatten(1)
        lengths = [int(h * w) for t, h, w in grid_sizes for _ in range(t)]
        slices = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        rotary = torch.cat([self._rotary(*row) for row in zip(grid_sizes.tolist(), merge_sizes.tolist(), strict=True)])
        for layer in self.encoder.layers:
            x = layer(x, cu_seqlens=slices, rotary_pos_emb=rotary)
        parts = self.post_layernorm(x).split(grid_sizes.prod(1).tolist())
        merged = []
        for part, (t, h, w), m in zip(parts, grid_sizes.tolist(), merge_sizes.tolist(), strict=True):
            sizes = {"t": t, "h": h // m, "w": w // m, "a": m, "b": m}
            frames = rearrange(part, "(t h w a b) v -> t v (h a) (w b)", **sizes)
            smaller = F.interpolate(frames, (h // m, w // m), mode="bilinear")
            merged.append(rearrange(smaller, "t v h w -> (t h w) v"))
        return torch.cat(merged)

    def _rotary(self, grid: list[int], m: int) -> Tensor:
        t, h, w = grid
        places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        places = rearrange(places, "c (h a) (w b) -> (h w a b) c", a=m, b=m).repeat(t, 1)
        frequencies = 1e4 ** (-torch.arange(self.angles) / self.angles)
        return (places[..., None] * frequencies).flatten(1)


class Projector(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.readout = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(x)
        return out


class HuluQwen2Config(Qwen2Config):
    model_type = "hulumed_qwen2"


class HuluQwen3Config(Qwen3Config):
    model_type = "hulumed_qwen3"


class Multimodal:
    """The multimodal side of the causal language model."""

    def get_model(self: Any) -> Any:
        return self.model

    def compression_mask(self, pixels: Tensor, grid: Tensor, merge: Tensor, modals: Sequence[str]) -> Tensor:
        """Tokens of videos that differ from the same place one frame before by more than 0.1, one a frame at least."""
        masks = []
        for part, (t, h, w), m, modal in zip(pixels.split(grid.prod(1).tolist()), grid, merge, modals, strict=True):
            tokens = part.view(int(t), int(h * w) // int(m) ** 2, -1)
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
            if modal == "video":
                mask[1:] = tokens.diff(dim=0).abs().mean(-1) > 0.1
                mask[mask.sum(1) < 1, :1] = True
            masks.append(mask.flatten() if modal != "text" else mask.new_zeros(0))
        return torch.cat(masks)

    def prepared(self: Any, ids: Tensor, mask: Any, pixels: Tensor, grid: Tensor, merge: Tensor, modals: Any) -> Any:
        """Embeddings (B, L', C) and attention mask."""
        merged = self.model.mm_projector(self.model.vision_encoder(pixels, grid, merge))
        counts = (grid.prod(1) // merge**2).tolist()
        shown = torch.tensor(
            [modal != "text" for modal, count in zip(modals, counts, strict=True) for _ in range(count)]
        )
        features = merged[shown]
        if self.config.use_token_compression:
            assert len(ids) == 1
            kept = self.compression_mask(pixels, grid, merge, modals)
            stays = torch.ones_like(ids[0], dtype=torch.bool)
            stays[ids[0] == self.config.image_token_index] = kept
            ids, mask, features = ids[:, stays], None if mask is None else mask[:, stays], features[kept]
        embeds = self.model.embed_tokens(ids).clone()
        embeds[ids == self.config.image_token_index] = features
        return embeds, mask

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        pixel_values: Any = None,
        grid_sizes: Any = None,
        merge_sizes: Any = None,
        modals: Any = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None and pixel_values is not None and input_ids.shape[1] > 1:
            inputs_embeds, attention_mask = self.prepared(
                input_ids, attention_mask, pixel_values, grid_sizes, merge_sizes, modals
            )
            input_ids = None
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self: Any,
        pixel_values: Any = None,
        grid_sizes: Any = None,
        merge_sizes: Any = None,
        modals: Any = None,
        **kwargs: Any,
    ) -> Any:
        ids, mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask", None)
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        if pixel_values is None:
            embeds = self.model.embed_tokens(ids)
        else:
            embeds, mask = self.prepared(ids, mask, pixel_values, grid_sizes, merge_sizes, modals)
        return super().generate(attention_mask=mask, inputs_embeds=embeds, **kwargs)  # type: ignore[misc]


class HuluQwen2(Multimodal, Qwen2ForCausalLM):
    config_class = HuluQwen2Config


class HuluQwen3(Multimodal, Qwen3ForCausalLM):
    config_class = HuluQwen3Config


def hulu(kind: str = "qwen2", compression: bool = False, seed: int = 0) -> Any:
    """Three blocks in the tower and three decoder layers."""
    torch.manual_seed(seed)
    kinds: dict[str, Any] = {"qwen2": (HuluQwen2Config, HuluQwen2), "qwen3": (HuluQwen3Config, HuluQwen3)}
    config_class, model_class = kinds[kind]
    config = config_class(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    config.image_token_index = IMAGE
    config.use_token_compression = compression
    model = model_class(config)
    assert isinstance(model.model, Qwen2Model | Qwen3Model)
    model.model.vision_encoder = Tower()
    model.model.mm_projector = Projector(32, 32)
    return louder(model)


Shown = tuple[str, int, int, int]
"""What is shown and its frames, rows and columns of patches."""


def prompts(rows: Sequence[Sequence[Shown]], seed: int = 0) -> dict[str, Any]:
    """Inputs with a row for each list of images, videos or hidden ("text") pixels, as its processor writes them.

    Frames of a video stand behind "Time ...:" and before a comma, images before a line's end. Every second frame
    nearly repeats the one before.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, grids, merges = [], [], [], []
    for number, row in enumerate(rows):
        of_row = [20 + number, 21]
        for modal, t, h, w in row:
            merge = 2 if modal == "video" else 1
            frames = torch.rand(t, h * w, 3 * PATCH**2, generator=generator)
            frames[1::2] = frames[:-1:2][: len(frames[1::2])] + 0.001
            pixels.append(frames.flatten(0, 1))
            grids.append([t, h, w])
            merges.append(merge)
            tokens = [IMAGE] * (h * w // merge**2)
            if modal == "video":
                of_row += [x for s in range(t) for x in (TIME, 30 + s, *tokens, COMMA if s + 1 < t else LINE)]
            elif modal == "image":
                of_row += [x for _ in range(t) for x in (*tokens, LINE)]
        ids.append([*of_row, *range(40, 45 + number)])
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": (torch.arange(width) >= torch.tensor([[width - len(row)] for row in ids])).long(),
        "pixel_values": torch.cat(pixels),
        "grid_sizes": torch.tensor(grids),
        "merge_sizes": torch.tensor(merges),
        "modals": [modal for row in rows for modal, *_ in row],
    }
