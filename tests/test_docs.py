"""What the documents say is so: commands and settings, snippets, messages, files, links."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import torch

import pipeline.loader
from engine.checkpoint.compatibility import FIXED, FREE
from engine.config.cli import flat
from engine.config.settings import Settings
from methods import registry
from methods.base import Embeddings
from pipeline.prepare import prepare
from tests import documents
from tests.command_lines import LAUNCHERS, commands, options, parser_of, problems, settings
from tests.documents import PACKAGES, ROOT, Line
from tests.methods import formulas, test_losses
from tests.methods.formulas import unit

README, CONTRIBUTING, CHANGELOG = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"
DOCUMENTS = [README, CONTRIBUTING, CHANGELOG]
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
NAMES = {documents.module_of(path) for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]}
COMMENTED = [
    path
    for folder in ("engine/recipes", "engine/launch", "engine/transfer", "benchmarks/studies", "benchmarks/machines")
    for path in sorted((ROOT / folder).iterdir())
    if path.suffix in (".yaml", ".sbatch")
]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def complaints(lines: list[Line]) -> list[str]:
    return [f"{line}: {wrong}" for line in lines for wrong in problems(line)]


# ---- command lines, options, settings ----


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("python -m pipeline.prepare A b.beton --max-side 500", ""),
        ("python -m pipeline.prepare A b.beton --max-sides 500", "no option --max-sides"),
        ("python -m pipeline.prepare A b.beton --max-side", "without its value"),
        ("python -m pipeline.prepare A b.beton --mode png", "mode png"),
        ("python -m pipeline.prepare A b.beton --mode jpg|raw", ""),
        ("python -m pipeline.prepare A b.beton --quality high", "no number"),
        ("python -m pipeline.prepare A", "out is left out"),
        ("python -m pipeline.prepare A ...", ""),
        ("python -m pipeline.prepare A b.beton c.beton", "one too many"),
        ("python -m pipeline.prepares A b.beton", "no module"),
        ("python -m engine.evaluate knn RUN --train A", ""),
        ("python -m engine.evaluate knn RUN", "train is left out"),
        ("python -m engine.evaluate kmeans RUN ...", "kmeans"),
        ("python -m engine.evaluate knn RUN --train A --protocol moco", "no option --protocol"),
        ("python -m benchmarks.step --config R.yaml --runs 3 --optim.lr 0.1", ""),
        ("python -m benchmarks.step --config R.yaml --optim.rate 0.1", "optim.rate"),
        ("python -m benchmarks.step --config engine/recipes/moco_v9.yaml", "moco_v9.yaml does not exist"),
        ("python -m benchmarks.reliability [--quick] [arguments of pytest]", ""),
        ("accelerate launch engine/run.py --data.train F.beton", ""),
        ("accelerate launch engine/run.py --config ... --data.tran F.beton", "data.tran"),
        ("accelerate launch --num_gpus 8 engine/run.py --data.train F.beton", "no option --num_gpus"),
        ("accelerate launch --multi_gpu -m engine.evaluate knn RUN --train A --tran B", "no option --tran"),
        ("accelerate launch --num_processes 8 -m engine.evaluate knn RUN --train A", ""),
        ("accelerate launch engine/train.py", "engine/train.py is not"),
        ("torchrun --nnodes 1:4 engine/run.py --resume auto", ""),
        ("sbatch --nodes 4 engine/launch/slurm.sh", "does not exist"),
        ("ACCELERATE_USE_CPU=true accelerate launch --multi_gpu engine/run.py --seed x", "seed"),
        ("python engine/run.py --model.arch resnet51", "model.arch"),
        ("./millrace demo DATA --minutes 1 && ./millrace doctors", "no doctors"),
        ("./millrace demo DATA --minute 1", "no option --minute"),
        ("python -m pytest -m quick tests/test_docs.py", "no mark quick"),
        ("python -m pytest tests/test_doc.py", "does not exist"),
        ("python -m tests.engine.training.test_golden --all", "takes no --all"),
    ],
)
def test_wrong_command_lines_are_found(call: str, wrong: str) -> None:
    lines = documents.lines_of_text("here", f"    {call}  # remarks")
    assert lines
    found = complaints(lines)
    assert len(found) == bool(wrong), found
    assert all(wrong in one for one in found)


@every_document
def test_command_lines_of_documents_are_right(path: Path) -> None:
    lines = documents.lines_of_markdown(path)
    assert len(lines) >= {README: 20, CONTRIBUTING: 10}.get(path, 0)
    assert not complaints(lines)


def test_command_lines_of_docstrings_are_right() -> None:
    found = [(name_of(path), text) for path in MODULES for text in documents.docstrings(path)]
    lines = [line for where, text in found for line in documents.lines_of_text(where, text)]
    assert len(lines) > 20
    assert not complaints(lines)


@pytest.mark.parametrize("path", COMMENTED, ids=name_of)
def test_command_lines_of_recipes_studies_and_launch_files_are_right(path: Path) -> None:
    lines = documents.lines_of_text(name_of(path), documents.comments(path))
    assert lines or path.parent.name in ("machines", "transfer")
    assert not complaints(lines)


@pytest.mark.parametrize("path", [*DOCUMENTS, *MODULES, *COMMENTED], ids=name_of)
def test_every_module_that_is_said_to_be_run_is_there(path: Path) -> None:
    """In messages and prose, too."""
    text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a message of several lines
    named = re.findall(rf"python\s+-m\s+((?:tests|{'|'.join(PACKAGES)})\.[\w.]*\w)", text)
    assert not set(named) - NAMES


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    found = {f"--{name}" for name in flat(_with_all_terms().as_dict())} | {"--config", "--dry-run", "--terms"}
    parsers = [*LAUNCHERS.values(), *(parser_of(module)[0] for module in commands())]
    return found.union({"--allow-change"}, *(options(parser) for parser in parsers))


def _with_all_terms() -> Settings:
    hints = get_type_hints(registry.Terms).items()
    kinds: dict[str, Any] = {name: next(filter(is_dataclass, get_args(kind))) for name, kind in hints}
    return Settings(terms=registry.Terms(**{name: kind() for name, kind in kinds.items()}))


def _without_example(spans: list[str]) -> list[str]:
    return [span for span in spans if "koleo" not in span]  # CONTRIBUTING's, which is not there yet


@every_document
def test_options_in_running_text_are_known(path: Path, known_options: set[str]) -> None:
    words = [word for span in _without_example(documents.spans(path.read_text())) for word in span.split()]
    named = {word.partition("=")[0].replace("-", "_") for word in words if re.match(r"--\w", word)}
    assert not named - {option.replace("-", "_") for option in known_options}


@every_document
def test_settings_in_running_text_are_known_and_take_their_value(path: Path) -> None:
    known = flat(_with_all_terms().as_dict())
    sections = "|".join(field.name for field in fields(Settings) if is_dataclass(getattr(Settings(), field.name)))
    for span in _without_example(documents.spans(path.read_text())):
        found = re.fullmatch(rf"(?:--)?((?:{sections})\.\w+(?:\.\w+)?)(?: (.+))?", span)
        if found is None or found[1].endswith(".help"):
            continue
        key, value = found.groups()
        assert key in known, span
        if value is not None and not re.search(r"\.\.\.|^[A-Z]+$", value):
            wrong = settings([f"--{key}", value])
            assert not re.search("choose one of|wrong type", " ".join(wrong)), wrong


def test_the_readme_lists_what_a_resume_may_change() -> None:
    rows = re.findall(r"^\| (.+) \| (freely|never|where)\b", README.read_text(), re.MULTILINE)
    listed = {kind: re.findall("`(.+?)`", named) for named, kind in rows}
    assert {kind: sorted(named) for kind, named in listed.items()} == {
        "freely": sorted(FREE),
        "never": sorted(FIXED),
        "where": [],
    }


# ---- snippets ----


def snippet(path: Path, holds: str) -> str:
    found = [body for body in documents.fences(path.read_text(), "python") if holds in body]
    assert len(found) == 1, f"{len(found)} Python snippets of {path.name} with {holds!r}"
    return found[0]


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
def test_the_readmes_loader_gives_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, for one epoch, in smaller batches and views."""
    code = snippet(README, "Loader(")
    said = re.search(r"\[(\d+), 3, (\d+), (\d+)\]", code)
    batch, size = re.findall(r"batch=(\d+)", code), re.findall(r"size=(\d+)", code)
    assert said
    assert [*said.groups()] == [*batch, *size, *size]
    assert '"cuda"' in code
    code = re.sub(r"range\(\d+\)", "range(1)", code.replace('"cuda"', '"cpu"'))
    code = code.replace(f"batch={batch[0]}", "batch=8").replace(f"size={size[0]}", "size=32")
    made: list[pipeline.loader.Loader] = []

    class Recorded(pipeline.loader.Loader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(pipeline.loader, "Loader", Recorded)
    monkeypatch.chdir(tmp_path)
    prepare("synthetic:24", tmp_path / "train.beton", workers=1, quiet=True)
    try:
        names = run(code, README.name, {})
    finally:
        for loader in made:
            loader.close()
    assert len(made) == 1
    assert (names["batch"].epoch, names["batch"].step) == (0, 2)
    assert len(names["batch"].views) == 2
    for view in names["batch"].views:
        assert view.shape == (8, 3, 32, 32)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.mean().abs() < 3
        assert 0.3 < view.std() < 3


def test_the_readmes_losses_add_up_to_their_formulas() -> None:
    code = snippet(README, "from methods.co2 import")
    q1, q2, k1, k2 = (unit(6, 5, seed=seed) for seed in range(4))
    given = {"q1": q1.requires_grad_(), "q2": q2, "k1": k1, "k2": k2, "queue": unit(9, 5, seed=9)}
    loss = run(code, README.name, given | {"info_nce": torch.tensor(1.5, dtype=torch.float64)})["loss"]
    q, a, b, n = (tensor.tolist() for tensor in (q1, k1, k2, given["queue"]))
    expected = 1.5 + 0.3 * formulas.co2(q, b, n, 0.05) + formulas.residual(q, a)
    expected += formulas.cross_mse(q, b) + 0.1 * formulas.uniformity(q, n, 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    loss.backward()
    assert q1.grad is not None


@pytest.fixture
def koleo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """CONTRIBUTING's module."""
    module = ModuleType("methods.koleo")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(snippet(CONTRIBUTING, "@full_precision"), "koleo.py", vars(module))
    return module


@pytest.fixture
def formulas_with_koleo() -> ModuleType:
    module = ModuleType("formulas")
    vars(module).update(vars(formulas))
    run(snippet(CONTRIBUTING, "def koleo("), "formulas.py", vars(module))
    return module


def test_contributings_regularizer_is_a_term_of_every_base(
    koleo: ModuleType, formulas_with_koleo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the registry, with the lines in it that CONTRIBUTING gives."""
    (imported,) = [span for span in documents.spans(CONTRIBUTING.read_text()) if span.startswith("from methods.koleo")]
    source, line = Path(registry.__file__).read_text(), snippet(CONTRIBUTING, "koleo: KoLeo | None")
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


def test_contributings_regularizer_passes_the_tests_of_losses(
    koleo: ModuleType, formulas_with_koleo: ModuleType
) -> None:
    names = vars(test_losses) | {"nearest": koleo.nearest, "formulas": formulas_with_koleo}
    case = eval(f"dict({{{snippet(CONTRIBUTING, 'Case(')}}})", names)["koleo"]
    for batch, dim, length in test_losses.SHAPES:
        test_losses.test_value_equals_the_formula(case, batch, dim, length)
    test_losses.test_gradient_equals_central_differences_of_the_formula(case)
    test_losses.test_gradcheck(case)
    test_losses.test_gradient_reaches_the_queries_and_neither_keys_nor_queue(case)
    test_losses.test_is_computed_in_float32_under_autocast(case)


# ---- messages ----

_OPEN = re.compile(r"\.\.\.|\b[A-Z]+\b|\d+(?:\.\d+)?")


def told() -> list[str]:
    """Return the messages of `README`'s table of troubles."""
    rows = re.findall(r"^\| (.*?) \| ", documents.section(README.read_text(), "Troubleshooting"), re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def pattern(message: str) -> str:
    """Return a regular expression for a message: numbers and words in capitals stand for themselves or for others."""
    ends = [0, *(place.end() for place in _OPEN.finditer(message))]
    places = [*_OPEN.finditer(message), None]
    found = ""
    for end, place in zip(ends, places, strict=True):
        found += re.escape(message[end : place.start() if place else None])
        if place:
            found += ".*?" if place[0] == "..." else f"(?:{re.escape(place[0])}|\0)"
    return found if re.search("[a-z]{2}", _OPEN.sub("", message)) else re.escape(message)


def is_said(message: str, sources: dict[Path, list[str]]) -> bool:
    """Return whether one of the strings has the message, or those of one folder all its parts, two or more of them."""
    wanted = re.compile(pattern(message))
    if any(wanted.search(text) for texts in sources.values() for text in texts):
        return True
    parts = [part.strip(" ():,") for part in _OPEN.split(message)]
    parts = [rf"(?<!\w){re.escape(part)}(?!\w)" for part in parts if len(part) > 2]
    folders = {path.parent for path in sources}
    texts = {
        folder: [text for path in sources if path.parent == folder for text in sources[path]] for folder in folders
    }
    return len(parts) > 1 and any(
        all(any(re.search(part, text) for text in found) for part in parts) for found in texts.values()
    )


@pytest.fixture(scope="module")
def sources() -> dict[Path, list[str]]:
    found = {path: list(documents.messages(path)) for path in MODULES}
    launcher = (ROOT / "millrace").read_text().splitlines()
    return {**found, ROOT / "millrace": [re.sub(r"\$\{?\w+\}?", "\0", line) for line in launcher]}


@pytest.mark.parametrize("message", told())
def test_messages_of_the_table_are_those_of_the_code(message: str, sources: dict[Path, list[str]]) -> None:
    assert is_said(message, sources)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("no batch for 60 s", True),
        ("no batch for 60 minutes", False),
        ("process 3 on HOST: ...", True),
        ("worker 3 on HOST: ...", False),
        ("process 3 (last at step 1200) did not answer within 600 s", True),
        ("process 3 (last at step 1200) did not reply within 600 s", False),
        ("COLLAPSE", True),
        ("COLLAPSED NOW", False),
        ("its manifest ... says", True),
        ("its manifest ... states", False),
        ("FFCV could not be built", True),
        ("FFCV can not be built", False),
        ("Losses, optimizers", False),
    ],
)
def test_other_messages_are_not_found(message: str, said: bool, sources: dict[Path, list[str]]) -> None:
    assert is_said(message, sources) == said


def test_the_table_of_troubles_is_read() -> None:
    assert len(told()) >= 20


# ---- names of files ----


@every_document
def test_files_that_are_named_in_running_text_are_there(path: Path) -> None:
    """Those of the repository: with a folder of its before them; `*` stands for anything, NAME for what may be."""
    for span in _without_example(documents.spans(path.read_text())):
        if re.fullmatch(rf"(?:{'|'.join(PACKAGES)}|tests|\.ci)/[\w./*-]*", span) and "NAME" not in span:
            assert list(ROOT.glob(span.rstrip("/"))), span


# ---- links and the rest ----


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    text = documents.prose(path.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match("https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target.read_text()), link


FORBIDDEN = r"(?<![\w.])/(?:home|root|tmp|work|Users)/|(?<!\w)\.\./|\b(?:TODO|FIXME|XXX|TBD)\b"


@every_document
def test_documents_name_no_place_of_a_machine_and_leave_nothing_open(path: Path) -> None:
    text = path.read_text()
    assert not re.findall(FORBIDDEN, text)
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", documents.prose(text))
    assert not re.findall(r"\b[A-Z]{8,}\b(?!\.)", plain)  # which stand in for a figure


def test_the_version_is_the_same_everywhere() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert re.findall(r"^## \[(.+?)\]", CHANGELOG.read_text(), re.MULTILINE)[0] == version
