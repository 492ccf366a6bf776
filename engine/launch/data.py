"""The data sets that a run's settings name, a line each:  python -m engine.launch.data --config R.yaml [settings]"""

from __future__ import annotations

from engine.arguments import parse
from pipeline.errors import command


@command
def main() -> None:
    data = parse().data
    for name in ("train", "eval"):
        if path := getattr(data, name):
            print(f"data.{name} {path}")


if __name__ == "__main__":
    main()
