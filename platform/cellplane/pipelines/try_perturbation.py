"""Trying perturbation: each one is left out in turn and foretold from control cells, by the model and by what needs no network.

With fewer than three perturbations the perturbed cells of each cell type are left out instead. The controls are split in three
by the seed: from one part is learned, from another predicted, the third tells the truth (PROTOCOLS 9).
"""

# G genes

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellplane.artifact.folder import ModelFolder
from cellplane.data.sources import AnnData, column, read_h5ad
from cellplane.errors import ColumnError, DataError
from cellplane.pipelines.drawing import new_axes
from cellplane.pipelines.job import MODEL_ROW
from cellplane.pipelines.perturbation import PerturbationPipeline
from cellplane.pipelines.perturbation_cells import Pair, check_groups, read_cells
from cellplane.pipelines.perturbation_config import PerturbationConfig
from cellplane.pipelines.perturbation_evaluation import LeaveOut, Split, cases_of
from cellplane.pipelines.perturbation_protocol import CEILING, SHOWN
from cellplane.pipelines.perturbation_scores import RELIABLE, Case, summary
from cellplane.pipelines.plots import save_axes
from cellplane.pipelines.protocol import Entry, Found, Method, Picture, Place
from cellplane.pipelines.try_config import TryPerturbation
from cellplane.pipelines.try_parts import BOOTSTRAP, Answer, Bench, Task, Tried, base_of, evaluation_of, still_to_go
from cellplane.pipelines.try_pictures import draw_units
from cellplane.pipelines.verdict import Measure, Verdict, few_lead

SIMPLE = ("target_only", "mean_of_others", "no_change")
HOW = f"{BOOTSTRAP} Of few perturbations it is at least as wide as Student's t makes it."
FEWEST = 3  # reliable perturbations below which no verdict is given
MEASURES: Mapping[LeaveOut, Measure] = {
    "perturbation": Measure("correlation of predicted and measured change", "perturbations left out whose change can be measured"),
    "cell_type": Measure("correlation of predicted and measured change", "cell types left out whose change can be measured"),
}
KEYS_HINT = (
    "keys of the screen are told as -o recipe.KEY=VALUE: perturbation_key, control, kind (knockout, crispri, crispra, stimulation), "
    "targets, ignore, unknown"
)
CONTROL_WORDS = ("control", "ctrl", "non-targeting", "ntc", "nt", "unperturbed", "untreated", "unstimulated", "vehicle", "dmso", "mock")
MOST_NAMES = 500  # different values of a column that may still name perturbations
WITHOUT_NETWORK = {
    "target_only": "target_only needs no model: expect that the perturbed gene itself changes, and count on nothing else",
    "mean_of_others": "mean_of_others needs no model: expect of a new one the mean change of those that you have measured",
    "no_change": "no_change needs no model: the cells that you have do not let a change be foretold",
}


@dataclass(frozen=True)
class Study:
    """A screen and what is left out of it in turn: the cases in the order of `cases_of`, {name: what is left out for it}."""

    data: AnnData
    recipe: PerturbationConfig
    base: ModelFolder | None
    leave_out: LeaveOut
    names: Mapping[str, str]
    notes: tuple[str, ...]

    def cases(self, measured: Collection[str]) -> Iterator[Case]:
        """Those not yet measured, as a model sees them that learned without them; fitted when they are asked for."""
        waiting = {unit for name, unit in self.names.items() if name not in measured}
        return cases_of(self.data, self.recipe, self.leave_out, self.base, set(self.names.values()) - waiting)


def measure_perturbation(config: TryPerturbation, bench: Bench) -> Tried:
    """Leaves out, foretells, compares; every case is measured once and remembered."""
    study = read_study(config)
    cases = study.cases({entry.place.protocol for entry in bench.ledger.entries()})
    found: list[Entry] = []
    for number, name in enumerate(study.names, 1):
        to_go = still_to_go([entry.seconds for entry in found], len(study.names))
        bench.say(f"[{number}/{len(study.names)}] {name} left out{to_go}")
        place = Place(Path(config.data).stem, name, number - 1, config.seed)
        found.append(bench.ledger.measured(place, Method("all", "control"), lambda name=name: _found(cases, name)))  # type: ignore[misc]
    scores = summary([_case(entry.details) for entry in found], config.seed)
    verdict = _verdict(scores, study.leave_out, config.seed)
    protocol = f"{study.leave_out.replace('_', ' ')} left out"
    entries = _rows(scores, Place(Path(config.data).stem, protocol, 0, config.seed))
    notes = (*study.notes, *_notes(scores))
    return Tried(verdict, evaluation_of("pearson", entries, "perturb", notes, [_drawn(scores, bench.pictures)]), HOW)


