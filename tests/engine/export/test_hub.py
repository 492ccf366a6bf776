"""Repositories for the Hugging Face Hub: written whole, loaded by timm, and uploaded by huggingface_hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from engine.export import __main__ as command
from engine.export import hub
from engine.weights.architecture import Architecture
from engine.weights.load import load_encoder
from engine.weights.readers import METADATA
from methods.vit import VITS
from pipeline.system.errors import InputError
from tests.engine.run_folders import settings, write_checkpoint
from tests.torchvision_operators import torchvision_or_skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "run", settings("train.beton"))
    return tmp_path / "run"


def _export(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["export", *map(str, words)])
    command.main.__wrapped__()  # type: ignore[attr-defined]


class Api:
    """Stands in for huggingface_hub's, and notes what it is given."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **_: Any) -> None:
        type(self).calls = []

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append(("create", {"name": name, **options}))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, **options: Any) -> None:
        files = sorted(file.name for file in Path(options["folder_path"]).iterdir())
        self.calls.append(("upload", {"name": options["repo_id"], "files": files}))


def test_a_folder_is_uploaded_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "HfApi", Api)
    _export(monkeypatch, run, "--push-to", "a/b", "--private", "--out", tmp_path / "x")
    assert Api.calls == [
        ("create", {"name": "a/b", "private": True, "exist_ok": True}),
        ("upload", {"name": "a/b", "files": ["README.md", "config.json", "model.safetensors"]}),
    ]
    assert "uploaded: https://huggingface.co/a/b" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "x/README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.tags == ["self-supervised", "millrace", "resnet18"]


def test_a_dry_run_uploads_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "push", lambda *_, **__: pytest.fail("uploaded"))
    _export(monkeypatch, run, "--push-to", "a/b", "--dry-run", "--out", tmp_path / "x")
    again = load_encoder(tmp_path / "x/model.safetensors")
    assert again.architecture == load_encoder(run).architecture
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert config["arch"] == "resnet18"  # of an architecture that timm lacks: our own format
    assert "load_encoder(file)" in (tmp_path / "x/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to", "b"], "--push-to b: give USER/NAME"),
        (["--push-to", "a/b/c"], "--push-to a/b/c: give USER/NAME"),
        (["--push-to", "a/b", "--format", "onnx"], "--format onnx: the Hub's libraries load timm and safetensors"),
        (["--private"], "--private: only with --push-to"),
        (["--dry-run"], "--dry-run: only with --push-to"),
    ],
)
def test_wrong_options_write_nothing(
    words: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=message):
        _export(monkeypatch, run, *words, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_with_other_files_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "push", lambda *_, **__: pytest.fail("uploaded"))
    with pytest.raises(InputError, match="has other files, such as checkpoints: choose another --out"):
        _export(monkeypatch, run, "--push-to", "a/b", "--out", run)


def test_a_network_of_another_stem_is_not_timms(tmp_path: Path) -> None:
    architecture = Architecture("resnet18", stem="small")
    assert hub.choose_format(architecture) == "safetensors"
    with pytest.raises(InputError, match=r"--format timm: has no resnet18 .small stem. by name: choose safetensors"):
        hub.check_format(architecture, "timm")


def test_a_refused_upload_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Api):
        def create_repo(self, name: str, **options: Any) -> str:
            raise OSError("Token is required\n(`token=True`)")

    monkeypatch.setattr(hub, "HfApi", Refusing)
    with pytest.raises(InputError) as caught:
        _export(monkeypatch, run, "--push-to", "a/b", "--out", tmp_path / "x")
    assert str(caught.value).startswith("--push-to a/b: Token is required (`token=True`): log in with hf auth login")


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_timm_loads_the_folder(arch: str, tmp_path: Path) -> None:
    torchvision_or_skip()
    timm = pytest.importorskip("timm")
    encoder = _drawn(arch, tmp_path)
    hub.write_folder(encoder, hub.choose_format(encoder.architecture), tmp_path / "x", "a/b")
    model = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(images), encoder.backbone(images), atol=1e-4)
    config = timm.data.resolve_model_data_config(model)
    assert (*config["input_size"], config["crop_pct"]) == (3, 64, 64, 0.875)
    assert timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True, num_classes=7)(images).shape == (2, 7)


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_the_configuration_is_timms(arch: str, tmp_path: Path) -> None:
    encoder = _drawn(arch, tmp_path)
    hub.write_folder(encoder, "timm", tmp_path / "x", "a/b")
    config = json.loads((tmp_path / "x/config.json").read_text())
    expected = {"resnet18": ("resnet18", {}), "vit_tiny": ("vit_tiny_patch16_224", {"img_size": 64, "num_heads": 3})}
    assert (config["architecture"], config["model_args"]) == expected[arch]
    assert config["num_features"] == encoder.backbone.features
    assert load_file(tmp_path / "x/model.safetensors").keys() == encoder.backbone.state_dict().keys()
    assert 'timm.create_model("hf_hub:a/b", pretrained=True)' in (tmp_path / "x/README.md").read_text()


def _drawn(arch: str, folder: Path) -> Any:
    heads = VITS[arch].heads if arch in VITS else 0
    architecture = Architecture(arch, size=64, heads=heads)
    described = json.dumps({"arch": arch, "size": 64, "heads": heads})
    save_file(architecture.build().state_dict(), folder / "source.safetensors", metadata={METADATA: described})
    return load_encoder(folder / "source.safetensors")
