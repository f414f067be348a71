"""Bearer keys: who may ask the endpoint, and for what.

A key file has one line a key: ``name sha256-of-the-key scope[,scope]``. Keys themselves are 256 random bits, shown
once and never stored, so a plain sha256 is enough: there is nothing to guess by dictionary.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from cellplane.client import LOOPBACK as LOOPBACK
from cellplane.errors import ConfigError, ServiceError

SCOPES = ("predict", "read")  # ask models; or only look: what is served, cards, metrics. Nothing over HTTP changes what is served
HOLDER = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
DIGEST = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class ApiKey:
    """One holder: a name for the log, the key's sha256, what it may do."""

    name: str
    digest: str
    scopes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not HOLDER.fullmatch(self.name) or not DIGEST.fullmatch(self.digest):
            raise ConfigError("an API key line is `name sha256 scope[,scope]`: a plain name and 64 hexadecimal digits")
        if unknown := sorted(set(self.scopes) - set(SCOPES)) or not self.scopes:
            raise ConfigError(f"API key {self.name!r} has scopes {unknown or 'none'}; valid are {', '.join(SCOPES)}")


@dataclass(frozen=True)
class ApiKeys:
    """The keys an endpoint accepts."""

    keys: tuple[ApiKey, ...]

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """The keys of a file; empty lines and lines with # are left out. ConfigError when it is missing, empty or wrong."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API key file {path} cannot be read: {type(error).__name__}") from error
        fields = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not fields or any(len(words) != 3 for words in fields):
            raise ConfigError(f"the API key file {path} needs at least one line, each `name sha256 scope[,scope]`")
        return cls(tuple(ApiKey(name, digest.lower(), tuple(scopes.split(","))) for name, digest, scopes in fields))

    def check(self, authorization: str | None, scope: str) -> str:
        """The name of the holder of a valid key with this scope.

        ServiceError 401 without a known key, 403 when its scopes do not reach. Every key is compared, each in constant
        time, so that the time taken tells nothing.
        """
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        matches = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        if scheme.lower() != "bearer" or not matches:
            raise ServiceError("an API key is needed: send the header `Authorization: Bearer KEY` with a key this endpoint knows", 401)
        if not any(scope in key.scopes or (scope == "read" and "predict" in key.scopes) for key in matches):
            raise ServiceError(f"this API key may not {scope}; ask for one with the scope {scope!r}", 403)
        return matches[0].name


def new_key(name: str, scopes: tuple[str, ...] = ("predict",)) -> tuple[str, str]:
    """A fresh secret key for its holder, and the line for the key file."""
    key = secrets.token_urlsafe(32)
    entry = ApiKey(name, hashlib.sha256(key.encode()).hexdigest(), scopes)
    return key, f"{entry.name} {entry.digest} {','.join(entry.scopes)}"
