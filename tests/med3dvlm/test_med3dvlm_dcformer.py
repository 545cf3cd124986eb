"""DCFormer: sizes, names, modes, and that its fast way is its plain one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from med3dvlm import branch_norm, dcformer, planes
from med3dvlm.dcformer import VARIANTS, DCFormer
from tests.med3dvlm.tiny_encoders import SIZE, randomised, tiny_dcformer, volume

# Parameters in millions and stage widths, from FACTS.
PUBLISHED = {"nano": 0.789, "naive": 5.852, "tiny": 14.66, "small": 18.24, "base": 33.9, "large": 185.0}
FORMS = ("auto", "views", "banded")


def variant(name: str, **changes: Any) -> DCFormer:
    return DCFormer(layers=VARIANTS[name].layers, widths=VARIANTS[name].widths, **changes)


# --- shapes and names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in variant(name).parameters())
    # The published figures have three or four digits: 33.9 stands for 33.87.
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_outputs_of_the_small_one_at_full_size() -> None:
    with torch.device("meta"):
        model, given = variant("small", form="plain"), torch.empty(1, 1, 128, 256, 256)
        features = model(given)
    assert features.low.shape == (1, 256, 384) and features.high.shape == (1, 32, 768)
    assert model.low_shape == (256, 384) and model.high_shape == (32, 768)


def test_nano_runs_at_full_size() -> None:
    model, given = randomised(variant("nano")).eval(), volume(1, (128, 256, 256))
    with torch.no_grad():
        fast = model(given)
        model.set_form("plain")
        plain = model(given)
    for found, expected, shape in zip(fast, plain, (model.low_shape, model.high_shape), strict=True):
        assert found.shape == (1, *shape)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def published_names(layers: tuple[int, ...]) -> set[str]:
    """Keys of a published checkpoint, as FACTS describes them."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    of_branch = ["0.weight", "0.bias", *(f"1.{x}" for x in norm)]
    decomposed = [f"c{branch}.{x}" for branch in (1, 2, 3) for x in of_branch]
    names = {f"encoder.s0.0.{i}.{x}" for i in range(4) for x in decomposed}
    for stage in range(1, 5):
        for block in range(layers[stage]):
            inside = ["scale", *(f"mlp.mlp.{i}.{x}" for i in (0, 3) for x in ("weight", "bias"))]
            inside += [f"dwconv.{x}" for x in decomposed] + (["proj.weight"] if block == 0 else [])
            names |= {f"encoder.s{stage}.{block}.{x}" for x in inside}
    return names


@pytest.mark.parametrize("name", ["nano", "small"])
def test_names_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        state = variant(name).state_dict()
    assert set(state) == published_names(VARIANTS[name].layers)
    width = VARIANTS[name].widths[1]
    # c1 runs along H of (B, C, H, W, D), c3 along D.
    assert state["encoder.s1.0.dwconv.c1.0.weight"].shape == (width, 1, 13, 1, 1)
    assert state["encoder.s1.0.dwconv.c3.0.weight"].shape == (width, 1, 1, 1, 13)
    assert state["encoder.s4.0.dwconv.c2.0.weight"].shape[-2] == 7


def test_layer_scale_starts_at_a_millionth() -> None:
    scales = [p for name, p in variant("nano").named_parameters() if name.endswith("scale")]
    assert len(scales) == 4 and all(torch.equal(p, torch.full_like(p, 1e-6)) for p in scales)


# --- the two ways are one -------------------------------------------------------------------------------------------


def loss(model: DCFormer, given: Tensor) -> Tensor:
    """Depends on every number of both outputs."""
    return sum((x * torch.arange(x.numel()).view_as(x).to(x).sin()).sum() for x in model(given))  # type: ignore[return-value]


