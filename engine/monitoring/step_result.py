"""The result of a training step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.monitoring.embedding_metrics import spread

Tensors = dict[str, torch.Tensor]


@dataclass
class Result:
    """The result of a step; tensors on the device, without gradient, which the next step may overwrite."""

    names: Sequence[str]
    """`loss`, and the names of its parts."""
    values: torch.Tensor
    """`taken`, `spread`, and the loss and its parts without their weights: [2 + parts], one tensor to copy."""
    measures: Tensors = field(default_factory=dict)
    """Those of `embedding_metrics.measure`, and `gradient_share_NAME` of each part, where they are requested."""
    features: torch.Tensor | None = None
    """The online backbone's features of this rank's first query view, [B, F], where `probe.every` asks for them."""

    @classmethod
    def stack(cls, parts: Tensors, q: torch.Tensor, taken: torch.Tensor, measures: Tensors | None = None) -> "Result":
        """Return the result of a step with online embeddings q [B, C]; taken: bool []."""
        values = torch.stack([taken.to(parts["loss"].dtype), spread(q), *parts.values()])
        return cls(list(parts), values, measures or {})

    @property
    def parts(self) -> Tensors:
        """The loss, and its parts without their weights."""
        return dict(zip(self.names, self.values[2:].unbind(), strict=True))

    @property
    def taken(self) -> torch.Tensor:
        """1 if loss and gradients were finite, and the step was taken, else 0, []."""
        return self.values[0]

    @property
    def spread(self) -> torch.Tensor:
        """`spread` of the online embeddings of the first view, of the last part of the batch, []."""
        return self.values[1]
