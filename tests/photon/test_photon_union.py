"""`upper_layers: union`: rows of a volume share the tokens that any of them keeps."""

from typing import Any

import pytest
import torch

from photon.modeling_photon import Pass
from photon.processing_photon import VolumeChats
from photon.stream import LossWeights, Stream
from tests.photon.conftest import turn
from tests.photon.test_photon_generation import Masked
from tests.photon.test_photon_groups import gradients, total_loss, volumes
from tests.photon.tiny_recipes import Recipes

QUESTIONS = [("Is there a pleural effusion?", "no"), ("Which side is it on?", "left"), ("How many lesions?", "two")]
UNION = {"predictor_bias": 0.0, "upper_layers": "union"}


def pair(tiny: Any, **scheduling: Any) -> tuple[Any, Any, Any]:
    """The same weights with union and with own tokens."""
    union, processor = tiny(scheduling={**UNION, **scheduling})
    own, _ = tiny(scheduling={**UNION, "upper_layers": "own", **scheduling})
    return union, own, processor


@pytest.mark.parametrize("chats", [[QUESTIONS[0]], [QUESTIONS[0]] * 2], ids=["one question", "the same one twice"])
def test_where_all_rows_keep_the_same_it_is_the_exact_one(tiny: Any, chats: list[tuple[str, str]]) -> None:
    union, own, processor = pair(tiny)
    batch = processor.batch([VolumeChats([v], [turn(q, a) for q, a in chats]) for v in volumes()])
    weights, found = LossWeights(0.1, 0.3), []
    for model in (union, own):
        loss = total_loss(model, batch, "hard", weights)
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (a, with_union), (b, with_own) = found
    assert a == pytest.approx(b, rel=1e-5) and with_union.keys() == with_own.keys()
    assert any("threshold_predictor" in name and bool(g.any()) for name, g in with_own.items())
    for name, gradient in with_own.items():  # float32 sums in another order
        atol = 1e-5 * float(gradient.abs().max()) + 1e-9
        assert torch.allclose(with_union[name], gradient, rtol=1e-5, atol=atol), name


def seen(layout: Any, kept: torch.Tensor) -> torch.Tensor:
    """(T, T) who attends to whom above the drop, written out token by token."""
    group_of: dict[int, int] = {}
    at = 0
    for g, n in enumerate(layout.prefix_lengths):
        group_of.update(dict.fromkeys(range(at, at + n), g))
        at += n
    owners = [g for g, lengths in enumerate(layout.suffix_lengths) for _ in lengths]
    table = layout.row_visual.tolist()
    mask = torch.eye(len(layout.source), dtype=torch.bool)
    union = {
        t
        for row, tokens in enumerate(layout.row_tokens.tolist())
        for t, v in zip(tokens, table[row], strict=True)
        if t >= 0 and (v < 0 or kept[row, v])
    }
    for row, tokens in enumerate(layout.row_tokens.tolist()):
        own = {t for t, v in zip(tokens, table[row], strict=True) if t >= 0 and (v < 0 or kept[row, v])}
        for t in (t for t in tokens if t >= 0):
            in_prefix = t in group_of
            assert not in_prefix or group_of[t] == owners[row]
            for s in (union if in_prefix else own) & {t for t in tokens if t >= 0}:
                mask[t, s] |= s <= t
    return mask


def test_the_loss_and_its_gradients_are_those_of_masked_attention(tiny: Any) -> None:
    union, _, processor = pair(tiny)
    batch = processor.batch([VolumeChats([v], [turn(q, a) for q, a in QUESTIONS]) for v in volumes()])
    output = union(**batch)
    layout = union.layout(*(batch[k] for k in (
        "input_ids", "attention_mask", "video_grid_thw", "group_index", "labels")))  # fmt: skip
    kept = output.kept[layout.row_order]
    assert not torch.equal(kept[0], kept[1]), "else there is nothing to unite"
    output.token_losses.sum().backward()
    found = {n: g for n, g in gradients(union).items() if "threshold" not in n}

    model = union.model
    visual, deepstack = model.visual.encode(batch["pixel_values_videos"], batch["video_grid_thw"], None)
    stream, _, _ = model._enter(batch["input_ids"], layout, visual, deepstack, 1, Pass())
    assert isinstance(stream, Stream)
    hidden = model.run(stream.hidden, range(1, 4), stream.rotary, Masked(seen(layout, kept)), stream.ordinal, deepstack)
    logits = union._logits(hidden[layout.predicts])
    losses = torch.nn.functional.cross_entropy(logits, layout.targets, reduction="none")
    # The same products in another order, in float32.
    torch.testing.assert_close(output.token_losses, losses, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    for name, gradient in gradients(union).items():
        if "threshold" not in name:
            atol = 1e-5 * float(gradient.abs().max()) + 1e-8
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=atol), name


def test_upper_layers_run_on_the_union_once(tiny: Any) -> None:
    union, _, processor = pair(tiny)
    lengths: list[int] = []
    union.model.language_model.layers[3].register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    batch = processor.batch([VolumeChats(volumes()[:1], [turn(q, a) for q, a in QUESTIONS])])
    kept = union(**batch).kept
    text = union.layout(*(batch[k] for k in (
        "input_ids", "attention_mask", "video_grid_thw", "group_index", "labels")))  # fmt: skip
    own_text = sum(map(sum, text.suffix_lengths)) + text.prefix_lengths[0] - text.visual_counts[0]
    assert lengths == [own_text + int(kept.any(0).sum())] and kept.any(0).sum() < kept.sum()


@pytest.mark.parametrize("early", ["keep", "evict"])
def test_decoding_goes_on_from_what_the_rows_share(tiny: Any, early: str) -> None:
    union, _, processor = pair(tiny)
    union.eval()
    prompts = processor(volumes()[:1], [turn(q) for q, _ in QUESTIONS])
    made = union.generate(
        **prompts, max_new_tokens=4, do_sample=False, eos_token_id=None, early_cache=early,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    labels = torch.full_like(made.sequences, -100)
    labels[:, -4:] = made.sequences[:, -4:]
    mask = torch.cat([prompts["attention_mask"], torch.ones(len(labels), 4, dtype=torch.long)], 1)
    forced = union(**{**prompts, "input_ids": made.sequences, "attention_mask": mask}, labels=labels)
    stepwise = torch.stack(made.logits, 1).flatten(0, 1)
    same = torch.isclose(forced.logits, stepwise, rtol=1e-4, atol=1e-4).all(1).view(-1, 4)
    assert same[:, 0].all() and bool(same.all()) == (early == "keep")


def test_what_it_does_not_go_with_is_refused(tiny: Any, recipes: Recipes, backbone: Any) -> None:
    union, _, processor = pair(tiny, layers=[1, 2])
    batch = processor.batch([VolumeChats(volumes()[:1], [turn(q, a) for q, a in QUESTIONS])])
    with pytest.raises(ValueError, match="union needs a single scheduling layer"):
        union(**batch)
    for change in ({"model__scheduling__layers": [1, 2]}, {"model__objective": "add"}):
        with pytest.raises(Exception, match="union needs one scheduling layer and objective: replace"):
            recipes.phase2(backbone, model__scheduling__upper_layers="union", **change)