def pair(form: str, **changes: Any) -> tuple[DCFormer, DCFormer]:
    return tiny_dcformer(form="plain", **changes), tiny_dcformer(form=form, **changes)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_eval_without_gradients(form: str, residual: bool) -> None:
    plain, fast = pair(form, residual=residual)
    with torch.no_grad():
        for found, expected in zip(fast.eval()(volume(3)), plain.eval()(volume(3)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_and_statistics(form: str, training: bool) -> None:
    plain, fast = (model.double().train(training) for model in pair(form))
    inputs = [volume(dtype=torch.float64).requires_grad_() for _ in range(2)]
    for model, given in zip((plain, fast), inputs, strict=True):
        for _ in range(2):  # the second forward pass sees the buffers that the first one wrote
            loss(model, given).backward()
    assert inputs[0].grad is not None and inputs[0].grad.abs().max() > 0
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-9, rtol=1e-7)
    for (name, expected), found in zip(plain.named_parameters(), fast.parameters(), strict=True):
        # A convolution's bias has no effect in training, which batch norm takes out again: its gradient is rounding.
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-7, rtol=1e-6, msg=name)
    for (name, expected), found in zip(plain.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_float32_gradients() -> None:
    size = (40, 72, 56)  # no axis of stages 1 to 3 is a single position, where batch norm leaves no gradient
    plain, fast = (model.train() for model in pair("auto", size=size, layers=(1, 2, 1, 1, 1)))
    for model in (plain, fast):
        loss(model, volume(2, size)).backward()
    for (name, expected), found in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        if not name.endswith(("c1.0.bias", "c2.0.bias", "c3.0.bias")):  # zero but for rounding
            scale = float(expected.grad.abs().max())
            torch.testing.assert_close(found[1].grad / scale, expected.grad / scale, atol=1e-4, rtol=0, msg=name)


def test_the_fast_way_is_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("Conv3d")

    monkeypatch.setattr(nn.Conv3d, "forward", forbidden)
    model, used = tiny_dcformer(), []
    monkeypatch.setattr(planes.PlaneConvolution, "run", _counted(planes.PlaneConvolution.run, used))
    loss(model.train(), volume()).backward()
    assert not used
    with torch.no_grad():
        model.eval()(volume(1))
    assert len(used) == 3
    with torch.enable_grad():
        model.requires_grad_(False)(volume(1))  # frozen, in a model that learns elsewhere
    assert len(used) == 6
    model.set_form("plain")
    with pytest.raises(AssertionError, match="Conv3d"):
        model(volume())


def _counted(function: Any, calls: list[str]) -> Any:
    def counting(*args: Any) -> Any:
        calls.append("")
        return function(*args)

    return counting


def test_other_norms_run_as_they_are() -> None:
    """A batch norm that is synchronised between ranks must not be replaced by this rank's statistics."""
    model, seen = tiny_dcformer(), []

    class Watched(nn.BatchNorm3d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape))
            return super().forward(x)

    expected = tiny_dcformer(form="plain").train()(volume())
    for branch in ("c1", "c2", "c3"):
        for convolution in list(model.encoder["s0"][0])[:3]:
            getattr(convolution, branch)[1].__class__ = Watched
    found = model.train()(volume())
    assert len(seen) == 9 and all(len(shape) == 5 for shape in seen)
    torch.testing.assert_close(found.high, expected.high, atol=1e-4, rtol=1e-4)


def test_one_position_has_no_variance() -> None:
    model = tiny_dcformer(size=(16, 16, 16)).train()
    with pytest.raises(ValueError, match="one position"):
        model(volume(1, (16, 16, 16)))


def test_several_channels() -> None:
    plain, fast = pair("auto", channels=2)
    given = torch.rand(2, 2, *SIZE)
    for training in (False, True):
        with torch.no_grad():
            expected, found = plain.train(training)(given), fast.train(training)(given)
        torch.testing.assert_close(found.high, expected.high, atol=1e-4, rtol=1e-4)


def test_volumes_of_a_batch_are_apart() -> None:
    model, given = tiny_dcformer().eval(), volume(3)
    with torch.no_grad():
        together = model(given).low
        for i in range(3):
            torch.testing.assert_close(model(given[i : i + 1]).low[0], together[i], atol=1e-5, rtol=1e-5)


