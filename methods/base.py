"""What a base method, its embeddings and a term of the loss are to each other.

Embeddings are named: x1 and x2 are the views; q1, q2 the online network's embeddings of them, k1, k2 the momentum
network's, [B, C] each, rows of norm 1, of this process's samples; Q1, Q2, K1, K2 the same of all processes' samples,
[G, C]. Keys have no gradient. A base without a momentum network (SimCLR) takes the queries for keys, with gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

Heads = Callable[..., tuple[nn.Module, "nn.Module | None"]]
"""(features, hidden, dim, norm, transformer) to projector and predictor, see `methods.heads`."""


class CannotCarry(ValueError):
    """A term needs what the base method does not have; the message says what."""


class Part(NamedTuple):
    """One summand of the loss."""

    weight: float
    value: torch.Tensor
    """Scalar, without the weight."""


@dataclass(frozen=True)
class Base:
    """A base method: what it has, and what was published for it."""

    name: str
    heads: Heads
    loss: Callable[[], Term]
    """The base's own term."""
    symmetric: bool
    """Whether the loss is that of both views as queries."""
    queue: bool = False
    """Whether the negatives are a queue of keys; otherwise they are the other samples' keys of the global batch."""
    teacher: bool = True
    """Whether there is a momentum encoder."""
    contrastive: bool = True
    """Whether its own loss has negatives."""
    joint: bool = False
    """Whether all views go through the encoder as one batch."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Values of the settings that are left open, by their dotted name; what has no meaning for it is not there."""
    temperature: float = 1.0
    """Of its softmax."""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Return the views' numbers (of the query, of the key) that the loss is averaged over."""
        return ((1, 2), (2, 1)) if self.symmetric else ((1, 2),)


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a step, by name."""

    named: Mapping[str, torch.Tensor]
    queue: torch.Tensor | None = None
    """Keys of earlier steps, [K, C]."""
    first: int = 0
    """Row of this process's first sample among those of all processes."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.named[name]

    def negatives(self, view: int) -> tuple[torch.Tensor, int | None]:
        """Return the keys [N, C] a query meets beside its own of `view`, and the row of the first sample's own key.

        That is the queue and None, where there is a queue: no sample's own key is in it.
        """
        return (self[f"K{view}"], self.first) if self.queue is None else (self.queue, None)


class Term(Protocol):
    """A summand of the loss, the base's own or a regularizer."""

    def needs(self, base: Base) -> frozenset[str]:
        """Return the names of the embeddings it is computed from. Raises CannotCarry."""

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        """Return its parts by the names they have in the metrics."""


def needs_of(base: Base, kinds: str) -> frozenset[str]:
    """Return the names of those kinds over the base's pairs: q and Q of the query's view, k and K of the key's."""
    return frozenset(f"{kind}{a if kind in 'qQ' else b}" for a, b in base.pairs for kind in kinds)


def with_negatives(base: Base) -> frozenset[str]:
    """Return the names of queries, their keys and, where there is no queue, all processes' keys."""
    return needs_of(base, "qk" if base.queue else "qkK")


class Objective:
    """A base's loss and the regularizers added to it; one of these may take the place of the base's own."""

    def __init__(self, base: Base, loss: Term, terms: Mapping[str, Term]) -> None:
        replacing = [name for name, term in terms.items() if getattr(term, "replaces", False)]
        if len(replacing) > 1:
            raise CannotCarry(f"{' and '.join(replacing)}: both replace the base's own loss: choose one")
        self.base = base
        self.terms = [*([] if replacing else [loss]), *terms.values()]
        self.needs: frozenset[str] = frozenset().union(*(term.needs(base) for term in self.terms))

    def __call__(self, e: Embeddings) -> dict[str, Part]:
        """Return the parts by name; the sum of weight times value is what is minimized."""
        return {name: part for term in self.terms for name, part in term(e, self.base).items()}


def total(parts: Mapping[str, Part]) -> torch.Tensor:
    """Return the sum of weight times value."""
    return torch.stack([part.weight * part.value for part in parts.values()]).sum()
