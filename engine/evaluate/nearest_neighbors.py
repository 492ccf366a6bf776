"""Weighted k-nearest-neighbor classification (1805.01978, section 3.4), exact, of a bank that processes may share."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.parallel import collectives

_ROWS = 1024  # of a block of similarities, at most ...
_ELEMENTS = 1 << 28  # ... and a GiB
_BEST = 5


def neighbors(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    k: int,
    *,
    rows: int = _ROWS,
    merged: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest cosines of queries [N, F] with bank [M, F], descending, and their labels: [N, k] each.

    All of norm 1; labels int64 [M]. Computed in blocks of at most so many rows. merged: `bank` is this process's share
    of one, and `queries` the same on all: the nearest are those of all processes.
    """
    longest = torch.tensor([len(bank)], device=bank.device)
    if merged:
        longest = collectives.gather(longest).max()  # all processes have the same blocks, whatever their shares
    found = []
    for part in queries.split(max(1, min(rows, _ELEMENTS // max(int(longest), 1)))):
        similarity, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        near = labels[index]
        found.append(_nearest_of_all(similarity, near, k) if merged else (similarity, near))
    return torch.cat([s for s, _ in found]), torch.cat([n for _, n in found])


def _nearest_of_all(similarity: torch.Tensor, near: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k most similar of all processes' candidates, [N, k], and their classes."""
    missing = k - similarity.shape[1]  # where this process's share is smaller than k
    padded = F.pad(similarity, (0, missing), value=-torch.inf), F.pad(near, (0, missing))
    similarity, near = (
        torch.cat(collectives.gather(one).chunk(collectives.world()), dim=1) for one in padded
    )  # [N, world k]
    similarity, index = similarity.topk(k, dim=1)
    return similarity, near.gather(1, index)


def vote(similarity: torch.Tensor, near: torch.Tensor, temperature: float, classes: int) -> torch.Tensor:
    """Return the five classes of most votes, int64 [N, 5], -1 for those without any.

    similarity, near: cosines, descending, and classes of the neighbors, [N, k]. A neighbor's vote is exp(cosine /
    temperature), in parts of the nearest one's; of equal sums the smaller class comes first.
    """
    found = []
    for cosines, of in zip(similarity.split(8192), near.split(8192), strict=True):
        votes = torch.zeros(len(of), classes, device=of.device, dtype=torch.float64)
        votes.scatter_add_(1, of, ((cosines - cosines[:, :1]).double() / temperature).exp())
        most, ranked = votes.sort(dim=1, descending=True, stable=True)
        ranked = ranked[:, :_BEST].masked_fill(most[:, :_BEST] == 0, -1)
        found.append(F.pad(ranked, (0, _BEST - ranked.shape[1]), value=-1))
    return torch.cat(found)


def classify(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    *,
    k: int,
    temperature: float,
    classes: int,
    rows: int = _ROWS,
    merged: bool = False,
) -> torch.Tensor:
    """Return the class of each query by the `vote` of its k `neighbors`: int64 [N]; arguments are theirs."""
    return vote(*neighbors(queries, bank, labels, k, rows=rows, merged=merged), temperature, classes)[:, 0]
