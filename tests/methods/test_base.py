"""Base losses and terms together: needed embeddings, values, weights, where gradient flows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import pytest

from methods.base import Base, Embeddings, IncompatibleTerm, Objective, Part, total
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
INCOMPATIBLE = {("simclr", "residual"), ("byol", "dcl")}
SYMMETRIC = {f"{name}, symmetric": replace(BASES[name], symmetric=True) for name in ("moco_v1", "moco_v2")}
EVERY_BASE = {name: replace(base, temperature=T) for name, base in {**BASES, **SYMMETRIC}.items()}


def embeddings(base: Base, rows: int = 6) -> Embeddings:
    """Return the embeddings of a single rank; queries are leaves with gradient."""
    named = {name: unit(rows, 5, seed=i) for i, name in enumerate(("q1", "q2", "k1", "k2"))}
    named["q1"].requires_grad_()
    named["q2"].requires_grad_()
    if not base.momentum_encoder:
        named |= {"k1": named["q1"], "k2": named["q2"]}
    named |= {name.upper(): tensor for name, tensor in named.items()}
    return Embeddings(named, QUEUE if base.queue else None)


def expected(base: Base, e: Embeddings, term: str | None) -> float:
    """Return a base's own loss, or a term on it, by the formulas."""
    v = {name: tensor.tolist() for name, tensor in e.named.items()}
    pairs = ((1, 2), (2, 1)) if base.symmetric else ((1, 2),)
    losses = []
    for a, b in pairs:
        q, k = v[f"q{a}"], v[f"k{b}"]
        negatives, offset = (QUEUE.tolist(), None) if base.queue else (v[f"K{b}"], 0)
        losses_by_name = {
            "co2": lambda q=q, k=k, n=negatives, o=offset: formulas.co2(q, k, n, 0.05, o),
            "cross": lambda q=q, k=k: formulas.cross_mse(q, k),
            "cross kl": lambda q=q, k=k: formulas.cross_kl(q, k, 0.2),
            "uniformity": lambda q=q, b=b: formulas.uniformity(q, v[f"K{b}"], 0.2, 0),
            "residual": lambda q=q, a=a: formulas.residual(q, v[f"k{a}"]),
            "dcl": lambda q=q, k=k, n=negatives, o=offset, a=a: formulas.dcl(
                q, k, n, T, o, None if base.momentum_encoder else v[f"Q{a}"]
            ),
            "moco": lambda q=q, k=k: formulas.info_nce(q, k, QUEUE.tolist(), T),
            "moco_v3": lambda q=q, k=k: formulas.in_batch(q, k, T),
            "byol": lambda q=q, k=k: formulas.byol(q, k),
            "simclr": lambda: formulas.nt_xent(v["q1"], v["q2"], T),
        }
        losses.append(losses_by_name[term or ("moco" if base.queue else base.name)]())
    mean = sum(losses) / len(losses)
    if term is None:  # MoCo v3 and BYOL sum over views, MoCo v3 with a factor of 2 t
        return {"moco_v3": 2 * T * 2 * mean, "byol": 2 * mean}.get(base.name, mean)
    return mean


@pytest.mark.parametrize("name", EVERY_BASE)
def test_base_loss_equals_the_formula(name: str) -> None:
    base = EVERY_BASE[name]
    e = embeddings(base)
    parts = build_objective(base, Terms())(e)
    assert total(parts).item() == pytest.approx(expected(base, e, None), abs=1e-10)


@pytest.mark.parametrize(
    ("name", "term"),
    [(name, term) for name, term in product(EVERY_BASE, ALONE) if (name.split(",")[0], term) not in INCOMPATIBLE],
)
def test_term_equals_the_formula_with_gradient_to_queries_alone(name: str, term: str) -> None:
    base = EVERY_BASE[name]
    e = embeddings(base)
    others = [tensor for key, tensor in e.named.items() if key[0] in "kK" and base.momentum_encoder]
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
def test_needs_are_the_embeddings_read(name: str, term: str | None, needs: set[str]) -> None:
    base = EVERY_BASE[name]
    field = {"cross": "xmoco", "uniformity": "xmoco"}.get(term or "", term)
    objective = build_objective(base, Terms(**({field: ALONE[term]} if field and term else {})))
    assert objective.needs == needs
    e = embeddings(base)
    objective(Embeddings({key: e[key] for key in needs}, e.queue))  # raises KeyError for any other


def test_parts_are_weighted_and_zero_leaves_one_out() -> None:
    base = EVERY_BASE["moco_v2"]
    e = embeddings(base)
    terms = Terms(co2=CO2(weight=3), xmoco=XMoCo(cross=5, uniformity=7), residual=Residual(weight=2))
    parts = build_objective(base, terms)(e)
    assert list(parts) == ["info_nce", "co2", "xmoco_cross", "xmoco_uniformity", "residual"]
    loss = sum(
        weight * expected(base, e, term)
        for weight, term in ((1, None), (3, "co2"), (5, "cross"), (7, "uniformity"), (2, "residual"))
    )
    assert total(parts).item() == pytest.approx(loss, abs=1e-9)
    assert list(build_objective(base, Terms(xmoco=XMoCo(cross=0)))(e)) == ["info_nce", "xmoco_uniformity"]


def test_objective_rejects_two_terms_that_replace_the_loss() -> None:
    @dataclass(frozen=True)
    class Other:
        replaces: ClassVar[bool] = True

        def needs(self, base: Base) -> frozenset[str]:
            return frozenset({"q1"})

        def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
            return {}

    base = BASES["moco_v2"]
    with pytest.raises(IncompatibleTerm, match="dcl and other: both replace"):
        Objective(base, base.loss(), {"dcl": DCL(), "other": Other()})
