"""Runs with the user's own backbone: start, exact resume, evaluation, export, and refusals."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.config.cli import parse
from engine.config.setting_error import SettingError
from engine.config.settings import Settings
from engine.evaluate.__main__ import run as evaluate
from engine.export.formats import export
from engine.parallel import collectives
from engine.parallel.rendezvous import rank
from engine.training.build import Run, build
from engine.training.loop import train, train_on
from engine.training.resume import restore, save
from engine.weights.architecture import Architecture
from engine.weights.load import load_encoder
from engine.weights.readers import METADATA
from methods.custom import CustomBackbone
from pipeline.system.errors import InputError
from tests import processes
from tests.engine.training import runs
from tests.gloo import on_ranks

CODE = """
import torch
from torch import nn


def net(channels=8, drop=0.0, features_of="maps"):
    layers = [nn.Conv2d(3, channels, 3, 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout2d(drop)]
    return nn.Sequential(*layers, nn.Conv2d(channels, 12, 3))
"""


@pytest.fixture
def arch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A function in the working directory."""
    name = f"own_{tmp_path.name.replace('-', '_')}"  # one module a test
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return f"{name}:net"


def _settings(beton: Path, out: Path, arch: str, bn: str = "shuffle", **model: Any) -> Settings:
    chosen = runs.settings(beton, bn)
    own = replace(chosen.model, arch=arch, stem="imagenet", width=1.0, zero_init_residual=None, **model)
    return replace(chosen, out=str(out), model=own)


def _run(settings: Settings) -> Run:
    run = build(settings)
    try:
        restore(run)
    except InputError:
        run.close()
        raise
    return run


def _net(run: Run) -> nn.Module:
    assert isinstance(run.backbone, CustomBackbone)
    return run.backbone.net


def _by_hand(arch: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    return namespace["net"]().state_dict()


def test_a_run_resumes_bit_by_bit_with_dropout(arch: str, drawn: Path, tmp_path: Path) -> None:
    settings = _settings(drawn, tmp_path / "a", arch, args={"drop": 0.5})
    run = _run(settings)
    iterator = iter(run.loader)
    train_on(run, next(iterator), logs=False)
    save(run)
    run.writer.wait()
    train_on(run, next(iterator), logs=True)
    run.close()
    again = _run(replace(settings, resume="auto"))
    train_on(again, next(iter(again.loader)), logs=True)
    again.close()
    for name, value in run.model.step.encoder.state_dict().items():
        assert torch.equal(value, again.model.step.encoder.state_dict()[name]), name


def test_a_finished_run_is_evaluated_and_exported(arch: str, drawn: Path, tmp_path: Path) -> None:
    train(_settings(drawn, tmp_path / "run", arch))
    with pytest.raises(InputError, match=r"own_\w+:net', which would import code or fetch files: add --trust-recipe"):
        load_encoder(tmp_path / "run")
    encoder = load_encoder(tmp_path / "run", trust_recipe=True)
    assert encoder.backbone.features == 12
    export(encoder, "safetensors", tmp_path / "x.safetensors")
    again = load_encoder(tmp_path / "x.safetensors", trust_recipe=True)
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(encoder.backbone(images), again.backbone(images))
    assert load_file(tmp_path / "x.safetensors").keys() == _by_hand(arch, 0).keys()  # the module's own names
    for format in ("timm", "torchvision", "mmdet"):
        with pytest.raises(InputError, match=f"--format {format}: has no own_.*: choose safetensors or onnx"):
            export(encoder, format, tmp_path / "y")


@pytest.mark.parametrize("prefix", ["", "module.encoder_q.", "student."])
def test_a_run_starts_from_weights_of_the_module(prefix: str, arch: str, drawn: Path, tmp_path: Path) -> None:
    state = {name: value + 0.5 for name, value in _by_hand(arch, 3).items() if value.is_floating_point()}
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "x.safetensors")
    init = {"init": str(tmp_path / "x.safetensors"), "init_prefix": prefix if prefix == "student." else ""}
    run = _run(_settings(drawn, tmp_path / "run", arch, **init))
    run.close()
    assert run.model.target is not None
    for module in (_net(run), run.model.target.backbone.net):
        assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    assert run.started_from["matched"] == len(state)


def test_weights_of_another_module_are_refused(arch: str, drawn: Path, tmp_path: Path) -> None:
    own = _by_hand(arch, 0)
    for state, message in (
        ({"0.weight": own["0.weight"]}, "of 8 backbone keys are missing: 1.weight, "),
        ({"first.weight": own["0.weight"]}, r"no key of own_\w+:net, online encoder \(the file's are first.weight"),
        (own | {"0.weight": torch.zeros(4, 3, 3, 3)}, r"0.weight is \[4, 3, 3, 3\], not \[8, 3, 3, 3\]"),
    ):
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=message):
            _run(_settings(drawn, tmp_path / "run", arch, init=str(tmp_path / "x.safetensors")))
        assert not (tmp_path / "run").exists()


