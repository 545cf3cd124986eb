"""Med3DVLM Eq. 1-4 and DCFormer as its paper and FACTS have it, in float64 loops, against all forms."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from med3dvlm.dcformer import DCFormer
from med3dvlm.decomposed import DecomposedConv3d
from tests.med3dvlm.tiny_encoders import randomised, tiny_dcformer, volume

TOLERANCE = 1e-11  # float64 in another order of summation
EPS = 1e-5
Array = np.ndarray


def plain_branch(x: Array, weight: Array, bias: Array, axis: int, stride: int) -> Array:
    """Eq. 1-3: a convolution along one of the axes of x (C, H, W, D), padded with zeros."""
    channels, kernel = weight.shape[0], weight.shape[2]
    shape = [-(-n // stride) for n in x.shape[1:]]
    out = np.zeros((channels, *shape))
    for place in np.ndindex(*shape):
        centre = [n * stride for n in place]
        for tap in range(kernel):
            at = list(centre)
            at[axis] += tap - kernel // 2
            if not 0 <= at[axis] < x.shape[1 + axis]:
                continue
            seen = x[:, at[0], at[1], at[2]]
            out[:, *place] += weight[:, 0, tap] * seen if weight.shape[1] == 1 < len(x) else weight[:, :, tap] @ seen
        out[:, *place] += bias
    return out


def plain_decomposed(batch: Array, module: DecomposedConv3d, training: bool) -> Array:
    """Eq. 4 for x (B, C, H, W, D); batch norm by the batch's statistics in training, else by its own."""
    total = 0.0
    for axis, (conv, norm) in enumerate(module.branches()):
        weight = conv.weight.detach().flatten(2).numpy()
        bias = conv.bias.detach().numpy()
        out = np.stack([plain_branch(x, weight, bias, axis, module.stride) for x in batch])
        mean, variance = norm.running_mean.numpy(), norm.running_var.numpy()
        if training:
            mean, variance = out.mean((0, 2, 3, 4)), out.var((0, 2, 3, 4))
        gain, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
        each = (slice(None), None, None, None)
        total = total + (out - mean[each]) / np.sqrt(variance[each] + EPS) * gain[each] + shift[each]
    return total + batch if module.residual else total


def plain_pool(x: Array) -> Array:
    """MaxPool3d(3, 2, 1) of x (C, H, W, D)."""
    shape = [-(-n // 2) for n in x.shape[1:]]
    out = np.zeros((len(x), *shape))
    for h, w, d in np.ndindex(*shape):
        window = x[:, max(2 * h - 1, 0) : 2 * h + 2, max(2 * w - 1, 0) : 2 * w + 2, max(2 * d - 1, 0) : 2 * d + 2]
        out[:, h, w, d] = window.max((1, 2, 3))
    return out


def plain_dcformer(batch: Array, model: DCFormer) -> tuple[Array, Array]:
    """Tokens of stages 3 and 4 of volumes (B, 1, D, H, W), in (D, H, W) order."""
    x = batch.transpose(0, 1, 3, 4, 2)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))
    for convolution in model.encoder["s0"][0]:
        x = plain_decomposed(x, convolution, False)
    tokens = []
    for i in range(1, 5):
        for j, block in enumerate(model.encoder[f"s{i}"]):
            name = f"encoder.s{i}.{j}"
            if j == 0:
                pooled = np.stack([plain_pool(volume) for volume in x])
                x = np.einsum("ec,bchwd->behwd", state[f"{name}.proj.weight"][:, :, 0, 0, 0], pooled)
            y = plain_decomposed(x, block.dwconv, False).transpose(0, 2, 3, 4, 1)
            y = gelu(y @ state[f"{name}.mlp.mlp.0.weight"].T + state[f"{name}.mlp.mlp.0.bias"])
            y = y @ state[f"{name}.mlp.mlp.3.weight"].T + state[f"{name}.mlp.mlp.3.bias"]
            x = x + (state[f"{name}.scale"] * y).transpose(0, 4, 1, 2, 3)
        tokens.append(x.transpose(0, 4, 2, 3, 1).reshape(len(x), -1, x.shape[1]))
    return tokens[2], tokens[3]


CASES: dict[str, dict[str, Any]] = {
    "dense": {"channels_in": 3, "channels_out": 4, "kernel": 3},
    "dense, stride": {"channels_in": 1, "channels_out": 4, "kernel": 7, "stride": 4},
    "dense, residual": {"channels_in": 3, "channels_out": 3, "kernel": 3, "residual": True},
    "depthwise": {"channels_in": 4, "channels_out": 4, "kernel": 5, "depthwise": True},
    "depthwise, residual": {"channels_in": 4, "channels_out": 4, "kernel": 13, "depthwise": True, "residual": True},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_decomposed_convolution_is_the_papers(name: str, training: bool) -> None:
    torch.manual_seed(0)
    module = randomised(DecomposedConv3d(**CASES[name])).double().train(training)
    x = torch.randn(2, CASES[name]["channels_in"], 6, 5, 9, dtype=torch.float64)
    expected = plain_decomposed(x.numpy(), module, training)
    with torch.no_grad():
        np.testing.assert_allclose(module(x), expected, atol=TOLERANCE)
        last = x.permute(0, 4, 2, 3, 1)  # (B, D, H, W, C)
        for form in ("auto", "views", *(["banded"] if module.depthwise else [])):
            found = module.channels_last(last, form).permute(0, 4, 2, 3, 1)
            np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("residual", [False, True])
def test_dcformer_is_the_papers(residual: bool) -> None:
    size = (34, 66, 40)  # stage 3 has 2 x 3 x 2 positions: another order of tokens would show
    model = tiny_dcformer(size=size, residual=residual).double().eval()
    given = volume(2, size, torch.float64)
    low, high = plain_dcformer(given.numpy(), model)
    assert low.shape[1:] == model.low_shape and high.shape[1:] == model.high_shape
    for form in ("plain", "auto", "banded"):
        model.set_form(form)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found = model(given)
            np.testing.assert_allclose(found.low.detach(), low, atol=TOLERANCE)
            np.testing.assert_allclose(found.high.detach(), high, atol=TOLERANCE)
