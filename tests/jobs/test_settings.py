"""Settings: the embedded default, the environment, and one clear sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import Client
from jobs.db import open_engines
from jobs.errors import SettingsError
from jobs.settings import Settings
from tests.jobs.test_inputs import drawn


def test_with_nothing_set_everything_is_in_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIGHTSHIFT_HOME")
    settings = Settings()
    assert settings.home.is_absolute()
    assert settings.home.name == "nightshift"
    assert settings.database_url == f"sqlite:///{settings.home}/nightshift.db"
    assert settings.storage_url == f"file://{settings.home}/storage"
    assert settings.broker_url == "memory://"
    assert settings.models == {"nightshift-mini": "shipped"}
    assert settings.embedded


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path / "a b"))
    monkeypatch.setenv("NIGHTSHIFT_DATABASE_URL", "postgresql://me:x@host/name")
    monkeypatch.setenv("NIGHTSHIFT_BROKER_URL", "redis://:geheim@host/1")
    monkeypatch.setenv("NIGHTSHIFT_STORAGE_URL", "s3://bucket/prefix")
    monkeypatch.setenv("NIGHTSHIFT_MODELS", "nightshift-mini=shipped, sd15=/models/sd15")
    settings = Settings()
    assert settings.models == {"nightshift-mini": "shipped", "sd15": Path("/models/sd15")}
    assert not settings.embedded
    settings.make_home()
    assert not settings.home.exists()
    assert "geheim" not in repr(settings)


def test_a_name_alone_is_a_model_of_the_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().serves_whole_shelf
    monkeypatch.setenv("NIGHTSHIFT_MODELS", "nightshift-mini, sd15 ,anime")
    settings = Settings()
    assert settings.models == {"nightshift-mini": "shipped", "sd15": "shelf", "anime": "shelf"}
    assert not settings.serves_whole_shelf


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_BROKER_URL", "")
    assert Settings().broker_url == "memory://"


def test_everything_stays_in_the_home_whatever_it_is_called(tmp_path: Path) -> None:
    home = tmp_path / "100% #mine? %41 ä b"
    with Client(Settings(home=home)) as client:
        job = client.submit("a star", init_image=drawn())
    assert (home / "nightshift.db").is_file()
    assert (home / "storage" / str(job.spec.init_image)).is_file()
    assert [path.name for path in tmp_path.iterdir()] == [home.name]


def test_the_home_is_for_its_owner_alone(settings: Settings) -> None:
    settings.make_home()
    assert settings.home.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("broker_url", "geheim", "known are memory://"),
        ("broker_url", "filesystem://geheim", "lose messages"),
        ("storage_url", "/geheim", "file:///dir"),
        ("storage_url", "ftp://geheim", "known are file://"),
        ("models", "geheim=", "name=path"),
        ("models", "geheim/x.ckpt", "no job can ask for"),
        ("models", "a=geheim,a=y", "distinct"),
        ("models", "=geheim", "name=path"),
        ("models", "a geheim=shipped", "no job can ask for"),
        ("home", 3, "NIGHTSHIFT_HOME"),
        ("png_parameters", "maybe", "is 'maybe'; allowed: 1 or 0"),
    ],
)
def test_a_bad_setting_is_one_sentence_with_its_name(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        Settings(**{field: value})
    assert f"NIGHTSHIFT_{field.upper()}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "geheim" not in str(caught.value).replace("filesystem://", "")


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(SettingsError, match="there is no setting datbase_url"):
        Settings(datbase_url="x")


@pytest.mark.parametrize(
    "url", ["geheim", "mysql://me:geheim@host/x", "sqlite://", "sqlite:///:memory:", "sqlite:////no/such/folder/x.db"]
)
def test_a_bad_database_url_is_one_sentence(url: str) -> None:
    with pytest.raises(SettingsError, match="NIGHTSHIFT_DATABASE_URL") as caught:
        open_engines(url)
    assert "geheim" not in str(caught.value)


def test_a_home_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match="NIGHTSHIFT_HOME"):
        Settings(home=tmp_path / "file" / "home").make_home()


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
