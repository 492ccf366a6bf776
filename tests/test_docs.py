"""What the documents say is so: commands and settings, snippets, messages, files, links."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.arguments import flat
from engine.config import Settings
from methods import registry
from methods.base import total
from pipeline.loader import Loader
from pipeline.prepare import prepare
from tests import documents
from tests.command_lines import LAUNCHERS, commands, options, parser_of, problems, settings
from tests.documents import PACKAGES, ROOT, Line
from tests.methods import formulas, test_losses
from tests.methods.formulas import unit

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCUMENTS = [README, CONTRIBUTING, ROOT / "CHANGELOG.md"]
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
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


# ---- command lines ----


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("python -m pipeline.prepare A b.beton --max-side 500", ""),
        ("python -m pipeline.prepare A b.beton --max-sides 500", "no option --max-sides"),
        ("python -m pipeline.prepare A b.beton --mode png", "mode png"),
        ("python -m pipeline.prepare A b.beton --mode jpg|raw", ""),
        ("python -m pipeline.prepare A b.beton --quality high", "no number"),
        ("python -m pipeline.prepare A", "out is left out"),
        ("python -m pipeline.prepare A ...", ""),
        ("python -m pipeline.prepare A b.beton c.beton", "one too many"),
        ("python -m pipeline.prepares A b.beton", "no module"),
        ("python -m engine.evaluate knn RUN --train A", ""),
        ("python -m engine.evaluate knn RUN", "train is left out"),
        ("python -m engine.evaluate kmeans RUN --train A", "kmeans"),
        ("python -m engine.evaluate knn RUN --train A --protocol moco", "no option --protocol"),
        ("python -m benchmarks.step --config R.yaml --runs 3 --optim.lr 0.1", ""),
        ("python -m benchmarks.step --config R.yaml --optim.rate 0.1", "optim.rate"),
        ("python -m benchmarks.step --config engine/recipes/moco_v9.yaml", "moco_v9.yaml does not exist"),
        ("python -m benchmarks.reliability [--quick] [arguments of pytest]", ""),
        ("accelerate launch engine/run.py --data.train F.beton", ""),
        ("accelerate launch engine/run.py --config ... --data.tran F.beton", "data.tran"),
        ("accelerate launch --num_gpus 8 engine/run.py --data.train F.beton", "no option --num_gpus"),
        ("accelerate launch --multi_gpu -m engine.evaluate knn RUN --tran A", "no option --tran"),
        ("accelerate launch engine/train.py", "engine/train.py is not"),
        ("torchrun --nnodes 1:4 engine/run.py --resume auto", ""),
        ("sbatch --nodes 4 engine/launch/slurm.sh", "does not exist"),
        ("ACCELERATE_USE_CPU=true accelerate launch --multi_gpu engine/run.py --seed x", "seed"),
        ("python engine/run.py --model.arch resnet51", "model.arch"),
        ("./millrace demo DATA --minutes 1 && ./millrace doctors", "no doctors"),
        ("./millrace demo DATA --minute 1", "no option --minute"),
        ("python -m pytest -m quick tests/test_docs.py", "no mark quick"),
        ("python -m pytest tests/test_doc.py", "does not exist"),
        ("python -m tests.engine.test_golden --all", "takes no --all"),
    ],
)
def test_wrong_command_lines_are_found(call: str, wrong: str) -> None:
    lines = documents.lines_of_text("here", f"    {call}  # remarks")
    found = complaints(lines)
    assert lines
    assert len(found) == bool(wrong), found
    assert all(wrong in one for one in found)


@every_document
def test_command_lines_of_documents_are_right(path: Path) -> None:
    lines = documents.lines_of_markdown(path)
    assert len(lines) >= {"README.md": 20, "CONTRIBUTING.md": 10}.get(path.name, 0)
    assert not complaints(lines)


def test_command_lines_of_docstrings_are_right() -> None:
    lines = []
    for path in MODULES:
        for text in documents.docstrings(path):
            lines += documents.lines_of_text(name_of(path), text)
    assert len(lines) > 20
    assert not complaints(lines)


@pytest.mark.parametrize("path", COMMENTED, ids=name_of)
def test_command_lines_of_recipes_studies_and_launch_files_are_right(path: Path) -> None:
    lines = documents.lines_of_text(name_of(path), documents.comments(path))
    assert lines or path.parent.name in ("machines", "transfer")
    assert not complaints(lines)


def test_every_module_that_is_named_to_be_run_is_there() -> None:
    """In messages and prose, too."""
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]}
    for path in [*DOCUMENTS, *MODULES, *COMMENTED]:
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a message of several lines
        named = re.findall(rf"python\s+-m\s+((?:tests|{'|'.join(PACKAGES)})\.[\w.]*\w)", text)
        assert not set(named) - known, name_of(path)


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    found = {f"--{name}" for name in flat(Settings().as_dict())} | {"--config", "--dry-run", "--terms", "--allow-change"}
    parsers = [*LAUNCHERS.values(), *(parser_of(module)[0] for module in commands())]
    return found.union(*(options(parser) for parser in parsers))


@every_document
def test_options_in_running_text_are_known(path: Path, known_options: set[str]) -> None:
    named = {word.partition("=")[0] for span in documents.spans(path.read_text()) for word in span.split()}
    named = {name for name in named if re.fullmatch(r"--\w[\w-]+", name)}
    assert not named - known_options


@every_document
def test_settings_in_running_text_are_known_and_take_their_value(path: Path) -> None:
    sections = "|".join(field.name for field in fields(Settings) if hasattr(getattr(Settings(), field.name), "__dict__"))
    for span in documents.spans(path.read_text()):
        if not (found := re.fullmatch(rf"(?:--)?((?:{sections})\.[\w.]+)(?: (.+))?", span)) or span.endswith(".py"):
            continue
        key, value = found.groups()
        if key.split(".")[1] in ("koleo",):  # CONTRIBUTING's example
            continue
        if value is None or re.search(r"\.\.\.|^[A-Z]+$", value):
            assert key in flat(Settings(terms=_all_terms()).as_dict()), span
        else:
            wrong = settings([f"--{key}", value])
            assert not re.search("no such setting|choose one of|wrong type", " ".join(wrong)), wrong


def _all_terms() -> Any:
    kinds = {"co2": registry.CO2, "xmoco": registry.XMoCo, "residual": registry.Residual, "dcl": registry.DCL}
    return registry.Terms(**{name: kind() for name, kind in kinds.items()})


# ---- snippets ----


def snippet(text: str, holds: str) -> str:
    found = [body for body in documents.fences(text, "python") if holds in body]
    assert len(found) == 1, f"{len(found)} Python snippets with {holds!r}"
    return found[0]


@pytest.fixture
def of_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_loader_of_the_readme_gives_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_one_thread: None
) -> None:
    """On the CPU, for one epoch, in smaller batches and views."""
    code = snippet(README.read_text(), "Loader(")
    for old, new in (('device="cuda"', 'device="cpu"'), ("range(200)", "range(1)")):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    said = re.search(r"\[(\d+), 3, (\d+), (\d+)\]", code)
    assert said
    assert (said[1], said[2], said[3]) == (*re.findall(r"batch=(\d+)", code), *2 * re.findall(r"size=(\d+)", code))
    code = re.sub(r"batch=\d+", "batch=8", re.sub(r"size=\d+", "size=32", code))
    monkeypatch.chdir(tmp_path)
    prepare("synthetic:24", tmp_path / "train.beton", workers=1, quiet=True)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    loaders = [value for value in names.values() if isinstance(value, Loader)]
    with closing(loaders[0]):
        assert names["epoch"] == 0
        assert names["batch"].step == 2
        for view in (names["first"], names["second"]):
            assert view.shape == (8, 3, 32, 32)
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert 0.3 < view.std() < 3


def test_the_losses_of_the_readme_add_up_to_their_formulas() -> None:
    code = snippet(README.read_text(), "from methods.co2 import")
    q1, q2, k1, k2 = (unit(6, 5, seed=seed) for seed in range(4))
    given = {"q1": q1.requires_grad_(), "q2": q2, "k1": k1, "k2": k2, "queue": unit(9, 5, seed=9)}
    names: dict[str, Any] = given | {"info_nce": torch.tensor(1.5, dtype=torch.float64)}
    exec(compile(code, "README.md", "exec"), names)
    q, a, b, n = (tensor.tolist() for tensor in (q1, k1, k2, given["queue"]))
    parts = [formulas.co2(q, b, n, 0.05), formulas.residual(q, a), formulas.cross_mse(q, b), formulas.uniformity(q, n, 0.2)]
    weights = (0.3, 1, 1, 0.1)
    expected = 1.5 + sum(weight * part for weight, part in zip(weights, parts, strict=True))
    assert names["loss"].item() == pytest.approx(expected, abs=1e-9)
    names["loss"].backward()
    assert q1.grad is not None


@pytest.fixture
def koleo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that CONTRIBUTING writes."""
    module = ModuleType("methods.koleo")
    monkeypatch.setitem(sys.modules, "methods.koleo", module)
    exec(compile(snippet(CONTRIBUTING.read_text(), "@full_precision"), "koleo.py", "exec"), vars(module))
    return module


