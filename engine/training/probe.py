"""An online linear probe: a classifier of the training batches' features, from which the encoder learns nothing."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from engine.parallel import collectives
from pipeline.system.device import to_device

_MOMENTUM, _STATISTICS_MOMENTUM, _EPSILON = 0.9, 0.1, 1e-5


class Probe(nn.Module):
    """A linear classifier of backbone features, trained by SGD with momentum 0.9 on softmax cross-entropy, from 0.

    Features are of length 1, as for kNN, and standardized: in training over the batch, afterwards by running mean and
    variance, as in BatchNorm without affine (MAE's linear probe, 2111.06377), and divided by the root of their number,
    so that one rate suits all encoders. Each rank computes the update of the global batch, which is the same on any
    number of ranks. Nothing waits for the device but `take_accuracy`.

    labels: int64 [N] by sample id, -1 for none.
    """

    weight: torch.Tensor  # [C, F + 1], the biases in the last column
    momentum: torch.Tensor
    mean: torch.Tensor  # [F]
    variance: torch.Tensor
    counts: torch.Tensor  # labeled samples since the last `take_accuracy`: those classified correctly, all

    def __init__(self, features: int, labels: np.ndarray, lr: float, device: torch.device) -> None:
        super().__init__()
        self._labels, self._lr, self._device = labels, lr, device
        for name, value in (
            ("weight", torch.zeros(int(labels.max()) + 1, features + 1)),
            ("momentum", torch.zeros(int(labels.max()) + 1, features + 1)),
            ("mean", torch.zeros(features)),
            ("variance", torch.ones(features)),
            ("counts", torch.zeros(2, dtype=torch.int64)),
        ):
            self.register_buffer(name, value.to(device))

    @torch.no_grad()
    def update(self, features: torch.Tensor, ids: np.ndarray, taken: torch.Tensor) -> None:
        """Train on this rank's features [B, F] of the samples ids [B], with those of the other ranks.

        taken: whether the encoder's step was taken, [], alike on all ranks; if not, nothing changes.
        """
        x = collectives.gather(F.normalize(features.to(self.weight.dtype), dim=1))  # [G, F]
        y = collectives.gather(to_device(self._labels[ids], self._device))  # [G]
        labeled, target = y >= 0, y.clamp(min=0)

        variance, mean = torch.var_mean(x, dim=0, unbiased=False)
        x = self._standardized(x, mean, variance)  # [G, F + 1]
        logits = x @ self.weight.T  # [G, C]
        hits = (logits.argmax(dim=1) == target) & labeled

        # The gradient of the mean cross-entropy over the labeled samples.
        error = (logits.softmax(dim=1) - F.one_hot(target, len(self.weight))) * labeled[:, None]
        gradient = error.T @ x / labeled.sum().clamp(min=1)
        momentum = _MOMENTUM * self.momentum + gradient
        unbiased = variance * (len(x) / (len(x) - 1))
        for state, value in (
            (self.momentum, momentum),
            (self.weight, self.weight - self._lr * momentum),
            (self.mean, self.mean.lerp(mean, _STATISTICS_MOMENTUM)),
            (self.variance, self.variance.lerp(unbiased, _STATISTICS_MOMENTUM)),
            (self.counts, self.counts + torch.stack([hits.sum(), labeled.sum()])),
        ):
            state.copy_(torch.where(taken > 0, value, state))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Return the classes, int64 [N], of features of length 1, [N, F]."""
        return (self._standardized(features, self.mean, self.variance) @ self.weight.T).argmax(dim=1)

    def _standardized(self, x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Return standardized features with a column of ones, [N, F + 1]."""
        x = (x - mean) / (variance + _EPSILON).sqrt() / math.sqrt(x.shape[1])
        return F.pad(x, (0, 1), value=1.0)

    def take_accuracy(self) -> dict[str, float]:
        """Return `probe_train_top1`, over the samples since the last call, if there were any. Waits for the device."""
        correct, count = self.counts.tolist()
        self.counts.zero_()
        return {"probe_train_top1": correct / count} if count else {}
