"""A base's loss and its terms together: what they need, what they add up to, where their gradient goes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import pytest

from methods.base import Base, CannotCarry, Embeddings, Objective, Part, total
from methods.co2 import CO2
from methods.dcl import DCL
from methods.registry import BASES, Terms, build_objective
from methods.residual import Residual
from methods.xmoco import XMoCo
from tests.methods import formulas
from tests.methods.formulas import unit

T = 0.3
QUEUE = unit(11, 5, seed=77)
ALONE: dict[str, Any] = {
    "co2": CO2(),
    "cross": XMoCo(uniformity=0),
    "cross kl": XMoCo(uniformity=0, form="kl"),
    "uniformity": XMoCo(cross=0),
    "residual": Residual(),
    "dcl": DCL(),
}
CANNOT = {("simclr", "residual"), ("byol", "dcl")}
SYMMETRIC = {f"{name}, symmetric": replace(BASES[name], symmetric=True) for name in ("moco_v1", "moco_v2")}
EVERY_BASE = {name: replace(base, temperature=T) for name, base in {**BASES, **SYMMETRIC}.items()}


def embeddings(base: Base, rows: int = 6) -> Embeddings:
    """Return embeddings as one process has them; queries are leaves with gradient."""
    named = {name: unit(rows, 5, seed=i) for i, name in enumerate(("q1", "q2", "k1", "k2"))}
    named["q1"].requires_grad_()
    named["q2"].requires_grad_()
    if not base.teacher:
        named |= {"k1": named["q1"], "k2": named["q2"]}
    named |= {name.upper(): tensor for name, tensor in named.items()}
    return Embeddings(named, QUEUE if base.queue else None)


def expected(base: Base, e: Embeddings, term: str | None) -> float:
    """Return a base's own loss, or a term of it, by the formulas."""
    v = {name: tensor.tolist() for name, tensor in e.named.items()}
    pairs = ((1, 2), (2, 1)) if base.symmetric else ((1, 2),)
    losses = []
    for a, b in pairs:
        q, k = v[f"q{a}"], v[f"k{b}"]
        negatives, first = (QUEUE.tolist(), None) if base.queue else (v[f"K{b}"], 0)
        one = {
            "co2": lambda q=q, k=k, n=negatives, f=first: formulas.co2(q, k, n, 0.05, f),
            "cross": lambda q=q, k=k: formulas.cross_mse(q, k),
            "cross kl": lambda q=q, k=k: formulas.cross_kl(q, k, 0.2),
            "uniformity": lambda q=q, b=b: formulas.uniformity(q, v[f"K{b}"], 0.2, 0),
            "residual": lambda q=q, a=a: formulas.residual(q, v[f"k{a}"]),
            "dcl": lambda q=q, k=k, n=negatives, f=first, a=a: formulas.dcl(
                q, k, n, T, f, None if base.teacher else v[f"Q{a}"]
            ),
            "moco": lambda q=q, k=k: formulas.info_nce(q, k, QUEUE.tolist(), T),
            "moco_v3": lambda q=q, k=k: formulas.in_batch(q, k, T),
            "byol": lambda q=q, k=k: formulas.byol(q, k),
            "simclr": lambda: formulas.nt_xent(v["q1"], v["q2"], T),
        }
        losses.append(one[term or ("moco" if base.queue else base.name)]())
    mean = sum(losses) / len(losses)
    if term is None:  # MoCo v3 and BYOL add both views' losses, MoCo v3 with a factor of 2 t
        return {"moco_v3": 2 * T * 2 * mean, "byol": 2 * mean}.get(base.name, mean)
    return mean


@pytest.mark.parametrize("name", EVERY_BASE)
def test_a_bases_loss_is_the_papers(name: str) -> None:
    base = EVERY_BASE[name]
    e = embeddings(base)
    parts = build_objective(base, Terms())(e)
    assert total(parts).item() == pytest.approx(expected(base, e, None), abs=1e-10)


@pytest.mark.parametrize(
    ("name", "term"), [pair for pair in product(EVERY_BASE, ALONE) if (pair[0].split(",")[0], pair[1]) not in CANNOT]
)
def test_a_terms_value_is_the_papers_and_its_gradient_reaches_the_queries_alone(name: str, term: str) -> None:
    base = EVERY_BASE[name]
    e = embeddings(base)
    others = [tensor for key, tensor in e.named.items() if key[0] in "kK" and base.teacher]
    parts = ALONE[term](e, base)
    (part,) = parts.values()
    assert part.value.item() == pytest.approx(expected(base, e, term), abs=1e-10)
    part.value.backward()
    queries = [e[f"q{a}"] for a, _ in base.pairs]
    assert all(q.grad is not None and q.grad.abs().max() > 1e-6 for q in queries)
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in [*others, QUEUE])


