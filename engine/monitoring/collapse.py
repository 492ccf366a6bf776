"""Collapsed embeddings, counted."""

COLLAPSED = 0.2
"""Embeddings count as collapsed where their standard deviation is below this share of 1 / sqrt(C)."""
PATIENCE = 100
"""A collapse is this many steps in a row with collapsed embeddings."""


class CollapseWatch:
    """Counts consecutive steps with collapsed embeddings."""

    def __init__(self) -> None:
        self._count = self._longest = 0  # steps until now, and at most since the last `warning`
        self._warned = False

    def add(self, spread: float) -> None:
        """Add a step by the `spread` of its online embeddings."""
        self._count = self._count + 1 if spread < COLLAPSED else 0
        self._longest = max(self._longest, self._count)

    def warning(self) -> str | None:
        """Return a warning, once for each collapse, after PATIENCE steps of it."""
        count = self._longest
        due = count >= PATIENCE and not self._warned
        self._warned = self._count >= PATIENCE
        self._longest = self._count
        if not due:
            return None
        return (
            f"COLLAPSE: the embeddings' deviation has been below {COLLAPSED} / sqrt(C) for {count} steps, so that "
            "all images look alike: lower optim.lr or optim.weight_decay, warm up longer, or check model.bn"
        )

    def state_dict(self) -> dict[str, float]:
        """Return counts, and whether a warning was given."""
        return {"count": self._count, "longest": self._longest, "warned": self._warned}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load `state`."""
        self._count, self._longest = int(state["count"]), int(state["longest"])
        self._warned = bool(state["warned"])