def test_the_regulariser_of_contributing_is_registered_as_it_says(
    koleo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CONTRIBUTING.read_text()
    (imported,) = [span for span in documents.spans(text) if span.startswith("from methods.koleo")]
    line, source = snippet(text, "koleo: KoLeo | None"), Path(registry.__file__).read_text()
    last = source.index("\n\n\ndef build_objective")
    source = source[:last] + "\n" + line + source[last:]
    source = source.replace("from methods.moco import", f"{imported}\nfrom methods.moco import")
    source = source.replace("from methods.norm import", f"{imported}\nfrom methods.norm import", 1)
    module = ModuleType("registry_with_koleo")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "registry.py", "exec"), vars(module))
    for name, base in module.BASES.items():
        objective = module.build_objective(base, module.Terms(koleo=koleo.KoLeo(weight=2.0)))
        named = {key: unit(6, 5, seed=i) for i, key in enumerate(("q1", "q2", "k1", "k2"))}
        named |= {key.upper(): tensor for key, tensor in named.items()}
        e = module.Embeddings(named, unit(7, 5, seed=9)) if hasattr(module, "Embeddings") else _embeddings(named)
        parts = objective(e)
        queries = [named[f"q{a}"].tolist() for a, _ in base.pairs]
        expected = sum(_namespace(koleo)["koleo"](q) for q in queries) / len(queries)
        assert parts["koleo"].value.item() == pytest.approx(expected, abs=1e-10), name
        assert total({"koleo": parts["koleo"]}).item() == pytest.approx(2 * expected, abs=1e-10)


def _embeddings(named: dict[str, torch.Tensor]) -> Any:
    from methods.base import Embeddings

    return Embeddings(named, unit(7, 5, seed=9))


def _namespace(koleo: ModuleType) -> dict[str, Any]:
    names = {**vars(formulas), "math": math}
    exec(compile(snippet(CONTRIBUTING.read_text(), "def koleo("), "formulas.py", "exec"), names)
    return names


def test_the_regulariser_of_contributing_passes_its_tests(koleo: ModuleType) -> None:
    made = ModuleType("formulas")
    vars(made).update(_namespace(koleo))
    names = {**vars(test_losses), "nearest": koleo.nearest, "formulas": made}
    (case,) = eval("{" + snippet(CONTRIBUTING.read_text(), '"koleo": Case('), names).values()
    for batch, dim, length in test_losses.SHAPES:
        test_losses.test_value_equals_the_formula(case, batch, dim, length)
    test_losses.test_gradient_equals_central_differences_of_the_formula(case)
    test_losses.test_gradcheck(case)
    test_losses.test_gradient_reaches_the_queries_and_neither_keys_nor_queue(case)
    test_losses.test_is_computed_in_float32_under_autocast(case)
