"""A volume is encoded once for all its questions; nothing else may change by that."""

from typing import Any

import pytest
import torch

from mllm3d.training.engine import checkpoint_activations
from photon.losses import band_loss, flip_loss
from photon.packing import pack
from photon.processing_photon import VolumeChats
from photon.stream import LossWeights
from tests.photon.conftest import turn

QUESTIONS = [("Is there a pleural effusion?", "yes"), ("Which side is it on?", "left"), ("How many lesions?", "two")]


def volumes() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.rand(8, 24, 32), torch.rand(12, 16, 16)]  # unequal sizes: 24 and 12 tokens


def total_loss(
    model: Any, batch: dict[str, Any], reduction: str, weights: LossWeights, flip: Any = "none"
) -> torch.Tensor:
    """Cross-entropy and band; a flipped batch has the flip loss instead (replace) or besides (add)."""
    output = model(**batch, reduction=reduction, weights=weights, flip=flip)
    if flip == "replace":
        return flip_loss(output.token_losses).sum() * weights.token
    loss = output.token_losses.sum() * weights.token
    if flip == "add":
        loss = loss + flip_loss(output.flipped_losses).sum() * weights.token
    if output.mean_probability is not None:
        loss = loss + band_loss(output.mean_probability, 0.1, 0.2).sum() * weights.row
    return loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("reduction", "layers", "flip"),
    [
        ("none", [1], "none"),
        ("soft", [1], "none"),
        ("soft", [1, 3], "none"),
        ("hard", [1], "none"),
        ("hard", [0], "none"),
        ("hard", [1, 3], "none"),
        ("hard", [1], "replace"),
        ("hard", [1], "add"),
        ("hard", [0, 2], "replace"),
    ],
)
def test_a_shared_volume_gives_the_loss_and_gradients_of_separate_samples(
    tiny: Any, reduction: str, layers: list[int], flip: str
) -> None:
    model, processor = tiny(scheduling={"predictor_bias": 0.0, "layers": layers})
    groups = [VolumeChats([v], [turn(q, a) for q, a in QUESTIONS]) for v in volumes()]
    tokens = int((processor.batch(groups)["labels"] != -100).sum())
    weights = LossWeights(1 / tokens, 1 / (len(groups) * len(QUESTIONS)))

    loss = total_loss(model, processor.batch(groups), reduction, weights, flip)
    loss.backward()
    shared = gradients(model)

    apart = 0.0
    for group in groups:
        for chat in group.chats:
            batch = processor.batch([VolumeChats(group.volumes, [chat])])
            one = total_loss(model, batch, reduction, weights, flip)
            one.backward()
            apart += one.item()
    separate = gradients(model)

    # float32 sums in another order: a few units in the sixth digit of the largest entry.
    assert loss.item() == pytest.approx(apart, rel=1e-5)
    assert shared.keys() == separate.keys()
    learns = reduction != "none" and flip != "replace"
    assert learns == any("threshold_predictor" in name and bool(shared[name].any()) for name in shared)
    for name, gradient in shared.items():
        scale = separate[name].abs().max()
        assert torch.allclose(gradient, separate[name], rtol=1e-5, atol=1e-5 * float(scale) + 1e-9), name


def test_flipped_rows_see_just_what_was_dropped(tiny: Any) -> None:
    """`add` has both masks in one pass: each answer's loss is that of a pass with its mask alone."""
    model, processor = tiny()
    batch = processor.batch([VolumeChats([v], [turn(q, a) for q, a in QUESTIONS]) for v in volumes()])
    both = model(**batch, flip="add")
    torch.testing.assert_close(both.token_losses, model(**batch).token_losses, rtol=1e-5, atol=1e-5)
    flipped = model(**batch, flip="replace")
    torch.testing.assert_close(both.flipped_losses, flipped.token_losses, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both.token_losses, both.flipped_losses, atol=1e-3)


def test_adding_flips_needs_a_single_scheduling_layer(tiny: Any) -> None:
    model, processor = tiny(scheduling={"layers": [1, 2]})
    batch = processor.batch([VolumeChats(volumes()[:1], [turn("Is there?", "no")])])
    with pytest.raises(ValueError, match="flip: add needs a single scheduling layer"):
        model(**batch, flip="add")


