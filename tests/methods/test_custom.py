"""Backbones of other code: the same numbers as the module itself, BatchNorm of our kinds, and refusals."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from methods.custom import BackboneError, CustomBackbone, build_custom
from methods.norm import BatchNorm, norm_layers


class ActivatedNorm(nn.BatchNorm2d):
    """BatchNorm with dropout and activation, as of timm's BatchNormAct2d."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.drop, self.act = nn.Identity(), nn.PReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def _net(norm: Callable[..., nn.Module] = nn.BatchNorm2d, *, pooled: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, bias=False), norm(4, eps=1e-3, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 5, 3)]
    return nn.Sequential(*layers, *[nn.AdaptiveAvgPool2d(1), nn.Flatten()] * pooled)


def _states_equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    floats = [key for key in first if "num_batches" not in key]
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in floats)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ActivatedNorm])
def test_training_with_plain_batchnorm_equals_the_modules_own(norm: Callable[..., nn.Module]) -> None:
    own = _net(norm)
    backbone = CustomBackbone(copy.deepcopy(own), norm=norm_layers("plain"), size=16)
    x = torch.randn(6, 3, 16, 16)
    assert torch.equal(backbone(x), own(x))
    assert _states_equal(backbone.net, own)  # keys, weights, and running statistics after the step
    own.eval()
    assert torch.equal(backbone.eval()(x), own(x))
    assert backbone.features == 5


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ActivatedNorm])
def test_split_batchnorm_has_statistics_of_each_part(norm: Callable[..., nn.Module]) -> None:
    own = _net(norm)
    backbone = CustomBackbone(copy.deepcopy(own), norm=norm_layers("split", 4), size=16)
    x = torch.randn(8, 3, 16, 16)
    assert torch.allclose(backbone(x), torch.cat([own(part) for part in x.chunk(4)]), atol=1e-6)


def test_maps_are_averaged() -> None:
    maps, x = _net(pooled=False), torch.randn(2, 3, 16, 16)
    backbone = CustomBackbone(copy.deepcopy(maps), norm=norm_layers("plain"), size=16)
    assert torch.allclose(backbone(x), maps(x).mean(dim=(2, 3)), atol=1e-6)


def test_a_layer_that_occurs_twice_stays_one() -> None:
    shared = nn.BatchNorm2d(3)
    backbone = CustomBackbone(nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(3, 4, 1)), norm=norm_layers("plain"))
    assert sum(isinstance(module, BatchNorm) for module in backbone.modules()) == 1
    assert backbone.net[0] is backbone.net[2]  # type: ignore[index]


def test_frozen_parameters_stay_frozen_and_lazy_layers_get_weights() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(7))
    net[0].requires_grad_(False)
    backbone = CustomBackbone(net, norm=norm_layers("shuffle"))
    assert backbone.features == 7
    assert [name for name, p in backbone.named_parameters() if not p.requires_grad] == ["net.0.weight", "net.0.bias"]


def test_the_trial_leaves_statistics_and_generator_as_they_are_and_the_net_in_training() -> None:
    net = nn.Sequential(nn.Dropout2d(0.5), *_net().eval())
    before, state = copy.deepcopy(net), torch.get_rng_state()
    CustomBackbone(net, norm=norm_layers("plain"), size=16)
    assert _states_equal(net, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())


def test_an_expanded_buffer_gets_memory() -> None:
    net = _Flat()
    net.register_buffer("mask", torch.ones(1).expand(5))
    assert CustomBackbone(net, size=16).net.get_buffer("mask").is_contiguous()


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).flatten(1)


class _Returning(_Flat):
    def __init__(self, result: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: torch.Tensor) -> Any:
        return self.result(super().forward(x))


class _Auxiliary(_Flat):
    """Two outputs in training, as of Inception v3."""

    def forward(self, x: torch.Tensor) -> Any:
        features = super().forward(x)
        return (features, features) if self.training else features