def test_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the small volumes of the other tests do at once, a few rows at a time, the last fewer."""
    monkeypatch.setattr(branch_norm, "CACHED_NUMBERS", 40)
    monkeypatch.setattr(dcformer, "CACHED_NUMBERS", 400)
    plain, fast = (model.double() for model in pair("auto"))
    given = volume(dtype=torch.float64)
    for model in (plain, fast):
        loss(model.train(), given).backward()
    for (name, expected), found in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-7, rtol=1e-6, msg=name)
    torch.testing.assert_close(dict(fast.named_buffers()), dict(plain.named_buffers()))
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(given).high, plain.eval()(given).high)


def test_statistics_of_large_means() -> None:
    """Variance is not the small difference of two large numbers."""
    rows = 1000 + torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    mean, variance = branch_norm._statistics(rows)
    torch.testing.assert_close(mean, rows.double().mean(0).float())
    torch.testing.assert_close(variance, rows.double().var(0, correction=0).float(), rtol=1e-3, atol=0)


# --- precision ----------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(((found.double() - expected.double()).norm() / expected.double().norm()).detach())


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16(training: bool) -> None:
    """As near to float64 as the plain way in bfloat16 is, give or take rounding of 2**-8 in another order."""
    exact = tiny_dcformer(form="plain").double().train(training)(volume(dtype=torch.float64))
    errors = []
    for form in ("plain", "auto"):
        model = tiny_dcformer(form=form).bfloat16().train(training)
        with torch.set_grad_enabled(training):
            features = model(volume())
        assert features.low.dtype == torch.bfloat16
        errors.append(max(relative_error(f, e) for f, e in zip(features, exact, strict=True)))
    assert errors[1] < 0.05 and errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool, grad: bool) -> None:
    found = []
    for form in ("plain", "auto"):
        model = tiny_dcformer(form=form).train(training)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            found.append(model(volume()))
            if grad:
                loss(model, volume()).backward()
    assert found[0].high.dtype == found[1].high.dtype
    assert relative_error(found[1].high, found[0].high) < 0.05


# --- modes and errors -----------------------------------------------------------------------------------------------


def test_frozen_means_frozen() -> None:
    model = tiny_dcformer()
    parent = nn.Sequential(model, nn.Linear(2, 2))
    assert model.freeze() is model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parent.train()
    assert parent.training and not model.training and not any(m.training for m in model.modules())
    first = model(volume())
    assert not first.low.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.unfreeze()
    parent.train()
    model(volume()).low.sum().backward()
    assert model.training and all(p.grad is not None for n, p in model.named_parameters() if "s3" in n)
    name = "encoder.s0.0.0.c1.1.running_mean"
    assert not torch.equal(model.state_dict()[name], before[name])


def test_residual_is_equation_4() -> None:
    given = volume(1)
    with_x, without = (tiny_dcformer(residual=r).eval()(given).high for r in (True, False))
    assert not torch.allclose(with_x, without, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": (2, 3, 6, 2)}, "5 layers"),
        ({"layers": (2, 1, 1, 1, 1)}, "the stem's 1"),
        ({"kernels": (13, 11, 8, 7)}, "even"),
        ({"form": "fast"}, "banded"),
        ({"size": (16, 0, 16)}, "size"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        tiny_dcformer(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1, 36, 28, 14), (1, 2, *SIZE), (1, *SIZE), (2, 1, 14, 36, 29)])
def test_a_volume_of_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="14 x 36 x 28"):
        tiny_dcformer()(torch.rand(shape))


def test_max_pool_keeps_what_is_negative() -> None:
    """The frame behind the plane-wise stem must not win against negative numbers."""
    plain, fast = pair("auto")
    with torch.no_grad():
        for model in (plain, fast):
            for branch in model.encoder["s0"][0][3].branches():
                branch[1].bias.fill_(-5.0)
        found, expected = fast.eval()(volume()), plain.eval()(volume())
    torch.testing.assert_close(found.low, expected.low, atol=1e-4, rtol=1e-4)
