"""The door to MLflow's database or server: reached once, or an error in one line.

MLflow imports slowly, so nothing of it is loaded before `connect`; its telemetry and its reading
of pickles are switched off there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedml import failpoints
from fedml.durable import failure, sync_folder
from fedml.errors import ConfigError, Unreachable

if TYPE_CHECKING:
    from mlflow import MlflowClient


_FILE = "sqlite:///"


def connect(uri: str, artifacts: Path) -> MlflowClient:
    """Return a client of the MLflow at `uri`; a fresh database gets its tables, under a lock.

    `uri` is a database, `sqlite:////path/registry.db` or `postgresql://user@host/name`, or a
    server, `http://host`. The lock is in the folder `artifacts`. Raises `Unreachable` or
    `ConfigError`.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    artifacts.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    with _alone(artifacts / ".migration.lock"), mlflow_errors(uri):
        _check_reachable(uri)
        if uri.startswith(_FILE) and not Path(uri.removeprefix(_FILE)).exists():
            _make(Path(uri.removeprefix(_FILE)))
        client: MlflowClient = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_registered_models(max_results=1)
    return client


def _make(path: Path) -> None:
    """Make a SQLite file with MLflow's tables, whole or not at all.

    MLflow makes them in many steps, and one that was broken off in the middle stays broken.
    """
    from mlflow import MlflowClient

    draft = path.with_name(f"{path.name}.draft")
    for left in path.parent.glob(f"{draft.name}*"):
        left.unlink()
    uri = f"{_FILE}{draft}"
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_registered_models(max_results=1)
    failpoints.reach("registry.drafted")
    draft.rename(path)
    sync_folder(path.parent)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is here. The kernel lets go when a process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_reachable(uri: str) -> None:
    """Try the database once: MLflow itself would try again, silently, for half an hour."""
    from sqlalchemy import create_engine

    if not uri.startswith(("sqlite:", "http:", "https:")):
        engine = create_engine(uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow and its database raise into what a caller can act on."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    try:
        yield
    except OperationalError as error:
        raise Unreachable(_line(uri, error)) from error
    except MlflowException as error:
        away = error.error_code == "TEMPORARILY_UNAVAILABLE" or "API request to" in str(error)
        raise (Unreachable if away else ConfigError)(_line(uri, error)) from error
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        raise ConfigError(_line(uri, error)) from error
    except OSError as error:
        raise failure(_line(uri, error), error) from error


def _line(uri: str, error: Exception) -> str:
    """One line without the password, which MLflow and SQLAlchemy like to repeat."""
    scheme, _, rest = uri.partition("://")
    login, _, place = rest.rpartition("@")
    text = " ".join(str(error).split())
    if login:
        text = text.replace(login, "...")
    return f"registry {scheme}://{place}: {text}"[:400]
