"""The contrastive losses on four ranks, which this program starts itself: importing once is what takes its time.

Rank R leaves in the given folder shares_R.safetensors (keys "case/value"), what a case's loss and gradients are on
it, rank 0 also gradients.safetensors (keys "run/parameter"), those of the trainer's steps, and notes.json. A rank
that waits for another too long prints where, and ends the launch.
"""

import faulthandler
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from med3dvlm.contrastive import ContrastiveSettings, contrastive_sum  # noqa: E402
from mllm3d.training import distributed  # noqa: E402
from mllm3d.training.distributed import World  # noqa: E402
from mllm3d.training.recipe import Batch, Description, ParameterGroup, Recipe, StepOutput, Term  # noqa: E402
from mllm3d.training.step import train_step  # noqa: E402
from tests.med3dvlm.tiny_clip import pairs, tiny_clip  # noqa: E402
from tests.parity.test_siglip_equations import SETTINGS, leaves  # noqa: E402
from tests.photon.rank_run import start_engine  # noqa: E402
from tests.training.toy_launch import free_port  # noqa: E402
from tests.training.toy_run import read_config  # noqa: E402

LIMIT = 60
RANKS = 4
PAIRS = 13
SPLITS = {1: [13], 2: [7, 6], 4: [5, 2, 0, 6]}
"""How the pairs are dealt out to so many ranks; one of four has none."""


class Case(NamedTuple):
    """A loss over the pairs of the first `ranks` ranks, which may be wrong in some way on rank 1."""

    settings: ContrastiveSettings
    ranks: int
    dtype: torch.dtype = torch.float64
    only: str = "all"
    """What wants a gradient: all, nothing, or the images of rank 0."""


CASES = {
    f"{number}_{ranks}_{str(dtype)[6:]}": Case(replace(settings, chunk=3), ranks, dtype)
    for number, settings in enumerate(SETTINGS)
    for ranks in SPLITS
    for dtype in (torch.float64, torch.float32)
}
CASES |= {
    "bfloat16": Case(ContrastiveSettings(chunk=3), 4, torch.bfloat16),
    "siglip_nothing": Case(ContrastiveSettings(chunk=3), 4, only="nothing"),
    "clip_nothing": Case(ContrastiveSettings("clip", chunk=3), 4, only="nothing"),
    "siglip_one": Case(ContrastiveSettings(chunk=3), 4, only="one"),
    "clip_one": Case(ContrastiveSettings("clip", chunk=3), 4, only="one"),
}

MICRO = [[3, 1, 2, 2], [1, 2, 1, 3]]
"""Pairs of each rank in the two micro-batches of a step."""
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (0, {}),
    "zero2": (2, {}),
    "zero3": (3, {"symmetric": True}),
    "zero2_clip": (2, {"loss": "clip"}),
}


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation within it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


# --- the losses by themselves -------------------------------------------------------------------------------


def whole(case: Case) -> list[Tensor]:
    """Images, texts, t_prime and bias, if any, of all pairs together."""
    return leaves(case.settings, PAIRS, case.dtype)


def own_part(case: Case, rank: int) -> list[Tensor]:
    """A rank's rows of them, each wanting a gradient if the case says so."""
    image, text, *scalars = (tensor.detach() for tensor in whole(case))
    start, rows = sum(SPLITS[case.ranks][:rank]), SPLITS[case.ranks][rank]
    given = [image[start : start + rows].clone(), text[start : start + rows].clone(), *scalars]
    for place, tensor in enumerate(given):
        tensor.requires_grad_(case.only == "all" or (case.only == "one" and rank == place == 0))
    return given


