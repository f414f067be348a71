"""docs/try.md says what is true: the keys it names exist, and so do the functions of `cellplane.pl`."""

from __future__ import annotations

import re

from cellplane import pl
from tests.house.source import ROOT

PAGE = (ROOT / "docs" / "try.md").read_text(encoding="utf-8")


def keys_in(text: str) -> set[str]:
    return set(re.findall(r'(?:obs|obsm|layers|uns)\["([a-zA-Z_]+)"\]', text))


def test_every_key_of_an_answer_is_written_by_the_code():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "platform" / "cellplane").rglob("*.py"))
    written = set(re.findall(r'"([a-zA-Z_]+)"', code)) | {f"cellplm{end}" for end in re.findall(r'"\{key_added\}(_[a-z_]+)"', code)}
    assert len(keys_in(PAGE)) >= 9
    assert keys_in(PAGE) <= written


def test_every_picture_that_is_named_can_be_drawn():
    table = PAGE[PAGE.index("## Pictures in a notebook") :]
    named = set(re.findall(r"`?(\w+)\([a-z]+", table)) - {"savefig", "predict"}
    assert {"umap", "confusion", "per_class_f1", "reliability", "gene_pearson", "spatial", "change"} <= named
    assert not [name for name in named if not callable(getattr(pl, name, None))]


def test_every_configuration_that_is_named_is_shipped():
    shipped = {path.stem for path in (ROOT / "configs" / "try").glob("*.yaml")}
    assert shipped == {"annotate", "embed", "impute", "denoise", "perturb"}
    assert (ROOT / "configs" / "annotate" / "folder.yaml").is_file()
