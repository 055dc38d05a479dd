"""Collectives between processes of this host, beside a plain copy: `python -m tests.bench.collectives [--ranks 2]`.

Each rank has a CPU of its own and one thread. Prints the median time of a call as the graph's operators make it, what a
rank gives and gets, the larger of the two a second, and the time of copying as much, made by all ranks at once, over
that of the call.
"""

import argparse
import subprocess
import sys

from tests.bench.native import built


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    return subprocess.run([built("collectives.cc"), str(parser.parse_args().ranks)]).returncode


if __name__ == "__main__":
    sys.exit(main())
