"""Key files: what is stored is a hash, and whoever writes the file is told what is wrong with it."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from cellplane.errors import ConfigError, ServiceError
from serve import security
from serve.security import ApiKeys, new_key


def write(folder: Path, *lines: str) -> Path:
    file = folder / "keys"
    file.write_text("\n".join(lines))
    return file


def test_a_new_key_opens_what_its_line_says(tmp_path: Path) -> None:
    key, line = new_key("lab", ("predict",))
    assert key not in line
    keys = ApiKeys.load(write(tmp_path, "# who may ask", "", line))
    assert keys.check(f"Bearer {key}", "predict") == "lab"
    assert keys.check(f"bearer {key}", "read") == "lab", "who may ask may look"


def test_keys_differ_every_time() -> None:
    assert new_key("a")[0] != new_key("a")[0]


def test_a_missing_scope_is_forbidden_and_an_unknown_key_unauthenticated(tmp_path: Path) -> None:
    key, line = new_key("scraper", ("read",))
    keys = ApiKeys.load(write(tmp_path, line))
    assert keys.check(f"Bearer {key}", "read") == "scraper"
    wrong = [(f"Bearer {key}", "predict", 403), *((header, "predict", 401) for header in ("Bearer x", "Bearer \udcff", "", None))]
    for header, scope, status in wrong:
        with pytest.raises(ServiceError) as caught:
            keys.check(header, scope)
        assert caught.value.status == status
        assert key not in str(caught.value)


def test_every_key_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [new_key(f"user{number}") for number in range(3)]
    keys = ApiKeys.load(write(tmp_path, *(line for _, line in made)))
    compared = []

    def counting(first: str, second: str) -> bool:
        compared.append((first, second))
        return hmac.compare_digest(first, second)

    monkeypatch.setattr(security, "hmac", type("counted", (), {"compare_digest": staticmethod(counting)}))
    keys.check(f"Bearer {made[0][0]}", "predict")
    assert len(compared) == 3


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "line", ["", "# nothing", "name", "name abc predict", f"name {DIGEST} deploy", f"na/me {DIGEST} predict", f"name {DIGEST} ,"]
)
def test_a_bad_key_file_is_a_config_error(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError):
        ApiKeys.load(write(tmp_path, line))


def test_a_missing_key_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys.load(tmp_path / "none")