def run_case(case: Case, rank: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The rank's share and, weighed as the trainer does, the gradients of everything it gave."""
    given = own_part(case, rank)
    image, text, t_prime, *bias = given
    share = contrastive_sum(image, text, t_prime, bias[0] if bias else None, case.settings, group)
    if share.requires_grad:
        (share * (case.ranks / PAIRS)).backward()
    names = ("image", "text", "t_prime", "bias")
    return {
        "share": share.detach(),
        **{name: tensor.grad for name, tensor in zip(names, given, strict=False) if tensor.grad is not None},
    }


def largest_tensor(loss: str) -> int:
    """Elements of the largest tensor with 64 pairs of width 4 on each of four ranks, in chunks of 8."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = (torch.randn(64, 4, generator=generator).requires_grad_() for _ in range(2))
    bias = torch.zeros((), requires_grad=True) if loss == "siglip" else None
    settings = ContrastiveSettings(loss, chunk=8)  # type: ignore[arg-type]
    with Largest() as largest:
        contrastive_sum(x, y, torch.zeros((), requires_grad=True), bias, settings).backward()
    return largest.elements


def refusal(rank: int) -> str:
    """What all ranks say of features whose widths differ."""
    x = torch.zeros(2, 4 if rank else 5)
    try:
        contrastive_sum(x, x, torch.zeros(()), torch.zeros(()), ContrastiveSettings())
    except ValueError as error:
        return str(error)
    return ""


# --- in the trainer -----------------------------------------------------------------------------------------


class PairRecipe(Recipe):
    """Images and texts, and nothing but the contrastive loss."""

    contrastive: dict[str, Any]

    def build(self, meta: bool = False) -> nn.Module:
        return tiny_clip(contrastive=self.contrastive)

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        return [{"name": "all", "params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.0}]

    def collate(self, items: Any) -> Batch:
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"volumes": len(batch["volumes"])}

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        output = model(**batch)
        settings = ContrastiveSettings(**self.contrastive)
        share = contrastive_sum(output.image_embeds, output.text_embeds, output.t_prime, output.bias, settings)
        return StepOutput({"contrastive": Term(share, "volumes")})

    def save(self, module: nn.Module, state_dict: dict[str, Tensor] | None, directory: Path) -> None:
        raise NotImplementedError

    def describe(self) -> Description:
        return {}


def micro_batches(rank: int) -> list[Batch]:
    """A rank's two micro-batches."""
    return [pairs(sizes[rank], seed=10 * number + rank) for number, sizes in enumerate(MICRO)]


def trainer_gradients(stage: int, contrastive: dict[str, Any], folder: Path, world: World) -> dict[str, Tensor]:
    """Gradients as the optimizer gets them, whole, after one step of the real trainer; and the loss it logs."""
    from deepspeed.utils import safe_get_full_grad

    training = {"max_steps": 1, "accumulation": len(MICRO), "zero_stage": stage, "precision": "fp32"}
    training["optimizer"] = {"lr": 1e-3, "clip_norm": 0.0}
    config = {"recipe": "toy", "run": {"output": str(folder), "threads": 1}, "volume": {}, "model": {}}
    config |= {"data": {"manifest": str(folder / "none.jsonl")}, "training": training}
    recipe = PairRecipe(read_config(config))
    recipe.contrastive = contrastive
    engine = start_engine({"zero": {"stage3_param_persistence_threshold": 0} if stage == 3 else {}}, recipe, world)
    engine.module.eval()  # no dropout, and every rank's batch norms as they started
    found: dict[str, Tensor] = {}
    take_step = engine.step

    def keep_then_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                shape = getattr(parameter, "ds_shape", parameter.shape)
                gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
                found[name] = torch.zeros(shape) if gradient is None else gradient.detach().clone().view(shape)
        take_step()

    engine.step = keep_then_step
    result = train_step(engine, recipe, micro_batches(world.rank), 0, 1, world)
    found["loss"] = world.sum(result.terms["contrastive"])
    return found


def on_a_rank(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    world = distributed.start(1)
    groups: dict[int, Any] = {ranks: dist.new_group(list(range(ranks))) for ranks in SPLITS}
    shares: dict[str, Tensor] = {}
    for name, case in CASES.items():
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        if world.rank < case.ranks:
            found = run_case(case, world.rank, groups[case.ranks])
            shares |= {f"{name}/{key}": tensor for key, tensor in found.items()}
    save_file(shares, folder / f"shares_{world.rank}.safetensors")
    notes = {
        "largest": {loss: max(world.gather(largest_tensor(loss))) for loss in ("siglip", "clip")},
        "refusals": world.gather(refusal(world.rank)),
    }
    gradients: dict[str, Tensor] = {}
    for name, (stage, contrastive) in RUNS.items():
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        found = trainer_gradients(stage, contrastive, folder, world)
        gradients |= {f"{name}/{key}": tensor.contiguous() for key, tensor in found.items()}
    faulthandler.cancel_dump_traceback_later()
    if world.is_main:
        save_file(gradients, folder / "gradients.safetensors")
        (folder / "notes.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    import deepspeed  # noqa: F401

    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # A rank that fails ends the others.
    torch.multiprocessing.start_processes(on_a_rank, (Path(sys.argv[1]),), RANKS, start_method="fork")