def test_a_run_of_ours_names_the_code_of_the_file_that_it_starts_from(arch: str, drawn: Path, tmp_path: Path) -> None:
    train(_settings(drawn, tmp_path / "run", arch))
    with pytest.raises(InputError, match=rf"has {arch}: choose model.arch {arch}"):
        _run(_settings(drawn, tmp_path / "x", "resnet18", init=str(tmp_path / "run")))


def test_evaluation_and_onnx_of_a_run(arch: str, drawn: Path, tmp_path: Path) -> None:
    train(_settings(drawn, tmp_path / "run", arch))
    words = ["knn", str(tmp_path / "run"), "--train", str(drawn), "--test", str(drawn), "--size", "16", "--k", "5"]
    words += ["--cpu", "--precision", "no", "--workers", "1"]
    with pytest.raises(InputError, match="--trust-recipe"):
        evaluate(words)
    evaluate([*words, "--trust-recipe"])
    assert json.loads((tmp_path / "run/evaluation/knn.json").read_text())["top1"] >= 0
    pytest.importorskip("onnxruntime")
    assert export(load_encoder(tmp_path / "run", trust_recipe=True), "onnx", tmp_path / "x.onnx") < 1e-5


def _train_on_ranks(beton: str, arch: str, out: str, code: str) -> None:
    sys.path.append(code)
    run = _run(_settings(Path(beton), Path(out), arch, "sync"))
    for batch, _ in zip(run.loader, range(3), strict=False):
        run.model.step(batch)
    if rank() == 0:
        torch.save(run.model.step.encoder.state_dict(), f"{out}.pth")
    run.close()


@pytest.mark.slow
def test_two_ranks_train_as_one(arch: str, drawn: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        on_ranks(world, _train_on_ranks, str(drawn), arch, str(tmp_path / f"on{world}"), str(tmp_path))
    one, two = (torch.load(tmp_path / f"on{world}.pth") for world in (1, 2))
    assert all(torch.allclose(value, two[name], rtol=1e-4, atol=1e-5) for name, value in one.items())


def _compare_buffers(beton: str, arch: str, out: str, code: str) -> None:
    sys.path.append(code)
    run = _run(_settings(Path(beton), Path(out), arch))
    assert run.model.target is not None
    for encoder in (run.model.step.encoder, run.model.target):
        mask = encoder.backbone.get_buffer("net.mask")
        assert torch.equal(collectives.gather(mask[None])[0], mask), "differs from rank 0's"
    run.close()


@pytest.mark.slow
def test_ranks_have_one_drawn_buffer(drawn: Path, tmp_path: Path) -> None:
    name = "own_drawn_buffer"
    code = "import os\nimport torch\nfrom torch import nn\n\n\ndef net():\n"
    code += "    made = nn.Sequential(nn.Conv2d(3, 4, 3))\n"
    code += "    made.register_buffer('mask', torch.full([3], float(os.environ['RANK'])))\n    return made\n"
    (tmp_path / f"{name}.py").write_text(code)
    on_ranks(2, _compare_buffers, str(drawn), f"{name}:net", str(tmp_path / "run"), str(tmp_path))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"arch": "timm:hf-hub:a/b"}, "which would import code or fetch files: add --trust-recipe"),
        ({"arch": "timm:local-dir:/etc"}, "which would import code or fetch files: add --trust-recipe"),
        ({"arch": "timm:a", "args": [1]}, "arguments of timm:a that are no mapping"),
        ({"arch": "timm:a", "size": 10**9}, "states an impossible size of images"),
    ],
)
def test_files_cannot_make_timm_fetch(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={METADATA: json.dumps(stated)})
    with pytest.raises(InputError, match=message):
        load_encoder(tmp_path / "x.safetensors")