class _OtherNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Conv2d(4, 2, 1), "two images of 16 pixels fail in it (RuntimeError: "),
        (_Auxiliary(), "two images give tuple in training: return features"),
        (_Returning(lambda x: {"features": x}), "two images give dict in evaluation: return features [B, F] or maps"),
        (_Returning(lambda x: x[:, None]), "two images give [2, 1, 512] in evaluation: "),
        (_Returning(lambda x: x[:1]), "two images give [1, 512] in evaluation: "),
        (_Flat().half(), "is not of torch.float32"),
        (_Flat().requires_grad_(False), "it has no parameter to train"),
        (nn.Sequential(_OtherNorm(3), _Flat()), "_OtherNorm is a BatchNorm of another kind"),
        (nn.Sequential(nn.BatchNorm2d(3, momentum=None), _Flat()), "has no running statistics or no momentum"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), _Flat()), "has no running statistics"),
    ],
)
def test_what_cannot_be_trained_is_refused(net: nn.Module, message: str) -> None:
    if "float32" in message:
        net = nn.Sequential(_Flat(), nn.Linear(512, 4))
        net.register_parameter("extra", nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    with pytest.raises(BackboneError) as caught:
        CustomBackbone(net, norm=norm_layers("plain"), size=16)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_sizes_must_give_as_many_features() -> None:
    backbone = CustomBackbone(_Flat(), size=8)
    backbone.check(8)
    with pytest.raises(BackboneError, match="images of 16 pixels give 512 features, others 128: pool them"):
        backbone.check(16)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("nowhere.at:all", "cannot be imported (ModuleNotFoundError: No module named 'nowhere'): name a function"),
        ("os:nothing", "cannot be imported (AttributeError: "),
        ("os:getcwd", "returns str: return a torch.nn.Module"),
        ("math:sqrt", "the call fails (TypeError: "),
    ],
)
def test_wrong_functions_are_refused(arch: str, message: str) -> None:
    with pytest.raises(BackboneError) as caught:
        build_custom(arch, {})
    assert message in str(caught.value)


def _timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for timm, with models a (of any size) and b (of one)."""

    def create(name: str, num_classes: int, **args: Any) -> nn.Module:
        if args.keys() - {"img_size", "depth"}:
            raise TypeError(f"unexpected {args}")
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * args.get("img_size", 4) ** 2, args.get("depth", 2)))

    models = types.SimpleNamespace(
        is_model=lambda name: name in ("a", "b"),
        get_pretrained_cfg=lambda name: types.SimpleNamespace(fixed_input_size=name == "b"),
    )
    timm = types.SimpleNamespace(__version__="9", models=models, list_models=lambda: ["a", "b"], create_model=create)
    monkeypatch.setitem(sys.modules, "timm", timm)  # type: ignore[arg-type]


def test_timm_gets_arguments_and_the_size_where_it_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    _timm(monkeypatch)
    assert build_custom("timm:a", {"depth": 3}, size=4).features == 3
    assert build_custom("timm:b", {}, size=16).features == 2
    for arch, args, message in (
        ("timm:a", {"width": 1}, r"timm cannot create it \(TypeError: unexpected .*\): correct model.arch"),
        ("timm:a", {"num_classes": 3}, r"model.args num_classes: .*leave it out"),
        ("timm:c", {}, "timm 9 has no such model: "),
    ):
        with pytest.raises(BackboneError, match=message):
            build_custom(arch, args, size=4)


def test_timm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackboneError, match="timm is not installed: pip install timm"):
        build_custom("timm:resnet18", {})


def test_normalization_equals_functions_of_torch() -> None:
    layer = ActivatedNorm(3)
    made: Any = CustomBackbone(nn.Sequential(layer, nn.Conv2d(3, 4, 1)), norm=norm_layers("plain"), size=8).net
    x = torch.randn(4, 3, 8, 8)
    expected = F.prelu(F.batch_norm(x, None, None, training=True), layer.act.weight)
    assert torch.allclose(made[0](x), expected, atol=1e-6)
