"""The contrastive losses over ranks: as if one process had the whole batch, in chunks, through the real trainer.

All that needs ranks happens in one launch of four (contrastive_run.py); groups of two and one are parts of it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from med3dvlm.contrastive import ContrastiveSettings, contrastive_sum
from tests.integration.launching import PYTHON, Run, start
from tests.med3dvlm.contrastive_run import (
    CASES,
    MICRO,
    PAIRS,
    RANKS,
    RUNS,
    SPLITS,
    Case,
    Largest,
    micro_batches,
    own_part,
    whole,
)
from tests.med3dvlm.tiny_clip import tiny_clip
from tests.parity.test_siglip_equations import plain_clip, plain_loss, plain_siglip

SCRIPT = str(Path(__file__).with_name("contrastive_run.py"))


class Launch:
    """What the launch left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: Run = start([*PYTHON, SCRIPT, str(folder)], env={"DS_ACCELERATOR": "cpu"})

    def file(self, name: str) -> Path:
        file = self.folder / name
        assert file.is_file(), f"{name} was not written\n{self.done.out}\n{self.done.err}"
        return file

    def shares(self, name: str, case: Case) -> list[dict[str, Tensor]]:
        """What each of the case's ranks found."""
        return [under(name, load_file(self.file(f"shares_{rank}.safetensors"))) for rank in range(case.ranks)]

    def notes(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file("notes.json").read_text())
        return found


