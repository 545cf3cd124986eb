"""Training steps on two ranks that do different things to their batches: a program that tests start.

`python rank_run.py PLAN` imports everything once and forks into both ranks, which takes half as long as a launcher.
The plan is JSON: `limit`, seconds for one step, and a list of `runs`. A run has a name, a config, DeepSpeed's
settings of `zero_optimization` that a tiny model needs, and
    "steps": [[step, batches of rank 0, batches of rank 1], ...]   whose gradients are kept; the weights stay; or
    "mixed": n                                                     n steps with batches and treatments by chance.
A batch is written `content:treatment`: a key of `CONTENTS`, and what `treated` takes. Rank 0 leaves beside the plan,
as soon as a run is done, NAME.safetensors (keys "place in steps/parameter") or NAME.json. A rank that waits for
another longer than `limit` prints where, and ends the launch.
"""

import faulthandler
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from mllm3d.config import load  # noqa: E402
from mllm3d.data.dataset import GroupItem  # noqa: E402
from mllm3d.registry import recipe_class  # noqa: E402
from mllm3d.training import distributed, engine, random_state  # noqa: E402
from mllm3d.training.distributed import World  # noqa: E402
from mllm3d.training.recipe import Batch, StepOutput  # noqa: E402
from mllm3d.training.step import step_loss, train_step  # noqa: E402
from photon import modeling_photon  # noqa: E402
from photon.losses import BatchKind  # noqa: E402
from photon.recipes import objective  # noqa: E402
from photon.scheduling import Retention  # noqa: E402
from tests.photon.tiny_recipes import ROWS, items  # noqa: E402
from tests.training.toy_launch import free_port  # noqa: E402

RANKS = 2
TOTAL_STEPS = 10


class Step(NamedTuple):
    """One optimizer step: its number in the run, and each rank's micro-batches."""

    step: int
    rank0: list[str]
    rank1: list[str]


def text_only() -> GroupItem:
    """Two questions without a volume."""
    return GroupItem([], ROWS[:2], None)


CONTENTS: dict[str, Callable[[], list[GroupItem]]] = {
    "first": lambda: items()[:1],  # three questions about one volume
    "second": lambda: items()[1:],
    "text": lambda: [text_only()],
    "mixed": lambda: [text_only(), items()[1]],
}


# --- batches whose treatment is not left to chance ----------------------------------------------------------


@contextmanager
def treated(treatment: str, seed: int) -> Iterator[None]:
    """Within it a batch is treated so: a perturbation's name, `flip`, `keep` (all tokens stay), or "" for nothing.

    What else is drawn comes from `seed`.
    """
    as_decided = modeling_photon.decide

    def draw(_perturb: float, _flip: float, flipping: bool, _generator: torch.Generator) -> BatchKind:
        if treatment in ("", "keep"):
            return BatchKind()
        return BatchKind(flip=flipping) if treatment == "flip" else BatchKind(perturbation=treatment)  # type: ignore[arg-type]

    def decide(*given: Any) -> Retention:
        found = as_decided(*given)
        if treatment == "keep":
            found.kept = found.valid
        return found

    torch.manual_seed(seed)
    with patch.object(objective, "draw_batch_kind", draw), patch.object(modeling_photon, "decide", decide):
        yield


def make_batches(recipe: Any, place: int, rank: int, written: list[str]) -> list[dict[str, Any]]:
    """A rank's micro-batches of the step at this place of the plan."""
    made = []
    for number, text in enumerate(written):
        content, _, treatment = text.partition(":")
        seed = (place * RANKS + rank) * 10 + number
        made.append({**recipe.collate(CONTENTS[content]()), "treatment": treatment, "seed": seed})
    return made


def build_recipe(config: str) -> Any:
    """The recipe of a config file; it treats a batch as the batch says, if it says so."""
    loaded = load(config)
    recipe: Any = recipe_class(loaded.recipe)(loaded)
    losses = recipe.losses

    def treat(model: nn.Module, batch: Batch, *rest: Any) -> StepOutput:
        if "treatment" not in batch:
            return losses(model, batch, *rest)
        with treated(batch["treatment"], batch["seed"]):
            return losses(model, batch, *rest)

    recipe.losses = treat
    return recipe


