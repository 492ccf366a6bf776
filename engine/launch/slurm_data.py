"""Print the data sets of a run's settings, one a line.

python -m engine.launch.slurm_data --config R.yaml [settings]
"""

from __future__ import annotations

import sys

from engine.config.cli import parse
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import command


@command
def main() -> None:
    about = "Print the data sets of a run's settings."
    ArgumentParser(prog="python -m engine.launch.slurm_data", description=about).parse_known_args()
    data = parse(sys.argv[1:]).data
    for name in ("train", "eval"):
        if path := getattr(data, name):
            print(f"data.{name} {path}")


if __name__ == "__main__":
    main()
