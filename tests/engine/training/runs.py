"""Settings of small runs on drawn images."""

from __future__ import annotations

from pathlib import Path

from engine.config.settings import Data, Method, Model, Optim, Settings
from methods.registry import Terms


def settings(beton: Path, bn: str, terms: Terms | None = None, **method: object) -> Settings:
    """Return settings of one epoch of MoCo v2 on `beton`, with that kind of BatchNorm."""
    return Settings(
        data=Data(train=str(beton), size=16, batch=32, augmentation="moco_v2_32", workers=1),
        model=Model("resnet18", "small", 0.125, 16, bn=bn),  # type: ignore[arg-type]
        method=Method(queue_size=70, ema_momentum=0.9, **method),  # type: ignore[arg-type]
        terms=terms or Terms(),
        optim=Optim(lr=0.05, epochs=1),
        precision="no",
        tracker="none",
        cpu=True,
    )
