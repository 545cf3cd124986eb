"""Forward FLOPs of Photon, counted from shapes: for planning a run and for its utilization."""

from photon.configuration_photon import PhotonConfig


def _linear(tokens: float, inputs: int, outputs: int) -> float:
    return 2.0 * tokens * inputs * outputs


def vision_flops(config: PhotonConfig, patches: int, slab: int) -> float:
    """Vision tower on ``patches`` patches, ``slab`` of them in one depth slab (full attention stays in it)."""
    v = config.vision_config
    window = min(slab, (v.window_size // config.patches.size[1]) ** 2)
    per_layer = _linear(patches, v.hidden_size, 4 * v.hidden_size + 3 * v.intermediate_size)
    full = len([i for i in v.fullatt_block_indexes if i < v.depth])
    attention = 4.0 * patches * v.hidden_size * (full * slab + (v.depth - full) * window)
    merged = v.hidden_size * v.spatial_merge_size**2
    merger = _linear(patches / v.spatial_merge_size**2, merged, merged + v.out_hidden_size)
    return _linear(patches, config.patches.voxels, v.hidden_size) + v.depth * per_layer + attention + merger


def decoder_flops(config: PhotonConfig, layers: int, tokens: float, visible: float) -> float:
    """``layers`` decoder layers on ``tokens`` tokens that see ``visible`` tokens each on average."""
    t = config.text_config
    key_value = t.hidden_size // t.num_attention_heads * t.num_key_value_heads
    per_token = _linear(1, t.hidden_size, 2 * t.hidden_size + 2 * key_value + 3 * t.intermediate_size)
    return layers * tokens * (per_token + 4.0 * visible * t.hidden_size)


def forward_flops(
    config: PhotonConfig,
    shape: tuple[int, int, int],
    questions: int,
    text: int,
    answers: int,
    keep_rate: float | None,
) -> float:
    """One volume of ``shape`` voxels with ``questions`` questions.

    Args:
        text: tokens of a question with its answer. answers: tokens of it that carry a label.
        keep_rate: share of the visual tokens that each question keeps after the scheduling layer; None shares
            every layer.
    """
    grid = config.patches.grid(shape)
    visual = config.patches.tokens(shape)
    layers = config.text_config.num_hidden_layers
    total = vision_flops(config, grid[0] * grid[1] * grid[2], grid[1] * grid[2])
    drops = config.scheduling_layers or (layers // 4,)
    lower = layers if keep_rate is None else drops[0]
    total += decoder_flops(config, lower, visual, visual / 2)
    total += decoder_flops(config, lower, questions * text, visual + text / 2)
    if keep_rate is not None:
        length = keep_rate * visual + text
        total += decoder_flops(config, layers - lower, questions * length, length / 2)
    return total + _linear(questions * answers, config.text_config.hidden_size, config.text_config.vocab_size)
