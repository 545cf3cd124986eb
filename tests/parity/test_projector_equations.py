"""Med3DVLM Eq. 6-7 and the two splices, written plainly in float64."""

import math

import numpy as np
import pytest
import torch

from med3dvlm.projectors import Projector, ProjectorSettings
from med3dvlm.splicing import Splice, image_places, splice_in

LOW, HIGH, WIDTH = (12, 8), (4, 10), 16
PATCH = 99


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    for i, row in enumerate(x):
        out[i] = (row - row.mean()) / math.sqrt(((row - row.mean()) ** 2).mean() + 1e-5) * weight + bias
    return out


class Weights:
    """The projector's parameters by their published names, as arrays."""

    def __init__(self, projector: Projector) -> None:
        self.values = {name: value.numpy() for name, value in projector.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.values[f"{name}.weight"].T + self.values[f"{name}.bias"]

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{name}.mm_projector.1.1", gelu(self.linear(f"{name}.mm_projector.0", x)))

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return norm(x, self.values[f"{name}.weight"], self.values[f"{name}.bias"])

    def mixer(self, name: str, x: np.ndarray) -> np.ndarray:
        u = self.mlp(f"{name}.mlp1", self.norm(f"{name}.ln1", x).T)  # Eq. 6: U = W2 s(W1 Norm(X)^T)
        return self.mlp(f"{name}.mlp2", self.norm(f"{name}.ln2", u.T))  # Eq. 7: Y = W4 s(W3 Norm(U^T))


def projector(name: str) -> Projector:
    torch.manual_seed(0)
    found = Projector(ProjectorSettings(name, LOW, HIGH, mixed_tokens=6), WIDTH).double()
    with torch.no_grad():
        for parameter in found.parameters():  # also biases and norms, which start at 0 and 1
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_the_mixer_is_the_papers(layers: int) -> None:
    module, weights = projector(f"{layers}xMLP-Mixer-H"), None
    weights = Weights(module)
    low, high = torch.randn(2, *LOW).double(), torch.randn(2, *HIGH).double()
    found = module(low, high).detach().numpy()
    for b in range(2):
        streams = {"low_mixer": low[b].numpy(), "high_mixer": high[b].numpy()}
        for name in streams:
            for layer in range(layers):
                streams[name] = weights.mixer(f"{name}.{layer}", streams[name])
        # Both are float64; 1e-12 is some thousands of its units, for sums of 16 terms in another order.
        np.testing.assert_allclose(found[b], np.concatenate([*streams.values()]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["2xMLP", "2xMLP-H"])
def test_the_mlps_are_two_layers_a_stream(name: str) -> None:
    module = projector(name)
    weights = Weights(module)
    low, high = torch.randn(1, *LOW).double(), torch.randn(1, *HIGH).double()
    expected = [weights.mlp("high_mlp", high[0].numpy())]
    if name == "2xMLP-H":
        expected = [weights.mlp("low_mlp", low[0].numpy()), *expected]
    np.testing.assert_allclose(module(low, high)[0].detach(), np.concatenate(expected), rtol=1e-12, atol=1e-12)


# --- splices ------------------------------------------------------------------------------------------------


def plain_published(embeds: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Keep the first position, then the image tokens, then what comes after that many positions."""
    return torch.cat([embeds[:1], image, embeds[1 + len(image) :]])


def plain_correct(ids: list[int], embeds: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    out, used = [], 0
    for i, vector in zip(ids, embeds, strict=True):
        out.append(image[used] if i == PATCH else vector)
        used += i == PATCH
    return torch.stack(out)


def case(lead: list[int], pads: int) -> tuple[torch.Tensor, ...]:
    """Two rows of ``lead``, three ``<im_patch>`` and four words, ``pads`` of padding on the left of the second."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.tensor([[*lead, *[PATCH] * 3, 5, 6, 7, 8]] * 2)
    mask = torch.ones_like(ids)
    if pads:
        ids = torch.cat([torch.zeros(2, pads, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(2, pads, dtype=torch.long), mask], 1)
        ids[0], mask[0] = ids[0].roll(-pads), mask[0].roll(-pads)
    table = torch.randn(100, 4, generator=rng, dtype=torch.float64)
    return ids, mask, table[ids], torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("lead", [[], [1]], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize("splice", ["correct", "published"])
def test_splices_are_the_plain_ones(lead: list[int], pads: int, splice: Splice) -> None:
    ids, mask, embeds, image = case(lead, pads)
    found = splice_in(embeds, image, image_places(ids, mask, PATCH, 3, splice))
    for row in range(2):
        own = mask[row].bool()
        expected = (
            plain_published(embeds[row][own], image[row])
            if splice == "published"
            else plain_correct(ids[row][own].tolist(), embeds[row][own], image[row])
        )
        assert torch.equal(found[row][own], expected)
        assert torch.equal(found[row][~own], embeds[row][~own])


def test_without_a_bos_token_the_published_splice_is_off_by_one() -> None:
    ids, mask, embeds, image = case([], 0)
    found = splice_in(embeds, image, image_places(ids, mask, PATCH, 3, "published"))
    assert torch.equal(found[0, 0], embeds[0, 0]) and ids[0, 0] == PATCH  # an embedding of <im_patch> stays
    assert torch.equal(found[0, 3], image[0, 2]) and ids[0, 3] == 5  # the first word of the question is gone


def test_with_a_bos_token_both_splices_are_the_same() -> None:
    ids, mask, _, _ = case([1], 2)
    places = [image_places(ids, mask, PATCH, 3, splice) for splice in ("correct", "published")]
    assert torch.equal(*places)


def test_places_that_do_not_fit() -> None:
    ids, mask, _, _ = case([1, 2], 0)
    with pytest.raises(ValueError, match="published needs <im_patch> at the start"):
        image_places(ids, mask, PATCH, 3, "published")
    with pytest.raises(ValueError, match="published needs"):  # nothing behind the image tokens
        image_places(ids[:, 2:5], mask[:, 2:5], PATCH, 3, "published")
    with pytest.raises(ValueError, match="3 <im_patch> in row 0 for 4 image tokens"):
        image_places(ids, mask, PATCH, 4)
    ids[1, 2] = 5
    with pytest.raises(ValueError, match="2 <im_patch> in row 1 for 3 image tokens"):
        image_places(ids, mask, PATCH, 3)