def read_study(config: TryPerturbation) -> Study:
    """The screen and what to leave out of it; ColumnError and DataError name the way out where there is nothing to."""
    data, recipe, base = read_h5ad(Path(config.data)), _recipe(config), base_of(config)
    check_columns(data, recipe)
    try:
        split = Split.of(read_cells(data, recipe, base)[0], recipe.seed)
        check_groups(split.screen.group, split.screen.name, recipe)
    except DataError as error:
        if type(error) is not DataError:  # about the file, not about the screen
            raise
        raise DataError(f"{error} ({KEYS_HINT})") from error
    pairs = split.pairs(split.screen, recipe)
    leave_out = _left_out(config, pairs)
    together = sorted({(pair.cell_type, pair.perturbation.name) for pair in pairs})
    types = {f"{perturbation} in {cell_type}": cell_type for cell_type, perturbation in together}
    names = types if leave_out == "cell_type" else {name: name for name in sorted({pair.perturbation.name for pair in pairs})}
    notes = [TOLD[leave_out]]
    if rare := sorted(split.screen.meaning.keys() - {pair.perturbation.name for pair in pairs}):
        notes.append(f"Too few cells, or controls beside them, to be asked for: {', '.join(rare[:12])}; {3 * recipe.min_cells} are needed.")
    return Study(data, recipe, base, leave_out, names, tuple(notes))


TOLD: Mapping[LeaveOut, str] = {
    "perturbation": "Each perturbation was left out with all its cells, and with the combinations that share a gene with it: this tells "
    "how a perturbation that you did not make would be foretold.",
    "cell_type": "The perturbed cells of each cell type were left out, their controls stayed: this tells how a cell type would answer that "
    "you did not perturb.",
}


def check_columns(data: AnnData, recipe: PerturbationConfig) -> None:
    """ColumnError and DataError, with the columns and names that may be meant, where obs does not say what was done to a cell."""
    key, control = recipe.perturbation_key, recipe.control
    if key not in data.obs:
        listed = "; ".join(candidates(data)) or "none: no column has a few different texts"
        raise ColumnError(
            f"no {key!r} in obs, which should say what was done to each cell. Columns that could: {listed}. Name yours and what it says "
            "of an untouched cell: -o recipe.perturbation_key=COLUMN -o recipe.control=NAME"
        )
    names = column(data, key)
    if control not in names:
        seen = sorted({str(name) for name in names if name is not None}, key=lambda name: (not _untouched(name), name))
        listed = ", ".join([*seen[:8], *["..."][: len(seen) > 8]]) or "nothing"
        raise DataError(
            f"no cell of obs[{key!r}] is {control!r} (it says {listed}): predictions start from control cells; say what yours are called: "
            "-o recipe.control=NAME"
        )


