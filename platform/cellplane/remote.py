"""Files answered by an endpoint: the outputs of the offline predict, with the model running elsewhere.

A file is read whole, sent sentence by sentence, and its answer written beside its target and renamed. Answers that the
served version gave before are kept, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cellplane.batch import ANSWERS, PredictReport
from cellplane.client import Client, Options, Progress, quiet
from cellplane.data.config import DataKeys
from cellplane.data.files import gone_if_empty
from cellplane.data.inputs import check_answers
from cellplane.data.sources import AnnData, query_keys, read_h5ad, write_h5ad
from cellplane.errors import CellplaneError, ConfigError, ServiceError
from cellplane.inference import reading_keys
from cellplane.results import ONLY_SOME, answered

KEY_VARIABLE = "CELLPLANE_API_KEY"  # of a caller; a key on the command line would be seen by everybody
OF_THE_CELLS = (413, 422)  # what an endpoint says to one file and not to the next


@dataclass(frozen=True)
class Remote:
    """Which endpoint is asked, and what: ``model`` NAME[@ALIAS or :VERSION], '' where only one is served."""

    url: str
    task: Literal["annotate", "embed", "denoise", "impute", "perturb"]
    model: str = ""
    keys: DataKeys | None = None
    options: Options | None = None
    perturbations: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.model.startswith("models:"):
            raise ConfigError(f"an endpoint knows its models by the names they are served by: --model NAME and not {self.model}")


def predict_remote(remote: Remote, inputs: Sequence[Path], out: Path, progress: Progress = quiet) -> PredictReport:
    """Asks about every input; one h5ad of the same name in ``out`` for each. The key is taken from $CELLPLANE_API_KEY.

    What the endpoint says to one file's cells is that file's failure. Raises ServiceError when it cannot be asked at all,
    ConfigError for a task the model has not, two inputs of one name or an answer that would overwrite its input.
    """
    check_answers(inputs, out)
    written, reused, failed, cells = [], [], dict[str, str](), 0
    with gone_if_empty(out), Client(remote.url, os.environ.get(KEY_VARIABLE)) as client:
        served = _served(client, remote)
        exact, holds = f"{served['name']}:{served['version']}", ANSWERS.get(remote.task, ("uns", "cellplm"))
        for path in inputs:
            target = out / path.name
            if not remote.options and remote.perturbations is None and answered(path, target, served["model_sha256"], holds):
                reused.append(target)
                continue
            try:
                data = read_h5ad(path)
                write_h5ad(ASKED[remote.task](client, data, exact, remote, progress), target)
            except CellplaneError as error:
                if isinstance(error, ServiceError) and error.status not in OF_THE_CELLS:
                    raise
                failed[str(path)] = str(error)
                continue
            written.append(target)
            cells += data.n_obs
    return PredictReport(tuple(written), tuple(reused), cells, failed)


def _served(client: Client, remote: Remote) -> dict[str, Any]:
    """The version that is asked for the whole run, whatever is promoted meanwhile."""
    served = client.model(remote.model or _only(client, remote.url))
    if remote.task not in served["tasks"]:
        raise ConfigError(f"{served['name']} cannot {remote.task}, it can {', '.join(served['tasks'])}")
    return served


def _only(client: Client, url: str) -> str:
    """The name of the one model that is served."""
    names = sorted({str(model["name"]) for model in client.models()})
    if len(names) != 1:
        raise ConfigError(f"name the model with --model: {', '.join(names) or 'none'} is served at {url}")
    return names[0]


def _written(client: Client, data: AnnData, model: str, remote: Remote, progress: Progress) -> AnnData:
    """The cells with their answers in them, read as is said, else as the cells that the model learned."""
    keys = None
    if remote.keys is not None:
        own = client.model(model).get("keys")
        keys = query_keys(data, reading_keys(None if own is None else DataKeys.model_validate(own), remote.keys))
    getattr(client, remote.task)(data, model, keys, remote.options, progress)
    return data


def _impute(client: Client, data: AnnData, model: str, remote: Remote, progress: Progress) -> AnnData:
    return client.impute(data, model, None, remote.options, progress)


def _perturb(client: Client, data: AnnData, model: str, remote: Remote, progress: Progress) -> AnnData:
    found = client.perturb(data, model, remote.perturbations, None, remote.options, progress)
    if remote.perturbations is not None:
        found.uns["cellplm"][ONLY_SOME] = True
    return found


ASKED: dict[str, Callable[[Client, AnnData, str, Remote, Progress], AnnData]] = {
    "annotate": _written,
    "embed": _written,
    "denoise": _written,
    "impute": _impute,
    "perturb": _perturb,
}
