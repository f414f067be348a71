"""The public names are few and real, and asking for them costs nothing until they are used."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys

import cellplane
from tests.house.source import PLATFORM, PYPROJECT, ROOT, lazy_names

HEAVY = ("torch", "ray", "mlflow", "deepspeed", "scanpy", "pandas", "anndata", "sklearn", "matplotlib")
IMPORT_S = 0.05  # what `import cellplane` may add to bare Python


def fresh(code: str) -> str:
    """Standard output of a new interpreter."""
    path = os.environ | {"PYTHONPATH": str(PLATFORM)}
    done = subprocess.run([sys.executable, "-c", code], env=path, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str) -> set[str]:
    """Top-level modules that are in memory after ``code`` in a new interpreter."""
    listing = "import json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    return set(json.loads(fresh(f"{code}\n{listing}").splitlines()[-1]))


def test_at_most_twelve_names_are_public_and_every_one_exists():
    assert len(cellplane.__all__) <= 12
    assert list(cellplane.__all__) == sorted(cellplane.__all__)
    for name in cellplane.__all__:
        assert getattr(cellplane, name) is not None


def test_the_list_of_names_equals_what_can_be_reached():
    assert set(cellplane.__all__) == {*lazy_names(), "__version__"}
    assert set(dir(cellplane)) == set(cellplane.__all__)


def test_every_name_lives_where_the_package_says():
    for name, home in lazy_names().items():
        found = getattr(cellplane, name)
        assert getattr(found, "__module__", found.__name__) == home, name


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(cellplane, "no_such_name")


def test_the_version_is_told_once():
    assert cellplane.__version__ == PYPROJECT["project"]["version"]
    assert re.search(rf"^## \[{re.escape(cellplane.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_importing_the_package_is_as_good_as_free():
    code = "import time; start = time.perf_counter(); import cellplane; print(time.perf_counter() - start)"
    times = [float(fresh(code)) for _ in range(7)]
    assert statistics.median(times) < IMPORT_S or min(times) < IMPORT_S / 2, f"{sorted(times)} s"


def test_importing_the_package_imports_nothing_heavy():
    assert not imported("import cellplane") & {*HEAVY, "pydantic", "numpy", "omegaconf"}


def test_importing_the_package_makes_waiting_threads_sleep():
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = f"import os\nfor name in {names}:\n    os.environ.pop(name, 0)\nimport cellplane\nprint(*map(os.environ.get, {names}))"
    assert fresh(code).split() == ["passive", "0"]


def test_help_is_shown_without_importing_anything_heavy():
    ask = "import sys\nsys.argv = ['cellplane', '--help']\nfrom cellplane.cli.main import main\n"
    assert not imported(ask + "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code") & set(HEAVY)


def test_public_classes_say_what_they_are():
    for name in lazy_names():
        assert (getattr(cellplane, name).__doc__ or "").strip(), name


def test_the_lazy_table_is_plain_data():
    tree = ast.parse((ROOT / "platform/cellplane/__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cellplane")]
