"""The forms of the decomposed convolution: each against the reference, and which one is taken."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dvlm import decomposed, decomposed_triton
from med3dvlm.branch_norm import normalised_sum
from med3dvlm.decomposed import DecomposedConv3d, band, choose, conv_view
from med3dvlm.planes import Folded, convolved_and_pooled
from med3dvlm.stem import folded_views, line_statistics, voxel_lines
from tests.med3dvlm.tiny_encoders import randomised
from tests.med3dvlm.triton_stand_in import stand_in

SHAPE = (5, 4, 7)
"""Depth, height, width."""


def depthwise(kernel: int = 5, channels: int = 6, residual: bool = False) -> DecomposedConv3d:
    torch.manual_seed(0)
    return randomised(DecomposedConv3d(channels, channels, kernel, depthwise=True, residual=residual))


def last(x: Tensor) -> Tensor:
    """``(B, C, H, W, D) -> (B, D, H, W, C)``."""
    return x.permute(0, 4, 2, 3, 1)


def reference(module: DecomposedConv3d, x: Tensor) -> Tensor:
    """``(B, D, H, W, C)`` through the plain way."""
    return last(module(x.permute(0, 4, 2, 3, 1)))


# --- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (6, 1), (1, 4)])
def test_views(axis: int, groups: int, stride: int) -> None:
    """Against Conv3d on (B, C, D, H, W)."""
    x = torch.randn(2, *SHAPE, 6, dtype=torch.float64)
    weight = torch.randn(6, 6 // groups, 7, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    size = [7 if i == axis else 1 for i in (1, 2, 3)]
    padding = [n // 2 for n in size]
    kernel = weight.view(6, 6 // groups, *size)
    expected = F.conv3d(x.movedim(-1, 1), kernel, bias, stride, padding, groups=groups).movedim(1, -1)
    found = conv_view(x, weight, bias, axis, stride, groups)
    assert found.shape == expected.shape and (found.is_contiguous() or stride > 1)
    torch.testing.assert_close(found, expected)


def test_a_band_is_the_convolution() -> None:
    weight, x = torch.randn(3, 5), torch.randn(1, 3, 4)
    expected = F.conv1d(x, weight[:, None], padding=2, groups=3)
    torch.testing.assert_close((band(weight, 4) @ x[0, :, :, None])[None, ..., 0], expected)


@pytest.mark.parametrize("form", ["views", "banded"])
@pytest.mark.parametrize("kernel", [3, 13])
def test_depthwise_forms_and_their_gradients(form: str, kernel: int) -> None:
    for training in (False, True):
        module, given = depthwise(kernel).double().train(training), torch.randn(2, *SHAPE, 6, dtype=torch.float64)
        weights = [p for p in module.parameters() if p.ndim == 5]
        found = []
        for run in (reference, lambda module, x: module.channels_last(x, form)):
            x = given.clone().requires_grad_()
            out = run(module, x)
            found.append([out, *torch.autograd.grad((out * out.cos()).sum(), [x, *weights])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_folding_keeps_gradients_of_batch_norm() -> None:
    module = depthwise().double().eval()
    x = torch.randn(2, *SHAPE, 6, dtype=torch.float64)
    wanted = list(module.parameters())
    expected = torch.autograd.grad(reference(module, x).sin().sum(), wanted)
    found = torch.autograd.grad(module.channels_last(x).sin().sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_kernels_are_folded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, folded = depthwise().eval(), torch.randn(1, *SHAPE, 6), []
    fold = DecomposedConv3d._fold
    monkeypatch.setattr(DecomposedConv3d, "_fold", lambda self: (folded.append(1), fold(self))[1])

    def folds() -> int:
        """How often, in two passes that must be right."""
        before = len(folded)
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(module.channels_last(x), reference(module, x), atol=1e-5, rtol=1e-5)
        return len(folded) - before

    assert folds() == 2  # its parameters learn
    module.requires_grad_(False)
    assert folds() == 1 and folds() == 0
    module.c2[1].running_mean.add_(1)
    assert folds() == 1
    module.load_state_dict(randomised(depthwise(), 7).state_dict())
    assert folds() == 1
    module.c1[0].weight.data = module.c1[0].weight.data * 2
    assert folds() == 1
    with torch.inference_mode():
        module.channels_last(x)
    assert folds() == 1  # what inference mode made is not used outside


def test_a_sum_of_norms_has_exact_gradients() -> None:
    norms = [randomised(nn.BatchNorm3d(3), i).double() for i in range(3)]
    outputs = [torch.randn(2, 2, 3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in norms]
    parameters = [p for norm in norms for p in norm.parameters()]
    assert torch.autograd.gradcheck(lambda *given: normalised_sum(given[:3], norms), (*outputs, *parameters))


def test_running_statistics_with_a_cumulative_average() -> None:
    x = [torch.randn(2, *SHAPE, 3) for _ in range(3)]
    norms = [[nn.BatchNorm3d(3, momentum=None) for _ in range(3)] for _ in range(2)]
    for _ in range(3):
        normalised_sum(x, norms[0])
        for norm, y in zip(norms[1], x, strict=True):
            norm(y.movedim(-1, 1))
    for a, b in zip(*norms, strict=True):
        torch.testing.assert_close(dict(a.named_buffers()), dict(b.named_buffers()))


def test_statistics_of_lines() -> None:
    volume, weight = 100 + torch.randn(2, 9, 12, 10, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    for line, axis in zip(voxel_lines(volume, 7, 4), (2, 3, 1), strict=True):
        shape = [7 if i == axis else 1 for i in (1, 2, 3)]
        out = F.conv3d(volume[:, None], weight.view(5, 1, *shape), stride=4, padding=[n // 2 for n in shape])
        assert line.shape[:-1] == out.shape[:1] + out.shape[2:]
        mean, variance = line_statistics(line, weight)
        torch.testing.assert_close(mean, out.mean((0, 2, 3, 4)))
        torch.testing.assert_close(variance, out.var((0, 2, 3, 4), correction=0))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (7, 4, 6)])
def test_planes(shape: tuple[int, int, int]) -> None:
    """A chain of convolutions, plane by plane with the pooling behind it, and by views."""
    x = torch.randn(2, *shape, 3, dtype=torch.float64)
    layers, width, expected = [], 3, x.movedim(-1, 1)
    for out in (4, 5, 2):
        weights = tuple(torch.randn(out, width, 3, dtype=torch.float64) for _ in range(3))
        layers.append(Folded(weights, torch.randn(out, dtype=torch.float64)))  # type: ignore[arg-type]
        cross = torch.zeros(out, width, 3, 3, 3, dtype=torch.float64)  # depth, height, width
        cross[..., 1, :, 1] += weights[0]
        cross[..., 1, 1, :] += weights[1]
        cross[..., :, 1, 1] += weights[2]
        expected, width = F.conv3d(expected, cross, layers[-1].bias, padding=1), out
    torch.testing.assert_close(folded_views(x, layers).movedim(-1, 1), expected)
    pooled = F.max_pool3d(expected, 3, 2, 1).movedim(1, -1)
    torch.testing.assert_close(convolved_and_pooled(x, layers), pooled)


# --- the fused kernel -----------------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``decomposed_triton`` as it is where triton is installed, on the stand-in."""
    spec = importlib.util.spec_from_file_location("fused_on_the_stand_in", decomposed_triton.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with stand_in():
        spec.loader.exec_module(module)
        monkeypatch.setattr(decomposed, "decomposed_triton", module)
        yield module


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("kernel", "channels", "shape"), [(3, 6, SHAPE), (13, 35, (3, 5, 4)), (1, 4, (2, 2, 2))])
def test_the_fused_kernel(
    fused: ModuleType, kernel: int, channels: int, shape: tuple[int, int, int], residual: bool
) -> None:
    assert fused.available()
    module, x = depthwise(kernel, channels, residual).eval(), torch.randn(2, *shape, channels)
    with torch.no_grad():
        torch.testing.assert_close(module.channels_last(x, "fused"), reference(module, x), atol=1e-5, rtol=1e-5)
        half = module.bfloat16().channels_last(x.bfloat16(), "fused")
    assert half.dtype == torch.bfloat16


