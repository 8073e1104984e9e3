from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from fedml.errors import ConfigError, Corrupt, FedmlError, NoRoom, Unreachable
from fedml.protocol.messages import RunId
from fedml.protocol.operations import Receipt
from fedml.releases.database import mlflow_errors
from fedml.releases.registry import Story
from fedml.releases.tracking import MlflowRegistry
from tests.bundles import write_bundle

_BOTH = {"live": 1, "candidate": 2}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> MlflowRegistry:
    folder = tmp_path_factory.mktemp("mlflow")
    return MlflowRegistry(f"sqlite:///{folder / 'registry.db'}", folder / "artifacts")


def test_people_find_the_curves_and_the_lineage_in_mlflow(
    registry: MlflowRegistry, tmp_path: Path
) -> None:
    receipts = [
        Receipt(RunId("run-1"), n, 1, (), (), metrics={"loss": 1 / n}, closed=float(n))
        for n in (1, 2, 3)
    ]
    manifest = write_bundle(tmp_path, "curves")
    registry.stage(tmp_path, Story(receipts, {f"setting.{n}": str(n) for n in range(250)}))
    client = MlflowClient(registry.uri, registry.uri)
    version = client.get_model_version("curves", "1")
    assert version.run_id
    assert [m.value for m in client.get_metric_history(version.run_id, "loss")] == [1, 1 / 2, 1 / 3]
    run = client.get_run(version.run_id)
    assert run.data.params["setting.249"] == "249"
    assert run.data.metrics["final/epsilon/hospital-a"] == 1.5
    assert run.data.tags["fedml.digest"] == manifest.digest
    assert run.info.status == "FINISHED"


def test_an_alias_in_mlflow_follows_the_promotion(registry: MlflowRegistry, tmp_path: Path) -> None:
    for version in (1, 2):
        write_bundle(tmp_path / str(version), "alias", version)
        registry.stage(tmp_path / str(version))
    registry.promote("alias", 1)
    client = MlflowClient(registry.uri, registry.uri)
    aliases = {alias: client.get_model_version_by_alias("alias", alias).version for alias in _BOTH}
    assert {alias: int(version) for alias, version in aliases.items()} == _BOTH


def test_a_crash_before_the_version_is_created_can_be_repeated(
    registry: MlflowRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(BaseException):
        pass

    def cut(*_: object, **__: object) -> None:
        raise Cut

    write_bundle(tmp_path, "crash")
    for method in ("log_artifacts", "set_terminated", "create_model_version"):
        with monkeypatch.context() as patch:
            patch.setattr(registry._client, method, cut)
            with pytest.raises(Cut):
                registry.stage(tmp_path)
        assert registry.list("crash") == ()
    assert registry.stage(tmp_path).version == 1


def test_versions_deleted_in_mlflow_are_not_used_again(
    registry: MlflowRegistry, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "1", "deleted", 1)
    registry.stage(tmp_path / "1")
    MlflowClient(registry.uri, registry.uri).delete_model_version("deleted", "1")
    assert registry.next_version("deleted") == 2
    write_bundle(tmp_path / "2", "deleted", 2)
    assert registry.stage(tmp_path / "2").version == 2


def test_an_artifact_changed_behind_our_back_is_noticed(
    registry: MlflowRegistry, tmp_path: Path
) -> None:
    write_bundle(tmp_path, "changed")
    registry.stage(tmp_path)
    manifest = registry.bundle("changed", 1) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rounds":3', b'"rounds":4'))
    with pytest.raises(Corrupt):
        registry.get("changed", 1)


def test_telemetry_is_off_and_mlflow_is_not_loaded_before_it_is_needed() -> None:
    code = """
import sys, fedml.releases.tracking, fedml.releases.registry
assert "mlflow" not in sys.modules and "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("sqlite:////proc/nowhere/registry.db", ConfigError),
        ("postgresql://host:1/db", Unreachable),
        ("nonsense://host/db", ConfigError),
    ],
)
def test_a_wrong_database_is_one_clear_line_without_the_password(
    tmp_path: Path, uri: str, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        MlflowRegistry(uri.replace("://host", "://user:secret@127.0.0.1"), tmp_path)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_kill_while_the_tables_are_made_leaves_no_half_of_them(tmp_path: Path) -> None:
    database = tmp_path / "registry.db"
    (tmp_path / "registry.db.draft").write_bytes(b"half of one")
    code = (
        "import sys; from pathlib import Path\n"
        "from fedml.releases.tracking import MlflowRegistry\n"
        "registry = MlflowRegistry(f'sqlite:///{sys.argv[1]}/registry.db', Path(sys.argv[1]))\n"
        "print(registry.next_version('cancer'))"
    )

    def opened(strike: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "FEDML_FAILPOINT": strike}
        line = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280)

    assert opened("registry.drafted:1:kill").returncode == -9
    assert not database.exists()
    assert opened("").stdout.strip() == "1"
    assert [path.name for path in tmp_path.glob("registry.db*")] == ["registry.db"]


@pytest.mark.parametrize(
    ("foreign", "kind"),
    [
        (
            MlflowException("(sqlite3.OperationalError) locked", TEMPORARILY_UNAVAILABLE),
            Unreachable,
        ),
        (MlflowException("API request to http://db/x failed with exception timeout"), Unreachable),
        (MlflowException("Invalid model name", INVALID_PARAMETER_VALUE), ConfigError),
        (OSError(errno.ENOSPC, "No space left on device"), NoRoom),
        (OSError(errno.EACCES, "Permission denied"), ConfigError),
    ],
)
def test_what_passes_by_itself_is_told_apart_from_what_must_be_mended(
    foreign: Exception, kind: type[FedmlError]
) -> None:
    with pytest.raises(kind) as caught, mlflow_errors("sqlite:///registry.db"):
        raise foreign
    assert type(caught.value) is kind
