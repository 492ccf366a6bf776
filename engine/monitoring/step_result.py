"""The result of a training step."""

from dataclasses import dataclass, field

import torch

Tensors = dict[str, torch.Tensor]


@dataclass
class Result:
    """The result of a step; tensors on the device, without gradient, which the next step may overwrite."""

    parts: Tensors
    """The loss, and its parts without their weights."""
    q: torch.Tensor
    """Online embeddings of the first view, [B, C], of the last part of the batch."""
    taken: torch.Tensor
    """bool []: whether loss and gradients were finite, and the step was taken."""
    measures: Tensors = field(default_factory=dict)
    """Those of `embedding_metrics.measure`, and `gradient_share_NAME` of each part, where they are requested."""
