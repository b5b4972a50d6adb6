"""Settings: environment variables, and the embedded default when none is set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import sqlalchemy as sa
from platformdirs import user_data_path
from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from jobs.errors import SettingsError
from jobs.fields import ALLOWED, MODEL_NAME
from jobs.redaction import check_authority, with_checked_certificate

BROKER_SCHEMES = ("memory", "redis", "rediss")
STORAGE_SCHEMES = ("file", "s3")
#: Where a model is: a path, inside the package, or on the shelf (what `nightshift models add` put on this machine).
ModelPath = Path | Literal["shipped", "shelf"]

#: What is served where nobody chose, and its name.
SHIPPED: Mapping[str, ModelPath] = {"nightshift-mini": "shipped"}


def database_in(home: Path) -> str:
    """The URL of the embedded database in this data directory, whatever characters are in its name."""
    return sa.URL.create("sqlite", database=str(home / "nightshift.db")).render_as_string(hide_password=False)


def storage_in(home: Path) -> str:
    """The URL of the embedded storage in this data directory."""
    return (home / "storage").as_uri()


class Settings(BaseSettings):
    """Where things are. Each field reads NIGHTSHIFT_<FIELD>; URLs may hold passwords and are never shown."""

    model_config = SettingsConfigDict(
        env_prefix="NIGHTSHIFT_", env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    home: Path = Field(
        default_factory=lambda: user_data_path("nightshift"),
        description="data directory of the embedded default; made when missing",
    )
    database_url: str = Field(
        default_factory=lambda data: database_in(data["home"]),
        repr=False,
        description="SQLAlchemy URL: sqlite:////dir/nightshift.db or postgresql://user:password@host/name",
    )
    broker_url: str = Field(
        default="memory://",
        repr=False,
        description="Celery broker: redis://host:6379/0, rediss://..., or memory:// (the worker looks by itself)",
    )
    storage_url: str = Field(
        default_factory=lambda data: storage_in(data["home"]),
        repr=False,
        description="file:///dir or s3://bucket/prefix; credentials and endpoint by boto3's own variables (AWS_...)",
    )
    models: Annotated[dict[str, ModelPath], NoDecode] = Field(
        default_factory=lambda: dict(SHIPPED),
        description="the worker's models, separated by commas: name=path, or the name alone of one on the shelf; "
        "the path `shipped` is the model inside; unset: that one and the whole shelf",
    )

    png_parameters: bool = Field(
        default=True, description="whether each PNG carries its prompt, seed and other parameters; 0: no text at all"
    )

    def __init__(self, **values: Any) -> None:
        """Raises SettingsError, naming the variable; pydantic's own error would show the value, password and all."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            # A default that depends on a bad value is no news of its own.
            bad = [details for details in error.errors() if details["type"] != "default_factory_not_called"]
            raise SettingsError("; ".join(_sentence(details) for details in bad)) from None

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, url: str) -> str:
        _known_scheme(url, BROKER_SCHEMES, "filesystem:// and sqla:// lose messages")
        for one in url.split(";"):  # several: where to go when the first does not answer
            check_authority(one)
            if re.search(r"[?&](?:password|username)=", one):
                raise ValueError("has a name or password in its query; write it before the host: //name:password@host")
        return with_checked_certificate(url)

    @field_validator("storage_url")
    @classmethod
    def _known_storage(cls, url: str) -> str:
        return _known_scheme(url, STORAGE_SCHEMES, "a plain path is written file:///dir")

    @field_validator("models", mode="before")
    @classmethod
    def _read_models(cls, value: object) -> object:
        """`name=path,name`; a name alone is on the shelf, or the shipped model's. A mapping passes as it is."""
        if isinstance(value, Mapping):
            return dict(value)
        pairs = [pair.strip() for pair in str(value).split(",") if pair.strip()]
        split = ((name.strip(), found, path.strip()) for name, found, path in (pair.partition("=") for pair in pairs))
        models = {name: path if found else SHIPPED.get(name, "shelf") for name, found, path in split}
        if len(models) != len(pairs) or not all(models) or not all(models.values()):
            raise ValueError("is no list of distinct name=path or names on the shelf, separated by commas")
        if not all(re.fullmatch(MODEL_NAME, name) for name in models):
            raise ValueError(f"has a name that no job can ask for; allowed: {ALLOWED['model']}")
        return models

    @property
    def serves_whole_shelf(self) -> bool:
        """Whether nobody chose the models: then a worker serves the shelf beside the shipped one."""
        return "models" not in self.model_fields_set

    @property
    def embedded(self) -> bool:
        """Whether the database or the storage lives in the data directory."""
        return not {"database_url", "storage_url"} <= self.model_fields_set

    def make_home(self) -> None:
        """Make the data directory if anything lives there, for its owner alone: prompts and pictures are private."""
        if not self.embedded:
            return
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"NIGHTSHIFT_HOME: cannot make {self.home}: {error.strerror}") from None


def _known_scheme(url: str, schemes: tuple[str, ...], hint: str) -> str:
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        scheme = ""
    if scheme not in schemes:
        known = ", ".join(f"{each}://" for each in schemes)
        raise ValueError(f"begins with {scheme + '://' if scheme else 'no scheme'}; known are {known} ({hint})")
    return url


def _sentence(details: ErrorDetails) -> str:
    name = str(details["loc"][0]) if details["loc"] else ""
    if details["type"] == "extra_forbidden":
        return f"there is no setting {name}; the settings are {', '.join(Settings.model_fields)}"
    if details["type"] == "bool_parsing":
        return f"NIGHTSHIFT_{name.upper()} is {details['input']!r}; allowed: 1 or 0"
    return f"NIGHTSHIFT_{name.upper()} {str(details['msg']).removeprefix('Value error, ')}"
