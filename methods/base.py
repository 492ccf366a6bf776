"""Base methods, loss terms, and the objective that combines them.

Embeddings are named by network and view. The views are x1 and x2; q1 and q2 are the online network's embeddings of
them, k1 and k2 the momentum encoder's: [B, C], this rank's samples, rows of norm 1. Q1, Q2, K1, K2 are the same,
gathered from all ranks: [G, C], G = world size x B. Keys have no gradient. A base without a momentum encoder (SimCLR)
uses its queries as keys, with gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from methods.heads import HeadPair


class IncompatibleTerm(ValueError):
    """The base method lacks something that a term needs, or two terms exclude each other: `key value: remedy`.

    key: a term, or its parameter. value: of the parameter.
    """

    def __init__(self, key: str, remedy: str, value: str = "") -> None:
        super().__init__(f"{key} {value}: {remedy}" if value else f"{key}: {remedy}")
        self.key, self.value, self.remedy = key, value, remedy


class Part(NamedTuple):
    """A summand of the loss."""

    weight: float
    value: torch.Tensor
    """Scalar, unweighted."""


@dataclass(frozen=True)
class Base:
    """A base method: heads, loss, properties, published settings."""

    name: str
    heads: Callable[..., HeadPair]
    """(features, mlp_dim, dim, norm, transformer) to projector and predictor."""
    loss: Callable[[], "Term"]
    symmetric: bool
    """Both views serve as queries."""
    queue: bool = False
    """Negatives are a queue of keys; otherwise the other samples' keys of the global batch."""
    momentum_encoder: bool = True
    contrastive: bool = True
    """The base's own loss has negatives."""
    joint: bool = False
    """All views pass the encoder as one batch."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Published values of settings by dotted name, used where the user sets none."""
    temperature: float = 1.0
    """Softmax temperature of the base's own loss."""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(query view, key view) of each summand of the loss."""
        return ((1, 2), (2, 1)) if self.symmetric else ((1, 2),)


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a step, by name."""

    named: Mapping[str, torch.Tensor]
    queue: torch.Tensor | None = None
    """Keys of earlier steps, [K, C]."""
    offset: int = 0
    """Row of this rank's first sample in gathered embeddings."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.named[name]

    def negatives(self, view: int) -> tuple[torch.Tensor, int | None]:
        """Return the negatives [N, C] of a query whose key is of `view`, and the row of this rank's first own key.

        With a queue the row is None: no sample's own key is in it.
        """
        return (self[f"K{view}"], self.offset) if self.queue is None else (self.queue, None)


class Term(Protocol):
    """A loss: the base's own, or a regularizer."""

    def needs(self, base: Base) -> frozenset[str]:
        """Return the names of the embeddings it reads. Raises IncompatibleTerm."""

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        """Return its parts by their names in the metrics."""


def needs_of(base: Base, kinds: str) -> frozenset[str]:
    """Return the embeddings of these kinds over the base's pairs: q, Q of the query view and k, K of the key view."""
    return frozenset(f"{kind}{a if kind in 'qQ' else b}" for a, b in base.pairs for kind in kinds)


def needs_with_negatives(base: Base) -> frozenset[str]:
    """Return queries and keys and, for a base without a queue, the gathered keys."""
    return needs_of(base, "qk" if base.queue else "qkK")


class Objective:
    """A base's loss plus regularizers; one term may replace the base's own loss. Raises IncompatibleTerm."""

    def __init__(self, base: Base, loss: Term, terms: Mapping[str, Term]) -> None:
        replacing = [name for name, term in terms.items() if getattr(term, "replaces", False)]
        if len(replacing) > 1:
            raise IncompatibleTerm(" and ".join(replacing), "both replace the base's own loss: choose one")
        self.base = base
        self.terms = [*([] if replacing else [loss]), *terms.values()]
        self.needs: frozenset[str] = frozenset().union(*(term.needs(base) for term in self.terms))

    def __call__(self, e: Embeddings) -> dict[str, Part]:
        """Return the loss's parts by name; their `total` is minimized."""
        return {name: part for term in self.terms for name, part in term(e, self.base).items()}


def total(parts: Mapping[str, Part]) -> torch.Tensor:
    """Return the sum of weight times value."""
    return torch.stack([part.weight * part.value for part in parts.values()]).sum()
