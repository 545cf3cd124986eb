"""The four projectors: shapes, names, parameters, what reads what."""

import pytest
import torch

from med3dvlm.projectors import KINDS, Projector, ProjectorSettings, steps

LOW, HIGH, WIDTH = (12, 8), (4, 10), 16


def small(name: str) -> Projector:
    torch.manual_seed(0)
    return Projector(ProjectorSettings(name, LOW, HIGH, mixed_tokens=6), WIDTH)


def streams(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, *LOW), torch.randn(count, *HIGH)


def test_the_published_shape_has_the_published_names_and_number_of_parameters() -> None:
    with torch.device("meta"):
        projector = Projector(ProjectorSettings(), width=3584)
    names = {
        f"{stream}_mixer.{layer}.{part}.{end}"
        for stream in ("low", "high")
        for layer in (0, 1)
        for part in ("ln1", "ln2", "mlp1.mm_projector.0", "mlp1.mm_projector.1.1", "mlp2.mm_projector.0",
                     "mlp2.mm_projector.1.1")
        for end in ("weight", "bias")
    }  # fmt: skip
    found = dict(projector.named_parameters())
    assert set(found) == names
    assert round(sum(p.numel() for p in found.values()) / 1e6, 1) == 47.2
    shapes = {name: tuple(found[f"{name}.weight"].shape) for name in (n.removesuffix(".weight") for n in found)
              if name.endswith("mm_projector.0")}  # fmt: skip
    assert shapes == {
        "low_mixer.0.mlp1.mm_projector.0": (192, 256),
        "low_mixer.0.mlp2.mm_projector.0": (1792, 384),
        "low_mixer.1.mlp1.mm_projector.0": (128, 192),
        "low_mixer.1.mlp2.mm_projector.0": (3584, 1792),
        "high_mixer.0.mlp1.mm_projector.0": (64, 32),
        "high_mixer.0.mlp2.mm_projector.0": (1792, 768),
        "high_mixer.1.mlp1.mm_projector.0": (128, 64),
        "high_mixer.1.mlp2.mm_projector.0": (3584, 1792),
    }


@pytest.mark.parametrize(
    ("start", "target", "layers", "expected"),
    [
        (256, 128, 2, [192, 128]),
        (32, 128, 2, [64, 128]),
        (384, 3584, 2, [1792, 3584]),
        (96, 64, 3, [86, 75, 64]),
        (100, 128, 2, [100, 128]),  # half of the target would be less than there is
        (1, 3, 2, [1, 3]),
        (8, 8, 2, [8, 8]),
        (256, 128, 1, [128]),
    ],
)
def test_sizes_between(start: int, target: int, layers: int, expected: list[int]) -> None:
    assert steps(start, target, layers) == expected


@pytest.mark.parametrize(
    ("name", "tokens"), [("2xMLP", 4), ("2xMLP-H", 16), ("1xMLP-Mixer-H", 6), ("2xMLP-Mixer-H", 6)]
)
def test_shapes(name: str, tokens: int) -> None:
    projector = small(name)
    assert projector.settings.tokens == tokens
    assert projector(*streams(3)).shape == (3, tokens, WIDTH)


def changed(projector: Projector, stream: int, token: int) -> list[int]:
    """Image tokens of the second volume that change with one token of a stream; the first volume's must not."""
    features = [x.clone() for x in streams()]
    before = projector(*features)
    features[stream][1, token] += torch.linspace(-1, 1, features[stream].shape[-1])
    difference = (projector(*features) - before).abs().amax(-1) > 1e-6
    assert not difference[0].any()
    return difference[1].nonzero()[:, 0].tolist()


def test_an_mlp_maps_each_token_by_itself() -> None:
    assert changed(small("2xMLP"), stream=1, token=2) == [2]
    assert changed(small("2xMLP"), stream=0, token=2) == []
    assert changed(small("2xMLP-H"), stream=0, token=5) == [5]
    assert changed(small("2xMLP-H"), stream=1, token=2) == [12 + 2]  # low tokens come first


@pytest.mark.parametrize("name", ["1xMLP-Mixer-H", "2xMLP-Mixer-H"])
def test_a_mixer_mixes_the_tokens_of_its_stream_and_no_others(name: str) -> None:
    assert changed(small(name), stream=0, token=5) == [0, 1, 2]
    assert changed(small(name), stream=1, token=2) == [3, 4, 5]


def test_layers_by_name() -> None:
    assert len(small("1xMLP-Mixer-H").low_mixer) == 1
    assert len(small("2xMLP-Mixer-H").high_mixer) == 2
    assert sum(isinstance(m, torch.nn.Linear) for m in small("2xMLP").modules()) == 2
    assert sum(isinstance(m, torch.nn.Linear) for m in small("2xMLP-H").modules()) == 4


@pytest.mark.parametrize("name", KINDS)
def test_features_of_another_shape_are_refused(name: str) -> None:
    low, high = streams()
    projector = small(name)
    for wrong in ((low[:, :-1], high), (low, high[..., :-1]), (low[:1], high), (high, low)):
        with pytest.raises(ValueError, match=r"features: low \(.*made for volumes of \(12, 8\) and \(4, 10\)"):
            projector(*wrong)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "3xMLP"}, "'3xMLP' is not one of 2xMLP, 2xMLP-H"),
        ({"mixed_tokens": 7}, "mixed_tokens: 7 is not an even number"),
        ({"low": [256]}, r"low: \(256,\) is not \(tokens, width\)"),
        ({"high": [0, 8]}, r"high: \(0, 8\)"),
        ({"depth": 2}, "unknown depth; known: name"),
    ],
)
def test_settings_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectorSettings.from_dict(values)


def test_settings_survive_json() -> None:
    settings = ProjectorSettings("2xMLP-H", LOW, HIGH)
    assert ProjectorSettings.from_dict(settings.to_dict()) == settings
    assert settings.to_dict()["low"] == [12, 8]
