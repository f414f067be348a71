"""The full protocol of perturbation: what was never seen is predicted, from controls that the truth does not use.

`perturbation_evaluation` leaves out and splits, `perturbation_scores` measures; here seeds become rows. The ceiling is what
a perfect prediction would score, given how noisy the measured changes are; perturbations too noisy for that are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.artifact.folder import ModelFolder
from cellplane.config import to_plain
from cellplane.data.files import file_sha256
from cellplane.data.sources import AnnData, column, read_h5ad
from cellplane.errors import DataError
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_evaluation import cases_of
from cellplane.pipelines.perturbation_scores import MEASURES, Case, in_common, summary
from cellplane.pipelines.protocol import Entry, Evaluation, Found, Ledger, Method, Place
from cellplane.pipelines.protocol_run import Finished, Ledgers, Say, base_notes, check_protocol, finish, open_bases, out_of, quiet
from cellplane.pipelines.significance import bootstrap_interval
from cellplane.pipelines.task_pictures import CHANGES, ends_and_middle, short
from cellplane.pipelines.task_protocols import PerturbationProtocol, ScreenData

CEILING = "split-half ceiling"
DRAWN_GENES = 2000  # besides the differential ones and the perturbed ones, evenly spread over all
ROWS = {  # as `perturbation_evaluation` calls them -> as a table does
    "model": Method(MODEL_ROW, "model"),
    "network_alone": Method("network alone", "control"),
    "target_only": Method("target_only", "baseline"),
    "mean_of_others": Method("mean_of_others", "baseline"),
    "no_change": Method("no_change", "baseline"),
}
LEARNED = ("model", "network_alone")  # those that a base changes
SHOWN = (*MEASURES, "discrimination", "of_ceiling")


class Round:
    """One seed's split of a data set: everything is fitted when the first of its rows is asked for."""

    def __init__(self, data: AnnData, asked: ScreenData, seed: int, base: ModelFolder | None = None, drawn: bool = False) -> None:
        self.data, self.asked, self.seed, self.base = data, asked, seed, base
        self.drawn = drawn  # whether ours keeps some changes gene by gene, for a picture

    @property
    def recipe(self) -> PerturbationConfig:
        """How the networks of this seed are fitted."""
        recipe = recipe_of(self.asked, self.base)
        return recipe.model_copy(update={"seed": recipe.seed + self.seed})

    @cached_property
    def cases(self) -> list[Case]:
        """Every perturbation as predicted by models that never saw it."""
        return list(cases_of(self.data, self.recipe, self.asked.leave_out, self.base))

    def row(self, name: str, apart: bool) -> Found:
        """The scores of a method over the perturbations of one table."""
        found = self.summary(apart)
        row = found[name]
        told = {key: row[key] for key in ("interval", "by_perturbation")} | {"unreliable": found["unreliable"]}
        if name == "model" and self.drawn:
            told[CHANGES] = self.changes(apart, row["by_perturbation"])
        return Found({key: float(row[key]) for key in SHOWN}, told)

    def ceiling(self, apart: bool) -> Found:
        """What a perfect prediction would score."""
        found = self.summary(apart)
        return Found({"pearson": float(found["ceiling"])}, {"reliability": found["reliability"]})

    def changes(self, apart: bool, scores: Mapping[str, float]) -> dict[str, Any]:
        """Measured and predicted change of at most 2,000 genes of the best, the median and the worst perturbation; JSON-ready."""
        chosen = in_common([case for name in ends_and_middle(scores) for case in self.of_table(apart) if case.name == name])
        genes = chosen[0].genes
        named = np.unique(np.concatenate([[*case.de, *case.targets] for case in chosen])).astype(np.int64)
        rest = np.setdiff1d(np.arange(len(genes)), named)
        kept = np.sort(np.concatenate([named, rest[:: -(-len(rest) // DRAWN_GENES) or 1]]))
        of = {
            case.name: {
                "truth": short(case.truth[kept]),
                "predicted": short(case.answers["model"][kept]),
                "de": np.searchsorted(kept, case.de).tolist(),
                "targets": np.searchsorted(kept, case.targets).tolist(),
                "pearson": scores[case.name],
            }
            for case in chosen
        }
        return {"genes": [genes[gene] for gene in kept], "of": of}

    def summary(self, apart: bool) -> Mapping[str, Any]:
        """`perturbation_scores.summary` of the perturbations of one table."""
        return summary(self.of_table(apart), self.seed)

    def of_table(self, apart: bool) -> list[Case]:
        """The perturbations of one table; DataError where there is none."""
        mine = [case for case in self.cases if (case.name.split(" in ")[0] in self.asked.apart) == apart]
        if not mine:
            listed = ", ".join(sorted(case.name for case in self.cases))
            raise DataError(f"apart: {', '.join(self.asked.apart)} leaves an empty table; enough cells have {listed}: name some of these")
        return mine


def recipe_of(asked: ScreenData, base: ModelFolder | None) -> PerturbationConfig:
    """How a network of this data set is fitted, from scratch or from a base."""
    return asked.recipe if base is None or asked.finetune is None else asked.finetune


def run_perturbation_protocol(config: PerturbationProtocol, say: Say = quiet) -> Finished:
    """Every data set, seed and method that the ledger does not know yet, and the report of all."""
    check_protocol(config)
    ledgers = Ledgers(out_of(config, config.task))
    entries: list[Entry] = []
    notes: list[str] = []
    for name, asked in config.data.items():
        bases = open_bases(config, name)
        found = _entries(Screened(name, asked, bases), config.seeds, (ledgers, say))
        entries += found
        notes += [*_notes(name, found), *base_notes(name, [asked.path], bases)]
    evaluation = Evaluation(config.task, "pearson", tuple(entries), (), tuple(notes), ("mse",), splits_differ=False)
    return finish(evaluation, config, "Perturbations that were never seen, beside what needs no network")


@dataclass(frozen=True)
class Screened:
    """A data set of the protocol: what is asked of it, and the bases by name."""

    name: str
    asked: ScreenData
    bases: Mapping[str, ModelFolder]

    def ledgers(self, ledgers: Ledgers) -> dict[str, Ledger]:
        """What is known of the rows from scratch ("") and of those from each base."""
        plain = {key: value for key, value in to_plain(self.asked).items() if key not in ("path", "bases", "finetune")}
        file = file_sha256(Path(self.asked.path))
        found = {"": ledgers.of("perturb", plain, file)}
        for label, base in self.bases.items():
            recipe = to_plain(recipe_of(self.asked, base))
            found[label] = ledgers.of("perturb", {**plain, "recipe": recipe}, file, base.model_sha256)
        return found


def _entries(screened: Screened, seeds: Sequence[int], to: tuple[Ledgers, Say]) -> list[Entry]:
    ledgers, say = to
    name, asked, known_by = screened.name, screened.asked, screened.ledgers(ledgers)
    data = read_h5ad(Path(asked.path))
    if absent := sorted(set(asked.apart) - set(map(str, column(data, asked.recipe.perturbation_key)))):
        raise DataError(f"{name}: apart names {absent[0]}, which is not in obs[{asked.recipe.perturbation_key!r}]; name one that is there")
    entries = []
    for seed in seeds:
        one = Round(data, asked, seed, drawn=seed == seeds[0])
        begun = {label: Round(data, asked, seed, base) for label, base in screened.bases.items()}
        for apart in (False, True) if asked.apart else (False,):
            place = Place(name, f"{asked.leave_out.replace('_', ' ')} left out{', apart' * apart}", 0, seed)
            methods = {row: ("", partial(one.row, key, apart)) for key, row in ROWS.items()}
            for label, other in begun.items():
                for key in LEARNED:
                    row = ROWS[key]
                    methods[Method(f"{row.name} from {label}", row.kind)] = label, partial(other.row, key, apart)
            for row, (label, work) in {**methods, Method(CEILING, "ceiling"): ("", partial(one.ceiling, apart))}.items():
                known = known_by[label].find(place, row.name) is not None
                entry = known_by[label].measured(place, row, work)
                entries.append(entry)
                if not known:
                    say(f"{name} {place.protocol} seed {seed}: {row.name}  pearson {entry.metrics['pearson']:.3f}  {entry.seconds:.0f} s")
    return entries


def _notes(name: str, found: Sequence[Entry]) -> list[str]:
    """Perturbations that are too noisy to be predicted, and what the score is spread over."""
    ours = [entry for entry in found if entry.method.name == MODEL_ROW]
    noisy = sorted({one for entry in ours for one in entry.details["unreliable"]})
    lines = [f"{name}: left out of the means, for their split-half correlation is below .3: {', '.join(noisy) or 'none'}"]
    for entry in ours[:1]:
        low, high = entry.details["interval"]
        scores = ", ".join(f"{one} {value:.2f}" for one, value in entry.details["by_perturbation"].items())
        lines.append(f"{name}, seed {entry.place.seed}: 95 % interval over perturbations [{low:.3f}, {high:.3f}]; {scores}")
    lines += _leads(name, found)
    lines.append(f"{name}: the spread is over seeds of the three-way split of the controls, and of the network")
    seconds = [entry.seconds for entry in ours if not entry.place.protocol.endswith("apart")]
    return [*lines, f"{name}: all fits of a seed took {np.mean(seconds):.0f} s"]


def _leads(name: str, found: Sequence[Entry]) -> list[str]:
    """Our lead over every baseline, paired by perturbation (its mean over seeds), with a bootstrap over perturbations."""
    lines = []
    baselines = dict.fromkeys(entry.method.name for entry in found if entry.method.kind == "baseline")
    ours = _by_perturbation(found, MODEL_ROW)
    for other in baselines if ours else ():
        theirs = _by_perturbation(found, other)
        leads = [ours[one] - theirs[one] for one in ours if one in theirs]
        if leads and np.isfinite(leads).any():
            low, high = bootstrap_interval(leads)
            lines.append(f"{name}: lead over {other} by perturbation {np.nanmean(leads):+.3f}, 95 % interval [{low:.3f}, {high:.3f}]")
    return lines


def _by_perturbation(found: Sequence[Entry], row: str) -> dict[str, float]:
    """Mean over seeds of every perturbation's score in the tables that count."""
    scores: dict[str, list[float]] = defaultdict(list)
    for entry in found:
        if entry.method.name == row and not entry.place.protocol.endswith("apart"):
            for perturbation, score in entry.details["by_perturbation"].items():
                scores[perturbation].append(float(score))
    return {one: float(np.mean(values)) for one, values in scores.items()}
