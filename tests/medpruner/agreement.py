"""What every backbone must hold to, told its model and inputs for it."""

from typing import Any

import torch
from torch import Tensor

import medpruner
from medpruner import HiPrune, HuluL1, MedPruner, Random, Uniform, VisionZip

METHODS = [
    MedPruner(gamma=0.01, tau=0.5), MedPruner(gamma=0.01, tau=0.5, features="tower"), VisionZip(keep=0.3), HiPrune(),
    HuluL1(threshold=0.2), Uniform(), Random(keep=0.3),
]  # fmt: skip
PLACEHOLDER = 5
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [0, PLACEHOLDER]}
"""A random model may write placeholders."""

Inputs = dict[str, Any]


def logits(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def keeping_everything_changes_nothing(model: Any, one: Inputs, both: Inputs) -> None:
    """Bit for bit: logits of one prompt, and all that ``generate`` says of two of different lengths."""
    expected = logits(model, one)
    steps = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    generated = model.generate(**both, **steps)
    medpruner.attach(model, MedPruner(gamma=None, tau=1.0))
    assert torch.equal(logits(model, one), expected)
    assert model.medpruner.report.rate == 1.0
    found = model.generate(**both, **steps)
    assert torch.equal(found.sequences, generated.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, generated.logits, strict=True))


def generation_equals_single_steps(model: Any, inputs: Inputs, new: Tensor) -> None:
    """Greedy tokens (B, steps) of a pruned batch, chosen again one by one from prompts that grow."""
    assert 0 < model.medpruner.report.rate < 1
    longer = dict(inputs)
    for step in range(new.shape[1]):
        last = logits(model, longer)[:, -1].index_fill(1, torch.tensor(GREEDY["suppress_tokens"]), -torch.inf)
        assert torch.equal(last.argmax(-1), new[:, step])
        grows = {"input_ids": new[:, step : step + 1], "attention_mask": 1, "token_type_ids": 0}
        for name in grows.keys() & longer.keys():
            last_column = torch.as_tensor(grows[name]).expand(len(new), 1)
            longer[name] = torch.cat([longer[name], last_column], 1)


def beams_and_samples_see_their_own_row(model: Any, both: Inputs, first: Inputs, prompt: int) -> None:
    """``first`` is the first row of ``both`` alone; of what is generated, ``prompt`` columns are not new."""
    greedy = model.generate(**both, max_new_tokens=4, **GREEDY)
    sampling = {**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    assert torch.equal(model.generate(**both, max_new_tokens=4, **sampling), greedy.repeat_interleave(2, 0))
    beams = model.generate(**both, max_new_tokens=4, **GREEDY, num_beams=3)
    assert beams.shape == greedy.shape == (2, prompt + 4)
    alone = model.generate(**first, max_new_tokens=4, **GREEDY, num_beams=3)
    assert torch.equal(alone[0, -4:], beams[0, -4:])


def detaching_gives_the_model_back(model: Any, inputs: Inputs) -> None:
    before, attributes = logits(model, inputs), set(vars(model))
    medpruner.attach(model, MedPruner(gamma=0.01, tau=0.3))
    assert logits(model, inputs).shape != before.shape
    model.generate(**inputs, max_new_tokens=1, **GREEDY)
    medpruner.detach(model)
    assert torch.equal(logits(model, inputs), before)
    assert set(vars(model)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
