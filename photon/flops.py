"""FLOPs of Photon's forward pass, counted from shapes: for planning a run, and for what a measured time should be.

Legend: D decoder width, V width of the vision tower, M patches of a token, P tokens that questions share, N visual
tokens of a volume.

Counted are matrix products and attention, two FLOPs per multiplication. A token attends to what it may see and no
more: causal attention counts half of the matrix, whatever a kernel computes to mask it. Left out are norms,
activations, the choice of the tokens that stay (below 0.1 % of Photon 3B), and reading and writing memory, so that
the count says nothing of the time of a token that is generated alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from photon.configuration_photon import PhotonConfig
from photon.decoding import EarlyCache
from photon.geometry import Size3


def _linear(tokens: float, inputs: int, outputs: int) -> float:
    return 2.0 * tokens * inputs * outputs


def _has_windows(config: PhotonConfig) -> bool:
    """Qwen2.5-VL's tower has blocks with windows; in Qwen3-VL's all see a whole slab."""
    return hasattr(config.vision_config, "fullatt_block_indexes")


def visible_in_windows(config: PhotonConfig, height: int, width: int) -> float:
    """Patches that a patch sees on average in a block with windows, in a slab of ``height`` x ``width`` patches.

    Windows start at the slab's corner; the last ones of a row and of a column are cut off by its edge.
    """
    side = config.vision_config.window_size // config.patches.size[1]

    def along(patches: int) -> float:
        whole, rest = divmod(patches, side)
        return (whole * side**2 + rest**2) / patches

    return along(height) * along(width)


def vision_flops(config: PhotonConfig, patches: int, slab: int, window: float | None = None) -> float:
    """Vision tower on ``patches`` patches, ``slab`` of them in one depth slab (full attention stays in it).

    ``window``: what :func:`visible_in_windows` says; by default no window is cut off. Qwen3-VL has none.
    """
    v: Any = config.vision_config
    windows = _has_windows(config)
    full = len([i for i in v.fullatt_block_indexes if i < v.depth]) if windows else v.depth
    if windows and window is None:
        window = min(slab, (v.window_size // config.patches.size[1]) ** 2)
    matrices = 3 if windows else 2  # Qwen2.5-VL's MLPs are gated
    per_layer = _linear(patches, v.hidden_size, 4 * v.hidden_size + matrices * v.intermediate_size)
    attention = 4.0 * patches * v.hidden_size * (full * slab + (v.depth - full) * (window or 0))
    merged = v.hidden_size * v.spatial_merge_size**2
    mergers = 1 + len(getattr(v, "deepstack_visual_indexes", ()))
    merging = mergers * _linear(patches / v.spatial_merge_size**2, merged, merged + v.out_hidden_size)
    return _linear(patches, config.patches.voxels, v.hidden_size) + v.depth * per_layer + attention + merging


def volume_flops(config: PhotonConfig, shape: Size3) -> float:
    """Vision tower on one volume of ``shape`` voxels."""
    grid = config.patches.grid(shape)
    window = visible_in_windows(config, grid[1], grid[2]) if _has_windows(config) else None
    return vision_flops(config, grid[0] * grid[1] * grid[2], grid[1] * grid[2], window)


def decoder_flops(config: PhotonConfig, layers: int, tokens: float, visible: float) -> float:
    """``layers`` decoder layers on ``tokens`` tokens that see ``visible`` tokens each on average."""
    t: Any = config.text_config
    head = getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads
    query, key_value = head * t.num_attention_heads, head * t.num_key_value_heads
    per_token = _linear(1, t.hidden_size, 2 * query + 2 * key_value + 3 * t.intermediate_size)
    return layers * tokens * (per_token + 4.0 * visible * query)


def _causal(config: PhotonConfig, layers: int, length: float) -> float:
    """``layers`` decoder layers on one sequence."""
    return decoder_flops(config, layers, length, (length + 1) / 2)


def _head(config: PhotonConfig, tokens: float) -> float:
    """Logits of ``tokens`` tokens."""
    return _linear(tokens, config.text_config.hidden_size, config.text_config.vocab_size)


def _drops(config: PhotonConfig, keep_rate: float | Sequence[float] | None) -> list[tuple[int, float]]:
    """(scheduling layer, share of a volume's tokens behind it), drop by drop."""
    if keep_rate is None:
        return []
    layers = config.scheduling_layers or (config.text_config.num_hidden_layers // 4,)
    rates = [keep_rate] * len(layers) if isinstance(keep_rate, (int, float)) else list(keep_rate)
    left, drops = 1.0, []
    for layer, rate in zip(layers, rates, strict=True):
        left *= rate
        drops.append((layer, left))
    return drops


def forward_flops(
    config: PhotonConfig,
    shape: Size3,
    questions: int,
    text: int,
    answers: int,
    keep_rate: float | Sequence[float] | None,
    before: int = 0,
) -> float:
    """One volume of ``shape`` voxels with ``questions`` questions.

    Args:
        text: tokens of a question with its answer. answers: tokens of it that get logits.
        keep_rate: share of the visual tokens that each question keeps at a scheduling layer, or one share for each
            such layer; None shares every layer.
        before: tokens of text that all questions share with the volume, such as a system prompt.
    """
    visual, layers = config.patches.tokens(shape), config.text_config.num_hidden_layers
    drops = _drops(config, keep_rate)
    shared, lower = before + visual, drops[0][0] if drops else layers
    total = volume_flops(config, shape) + _causal(config, lower, shared)
    total += decoder_flops(config, lower, questions * text, shared + (text + 1) / 2)
    for (start, left), (end, _) in pairwise([*drops, (layers, 0.0)]):
        total += questions * _causal(config, end - start, before + left * visual + text)
    return total + _head(config, questions * answers)


def flip_flops(
    config: PhotonConfig, shape: Size3, questions: int, text: int, answers: int, keep_rate: float, before: int = 0
) -> float:
    """What the copies with the inverted mask add to :func:`forward_flops` (Eq. 20, ``objective: add``)."""
    ((layer, left),) = _drops(config, keep_rate)
    length = before + (1 - left) * config.patches.tokens(shape) + text
    layers = config.text_config.num_hidden_layers - layer
    return questions * _causal(config, layers, length) + _head(config, questions * answers)


def token_flops(
    config: PhotonConfig,
    shape: Size3,
    text: int,
    keep_rate: float | Sequence[float] | None,
    before: int = 0,
    early_cache: EarlyCache = "keep",
) -> float:
    """One generated token of one question, behind ``text`` tokens, itself included.

    ``early_cache``: with ``evict`` the layers below a drop, too, see only what passed the last one.
    """
    visual, layers = config.patches.tokens(shape), config.text_config.num_hidden_layers
    drops = _drops(config, keep_rate)
    if early_cache == "evict" and drops:
        drops = [(0, drops[-1][1])]
    stages = [(0, 1.0), *drops, (layers, 0.0)]
    total = _head(config, 1)
    for (start, left), (end, _) in pairwise(stages):
        total += decoder_flops(config, end - start, 1, before + left * visual + text)
    return total