def plain_gradients(config: str, steps: Sequence[Step]) -> dict[str, Tensor]:
    """What ranks should find together: the mean of their own gradients, by plain autograd in one process."""
    recipe = build_recipe(config)
    random_state.seed(recipe.config.run.seed)
    module = recipe.build().train()
    found = {}
    for place, (step, *ranks) in enumerate(steps):
        batches = [batch for r, written in enumerate(ranks) for batch in make_batches(recipe, place, r, written)]
        counted = [recipe.counts(batch) for batch in batches]
        weights = {unit: RANKS / sum(counts[unit] for counts in counted) for unit in counted[0]}
        module.zero_grad()
        for batch in batches:
            step_loss(recipe.losses(module, batch, step, TOTAL_STEPS, weights), weights).backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[f"{place}/{name}"] = gradient / RANKS
    return found


# --- on a rank ----------------------------------------------------------------------------------------------


def start_engine(run: dict[str, Any], recipe: Any, world: World) -> Any:
    """The trainer's engine, with smaller buckets and partitions than the trainer's own."""
    as_trained = engine.deepspeed_config

    def smaller(*given: Any) -> dict[str, Any]:
        config = as_trained(*given)
        config["zero_optimization"] |= run["zero"]
        return config

    with patch.object(engine, "deepspeed_config", smaller):
        return engine.build_engine(recipe.config, recipe, world, TOTAL_STEPS)


def keep_gradients(run: dict[str, Any], limit: float, world: World) -> dict[str, Tensor]:
    """Gradients of the given steps, whole, as they are before the optimizer takes them."""
    from deepspeed.utils import safe_get_full_grad

    recipe = build_recipe(run["config"])
    model = start_engine(run, recipe, world)
    found: dict[str, Tensor] = {}
    take_step = model.step

    def keep_then_step() -> None:
        if model.is_gradient_accumulation_boundary():
            for name, parameter in model.module.named_parameters():
                if parameter.requires_grad:
                    # ZeRO 3 leaves an empty tensor in place of a parameter, and its shape beside it.
                    shape = getattr(parameter, "ds_shape", parameter.shape)
                    found[f"{place}/{name}"] = safe_get_full_grad(parameter).detach().clone().view(shape)
        for group in model.optimizer.param_groups:
            group["lr"] = 0.0
        take_step()

    model.step = keep_then_step
    for place, (step, *ranks) in enumerate(run["steps"]):
        faulthandler.dump_traceback_later(limit, exit=True)
        batches = make_batches(recipe, place, world.rank, ranks[world.rank])
        train_step(model, recipe, batches, step, TOTAL_STEPS, world)
    return found


def take_mixed_steps(run: dict[str, Any], limit: float, world: World) -> dict[str, Any]:
    """What each rank did in each step, the steps' losses, and a fingerprint of each rank's weights at the end."""
    recipe = build_recipe(run["config"])
    model = start_engine(run, recipe, world)
    batches = {name: recipe.collate(make()) for name, make in CONTENTS.items()}
    random = np.random.default_rng(world.rank)
    own, losses = [], []
    for step in range(run["mixed"]):
        faulthandler.dump_traceback_later(limit, exit=True)
        name = str(random.choice(list(batches)))
        result = train_step(model, recipe, [batches[name]], step, run["mixed"], world)
        own.append([name, *(kind for kind in ("perturbed", "flipped") if result.metrics[kind][0])])
        losses.append(world.sum(torch.stack(list(result.terms.values())).sum()).item())
    return {"ranks": world.gather(own), "losses": losses, "weights": world.gather(fingerprint(model))}


def fingerprint(model: Any) -> str:
    """Of all weights as this rank sees them."""
    import deepspeed

    total = hashlib.sha256()
    for parameter in model.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            total.update(parameter.detach().numpy().tobytes())
    return total.hexdigest()


def main(rank: int, file: Path, port: int) -> None:
    """One rank, in a process of its own."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    plan = json.loads(file.read_text())
    limit, world = plan["limit"], distributed.start(1)
    for run in plan["runs"]:
        if "steps" in run:
            gradients = keep_gradients(run, limit, world)
            if world.is_main:
                save_file(gradients, file.with_name(f"{run['name']}.safetensors"))
        else:
            results = take_mixed_steps(run, limit, world)
            if world.is_main:
                file.with_name(f"{run['name']}.json").write_text(json.dumps(results))
    faulthandler.cancel_dump_traceback_later()
    distributed.leave()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # before the fork, as both need it

    # A rank that fails, or leaves as it has waited too long, ends the other.
    mp.start_processes(main, (Path(sys.argv[1]), free_port()), nprocs=RANKS, start_method="fork")