@pytest.mark.parametrize(
    ("name", "term", "needs"),
    [
        ("moco_v2", None, {"q1", "k2"}),
        ("moco_v2, symmetric", None, {"q1", "q2", "k1", "k2"}),
        ("moco_v3", None, {"q1", "q2", "K1", "K2"}),
        ("simclr", None, {"q1", "q2", "Q1", "Q2"}),
        ("byol", None, {"q1", "q2", "k1", "k2"}),
        ("moco_v2", "co2", {"q1", "k2"}),
        ("moco_v2", "residual", {"q1", "k1", "k2"}),
        ("moco_v2", "cross", {"q1", "k2", "Q1", "K2"}),
        ("moco_v2", "uniformity", {"q1", "k2", "K2"}),
        ("moco_v3", "residual", {"q1", "q2", "k1", "k2", "K1", "K2"}),
        ("byol", "co2", {"q1", "q2", "k1", "k2", "K1", "K2"}),
    ],
)
def test_what_is_needed_is_what_is_used(name: str, term: str | None, needs: set[str]) -> None:
    base = EVERY_BASE[name]
    field = {"cross": "xmoco", "uniformity": "xmoco"}.get(term or "", term)
    objective = build_objective(base, Terms(**({field: ALONE[term]} if field and term else {})))
    assert objective.needs == needs
    e = embeddings(base)
    objective(Embeddings({key: e[key] for key in needs}, e.queue))  # raises KeyError for one that was not asked for


def test_every_part_is_weighted_and_a_weight_of_zero_leaves_a_part_out() -> None:
    base = EVERY_BASE["moco_v2"]
    e = embeddings(base)
    terms = Terms(co2=CO2(weight=3), xmoco=XMoCo(cross=5, uniformity=7), residual=Residual(weight=2))
    parts = build_objective(base, terms)(e)
    assert list(parts) == ["info_nce", "co2", "xmoco_cross", "xmoco_uniformity", "residual"]
    whole = sum(
        weight * expected(base, e, term)
        for weight, term in ((1, None), (3, "co2"), (5, "cross"), (7, "uniformity"), (2, "residual"))
    )
    assert total(parts).item() == pytest.approx(whole, abs=1e-9)
    assert list(build_objective(base, Terms(xmoco=XMoCo(cross=0)))(e)) == ["info_nce", "xmoco_uniformity"]


def test_uniformity_over_the_queue_is_a_choice_where_there_is_one() -> None:
    base = BASES["moco_v2"]
    term = XMoCo(cross=0, negatives="queue")
    e = embeddings(base)
    value = term(e, base)["xmoco_uniformity"].value.item()
    assert value == pytest.approx(formulas.uniformity(e["q1"].tolist(), QUEUE.tolist(), 0.2), abs=1e-10)
    assert term.needs(base) == {"q1"}
    with pytest.raises(CannotCarry, match="byol has no queue"):
        term.needs(BASES["byol"])


def test_dcl_has_the_bases_temperature_unless_it_is_given_one() -> None:
    base = EVERY_BASE["moco_v2"]
    e = embeddings(base)
    q, k = e["q1"].tolist(), e["k2"].tolist()
    for term, t in ((DCL(), T), (DCL(temperature=0.7), 0.7)):
        assert term(e, base)["dcl"].value.item() == pytest.approx(formulas.dcl(q, k, QUEUE.tolist(), t), abs=1e-10)


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "moco_v3", "simclr"])
def test_dcl_takes_the_place_of_the_bases_own_loss(name: str) -> None:
    base = BASES[name]
    assert list(build_objective(base, Terms(dcl=DCL(), co2=CO2()))(embeddings(base))) == ["co2", "dcl"]


def test_two_terms_that_replace_the_loss_are_refused() -> None:
    @dataclass(frozen=True)
    class Other:
        replaces: ClassVar[bool] = True

        def needs(self, base: Base) -> frozenset[str]:
            return frozenset({"q1"})

        def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
            return {}

    base = BASES["moco_v2"]
    with pytest.raises(CannotCarry, match="dcl and other: both replace"):
        Objective(base, base.loss(), {"dcl": DCL(), "other": Other()})