def test_a_momentum_encoder_under_a_prefix_is_refused(arch: str, tmp_path: Path) -> None:
    save_file({"a.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"no key of .* under a"):
        load_encoder(tmp_path / "x.safetensors", "momentum", prefix="a", custom=Architecture(arch, size=16))


def test_a_transformer_of_other_heads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither keys nor shapes show their number."""
    (tmp_path / "heads.py").write_text(
        "from methods.vit import VisionTransformer\n"
        "class Vit(VisionTransformer):\n"
        "    def __init__(self, heads):\n"
        "        super().__init__(384, 12, heads, size=16)\n"
        "        self.requires_grad_(True)\n"
        "        [setattr(b.attn, 'num_heads', heads) for b in self.blocks]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    state = Architecture("vit_small", size=16, heads=12).build().state_dict()
    official = {f"module.base_encoder.{name}": value for name, value in state.items()}
    torch.save({"state_dict": official}, tmp_path / "x.pth")
    fitting = Architecture("heads:Vit", size=16, args={"heads": 12})
    assert load_encoder(tmp_path / "x.pth", custom=fitting).matched == len(state)
    with pytest.raises(InputError, match=r"has 12 attention heads, and this run's backbone 6: choose model.args"):
        load_encoder(tmp_path / "x.pth", custom=Architecture("heads:Vit", size=16, args={"heads": 6}))


@pytest.mark.parametrize(
    "stated", [{"heads": "x"}, {"heads": [1]}, {"arch": ["vit_small"]}, {"arch": {}, "heads": None}]
)
def test_odd_statements_of_a_file_do_no_harm(stated: dict[str, Any], arch: str, tmp_path: Path) -> None:
    save_file(_by_hand(arch, 0), tmp_path / "x.safetensors", metadata={METADATA: json.dumps(stated)})
    assert load_encoder(tmp_path / "x.safetensors", custom=Architecture(arch, size=16)).matched == 8


def test_errors_of_the_code_end_the_start_with_one_line(arch: str, drawn: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"args": {"channels": 5.5}}, ": the call fails"),
        ({"args": {"width": 3}}, r": the call fails \(TypeError: net\(\) got an unexpected keyword argument 'width'\)"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            build(_settings(drawn, tmp_path / "run", arch, **options))  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"model.arch {arch}: ")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 0.5), ("stem", "small"), ("zero_init_residual", True), ("stop_grad_conv1", False)],
)
def test_settings_of_our_own_backbones_are_refused(key: str, value: object, arch: str, tmp_path: Path) -> None:
    settings = Settings()
    model = replace(settings.model, arch="resnet18", zero_init_residual=None)
    with pytest.raises(SettingError, match=f"{key}"):
        replace(settings, model=replace(model, arch=arch, **{key: value}))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="activation_checkpointing"):
        replace(settings, model=replace(model, arch=arch), activation_checkpointing=True)
    with pytest.raises(SettingError, match=r"model.args \{'a': 1\}: resnet18 takes none"):
        replace(settings, model=replace(model, args={"a": 1}))


def test_a_recipe_imports_code_only_where_it_is_trusted(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {arch: 'own:net', args: {channels: 4}}\n")
    with pytest.raises(InputError, match=f"'own:net' .* in {recipe}: would import code .*--trust-recipe"):
        parse(["--config", str(recipe)])
    trusted = parse(["--config", str(recipe), "--trust-recipe"])
    assert (trusted.model.arch, trusted.model.args) == ("own:net", {"channels": 4})
    typed = parse(["--config", str(recipe), "--model.arch", "own:net", "--model.args", "{channels: 5}"])
    assert typed.model.args == {"channels": 5}
    assert parse(["--config", str(recipe), "--trust-recipe", "--model.args", "{a: 1e-3}"]).model.args == {"a": 0.001}
    recipe.write_text("model: {arch: 'timm:resnet18', args: {checkpoint_path: x.pth}}\n")
    with pytest.raises(InputError, match=r"checkpoint_path.*would import code or read files"):
        parse(["--config", str(recipe)])
    recipe.write_text("model: {arch: 'timm:resnet18'}\n")
    assert parse(["--config", str(recipe)]).model.arch == "timm:resnet18"


@pytest.mark.parametrize("arch", ["resnet51", "timm:", "a:b:c", "a b:c", ":x", "os.path:", "1a:b"])
def test_other_names_of_backbones_are_refused(arch: str) -> None:
    with pytest.raises(SettingError, match=r"choose resnet10, .*, timm:NAME or package.module:function"):
        parse(["--model.arch", arch])


def test_the_command_line_finds_a_function_in_the_working_directory(arch: str, drawn: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    words = ["--dry-run", "--model.arch", arch, "--data.size", "16", "--data.batch", "16", "--cpu", "--precision", "no"]
    done = processes.run(
        [sys.executable, str(root / "engine/run.py"), *words, "--method.queue-size", "64"], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert arch in done.stdout
