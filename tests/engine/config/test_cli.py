"""Options and recipes: values, precedence, and errors with key and remedy."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from engine.config.cli import flat, parse, parse_command_line
from engine.config.settings import Data, Settings
from methods.co2 import CO2
from methods.dcl import DCL
from methods.registry import BASES, Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.system.errors import InputError
from pipeline.views import AUGMENTATIONS
from tests import ROOT

RECIPES = sorted((ROOT / "engine" / "recipes").glob("*.yaml"))


def test_defaults_are_moco_v2_on_imagenet() -> None:
    settings = parse([])
    assert settings == Settings()
    assert (settings.method.queue_size, settings.method.temperature, settings.method.ema_momentum) == (
        65536,
        0.2,
        0.999,
    )
    assert (settings.optim.lr, settings.data.batch, settings.optim.epochs) == (0.03, 256, 200)


def test_sizes_have_equal_shares_of_the_epochs() -> None:
    sizes = parse(["--data.sizes", "[160, 192, 224]", "--optim.epochs", "7"]).size_of_epochs
    assert sizes == [160, 160, 160, 192, 192, 224, 224]
    assert parse(["--optim.epochs", "2"]).size_of_epochs == [224, 224]


def test_views_and_normalization_are_read_and_written(tmp_path: Path) -> None:
    """Each view as it was given; a recipe with the values of the command line reads the same."""
    (tmp_path / "r.yaml").write_text(
        "data:\n  augmentation: moco_v3\n  views:\n  - {preset: moco_v2, hue: 0}\n  - {crop_scale: [0.5, 1]}\n"
        "  mean: auto\n  std: [0.2, 0.3, 1]\n"
    )
    settings = parse(["--config", str(tmp_path / "r.yaml")])
    first, second = settings.data.augmentations
    assert first == replace(AUGMENTATIONS["moco_v2"][0], hue=0.0)
    assert second == replace(AUGMENTATIONS["moco_v3"][1], crop_scale=(0.5, 1.0))
    assert (settings.data.mean, settings.data.std) == ("auto", [0.2, 0.3, 1.0])
    options = ["--data.augmentation", "moco_v3", "--data.views", "[{preset: moco_v2, hue: 0}, {crop_scale: [0.5, 1]}]"]
    assert parse([*options, "--data.mean", "auto", "--data.std=[0.2, 0.3, 1]"]) == settings
    settings.write(tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == settings
    assert (
        parse(["--config", str(tmp_path / "config.yaml"), "--data.views", "[]"]).data.augmentations
        == AUGMENTATIONS["moco_v3"]
    )


def test_views_of_one_mapping_are_written_without_anchors(tmp_path: Path) -> None:
    view = {"crop_scale": [0.5, 1.0]}
    settings = Settings(data=Data(views=[view, view]))
    settings.write(tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == settings


def test_options_override_recipes_and_recipes_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lr: 0.5, epochs: 7}\nmodel: {arch: resnet18}\n")
    settings = parse(["--config", str(recipe), "--optim.lr", "0.06", "--method.symmetric", "true"])
    assert (settings.optim.lr, settings.optim.epochs, settings.model.arch) == (0.06, 7, "resnet18")
    assert settings.method.symmetric


def test_options_before_the_recipe_override_it(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lr: 0.5, epochs: 7}")
    for arguments in (["--optim.lr", "0.06", "--config", str(recipe)], ["--optim.lr=0.06", f"--config={recipe}"]):
        assert (parse(arguments).optim.lr, parse(arguments).optim.epochs) == (0.06, 7)


def test_precision_no_is_false_to_yaml(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("precision: no\n")
    assert parse(["--config", str(tmp_path / "r.yaml")]).precision == "no"


def test_written_settings_read_back_equal(tmp_path: Path) -> None:
    settings = parse(["--data.batch", "64", "--out", "somewhere", "--optim.lr", "1e-3"])
    settings.write(tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == settings


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(recipe: Path) -> None:
    assert parse(["--config", str(recipe)]) != Settings()


@pytest.mark.parametrize(
    ("arguments", "key", "remedy"),
    [
        (["--data.bach", "3"], "data.bach", "did you mean data.batch"),
        (["--lr", "3"], "lr", "did you mean optim.lr"),
        (["--compile", "1"], "compile 1", "true or false"),
        (["--no-compile=true"], "--no-compile:", "give --no-compile without a value, or --compile true"),
        (["--no-optim.lr"], "--no-optim.lr:", "give --optim.lr VALUE"),
        (["--no-terms.co2"], "--no-terms.co2:", "give --terms.co2 null"),
        (["--optim.learning_rate", "1"], "optim.learning_rate: no such setting", "did you mean optim.lr:"),
        (["--batch-size", "8"], "batch-size: no such setting", "did you mean data.batch:"),
        (["--to", "runs/a"], "to", "renamed to out"),
        (["--terms.xmco.help"], "terms.xmco.help", "did you mean terms.xmoco: choose one of co2, xmoco, residual, dcl"),
        (["--no-compile", "true"], "true", "no such setting"),
        (["--optim.lr"], "optim.lr", "give one"),
        (["--optim.lr", "--seed", "3"], "optim.lr", "give one"),
        (["--data", "x"], "data: a section", "one by one"),
        (["--data.sizes", "32,32"], "data.sizes '32,32'", "a list such as [160, 224]"),
        (["--data.batch", "abc"], "data.batch 'abc'", "give a whole number"),
        (["--data.batch", "1"], "data.batch 1", "2 or more"),
        (["--data.batch", "256.0"], "data.batch 256.0", "give a whole number"),
        (["--data.batch", "true"], "data.batch True", "give a whole number"),
        (["--data.augmentation", "moco"], "data.augmentation 'moco'", "moco_v2"),
        (["--data.views", "[{hue: 0}]"], "data.views: 1 view, and every method takes two", "such as [{hue: 0}, {}]"),
        (["--data.views", "[{}, {}, {}]"], "data.views: 3 views, and every method takes two", "list two"),
        (["--data.views", "moco_v1"], "data.views 'moco_v1'", "two mappings such as [{hue: 0}, {}]"),
        (["--data.views", "[moco_v1, {}]"], "data.views 'moco_v1'", "two mappings such as [{hue: 0}, {}]"),
        (["--data.views", "{hue: 0}"], "data.views", "two mappings such as [{hue: 0}, {}]"),
        (["--data.views.hue", "0"], "data.views.hue: no such setting", "did you mean data.views"),
        (["--data.views", "[{}, {hue: 0.7}]"], "data.views {hue: 0.7}", "choose a number from 0 to 0.5"),
        (["--data.views", "[{}, {huge: 0}]"], "data.views {huge: 0}", "did you mean hue"),
        (["--data.views", "[{}, {preset: moco}]"], "data.views {preset: moco}", "choose one of moco_v1"),
        (["--data.mean", "[0.5, 0.5]"], "data.mean [0.5, 0.5]", "three numbers from 0 to 1, or auto"),
        (["--data.mean", "[0.5, 0.5, 127]"], "data.mean [0.5, 0.5, 127.0]", "three numbers from 0 to 1, or auto"),
        (["--data.mean", "[a, b, c]"], "data.mean 'a'", "three numbers such as [0.485, 0.456, 0.406], or auto"),
        (["--data.mean", "imagenet"], "data.mean 'imagenet'", "three numbers such as [0.485, 0.456, 0.406], or auto"),
        (["--data.std", "0.2"], "data.std 0.2", "three numbers such as [0.229, 0.224, 0.225], or auto"),
        (["--data.std", "[0.2, 0.2, 0]"], "data.std [0.2, 0.2, 0.0]", "three numbers above 0, up to 1, or auto"),
        (["--data.sizes", "[160, 192]"], "data.sizes [160, 192]", "end with data.size 224"),
        (["--data.sizes", "[4, 224]"], "data.sizes [4, 224]", "8 to 1024"),
        (["--data.sizes", "[160, 224]", "--optim.epochs", "1"], "data.sizes [160, 224]", "at most one an epoch"),
        (["--model.arch", "vit_small", "--data.sizes", "[160, 224]"], "data.sizes", "leave data.sizes out"),
        (["--cuda_graph", "true", "--log_every", "1"], "cuda_graph true: log_every 1", "choose 2"),
        (["--gradient_dtype", "float16"], "gradient_dtype 'float16'", "bfloat16"),
        (["--data.backend", "lmdb"], "data.backend 'lmdb'", "ffcv"),
        (["--method.queue_size", "0"], "method.queue_size 0", "above 0"),
        (["--method.temperature", "-1"], "method.temperature -1", "above 0"),
        (["--method.ema_momentum", "1.5"], "method.ema_momentum 1.5", "0 to 1"),
        (["--optim.lr", "-1"], "optim.lr -1", "above 0"),
        (["--optim.lr", ".inf"], "optim.lr", "finite"),
        (["--optim.warmup_epochs", "300"], "optim.warmup_epochs 300", "below optim.epochs"),
        (["--precision", "fp8"], "precision 'fp8'", "bf16"),
        (["--seed", "-1"], "seed -1", "choose 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml", "recipe"),
        (["words"], "words", "--help"),
        (["--terms.co2.weigh", "3"], "terms.co2.weigh: no such setting", "choose one of weight, temperature"),
        (["--terms.co2.weight", "x"], "terms.co2.weight 'x'", "give a number"),
        (["--terms.co2.weight", "-1"], "terms.co2.weight -1", "leave the term out"),
        (["--terms.dcl.weight", "0"], "terms.dcl.weight 0", "leave the term out"),
        (["--terms.co2.weight", ".inf"], "terms.co2.weight inf", "finite"),
        (["--terms.co2", "0.5"], "terms.co2 0.5", "{weight: 1}"),
        (["--terms", "{co2: {weight: 1}}"], "terms '{co2: {weight: 1}}'", "[co2, residual]"),
        (["--terms.xmoco.cross", "0", "--terms.xmoco.uniformity", "0"], "terms.xmoco", "both 0"),
        (["--method.temperature", "nan"], "method.temperature", "number"),
        (["--method.queue_size", "1.5"], "method.queue_size 1.5", "a whole number, or null"),
        (["--model.bn", "groupnorm"], "model.bn 'groupnorm'", "'shuffle'"),
        (["--method.name", "byol", "--method.temperature", "1"], "method.temperature 1.0", "no softmax"),
        (["--method.name", "simclr", "--method.ema_momentum", "0.9"], "method.ema_momentum 0.9", "no momentum encoder"),
        (["--method.name", "moco_v1", "--model.mlp_dim", "9"], "model.mlp_dim 9", "one layer"),
        (
            ["--method.name", "simclr", "--gradient_accumulation_steps", "2"],
            "gradient_accumulation_steps 2",
            "choose 1",
        ),
        (["--terms.xmoco.cross", "1", "--gradient_accumulation_steps", "2"], "terms.xmoco.cross", "choose 1"),
        (["--gradient-share", "true"], "gradient-share", "did you mean gradient_shares"),
        (["--terms.co2.weight", "null"], "terms.co2.weight None", "give a number"),
        (["--method.name", "null"], "method.name 'null'", "'moco_v1', 'moco_v2'"),
        (
            ["--optim.schedule", "steps", "--optim.milestones", "[250]"],
            "optim.milestones [250.0]",
            "below optim.epochs",
        ),
        (["--terms.co2.temperature", "0"], "terms.co2.temperature 0", "above 0"),
        (["--terms.xmoco.form", "l1"], "terms.xmoco.form 'l1'", "'mse', 'kl'"),
        (["--terms", "[co2, nonsense]"], "terms '[co2, nonsense]'", "of co2, xmoco, residual, dcl"),
        (["--method.name", "simclr", "--terms", "[residual]"], "terms.residual", "no momentum encoder"),
        (["--method.name", "byol", "--terms", "[dcl]"], "terms.dcl", "no contrastive loss"),
        (["--method.name", "moco_v3", "--terms.xmoco.negatives", "queue"], "xmoco.negatives 'queue'", "choose batch"),
        (["--method.name", "moco_v3", "--method.queue_size", "9"], "method.queue_size 9", "has no queue"),
        (["--method.name", "byol", "--method.symmetric", "false"], "method.symmetric False", "is symmetric"),
        (["--method.name", "simclr", "--model.bn", "shuffle"], "model.bn 'shuffle'", "choose plain or sync"),
        (["--model.arch", "vit_small", "--data.size", "40"], "data.size 40", "multiple of 16"),
        (["--model.arch", "vit_small", "--model.width", "0.5"], "model.arch 'vit_small'", "of ResNets"),
        (["--optim.milestones", "[3]"], "optim.milestones [3.0]", "schedule steps"),
        (["--optim.schedule", "steps"], "optim.milestones []", "give epochs"),
        (["--optim.clip_grad_norm", "-1"], "optim.clip_grad_norm -1", "0 for none"),
    ],
)
def test_wrong_settings_are_refused_with_key_and_remedy(arguments: list[str], key: str, remedy: str) -> None:
    with pytest.raises(InputError) as refused:
        parse(arguments)
    assert key in str(refused.value)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def test_terms_are_a_mapping_a_list_or_options(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("terms: {co2: {weight: 7}, residual: {}}")
    (tmp_path / "list.yaml").write_text("terms: [co2, residual]")
    both = Terms(co2=CO2(), residual=Residual())
    assert parse(["--config", str(tmp_path / "map.yaml")]).terms == Terms(co2=CO2(weight=7), residual=Residual())
    assert parse(["--config", str(tmp_path / "list.yaml")]).terms == both
    for given in (["--terms", "[co2, residual]"], ["--terms", "co2,residual"], ["--terms", "[co2,", "residual]"]):
        assert parse(given).terms == both
    with_one = ["--config", str(tmp_path / "map.yaml"), "--terms", "[co2]"]
    assert parse(with_one).terms == Terms(co2=CO2(weight=7))
    assert parse([*with_one[:2], "--terms", "[]"]).terms == Terms()
    for text in ("terms:", "terms: null", "terms: {co2: }"):
        (tmp_path / "none.yaml").write_text(text)
        assert parse(["--config", str(tmp_path / "none.yaml")]).terms == Terms()
    assert parse(["--terms.co2", "--terms.residual", "{weight: 2}"]).terms == Terms(CO2(), residual=Residual(weight=2))
    assert parse(["--terms=[co2]", "--terms.co2.temperature", "0.1"]).terms == Terms(co2=CO2(temperature=0.1))
    without = ["--config", str(tmp_path / "map.yaml"), "--terms.co2", "null", "--terms.residual.weight", "2"]
    assert parse(without).terms == Terms(residual=Residual(weight=2))


@pytest.mark.parametrize("name", BASES)
def test_null_is_the_published_value(name: str) -> None:
    published = {
        "moco_v1": (0.07, 0.999, "constant", 65536, False, 128, "shuffle", False),
        "moco_v2": (0.2, 0.999, "constant", 65536, False, 128, "shuffle", False),
        "moco_v3": (1.0, 0.99, "cosine", None, True, 256, "sync", True),
        "simclr": (0.1, None, None, None, True, 128, "sync", True),
        "byol": (None, 0.996, "cosine", None, True, 256, "sync", True),
    }
    s = parse(["--method.name", name])
    method = (
        s.method.temperature,
        s.method.ema_momentum,
        s.method.ema_schedule,
        s.method.queue_size,
        s.method.symmetric,
    )
    assert (*method, s.model.dim, s.model.bn, s.model.zero_init_residual) == published[name]
    given = parse(
        ["--method.name", name, "--model.zero_init_residual", "true", "--model.dim", "7", "--model.bn", "plain"]
    )
    assert (given.model.zero_init_residual, given.model.dim, given.model.bn) == (True, 7, "plain")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"data: {bach: 3}", "data.bach"),
        (b"dta: {batch: 3}", "dta: no such setting, did you mean data"),
        (b"data: [", "r.yaml: not valid YAML"),
        (b"a: !!python/object:f x", "r.yaml: not valid YAML"),
        (b"- 1", "r.yaml: not a mapping"),
        (b"", "r.yaml: not a mapping"),
        (b"\xff\xfe", "r.yaml: not UTF-8 text"),
        (b"nonsense: {}", "nonsense: no such setting"),
        (b"terms: [co2, residaul]", "terms.residaul: no such setting, did you mean terms.residual"),
        (b"terms: {residaul: {}}", "terms.residaul"),
        (b"terms: {co2: {temperature: null}}", "terms.co2.temperature None: wrong type: give a number"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text)
    with pytest.raises(InputError) as refused:
        parse(["--config", str(path)])
    assert says in str(refused.value).replace(f" ({path})", "")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_error_names_the_recipe_of_a_value(tmp_path: Path) -> None:
    base, variant = tmp_path / "base.yaml", tmp_path / "variant.yaml"
    base.write_text("optim: {warmup_epochs: 5}\nmethod: {symmetric: false}\ndata: {augmentation: byol, batch: 1}\n")
    variant.write_text("base: base.yaml\ndata: {batch: 8, augmentation: crop}\n")
    recipe = ["--config", str(variant)]
    for arguments, message in (
        (["--data.augmentation", "byol", "--optim.epochs", "3"], f"optim.warmup_epochs 5.0 ({base}): choose 0 or more"),
        ([], f"data.augmentation 'crop' ({variant}): choose one of"),
        (["--data.augmentation", "crop"], "data.augmentation 'crop': choose one of"),
        (
            ["--data.augmentation", "byol", "--optim.warmup_epochs", "0", "--method.name", "byol"],
            f"method.symmetric False ({base}): byol is symmetric",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            parse([*recipe, *arguments])


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_lists_every_setting(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(len(line) <= int(columns) for line in shown.splitlines())
    assert "_" not in "".join(re.findall(r"^  --\S+", shown, re.MULTILINE))
    text = " ".join(shown.split()).partition(" data: ")[2]
    every = Terms(CO2(), XMoCo(), Residual(), DCL())
    for key, value in flat(Settings(terms=every).as_dict()).items():
        _, entry, *others = text.split(f" --{key.replace('_', '-')} ")
        help_text, _, default = entry.partition("default: ")
        assert not others
        assert len(help_text.split("(")[0]) > 10, f"{key} has no help"
        assert default.startswith(("null)", f"{value})", f"{json.dumps(value)})")), key
    assert "true|false" in text
    assert "auto|ffcv|ffcv_gpu|dali|resident" in text
    assert "such as 0.03; default: 0.03" in text


@pytest.mark.parametrize("name", ["co2", "xmoco", "residual", "dcl"])
def test_help_of_a_term_lists_its_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([f"--terms.{name}.help"])
    assert not ended.value.code
    every = Terms(CO2(), XMoCo(), Residual(), DCL())
    options = re.findall(r"--(\S+)", capsys.readouterr().out)
    assert options[1:] == [f"terms.{name}.{field.name}".replace("_", "-") for field in fields(getattr(every, name))]


@pytest.mark.parametrize("option", ["--save-every", "--save_every"])
def test_hyphens_and_underscores_are_the_same(option: str) -> None:
    assert parse([option, "7"]).save_every == parse([f"{option}=7"]).save_every == 7
    assert parse(["--optim.warmup-epochs", "2", "--terms.xmoco.cross_temperature", "1"]).optim.warmup_epochs == 2


@pytest.mark.parametrize("option", ["--dry-run", "--dry_run"])
def test_dry_run_is_an_option(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", option, "--seed", "3"])
    assert parse_command_line() == (parse(["--seed", "3"]), True)
    assert not parse_command_line(["--out", "dry-run", "--seed", "3"]).dry_run


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--compile"], True),
        (["--compile", "true"], True),
        (["--compile=true"], True),
        (["--compile", "--cpu"], True),
        (["--no-compile"], False),
        (["--no_compile"], False),
        (["--compile", "false"], False),
        (["--compile", "--no-compile"], False),
    ],
)
def test_booleans_are_options(arguments: list[str], value: bool) -> None:
    assert parse(arguments).compile == value


def test_booleans_of_sections_are_options() -> None:
    for option in ("--no-model.stop-grad-conv1", "--model.no-stop-grad-conv1", "--model.no_stop_grad_conv1"):
        assert not parse([option]).model.stop_grad_conv1
    assert parse(["--method.symmetric"]).method.symmetric
    assert parse(["--no-model.zero-init-residual", "--method.name", "moco_v3"]).model.zero_init_residual is False


def test_print_config_shows_all_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--print-config", "--optim.lr", "1e-3"])
    assert not ended.value.code
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    assert parse(["--config", str(tmp_path / "all.yaml")]) == parse(["--optim.lr", "1e-3"])


def test_settings_allowed_to_change_add_up(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("allow_change: [seed]")
    settings = parse(["--config", str(tmp_path / "r.yaml"), "--allow-change", "optim.lr", "--allow_change=[data, knn]"])
    assert settings.allow_change == ["seed", "optim.lr", "data", "knn"]


def write(folder: Path, **recipes: str) -> Path:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_recipe_overrides_its_base(tmp_path: Path) -> None:
    write(
        tmp_path,
        first="optim: {lr: 0.5, epochs: 7}\nterms: {co2: {weight: 7}}\nout: a",
        second="base: first.yaml\noptim: {lr: 0.25}\nterms: {residual: {}, co2: {temperature: 1}}",
        third="base: second.yaml\nterms: [residual]\nmodel: {bn: plain}\nout: b",
    )
    settings = parse(["--config", str(tmp_path / "second.yaml"), "--optim.momentum", "0.5"])
    assert (settings.optim.lr, settings.optim.epochs, settings.optim.momentum, settings.out) == (0.25, 7, 0.5, "a")
    assert settings.terms == Terms(CO2(weight=7, temperature=1), residual=Residual())
    settings = parse(["--config", str(tmp_path / "third.yaml")])
    assert (settings.optim.lr, settings.optim.epochs, settings.model.bn, settings.out) == (0.25, 7, "plain", "b")
    assert settings.terms == Terms(residual=Residual())


def test_a_base_is_relative_to_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path, first="seed: 3")
    write(tmp_path / "below", second="base: ../first.yaml")
    monkeypatch.chdir(tmp_path / "below")
    assert parse(["--config", "second.yaml"]).seed == 3
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", "below/second.yaml"]).seed == 3


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("nowhere.yaml", r"nowhere\.yaml: cannot be read \(No such file or directory\): correct base in .*r\.yaml"),
        ("r.yaml", r"r\.yaml: base r\.yaml: is a variant of this recipe: remove one of the two bases"),
        ("other.yaml", r"other\.yaml: base r\.yaml: is a variant"),
        ("[r.yaml]", r"r\.yaml: base \['r\.yaml'\]: give the path of a recipe"),
        ("3", r"r\.yaml: base 3: give the path"),
        ("/dev/zero", r"/dev/zero: cannot be read .*: correct base in .*r\.yaml"),
    ],
)
def test_a_wrong_base_is_refused(tmp_path: Path, base: str, says: str) -> None:
    write(tmp_path, r=f"base: {base}\nseed: 1", other="base: r.yaml")
    with pytest.raises(InputError, match=says) as refused:
        parse(["--config", str(tmp_path / "r.yaml")])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"), [("data.views", "{hue: 0}"), ("data.size", "{a: 1}"), ("data.mean", "{a: 1}")]
)
def test_a_mapping_for_another_setting_of_a_recipe_is_refused(key: str, value: str, tmp_path: Path) -> None:
    """The recipe's own value does not take its place."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {views: [{hue: 0}, {}], size: 32, mean: [0.5, 0.5, 0.5]}\n")
    with pytest.raises(InputError, match=f"^{key}"):
        parse(["--config", str(recipe), f"--{key}", value])