CHECK = """
import torch
from med3dvlm import decomposed_triton
from tests.med3dvlm.test_med3dvlm_decomposed import depthwise, reference
assert decomposed_triton.available()
for kernel, channels, shape in ((3, 6, (5, 4, 7)), (13, 35, (3, 5, 4))):
    for residual in (False, True):
        module, x = depthwise(kernel, channels, residual).eval(), torch.randn(2, *shape, channels)
        with torch.no_grad():
            found, expected = module.channels_last(x, "fused"), reference(module, x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
print("as the reference")
"""


def test_the_fused_kernel_in_tritons_interpreter() -> None:
    """Where triton is installed; elsewhere the form says what it needs."""
    if decomposed_triton.available():
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout == "as the reference\n", done.stderr
    else:
        with pytest.raises(ValueError, match="needs triton"):
            depthwise().eval().channels_last(torch.randn(1, *SHAPE, 6), "fused")
        with pytest.raises(ValueError, match="pip install triton"):
            decomposed_triton.depthwise(torch.randn(1, *SHAPE, 6), [torch.randn(6, 1, 3)] * 3, torch.randn(6))


# --- the choice -----------------------------------------------------------------------------------------------------


def on(device: str, shape: tuple[int, ...] = (1, 16, 32, 32, 6)) -> Any:
    return SimpleNamespace(device=torch.device(device), shape=shape, requires_grad=False)


def test_the_choice_by_device_and_shape(fused: ModuleType) -> None:
    eval_mode, training = depthwise().eval(), depthwise().train()
    dense = DecomposedConv3d(4, 4, 3).eval()
    with torch.no_grad():
        assert choose(eval_mode, on("cpu")) == "views"
        assert choose(eval_mode, on("cuda")) == "fused"
        assert choose(dense, on("cuda")) == "views"
        assert choose(training, on("cuda")) == "banded"
        assert choose(training, on("cuda", (1, 16, 32, 65, 6))) == "views"
    assert choose(eval_mode, on("cuda")) == "banded"  # its parameters want gradients
    assert choose(eval_mode.requires_grad_(False), on("cuda")) == "fused"


def test_the_choice_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposed_triton, "triton", None)
    with torch.no_grad():
        assert choose(depthwise().eval(), on("cuda")) == "banded"


@pytest.mark.parametrize("form", ["banded", "fused"])
def test_forms_that_are_for_depthwise_convolutions(form: str) -> None:
    with pytest.raises(ValueError, match="views or auto"):
        DecomposedConv3d(3, 3, 3).channels_last(torch.randn(1, *SHAPE, 3), form)


def test_the_fused_form_is_for_eval_mode(fused: ModuleType) -> None:
    with pytest.raises(ValueError, match="eval mode"):
        depthwise().train().channels_last(torch.randn(1, *SHAPE, 6), "fused")


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="same shape"):
        DecomposedConv3d(3, 4, 3, residual=True)
    with pytest.raises(ValueError, match="odd"):
        DecomposedConv3d(3, 3, 4)
