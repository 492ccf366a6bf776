"""Python's command line in a process forked from the tests' server:  python -m tests.forked -m MODULE ..."""

import sys

from tests import processes

if __name__ == "__main__":
    done = processes.run([sys.executable, *sys.argv[1:]])
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    sys.exit(done.returncode)
