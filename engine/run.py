"""Pretrain an encoder:  python engine/run.py --config engine/recipes/NAME.yaml --data.train F.beton ..."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on the module path: put the project's root there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.fault_tolerance.heartbeat import LostRank
from engine.fault_tolerance.preemption import Stopped
from engine.parallel.rendezvous import rank
from engine.training.build import agree_on_launch
from engine.training.dry_run import dry_run
from engine.training.loop import train
from pipeline.system.errors import command, report


@command
def main() -> int:
    settings, device = agree_on_launch()
    if device is None:
        dry_run(settings)
        return 0
    try:
        train(settings, device)
    except Stopped as stopped:
        if rank() == 0:
            print(stopped)
        return stopped.status
    except LostRank as lost:
        report(lost, 1)
        sys.stdout.flush()
        os._exit(1)  # torch's own end would wait for the lost rank
    return 0


if __name__ == "__main__":
    main()
