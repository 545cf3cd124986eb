"""M3D's vision transformer: sizes, MONAI's blocks under the same names, pooling."""

from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets.vit import ViT

from med3dvlm.vit3d import ViT3D

SMALL: dict[str, Any] = {"size": (8, 32, 64), "patch": (2, 8, 16), "width": 24, "hidden": 40, "layers": 2, "heads": 3}


def small(**changes: Any) -> ViT3D:
    torch.manual_seed(0)
    model = ViT3D(**{**SMALL, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = ViT3D()
        features, patches = model(torch.empty(1, 1, 32, 256, 256)), model.patches(torch.empty(1, 1, 32, 256, 256))
    assert patches.shape == (1, 2048, 768)
    assert features.low.shape == features.high.shape == (1, 256, 768) == (1, *model.low_shape)


def test_it_is_monais_under_the_same_names() -> None:
    model, given = small(), torch.rand(2, 1, *SMALL["size"])
    theirs: Any = ViT(
        1, SMALL["size"], SMALL["patch"], hidden_size=24, mlp_dim=40, num_layers=2, num_heads=3,
        proj_type="perceptron", classification=True,
    )  # fmt: skip
    loaded = theirs.load_state_dict(model.state_dict(), strict=False)
    # M3D has no classification head, and norms for cross-attention came to MONAI after it.
    assert not loaded.unexpected_keys
    assert all("cross" in key or key.startswith("classification_head") for key in loaded.missing_keys)
    with torch.no_grad():
        _, hidden = theirs(given)
        expected = theirs.norm(hidden[-1])[:, 1:]
        torch.testing.assert_close(model.patches(given), expected, atol=1e-5, rtol=1e-5)


def test_pooling_averages_neighbours() -> None:
    model, given = small(), torch.rand(1, 1, *SMALL["size"])
    with torch.no_grad():
        patches, tokens = model.patches(given)[0].view(4, 4, 4, 24), model(given).high[0]
    for token, (d, h, w) in zip(tokens, np.ndindex(2, 2, 2), strict=True):
        block = patches[2 * d : 2 * d + 2, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
        torch.testing.assert_close(token, block.mean((0, 1, 2)))
    assert model.low_shape == (8, 24) and small(pool=1).low_shape == (64, 24)


def test_it_learns_and_freezes() -> None:
    model, given = small(), torch.rand(1, 1, *SMALL["size"])
    model(given).low.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.freeze().train()
    assert not model.training and not model(given).low.requires_grad
    assert model.bfloat16()(given).low.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"size": (8, 32, 60)}, "whole groups"), ({"heads": 5}, "heads"), ({"pool": 3}, "groups of 3")],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(**changes)


def test_a_volume_of_another_size() -> None:
    with pytest.raises(ValueError, match="8 x 32 x 64"):
        small()(torch.rand(1, 1, 8, 64, 32))
