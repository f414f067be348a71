"""Side-by-side measurements: `python -m jobs.benchmark model | peers`. JSON lines while it runs, a table at the end."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cellplane.benchmark.model import PARTS, ModelBenchmark
from cellplane.benchmark.peers import PeersBenchmark
from cellplane.benchmark.report import machine, table
from cellplane.errors import CellplaneError


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=("model", "peers"), help="ours beside the released CellPLM, or beside gene language models")
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--nonzeros", type=int, default=2000, help="non-zero counts of each cell")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="quiet rounds, the sides in turn in each")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=(), help="model: these parts alone")
    parser.add_argument("--python", type=Path, help="the other packages' Python; default: an environment is made for them")
    return parser.parse_args()


def main() -> int:
    """Measures and prints; 1 when a gate does not hold, else what the error says."""
    given = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sizes = {"cells": given.cells, "nonzeros": given.nonzeros, "threads": given.threads, "rounds": given.rounds}
    try:
        if given.what == "model":
            benchmark: ModelBenchmark | PeersBenchmark = ModelBenchmark(**sizes, original_python=given.python, only=tuple(given.only))
        else:
            benchmark = PeersBenchmark(**sizes, python=given.python)
        print(machine(), flush=True)
        figures = []
        for figure in benchmark.run():
            print(figure.line(), flush=True)
            figures.append(figure)
    except CellplaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(figures))
    return int(any(figure.holds is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
