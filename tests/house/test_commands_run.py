"""Every command that a page shows is run by a test, or is listed here with the reason why no test runs it.

The test that runs a command is named beside the words by which it is found there; the quickstart runs line by line in
tests/release, from an installed wheel.
"""

from __future__ import annotations

import re

import pytest

from tests.house.source import ROOT
from tests.house.test_readme import GUIDES, commands, resolve

MAIN, CLI = "tests/cli/test_main.py", "tests/cli/"
RUN_BY = {
    "cellplane annotate": (CLI + "test_try.py", '"annotate"'),
    "cellplane config list": (MAIN, '"config", "list"'),
    "cellplane config show": (MAIN, '"config", "show"'),
    "cellplane data convert": (MAIN, '"data", "convert"'),
    "cellplane data export": (MAIN, '"data", "export"'),
    "cellplane data genes install": (CLI + "test_genes.py", '"genes", "install"'),
    "cellplane data genes report": (CLI + "test_genes.py", '"genes", "report"'),
    "cellplane data info": (MAIN, '"data", "info"'),
    "cellplane data simulate": ("docs/quickstart.md", "cellplane data simulate"),
    "cellplane data validate": ("tests/data/test_validate.py", '"data", "validate"'),
    "cellplane demo": ("tests/test_demo.py", '"demo"'),
    "cellplane diff": ("tests/test_difference.py", '"diff"'),
    "cellplane doctor": (MAIN, '"doctor"'),
    "cellplane down": (MAIN, '"down"'),
    "cellplane evaluate annotate": (MAIN, '"evaluate", "annotate"'),
    "cellplane evaluate denoise": (MAIN, '"evaluate", "denoise"'),
    "cellplane evaluate embed": (CLI + "test_protocols.py", '"evaluate", "embed"'),
    "cellplane evaluate unknown": (CLI + "test_protocols.py", '"evaluate", "unknown"'),
    "cellplane finetune annotate": (MAIN, '"finetune", "annotate"'),
    "cellplane finetune denoise": (MAIN, '"finetune", "denoise"'),
    "cellplane finetune impute": (MAIN, '"finetune", "impute"'),
    "cellplane gc": (CLI + "test_gc.py", '"gc"'),
    "cellplane inventory": ("tests/test_inventory.py", '"inventory"'),
    "cellplane jobs list": (CLI + "test_submit_cluster.py", '"jobs", "list"'),
    "cellplane jobs logs": (CLI + "test_submit_cluster.py", '"jobs", "logs"'),
    "cellplane jobs stop": (CLI + "test_submit_cluster.py", '"jobs", "stop"'),
    "cellplane k8s render": (CLI + "test_k8s.py", '"k8s", "render"'),
    "cellplane models history": (CLI + "test_promotion.py", '"models", "history"'),
    "cellplane models import": (CLI + "test_models_import.py", '"models", "import"'),
    "cellplane models list": (MAIN, '"models", "list"'),
    "cellplane models promote": (CLI + "test_promotion.py", '"models", "promote"'),
    "cellplane models rollback": (CLI + "test_promotion.py", '"models", "rollback"'),
    "cellplane plan": (CLI + "test_plan.py", "plan"),
    "cellplane predict annotate": (MAIN, '"predict", "annotate"'),
    "cellplane predict denoise": (MAIN, '"predict", "denoise"'),
    "cellplane predict impute": ("tests/serve/test_predict_via.py", '"impute"'),
    "cellplane pretrain": (MAIN, '"pretrain"'),
    "cellplane serve": ("docs/quickstart.md", "cellplane serve"),
    "cellplane status": (MAIN, '"status"'),
    "cellplane submit": (CLI + "test_submit_cluster.py", '"submit"'),
    "cellplane try annotate": (CLI + "test_try.py", '"try", "annotate"'),
    "cellplane try denoise": (CLI + "test_try.py", '"try", "denoise"'),
    "cellplane try embed": (CLI + "test_try.py", '"try", "embed"'),
    "cellplane try impute": (CLI + "test_try.py", '"try", "impute"'),
    "cellplane try perturb": (CLI + "test_try.py", '"try", "perturb"'),
    "cellplane tune annotate": (MAIN, '"tune", "annotate"'),
    "cellplane up": ("docs/quickstart.md", "cellplane up"),
    "python -m jobs.benchmark plan": ("tests/benchmark/test_plan_benchmark.py", "PlanBenchmark"),
    "make sbom": ("tests/test_inventory.py", "sbom"),
}
NOT_RUN = {
    "cellplane evaluate impute": "takes an hour on its real files; its protocol runs in tests/pipelines/test_imputation_protocol.py",
    "cellplane evaluate perturb": "takes an hour on its real files; its protocol runs in tests/pipelines",
    "python -m jobs.benchmark model": "installs the released package into an environment of its own",
    "python -m jobs.benchmark serve": "measures for minutes, on a machine that must be quiet; its parts run in tests/benchmark",
    "python -m jobs.benchmark train": "measures for minutes, on a machine that must be quiet; its parts run in tests/benchmark",
    "make audit": "asks a service on the network",
    "make backends": "needs servers that are installed apart; runs tests/backends",
    "make chaos": "kills processes for half an hour; runs tests/chaos",
    "make chaos-full": "kills processes for hours; runs tests/chaos",
    "make check": "is this very check",
    "make demo": "is `cellplane demo` in an environment that it makes itself",
    "make fast": "is a part of `make test`",
    "make gpu": "needs a CUDA device",
    "make reference": "writes what tests/house/test_reference.py compares",
    "make release": "makes two environments from a package index; runs tests/release",
    "make test": "is this very run",
    "make venv": "is what makes the environment of this run",
}
JOBS = "a job is the verb of that name with the same function behind it, see tests/cli/test_main.py"


def shown() -> list[str]:
    """Verbs, targets and jobs that pages show, without their options."""
    found = set()
    for guide in GUIDES:
        for words in commands(guide) if not guide.startswith("docs/reference/") else []:
            if words[0] == "cellplane":
                found.add(" ".join(["cellplane", *resolve(words[1:])[0]]))
            elif words[0] == "make":
                found |= {f"make {word}" for word in words[1:] if "=" not in word}
            else:
                found.add(" ".join(["python", *words[1 : 4 if words[2] == "jobs.benchmark" else 3]]))
    return sorted(found)


@pytest.mark.parametrize("command", shown())
def test_a_command_is_run_by_a_test_or_said_not_to_be(command: str) -> None:
    if command.startswith("python -m jobs.") and not command.startswith("python -m jobs.benchmark"):
        job = command.removeprefix("python -m jobs.")
        assert f"jobs.{job}" in (ROOT / MAIN).read_text(encoding="utf-8") or (ROOT / "jobs" / f"{job}.py").read_text(
            encoding="utf-8"
        ).count("cellplane.cli"), JOBS
        return
    assert (command in RUN_BY) != (command in NOT_RUN), f"name the test that runs `{command}`, or say why none does"


@pytest.mark.parametrize("command", RUN_BY)
def test_the_named_test_has_the_words(command: str) -> None:
    place, words = RUN_BY[command]
    text = (ROOT / place).read_text(encoding="utf-8")
    written = re.escape(words).replace(r"\ ", r"\s+")
    split = re.escape(words.replace('", "', " ").strip('"'))
    assert re.search(written, text) or re.search(rf'"{split}\b', text), f"{place} does not run `{command}` any more"
