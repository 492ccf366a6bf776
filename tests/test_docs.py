"""The documents: commands and settings, snippets, messages, files and links are right."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import torch
from PIL import Image

import pipeline.loader
from engine.checkpoint.compatibility import FIXED, FREE
from engine.config import cli
from engine.config.cli import flat
from engine.config.settings import Knn, Method, Model, Settings
from methods import registry
from methods.base import Embeddings
from pipeline.prepare import prepare
from pipeline.views import VIEW_KEYS
from tests import documents
from tests.command_lines import LAUNCHERS, commands, options, parser_of, problems, settings
from tests.documents import DOCUMENTS, PACKAGES, ROOT, Line, name_of, snippet
from tests.methods import formulas, test_losses
from tests.methods.formulas import unit
from tests.side_files import copy_side_files

MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
NAMES = {documents.module_of(path) for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]}
COMMENTED = [
    path
    for folder in ("engine/recipes", "engine/launch", "engine/transfer", "benchmarks/studies", "benchmarks/machines")
    for path in sorted((ROOT / folder).iterdir())
    if path.suffix in (".yaml", ".sbatch")
]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


def complaints(lines: list[Line]) -> list[str]:
    return [f"{line}: {problem}" for line in lines for problem in problems(line)]


# ---- command lines, options, settings ----


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("python -m pipeline.prepare A b.beton --max-side 500", ""),
        ("python -m pipeline.prepare A b.beton --max-sides 500", "has no option --max-sides"),
        ("python -m pipeline.prepare A b.beton --max-side", "expected one argument"),
        ("python -m pipeline.prepare A b.beton --mode png", "invalid choice: 'png'"),
        ("python -m pipeline.prepare A b.beton --mode jpg|raw", ""),
        ("python -m pipeline.prepare A b.beton --quality high", "invalid check value"),
        ("python -m pipeline.prepare A", "required: OUT.beton"),
        ("python -m pipeline.prepare A ...", ""),
        ("python -m engine.export RUN c.beton", "c.beton"),
        ("python -m pipeline.prepares A b.beton", "no module"),
        ("python -m engine.evaluate knn RUN --train A", ""),
        ("python -m engine.evaluate knn RUN", "required: --train"),
        ("python -m engine.evaluate kmeans RUN ...", "kmeans"),
        ("python -m engine.evaluate knn RUN --train A --protocol moco", "has no option --protocol"),
        ("python -m benchmarks.step --config R.yaml --runs 3 --optim.lr 0.1", ""),
        ("python -m benchmarks.step --config R.yaml --optim.rate 0.1", "optim.rate"),
        ("python -m benchmarks.step --config engine/recipes/moco_v9.yaml", "moco_v9.yaml does not exist"),
        ("python -m benchmarks.reliability [--quick] [arguments of pytest]", ""),
        ("accelerate launch engine/run.py --data.train F.beton", ""),
        ("accelerate launch engine/run.py --config ... --data.tran F.beton", "data.tran"),
        ("accelerate launch --num_gpus 8 engine/run.py --data.train F.beton", "has no option --num_gpus"),
        ("accelerate launch --multi_gpu -m engine.evaluate knn RUN --train A --tran B", "has no option --tran"),
        ("accelerate launch --num_processes 8 -m engine.evaluate knn RUN --train A", ""),
        ("accelerate launch engine/train.py", "engine/train.py is not"),
        ("torchrun --nnodes 1:4 engine/run.py --resume auto", ""),
        ("sbatch --nodes 4 engine/launch/slurm.sh", "does not exist"),
        ("ACCELERATE_USE_CPU=true accelerate launch --multi_gpu engine/run.py --seed x", "seed"),
        ("python engine/run.py --model.arch resnet51", "model.arch"),
        ("./millrace demo DATA --minutes 1 && ./millrace doctors", "no doctors"),
        ("./millrace demo DATA --minute 1", "has no option --minute"),
        ("python -m pytest -m quick tests/test_docs.py", "no mark quick"),
        ("python -m pytest tests/test_doc.py", "does not exist"),
        ("python -m tests.engine.training.test_golden --all", "takes no --all"),
    ],
)
def test_wrong_command_lines_are_found(call: str, problem: str) -> None:
    lines = documents.lines_of_text("here", f"    {call}  # remarks")
    assert lines
    errors = complaints(lines)
    assert len(errors) == bool(problem), errors
    assert all(problem in error for error in errors)


@every_document
def test_command_lines_of_documents(path: Path) -> None:
    assert not complaints(documents.lines_of_markdown(path))


def test_command_lines_of_docstrings() -> None:
    texts = [(name_of(path), text) for path in MODULES for text in documents.docstrings(path)]
    lines = [line for where, text in texts for line in documents.lines_of_text(where, text)]
    assert len(lines) > 20
    assert not complaints(lines)


@pytest.mark.parametrize("path", COMMENTED, ids=name_of)
def test_command_lines_of_recipes_studies_and_launch_files(path: Path) -> None:
    lines = documents.lines_of_text(name_of(path), documents.comments(path))
    assert lines or path.parent.name in ("machines", "transfer")
    assert not complaints(lines)


@pytest.mark.parametrize("path", [*DOCUMENTS, *MODULES, *COMMENTED], ids=name_of)
def test_modules_to_run_exist(path: Path) -> None:
    """Messages and prose name modules, too."""
    text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # joins a message of several lines
    named = re.findall(rf"python\s+-m\s+((?:tests|{'|'.join(PACKAGES)})\.[\w.]*\w)", text)
    assert not set(named) - NAMES


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    names = {f"--{name}" for name in flat(_with_all_terms().as_dict())}
    names |= {f"--terms.{term}.help" for term in get_type_hints(registry.Terms)}
    parsers = [*(launcher() for launcher in LAUNCHERS.values()), *(parser_of(module) for module in commands())]
    names = names.union(
        ["--config", "--dry-run", "--terms", "--allow-change", "--system", "--trust-recipe"], *map(options, parsers)
    )
    return set(map(hyphenated_option, names))


def hyphenated_option(name: str) -> str:
    """Return an option with hyphens for underscores, and without the `no` of a boolean."""
    return name.replace("_", "-").replace("--no-", "--")


def _with_all_terms() -> Settings:
    hints = get_type_hints(registry.Terms).items()
    kinds: dict[str, Any] = {name: next(filter(is_dataclass, get_args(kind))) for name, kind in hints}
    return Settings(terms=registry.Terms(**{name: kind() for name, kind in kinds.items()}))


def _without_example(spans: list[str]) -> list[str]:
    return [span for span in spans if "koleo" not in span]  # the example of a new term


@every_document
def test_options_in_prose_exist(path: Path, known_options: set[str]) -> None:
    words = [word for span in _without_example(documents.spans(DOCUMENTS[path])) for word in span.split()]
    named = {hyphenated_option(word.partition("=")[0]) for word in words if re.match(r"--\w", word)}
    assert named - known_options == set()


def shown_texts(path: Path) -> list[str]:
    """Return the text of a document or script; of a module, docstrings and messages of several words."""
    if path.suffix != ".py":
        return [path.read_text()]
    return documents.docstrings(path) + [text for text in documents.messages(path) if " " in text]


@pytest.fixture(scope="module")
def launcher_options() -> set[str]:
    return set().union(*(options(launcher()) for launcher in LAUNCHERS.values()))


@pytest.mark.parametrize("path", [*DOCUMENTS, *MODULES, *COMMENTED], ids=name_of)
def test_options_are_written_with_hyphens(path: Path, launcher_options: set[str]) -> None:
    """Launchers have their own style."""
    words = [word for text in shown_texts(path) for word in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)]
    assert not {word for word in words if "_" in word} - launcher_options


@every_document
def test_settings_in_prose_exist_and_take_their_value(path: Path) -> None:
    known = flat(_with_all_terms().as_dict())
    sections = "|".join(field.name for field in fields(Settings) if is_dataclass(getattr(Settings(), field.name)))
    for span in _without_example(documents.spans(DOCUMENTS[path])):
        match = re.fullmatch(rf"(?:--)?((?:{sections})\.\w+(?:\.\w+)?)(?: (.+))?", span)
        if match is None or match[1].endswith(".help"):
            continue
        key, value = match.groups()
        assert key in known, span
        if value is not None and not re.search(r"\.\.\.|^[A-Z]+$", value):
            errors = settings([f"--{key}", value])
            assert not re.search("choose one of|wrong type", " ".join(errors)), errors


def test_the_table_of_changes_on_resume_is_complete() -> None:
    rows = re.findall(r"^\| (.+) \| (freely|never|where)\b", "\n".join(DOCUMENTS.values()), re.MULTILINE)
    listed = {kind: sorted(re.findall("`(.+?)`", names)) for names, kind in rows}
    assert listed == {"freely": sorted(FREE), "never": sorted(FIXED), "where": []}


def test_the_example_of_views_is_valid_and_its_table_complete(tmp_path: Path) -> None:
    text = documents.section("Your own views")
    (example,) = documents.fences(text, "yaml")
    (tmp_path / "r.yaml").write_text(example)
    first, second = cli.parse(["--config", str(tmp_path / "r.yaml")]).data.augmentations
    assert (first.vflip, first.gray_p, first.hue, second.brightness) == (0.5, 0, 0, 0.8)
    rows = re.findall(r"^\| (`.+?) \| .+? \| (`.+?) \|", text, re.MULTILINE)
    assert {key for row in rows for cell in row for key in re.findall("`(.+?)`", cell)} == set(VIEW_KEYS)


# ---- snippets ----


def run(code: str, where: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, where, "exec"), names)
    return names


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_loader_snippet_yields_the_documented_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on the CPU, for one epoch, in smaller batches and views."""
    code = snippet("Loader(Beton")
    shape = re.search(r"\[(\d+), 3, (\d+), (\d+)\]", code)
    batch, size = re.findall(r"batch=(\d+)", code), re.findall(r"size=(\d+)", code)
    assert shape
    assert [*shape.groups()] == [*batch, *size, *size]
    assert '"cuda"' in code
    code = re.sub(r"range\(\d+\)", "range(1)", code.replace('"cuda"', '"cpu"'))
    code = code.replace(f"batch={batch[0]}", "batch=8").replace(f"size={size[0]}", "size=32")
    loaders: list[pipeline.loader.Loader] = []

    class Recorded(pipeline.loader.Loader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            loaders.append(self)

    monkeypatch.setattr(pipeline.loader, "Loader", Recorded)
    monkeypatch.chdir(tmp_path)
    prepare("synthetic:24", tmp_path / "train.beton", workers=1, quiet=True)
    try:
        names = run(code, "snippet", {})
    finally:
        for loader in loaders:
            loader.close()
    assert len(loaders) == 1
    assert (names["batch"].epoch, names["batch"].step) == (0, 2)
    assert len(names["batch"].views) == 2
    for view in names["batch"].views:
        assert view.shape == (8, 3, 32, 32)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.mean().abs() < 3
        assert 0.3 < view.std() < 3


@pytest.mark.usefixtures("one_thread")
def test_the_pretraining_snippet_trains_and_its_encoder_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small encoder, for one epoch."""
    monkeypatch.chdir(tmp_path)
    prepare("synthetic:40", tmp_path / "train.beton", workers=1, quiet=True)
    shutil.copy("train.beton", "val.beton")
    copy_side_files(Path("train.beton"), Path("val.beton"))
    small: dict[str, Any] = {"method": Method(queue_size=32), "knn": Knn(k=5), "precision": "no", "cpu": True}
    small |= {"model": Model(arch="resnet10", stem="small", width=0.125), "tracker": "none"}
    monkeypatch.setattr("engine.config.settings.Settings", lambda **given: Settings(**{**small, **given}))
    code = (
        snippet("pretrain(settings")
        .replace("epochs=100", "epochs=1")
        .replace('eval="val.beton"', 'eval="val.beton", batch=16, size=16')
    )
    summary = run(code, "snippet", {"__name__": "snippet"})["summary"]
    assert f"step 2: kNN top-1 {summary['knn_top1']:.1%}" in capsys.readouterr().out
    Image.new("RGB", (50, 40)).save("photo.jpg")
    names = run(snippet("load_encoder("), "snippet", {})
    assert names["features"].shape == (1, names["encoder"].backbone.features)


def test_the_losses_snippet_equals_the_formulas() -> None:
    code = snippet("from methods.co2 import")
    q1, q2, k1, k2 = (unit(6, 5, seed=seed) for seed in range(4))
    names = {"q1": q1.requires_grad_(), "q2": q2, "k1": k1, "k2": k2, "queue": unit(9, 5, seed=9)}
    loss = run(code, "snippet", names)["loss"]
    q, a, b, n = (tensor.tolist() for tensor in (q1, k1, k2, names["queue"]))
    expected = formulas.info_nce(q, b, n, 0.2) + 0.3 * formulas.co2(q, b, n, 0.05) + formulas.residual(q, a)
    expected += formulas.cross_mse(q, b) + 0.1 * formulas.uniformity(q, n, 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    loss.backward()
    assert q1.grad is not None


@pytest.fixture
def koleo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example of a new term, as a module."""
    module = ModuleType("methods.koleo")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(snippet("@full_precision"), "koleo.py", vars(module))
    return module


@pytest.fixture
def formulas_with_koleo() -> ModuleType:
    module = ModuleType("formulas")
    vars(module).update(vars(formulas))
    run(snippet("def koleo("), "formulas.py", vars(module))
    return module


def test_the_example_is_a_term_of_every_base(
    koleo: ModuleType, formulas_with_koleo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented lines are added to the registry."""
    spans = [span for text in DOCUMENTS.values() for span in documents.spans(text)]
    (imported,) = [span for span in spans if span.startswith("from methods.koleo")]
    source, line = Path(registry.__file__).read_text(), snippet("koleo: KoLeo | None")
    end = source.index("\n\n\ndef build_objective")
    source = source[:end] + "\n" + line + source[end:]
    source = source.replace("\nfrom methods.norm import", f"\n{imported}\nfrom methods.norm import")
    module = ModuleType("registry_with_koleo")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(source, "registry.py", vars(module))
    named = {name: unit(6, 5, seed=seed) for seed, name in enumerate(("q1", "q2", "k1", "k2"))}
    e = Embeddings(named | {name.upper(): tensor for name, tensor in named.items()}, unit(7, 5, seed=9))
    for base in module.BASES.values():
        part = module.build_objective(base, module.Terms(koleo=koleo.KoLeo(weight=2.0)))(e)["koleo"]
        losses = [formulas_with_koleo.koleo(named[f"q{a}"].tolist()) for a, _ in base.pairs]
        assert part.weight == 2
        assert part.value.item() == pytest.approx(math.fsum(losses) / len(losses), abs=1e-10)


def test_the_example_passes_the_tests_of_losses(koleo: ModuleType, formulas_with_koleo: ModuleType) -> None:
    names = vars(test_losses) | {"nearest": koleo.nearest, "formulas": formulas_with_koleo}
    case = eval(f"dict({{{snippet('Case(')}}})", names)["koleo"]
    for batch, dim, length in test_losses.SHAPES:
        test_losses.test_value_equals_the_formula(case, batch, dim, length)
    test_losses.test_gradient_equals_central_differences_of_the_formula(case)
    test_losses.test_gradcheck(case)
    test_losses.test_gradient_reaches_queries_but_neither_keys_nor_queue(case)
    test_losses.test_loss_is_float32_under_autocast(case)


# ---- messages ----

_PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z]+\b|\d+(?:\.\d+)?")


def table_messages() -> list[str]:
    """Return the messages of the troubleshooting table."""
    rows = re.findall(r"^\| (.*?) \| ", documents.section("Troubleshooting"), re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def pattern(message: str) -> str:
    """Return a regular expression for a message, in which numbers and words in capitals may be formatted values."""
    if not re.search("[a-z]{2}", _PLACEHOLDER.sub("", message)):
        return re.escape(message)
    result, end = "", 0
    for match in _PLACEHOLDER.finditer(message):
        result += re.escape(message[end : match.start()])
        result += ".*?" if match[0] == "..." else f"(?:{re.escape(match[0])}|\0)"
        end = match.end()
    return result + re.escape(message[end:])


def is_in_code(message: str, sources: dict[Path, list[str]]) -> bool:
    """Return whether one string has the message, or the strings of one folder have its two or more pieces."""
    whole = re.compile(pattern(message))
    if any(whole.search(text) for texts in sources.values() for text in texts):
        return True
    pieces = [piece.strip(" ():,") for piece in _PLACEHOLDER.split(message)]
    pieces = [rf"(?<!\w){re.escape(piece)}(?!\w)" for piece in pieces if len(piece) > 2]
    return len(pieces) > 1 and any(
        all(any(re.search(piece, text) for text in texts) for piece in pieces) for texts in sources.values()
    )


@pytest.fixture(scope="module")
def sources() -> dict[Path, list[str]]:
    """Strings of the code by folder."""
    by_folder: dict[Path, list[str]] = {ROOT: []}
    for path in MODULES:
        by_folder.setdefault(path.parent, []).extend(documents.messages(path))
    for row in (ROOT / "millrace").read_text().splitlines():
        by_folder[ROOT].append(re.sub(r"\$\{?\w+\}?", "\0", row))
    return by_folder


@pytest.mark.parametrize("message", table_messages())
def test_messages_of_the_troubleshooting_table_are_in_the_code(message: str, sources: dict[Path, list[str]]) -> None:
    assert is_in_code(message, sources)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no batch for 60 s", True),
        ("no batch for 60 minutes", False),
        ("COLLAPSE", True),
        ("COLLAPSED NOW", False),
        ("its manifest ... says", True),
        ("its manifest ... states", False),
        ("FFCV could not be built", True),
        ("FFCV can not be built", False),
    ],
)
def test_other_messages_are_not_in_the_code(message: str, expected: bool, sources: dict[Path, list[str]]) -> None:
    assert is_in_code(message, sources) == expected


# ---- files, links, versions ----


@every_document
def test_files_named_in_prose_exist(path: Path) -> None:
    """Paths from the project's root; `*` is a wildcard, NAME a placeholder."""
    for span in _without_example(documents.spans(DOCUMENTS[path])):
        if re.fullmatch(rf"(?:{'|'.join(PACKAGES)}|tests|\.ci)/[\w./*-]*", span) and "NAME" not in span:
            assert list(ROOT.glob(span.rstrip("/"))), span


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    text = documents.prose(DOCUMENTS[path])
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match("https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target.read_text()), link


def test_the_version_is_the_same_everywhere() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
