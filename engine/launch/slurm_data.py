"""Print the data sets of a run's settings, one a line.

python -m engine.launch.slurm_data --config R.yaml [settings]
"""

import sys

from engine.config.cli import parse
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import command


def parser() -> ArgumentParser:
    return ArgumentParser(
        prog="python -m engine.launch.slurm_data", description="Print the data sets of a run's settings."
    )


@command
def main() -> None:
    parser().parse_known_args()  # answers --help
    data = parse(sys.argv[1:]).data
    for name in ("train", "eval"):
        if path := getattr(data, name):
            print(f"data.{name} {path}")


if __name__ == "__main__":
    main()
