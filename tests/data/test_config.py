"""The data configurations say what they mean and refuse what they cannot mean."""

from __future__ import annotations

import pytest

from cellplane.config import configs_root, load_config
from cellplane.data.config import ConvertConfig
from cellplane.errors import ConfigError


@pytest.mark.parametrize("path", sorted((configs_root() / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_data_config_loads_and_names_its_kind(path):
    assert load_config(ConvertConfig, path, "data").kind == "data"


def test_the_default_file_shows_every_key_with_its_default():
    loaded = load_config(ConvertConfig, "default", "data")
    assert loaded == ConvertConfig(inputs=loaded.inputs, out=loaded.out)
    text = (configs_root() / "data" / "default.yaml").read_text()
    assert all(f"{key}:" in text for key in ConvertConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_cell=3", "did you mean 'max_cells'"),
        ("keys.batchkey=a", "did you mean 'keys.batch_key'"),
        ("max_cells=0", "max_cells"),
        ("inputs=[]", "inputs"),
        ("inputs=[a.h5ad,a.h5ad]", "stands in the list twice"),
        ("kind=model", "kind"),
    ],
)
def test_a_wrong_value_is_named(override, said):
    with pytest.raises(ConfigError, match=said):
        load_config(ConvertConfig, "default", "data", [override])
