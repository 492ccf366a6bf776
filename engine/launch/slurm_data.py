"""Print the data sets that the settings of a run name, one a line.

python -m engine.launch.slurm_data --config R.yaml [settings]
"""

from __future__ import annotations

import argparse

from engine.config.cli import parse
from pipeline.system.errors import command


@command
def main() -> None:
    about = "Print the data sets that a run's settings name."
    _, settings = argparse.ArgumentParser(
        prog="python -m engine.launch.slurm_data", description=about
    ).parse_known_args()
    data = parse(settings).data
    for name in ("train", "eval"):
        if path := getattr(data, name):
            print(f"data.{name} {path}")


if __name__ == "__main__":
    main()