def test_a_batch_that_does_not_teach_scheduling_gives_it_no_gradient(tiny: Any) -> None:
    model, processor = tiny()
    batch = processor.batch([VolumeChats(volumes()[:1], [turn(q, a) for q, a in QUESTIONS])])
    for reduction in ("soft", "hard"):
        output = model(**batch, reduction=reduction, learn_scheduling=False)
        (output.loss + output.mean_probability.sum()).backward()
        found = [gradient for name, gradient in gradients(model).items() if "threshold_predictor" in name]
        assert len(found) == 4 and not any(gradient.any() for gradient in found), "zeros, for ranks whose batch teaches"


def test_a_second_drop_chooses_among_what_the_first_one_kept(tiny: Any) -> None:
    chats = [turn(q, a) for q, a in QUESTIONS]
    kept = []
    for layers in ([1], [1, 3]):
        model, processor = tiny(scheduling={"layers": layers, "keep_ratio": 0.5})
        kept.append(model(**processor.batch([VolumeChats([v], chats) for v in volumes()])))
    once, twice = kept
    assert not (twice.kept & ~once.kept).any()
    assert twice.kept.sum(1).tolist() == [6, 6, 6, 3, 3, 3]
    assert twice.keep_rate.tolist() == [0.25] * 6


def test_a_model_of_random_selection_keeps_as_many_but_others(tiny: Any) -> None:
    batches = []
    for selection in ("saliency", "random"):
        model, processor = tiny(scheduling={"predictor_bias": 0.0, "selection": selection})
        batches.append(model(**processor.batch([VolumeChats(volumes()[:1], [turn(q, a) for q, a in QUESTIONS])])))
    chosen, drawn = batches
    assert chosen.keep_rate.tolist() == drawn.keep_rate.tolist()
    assert not torch.equal(chosen.kept, drawn.kept)


def test_every_turn_of_the_user_is_instruction_and_the_answer_is_not(tiny: Any) -> None:
    model, processor = tiny()

    def kept(first: str, second: str, answer: str) -> torch.Tensor:
        chat = [*turn(first, "two"), *turn(second, answer)]
        return model(**processor.batch([VolumeChats(volumes()[:1], [chat])])).kept

    usual = kept("How many lesions?", "Which side is it on?", "no")
    assert torch.equal(usual, kept("How many lesions?", "Which side is it on?", "yes yes left"))
    assert not torch.equal(usual, kept("How many lesions?", "Is there a pleural effusion?", "no"))
    assert not torch.equal(usual, kept("Is there?", "Which side is it on?", "no"))


def test_instruction_tokens_are_those_of_the_users_turns(tiny: Any) -> None:
    model, processor = tiny()
    tokenizer, config = processor.tokenizer, model.config
    chat = [*turn("How many lesions?", "two"), *turn("Which side is it on?", "left")]
    batch = processor.batch([VolumeChats(volumes()[:1], [chat])])
    ids = batch["input_ids"][0]
    layout = pack(
        batch["input_ids"], None, batch["video_grid_thw"].tolist(), None, None, config.special_tokens, config.geometry
    )
    found = ids[layout.source[layout.instruction[0]]]
    assert tokenizer.decode(found) == "How many lesions?Which side is it on?"


def test_rows_without_group_index_are_their_own_groups(tiny: Any) -> None:
    model, processor = tiny()
    chats = [turn(q, a) for q, a in QUESTIONS[:2]]
    together = processor.batch([VolumeChats(volumes()[:1], chats)])
    apart = processor.batch([VolumeChats(volumes()[:1], [c]) for c in chats])
    apart.pop("group_index")
    assert model(**together).loss.item() == pytest.approx(model(**apart).loss.item(), rel=1e-5)


def test_the_answer_does_not_change_what_is_kept(tiny: Any) -> None:
    model, processor = tiny()
    kept = [
        model(**processor.batch([VolumeChats(volumes()[:1], [turn("Which side is it on?", answer)])])).kept
        for answer in ("left", "two yes no yes")
    ]
    assert torch.equal(*kept)
    assert 0 < kept[0].sum() < kept[0].numel()


def test_the_question_does_change_what_is_kept(tiny: Any) -> None:
    model, processor = tiny()
    output = model(**processor.batch([VolumeChats(volumes()[:1], [turn(q, a) for q, a in QUESTIONS])]))
    assert not torch.equal(output.kept[0], output.kept[1])


