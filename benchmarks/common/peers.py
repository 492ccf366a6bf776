"""Other implementations of the training step, as published by their authors, on our encoder."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from engine.config.settings import Settings
from methods.heads import Encoder

Pair = tuple[torch.Tensor, torch.Tensor]


class Official:
    """facebookresearch/moco's `main_moco.py` and `moco/builder.py`."""

    def __init__(self, encoder: Encoder, settings: Settings, device: torch.device, dtype: torch.dtype | None) -> None:
        self._online = _plain(encoder).to(device)
        self._target = copy.deepcopy(self._online).requires_grad_(False)
        assert settings.model.dim is not None
        self._length, self._temperature = settings.method.queue_size or 65536, settings.method.temperature or 0.2
        self._queue = F.normalize(torch.randn(settings.model.dim, self._length, device=device), dim=0)
        self._position = torch.zeros(1, dtype=torch.long)
        self._optimizer = _sgd(self._online.parameters(), settings)
        self._criterion, self._dtype, self._device = nn.CrossEntropyLoss(), dtype, device
        self._scaler = _scaler(device, dtype)

    def step(self, views: Pair) -> float:
        """Train on two views [B, 3, S, S], and return the loss."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            q = F.normalize(self._online(views[0])[0], dim=1)
            with torch.no_grad():
                for a, b in zip(self._online.parameters(), self._target.parameters(), strict=True):
                    b.data = b.data * 0.999 + a.data * (1.0 - 0.999)
                k = F.normalize(self._target(views[1])[0], dim=1)
            positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
            negative = torch.einsum("nc,ck->nk", [q, self._queue.clone().detach()])
            logits = torch.cat([positive, negative], dim=1) / self._temperature
            labels = torch.zeros(logits.shape[0], dtype=torch.long, device=self._device)
            loss = self._criterion(logits, labels)
        with torch.no_grad():
            start, count = int(self._position), len(k)
            self._queue[:, start : start + count] = k.T[:, : self._length - start].to(self._queue.dtype)
            self._position[0] = (start + count) % self._length
            _, best = logits.topk(5, 1)  # its accuracy meter
            float((best == 0).float().sum())
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return float(loss.detach())


def _sgd(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.SGD:
    optim = settings.optim
    return torch.optim.SGD(parameters, optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def _scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Return a loss scaler, which is active in float16 alone."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _plain(encoder: Encoder) -> Encoder:
    """Return a copy without autocast and compiled calls, with NCHW weights."""
    plain = Encoder(copy.deepcopy(encoder.backbone), copy.deepcopy(encoder.projector))
    return plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class Lightly:
    """The training step of lightly's MoCo v2 example, with its heads, loss and memory bank. Raises ImportError."""

    def __init__(self, encoder: Encoder, settings: Settings, device: torch.device, dtype: torch.dtype | None) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        features, dim = encoder.backbone.features, settings.model.dim
        self._backbone = _plain(encoder).to(device).backbone
        self._head = MoCoProjectionHead(features, settings.model.mlp_dim or features, dim).to(device)
        self._backbone_momentum, self._head_momentum = copy.deepcopy(self._backbone), copy.deepcopy(self._head)
        for module in (self._backbone_momentum, self._head_momentum):
            deactivate_requires_grad(module)
        self._criterion = NTXentLoss(settings.method.temperature, memory_bank_size=(settings.method.queue_size, dim))
        self._criterion.to(device)
        self._optimizer = _sgd([*self._backbone.parameters(), *self._head.parameters()], settings)
        self._update, self._dtype, self._device = update_momentum, dtype, device
        self._scaler = _scaler(device, dtype)

    def step(self, views: Pair) -> float:
        """Train on two views [B, 3, S, S], and return the loss."""
        self._update(self._backbone, self._backbone_momentum, m=0.999)
        self._update(self._head, self._head_momentum, m=0.999)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            query = self._head(self._backbone(views[0]).flatten(start_dim=1))
            with torch.no_grad():
                key = self._head_momentum(self._backbone_momentum(views[1]).flatten(start_dim=1))
            loss = self._criterion(query, key)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return float(loss.detach())


PEERS = {"official": Official, "lightly": Lightly}