def candidates(data: AnnData) -> list[str]:
    """Columns of obs that could name perturbations, with some of their names; those that know a word for control first."""
    found = []
    for key in map(str, data.obs.columns):
        values = data.obs[key]
        if values.dtype.kind in "fiu" and str(values.dtype) != "category":
            continue
        names = sorted({str(name) for name in column(data, key) if name is not None}, key=lambda name: (not _untouched(name), name))
        if 2 <= len(names) <= min(MOST_NAMES, data.n_obs // 2):
            found.append((not _untouched(names[0]), key, names))
    return [f"{key} ({', '.join([*names[:4], *['...'][: len(names) > 4]])})" for _, key, names in sorted(found)]


def _untouched(name: str) -> bool:
    return name.strip().lower().replace("_", "-") in CONTROL_WORDS


def _left_out(config: TryPerturbation, pairs: Sequence[Pair]) -> LeaveOut:
    """What is left out in turn; DataError where there are no two of it."""
    least = 3 * config.recipe.min_cells
    names, types = sorted({pair.perturbation.name for pair in pairs}), sorted({pair.cell_type for pair in pairs})
    by_type = config.recipe.keys.labels_key is not None and len(types) > 1
    if config.leave_out == "auto" and (len(names) >= FEWEST or by_type):
        return "perturbation" if len(names) >= FEWEST else "cell_type"
    if config.leave_out == "perturbation" and len(names) > 1:
        return "perturbation"
    if config.leave_out == "cell_type" and by_type:
        return "cell_type"
    of_types = f" in {len(types)} cell types" if config.recipe.keys.labels_key is not None else ""
    raise DataError(
        f"too few to leave one out: {len(names)} perturbations have {least} cells beside as many controls of their own group"
        f"{of_types} ({', '.join(names[:8]) or 'none'}). Three perturbations are needed; with fewer, cells of two types and more: name "
        "their obs column with --labels-key. Groups are batch_key x labels_key: fewer, larger ones, or -o recipe.min_cells=3, may help"
    )


def _recipe(config: TryPerturbation) -> PerturbationConfig:
    recipe: PerturbationConfig = config.recipe.model_copy(update={"seed": config.seed})
    return recipe


def _found(cases: Iterator[Case], name: str) -> Found:
    """The case of this name, JSON-ready; another case of the same cell type that was measured before is passed by."""
    case = next(case for case in cases if case.name == name)
    plain = {
        "name": case.name,
        "truth": _short(case.truth),
        "answers": {row: _short(case.answers[row]) for row in ("model", *SIMPLE)},
        "de": [int(gene) for gene in case.de],
        "targets": [int(gene) for gene in case.targets],
        "reliability": float(case.reliability),
        "genes": list(case.genes),
    }
    return Found({}, plain)


def _short(change_G: Any) -> list[float]:
    return [round(float(value), 6) for value in change_G]


def _case(plain: Mapping[str, Any]) -> Case:
    answers = {row: np.array(change, dtype=np.float64) for row, change in plain["answers"].items()}
    truth, de = np.array(plain["truth"], dtype=np.float64), np.array(plain["de"], dtype=np.int64)
    return Case(plain["name"], truth, answers, de, tuple(plain["targets"]), plain["reliability"], tuple(plain["genes"]))


def _rows(scores: Mapping[str, Any], place: Place) -> list[Entry]:
    """A row of means over what was left out for each method, and the ceiling."""
    kinds = {"model": Method(MODEL_ROW, "model"), **{name: Method(name, "baseline") for name in SIMPLE}}
    found = [Entry(place, method, {key: float(scores[row][key]) for key in SHOWN}) for row, method in kinds.items()]
    return [*found, Entry(place, Method(CEILING, "ceiling"), {"pearson": float(scores["ceiling"])})]


def _verdict(scores: Mapping[str, Any], leave_out: LeaveOut, seed: int) -> Verdict:
    """Against the simple method that turned out best: hindsight that favours it, not us."""
    best = max(SIMPLE, key=lambda name: scores[name]["pearson"])
    mine, theirs = scores["model"]["by_perturbation"], scores[best]["by_perturbation"]
    lead = few_lead([mine[name] - theirs[name] for name in mine], seed)
    reliable = sum(value >= RELIABLE for value in scores["reliability"].values())
    noisy = f"{len(scores['unreliable'])} more are too noisy: the two halves of their cells do not tell the same change."
    remark = noisy if scores["unreliable"] else ""
    ours, other = float(scores["model"]["pearson"]), float(scores[best]["pearson"])
    return Verdict(MEASURES[leave_out], reliable, ours, best, other, lead, least=FEWEST, remark=remark)


def _drawn(scores: Mapping[str, Any], folder: Path) -> Picture:
    by_name = {(MODEL_ROW if row == "model" else row): scores[row]["by_perturbation"] for row in ("model", *SIMPLE)}
    axes = draw_units(new_axes((11, 5.5)), by_name, ("left out", "Pearson correlation over genes (-1 to 1)"), scores["ceiling"])
    path = save_axes(axes, folder / "perturbations.png")
    return Picture("What was left out", path, "Each one foretold by a fit that never saw it; the dotted line is explained in the notes.")


def _notes(scores: Mapping[str, Any]) -> list[str]:
    """What a perfect prediction would score, and what no prediction could."""
    noisy = ", ".join(f"{name} ({value:.2f})" for name, value in sorted(scores["unreliable"].items()))
    none = " None is reliable: all are shown, and say nothing." if len(scores["unreliable"]) == len(scores["reliability"]) else ""
    return [
        f"The most there is: {scores['ceiling']:.3f}. A perfect prediction would correlate that well with changes measured in so few "
        "cells; of_ceiling is a score divided by it, discrimination how high the right one ranks among all predictions (.5 is chance).",
        f"Left out of the means, for the change told by one half of the cells correlates below {RELIABLE:g} with that of the other: "
        f"{noisy or 'none'}.{none}",
    ]


def answer_perturbation(config: TryPerturbation, winner: str) -> tuple[Answer, str]:
    """A model that learned all perturbations, where it won; a simple method leaves nothing to write."""
    if winner != MODEL_ROW:
        return None, f"nothing was written: {WITHOUT_NETWORK[winner]}"
    pipeline = PerturbationPipeline(base_of(config), _recipe(config)).fit(read_h5ad(Path(config.data)))
    assert pipeline.folder_ is not None
    return pipeline.folder_, f"a model that learned all {len(pipeline.perturbations_)} perturbations, for cellplane predict perturb --model"


PERTURB = Task(TryPerturbation, measure_perturbation, answer_perturbation)
