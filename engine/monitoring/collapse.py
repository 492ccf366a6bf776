"""Collapsed embeddings, counted on the device."""

import torch

from engine.monitoring.embedding_metrics import spread

COLLAPSED = 0.2
"""Embeddings count as collapsed where their standard deviation is below this share of 1 / sqrt(C)."""
PATIENCE = 100
"""A collapse is this many steps in a row with collapsed embeddings."""


class CollapseWatch:
    """Counts consecutive steps with collapsed embeddings, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._longest = torch.zeros_like(self._count)  # since the last `warning`
        self._warned = False

    @torch.no_grad()
    def add(self, q: torch.Tensor) -> None:
        """Add a step by its online embeddings [B, C]. Does not wait for the device."""
        self._count.add_(1).mul_(spread(q.detach()) < COLLAPSED)
        torch.maximum(self._longest, self._count, out=self._longest)

    def warning(self) -> str | None:
        """Return a warning, once for each collapse, after PATIENCE steps of it. Waits for the device."""
        count, now = (int(value) for value in torch.stack([self._longest, self._count]).tolist())
        due = count >= PATIENCE and not self._warned
        self._warned = now >= PATIENCE
        self._longest.copy_(self._count)
        if not due:
            return None
        return (
            f"COLLAPSE: the embeddings' deviation has been below {COLLAPSED} / sqrt(C) for {count} steps, so that "
            "all images look alike: lower optim.lr or optim.weight_decay, warm up longer, or check model.bn"
        )

    def state_dict(self) -> dict[str, float]:
        """Return counts, and whether a warning was given, as plain values. Waits for the device."""
        return {"count": self._count.item(), "longest": self._longest.item(), "warned": self._warned}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load `state`."""
        self._count.fill_(state["count"])
        self._longest.fill_(state["longest"])
        self._warned = bool(state["warned"])
