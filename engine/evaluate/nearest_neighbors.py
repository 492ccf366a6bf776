"""Weighted k-nearest-neighbor classification (1805.01978, section 3.4), exact, of a bank that may be sharded."""

import torch
from torch.nn import functional as F

from engine.parallel import collectives

_MAX_ROWS = 1024  # rows of a block of similarities
_MAX_ELEMENTS = 1 << 28  # elements of a block: 1 GiB
_RANKED = 5


def neighbors(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int, *, sharded: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest cosines of queries [N, F] with bank [M, F], descending, and their labels: [N, k] each.

    Rows have norm 1; labels int64 [M]. sharded: `bank` is this rank's shard, `queries` are the same on all ranks, and
    so is the result. Computed in blocks of queries, which bounds memory.
    """
    longest = torch.tensor([len(bank)], device=bank.device)
    if sharded:
        longest = collectives.gather(longest).max()  # so that all ranks have the same blocks
    blocks = []
    for part in queries.split(max(1, min(_MAX_ROWS, _MAX_ELEMENTS // max(int(longest), 1)))):
        similarity, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        nearest = labels[index]
        blocks.append(_merge_shards(similarity, nearest, k) if sharded else (similarity, nearest))
    return torch.cat([similarity for similarity, _ in blocks]), torch.cat([nearest for _, nearest in blocks])


def _merge_shards(similarity: torch.Tensor, nearest: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k most similar of all ranks' candidates, [N, k], and their labels."""
    missing = k - similarity.shape[1]  # a shard may be smaller than k
    padded = F.pad(similarity, (0, missing), value=-torch.inf), F.pad(nearest, (0, missing))
    similarity, nearest = (
        torch.cat(collectives.gather(part).chunk(collectives.world()), dim=1) for part in padded
    )  # [N, world k]
    similarity, index = similarity.topk(k, dim=1)
    return similarity, nearest.gather(1, index)


def vote(similarity: torch.Tensor, nearest: torch.Tensor, temperature: float, classes: int) -> torch.Tensor:
    """Return the five classes with most votes, int64 [N, 5], padded with -1.

    similarity, nearest: cosines, descending, and labels of the neighbors, [N, k]. A vote is exp(cosine / temperature)
    over that of the nearest neighbor, which keeps it finite; of equal sums the smaller class comes first.
    """
    ranked = []
    for cosines, labels in zip(similarity.split(8192), nearest.split(8192), strict=True):
        votes = torch.zeros(len(labels), classes, device=labels.device, dtype=torch.float64)
        votes.scatter_add_(1, labels, ((cosines - cosines[:, :1]).double() / temperature).exp())
        sums, order = votes.sort(dim=1, descending=True, stable=True)
        order = order[:, :_RANKED].masked_fill(sums[:, :_RANKED] == 0, -1)
        ranked.append(F.pad(order, (0, _RANKED - order.shape[1]), value=-1))
    return torch.cat(ranked)


def classify(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    *,
    k: int,
    temperature: float,
    classes: int,
    sharded: bool = False,
) -> torch.Tensor:
    """Return the class of each query by the `vote` of its k `neighbors`, int64 [N]. Arguments are theirs."""
    return vote(*neighbors(queries, bank, labels, k, sharded=sharded), temperature, classes)[:, 0]
