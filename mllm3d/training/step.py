"""One optimizer step: its loss over all ranks and micro-batches, and the guard against inf and nan."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from mllm3d.training.distributed import World
from mllm3d.training.engine import is_plain
from mllm3d.training.gradients import reach_all
from mllm3d.training.recipe import Batch, Recipe, StepOutput, to_device


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step leaves for the log.

    counts: units over all ranks and micro-batches.
    terms: this rank's share of each loss term, divided by the global count; the ranks' sum is the term.
    metrics: this rank's (sum, count) of each metric.
    """

    counts: dict[str, int]
    terms: dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]]
    grad_norm: Tensor | float


def train_step(
    engine: Any, recipe: Recipe, batches: Sequence[Batch], step: int, total_steps: int, world: World
) -> StepResult:
    """Forward and backward over the micro-batches of one optimizer step, then the step itself.

    Each loss term is divided by its number of units in the whole step: all ranks, all micro-batches. A batch
    with many answer tokens so weighs as much as if everything had been one batch.
    """
    counts = global_counts(recipe, batches, step, world)
    # DeepSpeed averages gradients over ranks; a mean over the units of all of them has to undo that.
    weights = {name: world.size / count for name, count in counts.items()}
    outputs: list[StepOutput] = []
    for batch in batches:
        output = recipe.losses(engine, to_device(batch, world.device), step, total_steps, weights)
        loss = step_loss(output, weights)
        if world.size > 1 and engine.zero_optimization_stage() in (1, 2):
            loss = reach_all(loss, engine.module)
        # `weights` are those of the whole step already: the recipe needs the loss as it is differentiated.
        engine.backward(loss, scale_wrt_gas=False)
        outputs.append(_detached(output))
        if is_plain(engine) and len(outputs) == len(batches):
            norm = _clip(engine)
            if not torch.isfinite(norm):
                _stop(recipe, batches, outputs, step, world)
        engine.step()
    if not is_plain(engine):
        if not engine.was_step_applied():
            _stop(recipe, batches, outputs, step, world)
        norm = engine.get_global_grad_norm()
    terms, metrics = _summed(outputs, counts)
    return StepResult(counts, terms, metrics, norm)


def global_counts(recipe: Recipe, batches: Sequence[Batch], step: int, world: World) -> dict[str, int]:
    """Units in all micro-batches of all ranks. A unit that does not occur at all ends the run: a mean over
    nothing is no loss."""
    local = [recipe.counts(batch) for batch in batches]
    names = sorted(local[0])
    totals = world.sum(torch.tensor([sum(counts[name] for counts in local) for name in names]))
    counts = dict(zip(names, totals.tolist(), strict=True))
    for name, count in counts.items():
        if count == 0:
            unit, samples = name.replace("_", " "), _samples(_all_ids(recipe, batches, world))
            world.stop(f"optimizer step {step + 1}: no {unit} in its batches{samples}; correct these rows")
    return counts


def step_loss(output: StepOutput, weights: dict[str, float]) -> Tensor:
    """The loss of one micro-batch: sum over terms of value * weight of its unit.

    A term that is not finite makes every gradient so (0 * inf is nan): the gradient norm, which all ranks
    share anyway, then tells them.
    """
    loss = torch.stack([(term.value * weights[term.per]).float() for term in output.terms.values()]).sum()
    return loss * (1.0 + 0.0 * loss.detach())


def _clip(engine: Any) -> Tensor:
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping() or float("inf"))


def _detached(output: StepOutput) -> StepOutput:
    terms = {name: type(term)(term.value.detach(), term.per) for name, term in output.terms.items()}
    return StepOutput(terms, output.metrics)


def _summed(
    outputs: list[StepOutput], counts: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    terms: dict[str, Tensor] = {}
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    for output in outputs:
        for name, term in output.terms.items():
            terms[name] = terms.get(name, 0.0) + term.value.double() / counts[term.per]
        for name, pair in output.metrics.items():
            total, count = (torch.as_tensor(value).detach().double() for value in pair)
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + total, before[1] + count)
    return terms, metrics


def _stop(recipe: Recipe, batches: Sequence[Batch], outputs: list[StepOutput], step: int, world: World) -> NoReturn:
    """End the run on all ranks, naming the term that is not finite, its rank and its samples."""
    found = []
    for batch, output in zip(batches, outputs, strict=True):
        for name, term in output.terms.items():
            if not torch.isfinite(term.value):
                samples = _samples(recipe.sample_ids(batch))
                found.append(f"loss term {name} on rank {world.rank}{samples}")
    where = [text for texts in world.gather(found) for text in texts]
    what = "; ".join(where) or f"gradient norm{_samples(_all_ids(recipe, batches, world))}"
    world.stop(
        f"optimizer step {step + 1}: not finite: {what}; stopped before the weights changed: "
        "look at these samples, or lower training.optimizer.lr and --resume"
    )


def _samples(names: list[str]) -> str:
    shown = [*names[:8], f"and {len(names) - 8} more"] if len(names) > 8 else names
    return f" (samples {', '.join(shown)})" if names else ""


def _all_ids(recipe: Recipe, batches: Sequence[Batch], world: World) -> list[str]:
    """Ids of the step's samples on all ranks."""
    own = [name for batch in batches for name in recipe.sample_ids(batch)]
    return [name for names in world.gather(own) for name in names]
