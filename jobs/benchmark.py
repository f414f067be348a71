"""Side-by-side measurements: `python -m jobs.benchmark model | peers | data | train | ...`. JSON lines, then a table."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cellplane.benchmark import data, model, neighbours, peers, plan, predict, report, serve, train
from cellplane.errors import CellplaneError

MEASURES = (data, model, peers, predict, serve, train, neighbours, plan)
PARTS = {part.__name__.rpartition(".")[2]: getattr(part, "PARTS", {}) for part in MEASURES}
KINDS = (data.DataBenchmark, model.ModelBenchmark, peers.PeersBenchmark, predict.PredictBenchmark)
KINDS = (*KINDS, serve.ServeBenchmark, train.TrainBenchmark, neighbours.NeighboursBenchmark, plan.PlanBenchmark)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=tuple(PARTS), help="beside CellPLM, gene models, other loaders, bare steps, the truth")
    parser.add_argument("--cells", type=int, help="default: 2000; data: 100000; plan: 102400000")
    parser.add_argument("--nonzeros", type=int, help="non-zero counts of each cell; default: 2000; data, train: 1350")
    parser.add_argument("--threads", type=int, help="default: 2; data: 1, as in a Ray Train worker of one CPU")
    parser.add_argument("--rounds", type=int, help="quiet rounds, the sides in turn in each; default: 5")
    parser.add_argument("--requests", type=int, help="serve: under load; default: 500, the gate asks 10000")
    parser.add_argument("--seconds", type=int, help="serve: of overload; default: 5, the gate asks 60")
    parser.add_argument("--proxy", choices=("auto", "serve", "haproxy"), help="serve: what receives HTTP; default: as `cellplane up`")
    parser.add_argument("--only", nargs="+", default=(), help="these parts alone; a wrong one is told which there are")
    parser.add_argument("--models", nargs="+", default=(), help="train: these models alone (tiny, 10m, 85m)")
    parser.add_argument("--python", type=Path, help="model, peers: the other packages' Python; default: an environment is made for them")
    given = parser.parse_args()
    if unknown := set(given.only) - set(PARTS[given.what]):
        parser.error(f"{given.what} has no part {min(unknown)!r}; it has: {', '.join(PARTS[given.what]) or 'none'}")
    return given


def main() -> int:
    """Measures and prints; 1 when a gate does not hold, else what the error says."""
    given = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    kind = dict(zip(PARTS, KINDS, strict=True))[given.what]
    asked = {**vars(given), "original_python": given.python, "only": tuple(given.only), "models": tuple(given.models)}
    taken = {name: value for name, value in asked.items() if value and name in kind.__dataclass_fields__}
    figures = []
    try:
        print(report.machine(), flush=True)
        for figure in kind(**taken).run():
            print(figure.line(), flush=True)
            figures.append(figure)
    except CellplaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report.table(figures))
    return int(any(figure.holds is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
