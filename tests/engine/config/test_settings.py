"""Settings: overrides, recipes, and refusals that name the key and the remedy."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from engine.config.cli import parse
from engine.config.settings import Settings
from methods.co2 import CO2
from methods.registry import BASES, Terms
from methods.residual import Residual
from pipeline.system.errors import InputError
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
    found = parse(["--data.sizes", "[160, 192, 224]", "--optim.epochs", "7"]).size_of_epochs
    assert found == [160, 160, 160, 192, 192, 224, 224]
    assert parse(["--optim.epochs", "2"]).size_of_epochs == [224, 224]


def test_command_line_overrides_the_recipe_and_the_recipe_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lr: 0.5, epochs: 7}\nmodel: {arch: resnet18}\n")
    settings = parse(["--config", str(recipe), "--optim.lr", "0.06", "--method.symmetric", "true"])
    assert (settings.optim.lr, settings.optim.epochs, settings.model.arch) == (0.06, 7, "resnet18")
    assert settings.method.symmetric


def test_the_command_line_wins_wherever_the_recipe_stands(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lr: 0.5, epochs: 7}")
    for arguments in (["--optim.lr", "0.06", "--config", str(recipe)], ["--optim.lr=0.06", f"--config={recipe}"]):
        assert (parse(arguments).optim.lr, parse(arguments).optim.epochs) == (0.06, 7)


def test_precision_no_is_what_yaml_takes_for_false(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("precision: no\n")
    assert parse(["--config", str(tmp_path / "r.yaml")]).precision == "no"


def test_written_settings_are_complete_and_read_back_equal(tmp_path: Path) -> None:
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
        (["--compile", "1"], "compile '1'", "true or false"),
        (["--data.sizes", "32,32"], "data.sizes '32,32'", "a list such as [160, 224]"),
        (["--data.batch", "abc"], "data.batch 'abc'", "type int"),
        (["--data.batch", "1"], "data.batch 1", "2 or more"),
        (["--data.augmentation", "moco"], "data.augmentation 'moco'", "moco_v2"),
        (["--data.sizes", "[160, 192]"], "data.sizes [160, 192]", "end with data.size 224"),
        (["--data.sizes", "[4, 224]"], "data.sizes [4, 224]", "8 to 1024"),
        (["--data.sizes", "[160, 224]", "--optim.epochs", "1"], "data.sizes [160, 224]", "at most one an epoch"),
        (["--model.arch", "vit_small", "--data.sizes", "[160, 224]"], "data.sizes", "leave it out"),
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
        (["--terms.co2.weigh", "3"], "terms.co2.weigh", "no such setting"),
        (["--terms.co2.weight", "x"], "terms.co2.weight 'x'", "type float"),
        (["--terms.co2.weight", "-1"], "terms.co2.weight -1", "leave the term out"),
        (["--terms.dcl.weight", "0"], "terms.dcl.weight 0", "leave the term out"),
        (["--terms.co2.weight", ".inf"], "terms.co2.weight inf", "finite"),
        (["--terms.co2", "0.5"], "terms.co2 0.5", "{weight: 1}"),
        (["--terms", "{co2: {weight: 1}}"], "terms '{co2: {weight: 1}}'", "[co2, residual]"),
        (["--terms.xmoco.cross", "0", "--terms.xmoco.uniformity", "0"], "terms.xmoco", "both 0"),
        (["--method.temperature", "nan"], "method.temperature", "number"),
        (["--method.queue_size", "1.5"], "method.queue_size '1.5'", "a whole number, or null"),
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
        (["--dry_run"], "dry_run", "--dry-run"),
        (["--gradient-shares", "true"], "gradient-shares", "did you mean gradient_shares"),
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
def test_a_wrong_setting_is_refused_with_key_and_remedy(arguments: list[str], key: str, remedy: str) -> None:
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
    assert parse(["--terms=[co2]", "--terms.co2.temperature", "0.1"]).terms == Terms(co2=CO2(temperature=0.1))
    without = ["--config", str(tmp_path / "map.yaml"), "--terms.co2", "null", "--terms.residual.weight", "2"]
    assert parse(without).terms == Terms(residual=Residual(weight=2))


@pytest.mark.parametrize("name", BASES)
def test_what_is_left_open_is_as_published(name: str) -> None:
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
        (b"terms: {co2: {temperature: null}}", "terms.co2.temperature None: give a value"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "r.yaml").write_bytes(text)
    with pytest.raises(InputError) as refused:
        parse(["--config", str(tmp_path / "r.yaml")])
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    settings = Settings()
    for section in fields(settings):
        value = getattr(settings, section.name)
        names = [f"{section.name}.{f.name}" for f in fields(value)] if is_dataclass(value) else [section.name]
        for name in names:
            after = text.split(f" --{name} ")[-1][:400]
            assert "(type:" in after, name
            assert len(after.split("(type:")[0]) > 10, f"{name} has no help"