def test_a_prior_and_a_current_scan_share_one_row(tiny: Any) -> None:
    model, processor = tiny()
    batch = processor.batch([VolumeChats(volumes(), [turn("Which side is it on?", "left")])])
    output = model(**batch)
    assert output.kept.shape == (1, 24 + 12)
    swapped = processor.batch([VolumeChats(volumes()[::-1], [turn("Which side is it on?", "left")])])
    assert model(**swapped).loss.item() != pytest.approx(output.loss.item(), rel=1e-4)


def test_text_without_a_volume_and_with_one_go_in_one_batch(tiny: Any) -> None:
    model, processor = tiny()
    groups = [
        VolumeChats([], [turn("How many lesions?", "two")]),
        VolumeChats(volumes()[:1], [turn("Is there?", "no")]),
    ]
    together = model(**processor.batch(groups)).token_losses
    alone = torch.cat([model(**processor.batch([g])).token_losses for g in groups])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_question_without_text_keeps_every_token(tiny: Any) -> None:
    model, processor = tiny()
    output = model(**processor.batch([VolumeChats(volumes()[:1], [turn("", "no")])]))
    assert output.keep_rate.tolist() == [1.0]


def test_truncation_inside_the_volume_is_an_error_with_both_counts(tiny: Any) -> None:
    model, processor = tiny()
    batch = processor.batch([VolumeChats(volumes()[:1], [turn("Is there?", "no")])])
    places = (batch["input_ids"][0] == model.config.video_token_id).nonzero()[:, 0]
    keep = [i for i in range(batch["input_ids"].shape[1]) if i != int(places[3])]
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name][:, keep]
    with pytest.raises(ValueError, match="23 .*for a volume of 24"):
        model(**batch)


def test_rows_of_a_group_must_agree_before_the_question(tiny: Any) -> None:
    model, processor = tiny()
    batch = processor.batch([VolumeChats(volumes()[:1], [turn("Is there?", "no"), turn("How many?", "two")])])
    batch["input_ids"][1, 1] = batch["input_ids"][1, 2]
    with pytest.raises(ValueError, match="rows 0 and 1 share a volume"):
        model(**batch)


def test_what_is_dropped_is_gone_from_the_upper_layers(tiny: Any) -> None:
    model, processor = tiny()
    seen: dict[int, int] = {}

    def note(index: int) -> Any:
        return lambda _m, args, _o: seen.__setitem__(index, args[0].shape[1])

    for i, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_hook(note(i))
    batch = processor.batch([VolumeChats(volumes()[:1], [turn(q, a) for q, a in QUESTIONS[:1]])])
    output = model(**batch)
    text = int(batch["attention_mask"].sum()) - 24
    assert seen[0] == text + 24
    assert seen[1] == seen[3] == text + int(output.kept.sum())


def test_random_tokens_are_as_many_and_depend_on_their_seed_alone(tiny: Any) -> None:
    model, processor = tiny()
    chats = [turn(q, a) for q, a in QUESTIONS]
    batch = processor.batch([VolumeChats(volumes()[:1], chats)])
    scheduled = model(**batch)
    drawn = model(**batch, selection="random", seeds=torch.tensor([7, 8, 9]))
    assert drawn.keep_rate.tolist() == scheduled.keep_rate.tolist()
    assert not torch.equal(drawn.kept, scheduled.kept)
    alone = model(
        **processor.batch([VolumeChats(volumes()[:1], [chats[1]])]), selection="random", seeds=torch.tensor([8])
    )
    assert torch.equal(alone.kept[0], drawn.kept[1])


def test_bfloat16_runs_and_stays_near(tiny: Any) -> None:
    model, processor = tiny()
    batch = processor.batch([VolumeChats(volumes()[:1], [turn(q, a) for q, a in QUESTIONS])])
    exact = model(**batch, reduction="none").loss.item()
    # bfloat16 keeps 8 bits: four layers of width 64 with enlarged weights stay within a tenth.
    assert model.bfloat16()(**batch, reduction="none").loss.item() == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("reduction", ["none", "hard"])
def test_activation_checkpointing_changes_no_gradient(tiny: Any, reduction: str) -> None:
    model, processor = tiny()
    batch = processor.batch([VolumeChats(volumes()[:1], [turn(q, a) for q, a in QUESTIONS])])
    model.train()
    weights = LossWeights(0.1, 0.3)
    total_loss(model, batch, reduction, weights).backward()
    plain = gradients(model)
    checkpoint_activations(model)
    total_loss(model, batch, reduction, weights).backward()
    again = gradients(model)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