def under(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose keys are "name/key", by key."""
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(tmp_path_factory.mktemp("ranks"))


def expected(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss of the whole batch, and its gradients, by plain autograd in float64."""
    given = [tensor.detach().double().requires_grad_() for tensor in whole(case)]
    loss = plain_loss(case.settings, given)
    loss.backward()
    names = ("image", "text", "t_prime", "bias")
    gradients = {name: tensor.grad for name, tensor in zip(names, given, strict=False) if tensor.grad is not None}
    return loss.item(), gradients


def combined(shares: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' gradients as DeepSpeed has them for what is before the features, which each rank has in part, and for
    the parameters, of which each has a copy: all of it divided by the number of ranks."""
    ranks = len(shares)
    found = {name: torch.cat([share[name] for share in shares]) / ranks for name in ("image", "text")}
    scalars = [name for name in ("t_prime", "bias") if name in shares[0]]
    return found | {name: torch.stack([share[name].double() for share in shares]).mean() for name in scalars}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.only == "all"])
def test_ranks_have_the_loss_and_gradients_of_one_process(launch: Launch, name: str) -> None:
    case = CASES[name]
    shares = launch.shares(name, case)
    loss, gradients = expected(case)
    # float64: sums in another order. float32: 1e-6, a few of its units; logits are up to 14, so rounded by as much.
    # bfloat16: the sums are in float32, but the gradients are returned as what was given, with 8 bits.
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6}[case.dtype]
    assert sum(share["share"].double().item() for share in shares) / PAIRS == pytest.approx(loss, rel=tolerance)
    found = combined(shares)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        scale = float(gradient.abs().max())
        allowed = 2**-8 if case.dtype == torch.bfloat16 else tolerance
        assert float((found[key].double() - gradient).abs().max()) <= allowed * scale, key


@pytest.mark.parametrize("loss", ["siglip", "clip"])
def test_nothing_is_learned_where_nothing_wants_a_gradient(launch: Launch, loss: str) -> None:
    case = CASES[f"{loss}_nothing"]
    shares = launch.shares(f"{loss}_nothing", case)
    assert [share.keys() for share in shares] == [{"share"}] * RANKS
    assert sum(share["share"].item() for share in shares) / PAIRS == pytest.approx(expected(case)[0], rel=1e-13)


@pytest.mark.parametrize("loss", ["siglip", "clip"])
def test_ranks_need_not_want_the_same_gradients(launch: Launch, loss: str) -> None:
    """Only rank 0 wants one, and only of its images; what comes of the other ranks' shares is in it."""
    case = CASES[f"{loss}_one"]
    shares = launch.shares(f"{loss}_one", case)
    assert [share.keys() - {"share"} for share in shares] == [{"image"}, set(), set(), set()]
    gradient = expected(case)[1]["image"][: SPLITS[RANKS][0]]
    torch.testing.assert_close(shares[0]["image"] / RANKS, gradient, rtol=1e-12, atol=1e-14)


def test_no_rank_holds_the_whole_matrix(launch: Launch) -> None:
    """256 pairs on four ranks, in chunks of 8 columns: 64 * 8 logits, and 64 rows that travel."""
    travel = {"siglip": 2 * 4, "clip": 2 * 4 + 3}
    assert launch.notes()["largest"] == {loss: 64 * max(8, width) for loss, width in travel.items()}


@pytest.mark.parametrize("loss", ["siglip", "clip"])
def test_one_process_does_not_either(loss: Any) -> None:
    x, y = (torch.randn(256, 4).requires_grad_() for _ in range(2))
    bias = torch.zeros(()) if loss == "siglip" else None
    with Largest() as largest:
        contrastive_sum(x, y, torch.zeros(()), bias, ContrastiveSettings(loss, chunk=16)).backward()
    assert largest.elements == 256 * 16


def test_widths_that_differ_are_refused_on_all_ranks(launch: Launch) -> None:
    refusals = launch.notes()["refusals"]
    assert refusals == ["the ranks' features differ: widths [5, 4, 4, 4], bytes per number [4, 4, 4, 4]"] * RANKS


@pytest.mark.parametrize("name", RUNS)
def test_the_trainers_gradient_is_that_of_the_global_batch(launch: Launch, name: str) -> None:
    """One step of the real trainer: two micro-batches on four ranks of unequal sizes, each with its own negatives."""
    found = under(name, load_file(launch.file("gradients.safetensors")))
    contrastive = RUNS[name][1]
    model = tiny_clip(contrastive=contrastive).eval().double()
    total = torch.zeros((), dtype=torch.float64)
    for micro, sizes in enumerate(MICRO):
        outputs = [model(**micro_batches(rank)[micro]) for rank in range(RANKS)]
        x, y = (torch.cat([output[key] for output in outputs]) for key in ("image_embeds", "text_embeds"))
        if model.bias is None:
            loss = plain_clip(x, y, model.t_prime[0])
        else:
            loss = plain_siglip(x, y, model.t_prime[0], model.bias[0], contrastive.get("symmetric", False))
        total = total + loss * sum(sizes) / sum(map(sum, MICRO))
    total.backward()
    assert found.pop("loss").item() == pytest.approx(total.item(), rel=1e-5)  # the towers are in float32
    assert found.keys() == dict(model.named_parameters()).keys()
    gradients = {key: torch.zeros(p.shape) if p.grad is None else p.grad for key, p in model.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, gradient in gradients.items():
        # Towers in float32: up to 7e-6 of a tensor's largest entry are found. That of the biases of an attention's
        # keys is zero, and rounding of the whole there. A wrong weight is off by a half or more.
        allowed = 2e-5 * float(gradient.abs().max()) + 1e-7 * largest
        assert float((found[key].double() - gradient).abs().max()) <= allowed, key


# --- mistakes -----------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    x, zero = torch.zeros(3, 4), torch.zeros(())
    with pytest.raises(ValueError, match=r"images \(3, 4\) and texts \(2, 4\): give one"):
        contrastive_sum(x, x[:2], zero, zero, ContrastiveSettings())
    with pytest.raises(ValueError, match="bias: siglip has one"):
        contrastive_sum(x, x, zero, None, ContrastiveSettings())
    with pytest.raises(ValueError, match="bias: clip has none"):
        contrastive_sum(x, x, zero, zero, ContrastiveSettings("clip"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loss": "nce"}, "loss: 'nce' is not one of siglip, clip"),
        ({"start": "zero"}, "start: 'zero' is not one of published, original"),
        ({"loss": "clip", "symmetric": True}, "symmetric: averages the logits of siglip"),
        ({"chunk": 0}, "chunk: 0 rows; give 1 or more"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ContrastiveSettings(**given)


def test_autocast_does_not_touch_the_loss() -> None:
    case = Case(ContrastiveSettings(), 1, torch.float32)
    image, text, t_prime, bias = own_part(case, 0)
    without = contrastive_sum(image, text, t_prime, bias, case.settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = contrastive_sum(image, text, t_prime, bias, case.settings)
    assert within.dtype == torch.float32 and torch.equal(within, without)
