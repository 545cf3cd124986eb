"""Encoders by name, what their specification keeps, and timm's backbones slice by slice (on a stand-in for timm)."""

import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from med3dvlm.dcformer import DCFormer
from med3dvlm.encoders import NAMES, build_encoder
from med3dvlm.slicewise import SliceEncoder
from med3dvlm.vit3d import ViT3D

DCFORMER = {"name": "dcformer-nano", "size": [14, 36, 28], "widths": [4, 6, 8, 10, 12]}
VIT = {"name": "vit3d", "size": [4, 16, 16], "patch": [2, 8, 8], "width": 12, "hidden": 24, "layers": 1, "heads": 2}
SLICES = {"name": "timm:maps", "size": [6, 32, 48]}


class Backbone(nn.Module):
    """Feature maps of a sixteenth of a slice's size in one of timm's layouts."""

    num_features, num_prefix_tokens = 5, 2
    pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.25, 0.25, 0.25)}

    def __init__(self, layout: str, in_chans: int) -> None:
        super().__init__()
        self.layout = layout
        self.patch = nn.Conv2d(in_chans, 5, 16, stride=16)

    def forward_features(self, x: Tensor) -> Tensor:
        maps = self.patch(x)
        if self.layout == "maps":
            return maps
        if self.layout == "last":
            return maps.permute(0, 2, 3, 1)
        prefix = torch.full((len(maps), 2, 5), 1e6)
        return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for timm; what models were made with."""
    made: list[dict[str, Any]] = []

    def create_model(name: str, pretrained: bool, in_chans: int, num_classes: int, **options: Any) -> nn.Module:
        made.append({"name": name, "pretrained": pretrained, "classes": num_classes, **options})
        torch.manual_seed(0)
        return Backbone(name.partition(".")[0], in_chans)

    module = ModuleType("timm")
    names = ["maps", "last", "tokens"]
    vars(module).update(create_model=create_model, is_model=names.__contains__, list_models=lambda: names)
    monkeypatch.setitem(sys.modules, "timm", module)
    return made


@pytest.mark.parametrize(("spec", "kind"), [(DCFORMER, DCFormer), (VIT, ViT3D), (SLICES, SliceEncoder)])
def test_every_encoder_keeps_the_contract(spec: dict[str, Any], kind: type, timm: list[Any]) -> None:
    encoder = build_encoder(spec)
    assert type(encoder) is kind and encoder.size == tuple(spec["size"])
    features = encoder.eval()(torch.rand(2, 1, *spec["size"]))
    assert features.low.shape == (2, *encoder.low_shape) and features.high.shape == (2, *encoder.high_shape)
    with pytest.raises(ValueError, match=" x ".join(map(str, spec["size"]))):
        encoder(torch.rand(2, 1, 3, 3, 3))
    parent = nn.ModuleList([encoder.freeze()]).train()
    assert parent.training and not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("spec", [DCFORMER, VIT, SLICES])
def test_a_saved_specification_makes_the_same_encoder(spec: dict[str, Any], timm: list[Any]) -> None:
    first = build_encoder(spec).eval()
    saved = json.loads(json.dumps(first.spec))
    assert saved["name"] == spec["name"] and saved.items() >= spec.items()
    second = build_encoder(saved).eval()
    second.load_state_dict(first.state_dict())
    assert second.spec == first.spec
    given = torch.rand(1, 1, *spec["size"])
    torch.testing.assert_close(second(given).high, first(given).high)


def test_names_alone_are_the_published_encoders() -> None:
    with torch.device("meta"):
        encoders = {name: build_encoder(name) for name in NAMES}
    assert [encoders[name].high_shape for name in ("dcformer-small", "vit3d")] == [(32, 768), (256, 768)]
    assert encoders["dcformer-base"].low_shape == (256, 512)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("dcformer-smal", "dcformer-small"),
        ("resnet", "timm:<model>"),
        ("timm:", "timm:<model>"),
        ({"size": [1, 2, 3]}, "no name"),
        ({**DCFORMER, "witdhs": [1]}, "widths"),
        ({**VIT, "kernels": [1]}, "vit3d has no setting"),
        ({"name": "timm:mapps", "size": [6, 32, 48]}, "nearest name is maps"),
        ({"name": "timm:tokens", "size": [6, 8, 48]}, "img_size"),
    ],
)
def test_specifications_that_make_no_sense(spec: Any, says: str, timm: list[Any]) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        build_encoder(spec)
    assert "\n" not in str(caught.value)


# --- slice by slice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["maps", "last", "tokens"])
def test_slices_are_averaged_over_depth(layout: str, timm: list[Any]) -> None:
    encoder = build_encoder({"name": f"timm:{layout}", "size": [6, 32, 48], "grid": [3, 2, 3]}).eval()
    given = torch.rand(2, 1, 6, 32, 48)
    backbone: Any = encoder.backbone
    with torch.no_grad():
        tokens = encoder(given).low.view(2, 3, 2, 3, 5)
        for place in range(3):  # every cell is the mean of two slices
            maps = [backbone.patch((given[:, :, i] - 0.5) / 0.25) for i in (2 * place, 2 * place + 1)]
            expected = ((maps[0] + maps[1]) / 2).permute(0, 2, 3, 1)
            torch.testing.assert_close(tokens[:, place], expected, atol=1e-5, rtol=1e-5)


def test_the_grid_can_be_coarser(timm: list[Any]) -> None:
    encoder = build_encoder({**SLICES, "grid": [2, 1, 1]})
    assert encoder.low_shape == (2, 5) and encoder(torch.rand(1, 1, 6, 32, 48)).low.shape == (1, 2, 5)
    assert build_encoder(SLICES).spec["grid"] == [4, 2, 3]


def test_what_timm_is_asked_for(timm: list[dict[str, Any]]) -> None:
    encoder = build_encoder({**SLICES, "name": "timm:maps.a1", "pretrained": True, "options": {"drop_path_rate": 0.1}})
    assert timm == [{"name": "maps.a1", "pretrained": True, "classes": 0, "drop_path_rate": 0.1}]
    assert "pretrained" not in encoder.spec  # a saved model must not fetch weights again


@pytest.mark.parametrize("error", [ImportError("No module named 'timm'"), RuntimeError("operator torchvision::nms")])
def test_without_timm(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "timm":
                raise error

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match="pip install timm"):
        build_encoder(SLICES)
