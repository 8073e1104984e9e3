"""What every `Registry` promises: the one in memory, MLflow on SQLite, MLflow on Postgres."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedml.errors import ConfigError, Untrusted
from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.operations import Counted, Receipt
from fedml.releases.manifest import Manifest, open_bundle
from fedml.releases.registry import MemoryRegistry, Registry, Story
from fedml.releases.tracking import MlflowRegistry
from tests.bundles import write_bundle

_STORY = Story(
    receipts=[
        Receipt(
            run=RunId("run-1"),
            round=number,
            attempt=1,
            asked=(SiteId("hospital-a"),),
            counted=(Counted(SiteId("hospital-a"), 10.0, "a" * 64, 0.5 * number),),
            metrics={"loss": 1.0 / number},
            scores={"accuracy": 0.1 * number},
            closed=1000.0 + number,
        )
        for number in (1, 2, 3)
    ],
    settings={"strategy": "fedavg", "training.lr": "0.1"},
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A server of our own. It refuses to run as root, so root lends it to `nobody`."""
    if not all(map(shutil.which, ("initdb", "pg_ctl", "postgres"))):
        pytest.skip("no PostgreSQL server (initdb, pg_ctl, postgres) on this machine")
    as_nobody: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="fedml-postgres-"))  # pytest's own are root's alone
    if os.geteuid() == 0:
        if not shutil.which("runuser"):
            pytest.skip("PostgreSQL refuses to run as root and there is no runuser")
        as_nobody = ["runuser", "-u", "nobody", "--"]
        shutil.chown(folder, "nobody")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    data = folder / "data"

    def run(*command: str) -> None:
        done = subprocess.run(
            [*as_nobody, *command], capture_output=True, text=True, cwd=folder, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("initdb", "-D", str(data), "-U", "fedml", "-A", "trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql://fedml@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stores(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Registry]:
    """One registry of each kind for the whole session: a fresh database takes seconds."""
    made: dict[str, Registry] = {}

    def store(kind: str) -> Registry:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "memory":
                made[kind] = MemoryRegistry(folder)
            else:
                uri = f"sqlite:///{folder / 'registry.db'}"
                uri = request.getfixturevalue("postgres") if kind == "postgres" else uri
                made[kind] = MlflowRegistry(uri, folder / "artifacts")
        return made[kind]

    return store


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def registry(request: pytest.FixtureRequest, stores: Callable[[str], Registry]) -> Registry:
    return stores(request.param)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A model of its own for each test, so that they can share a registry."""
    return request.node.originalname.replace("_", "-")[:40].rstrip("-")  # type: ignore[no-any-return]


def stage(registry: Registry, folder: Path, model: str, version: int) -> Manifest:
    manifest = write_bundle(folder / str(version), model, version)
    registry.stage(folder / str(version), _STORY)
    return manifest


def test_a_staged_version_tells_all_its_lineage(
    registry: Registry, tmp_path: Path, model: str
) -> None:
    assert registry.next_version(model) == 1
    manifest = stage(registry, tmp_path, model, 1)
    found = registry.get(model, 1)
    assert Manifest.decode(found.manifest.encode()) == manifest
    assert (found.model, found.version, found.state) == (model, 1, "candidate")
    assert (found.run, found.digest) == (manifest.lineage.run, manifest.digest)
    assert found.created == manifest.created
    assert found.scores == manifest.scores
    assert found.epsilon == manifest.lineage.epsilon
    assert registry.next_version(model) == 2


def test_the_bundle_comes_back_whole(registry: Registry, tmp_path: Path, model: str) -> None:
    manifest = stage(registry, tmp_path, model, 1)
    assert open_bundle(registry.bundle(model, 1), manifest.digest) == manifest
    with pytest.raises(ConfigError, match="no version 2"):
        registry.bundle(model, 2)


def test_staging_the_same_bundle_twice_counts_once(
    registry: Registry, tmp_path: Path, model: str
) -> None:
    stage(registry, tmp_path, model, 1)
    first = registry.get(model, 1)
    assert registry.stage(tmp_path / "1", _STORY) == first
    assert len(registry.list(model)) == 1


def test_a_wrong_number_is_refused_and_nothing_is_kept(
    registry: Registry, tmp_path: Path, model: str
) -> None:
    stage(registry, tmp_path, model, 1)
    for version in (1, 3):
        write_bundle(tmp_path / "wrong", model, version, factor=9)
        with pytest.raises(ConfigError, match="the next one is 2"):
            registry.stage(tmp_path / "wrong")
    assert [row.version for row in registry.list(model)] == [1]


def test_a_damaged_bundle_is_not_staged(registry: Registry, tmp_path: Path, model: str) -> None:
    write_bundle(tmp_path / "b", model)
    (tmp_path / "b" / "model.onnx").write_bytes(b"x")
    with pytest.raises(Untrusted):
        registry.stage(tmp_path / "b")
    assert registry.list(model) == ()


def test_one_version_is_live_at_a_time(registry: Registry, tmp_path: Path, model: str) -> None:
    for version in (1, 2, 3):
        stage(registry, tmp_path, model, version)
    for version in (2, 3, 1):
        assert registry.promote(model, version).state == "live"
        states = {row.version: row.state for row in registry.list(model)}
        assert states == {n: "live" if n == version else "candidate" for n in (1, 2, 3)}


def test_a_withdrawn_version_is_never_live_again(
    registry: Registry, tmp_path: Path, model: str
) -> None:
    stage(registry, tmp_path, model, 1)
    registry.promote(model, 1)
    assert registry.withdraw(model, 1, "biased on the ward").state == "withdrawn"
    with pytest.raises(ConfigError, match="withdrawn"):
        registry.promote(model, 1)
    assert [row.state for row in registry.list(model)] == ["withdrawn"]
    assert registry.next_version(model) == 2


def test_versions_that_do_not_exist_are_named(
    registry: Registry, tmp_path: Path, model: str
) -> None:
    for act in (registry.get, registry.promote, lambda m, v: registry.withdraw(m, v, "why")):
        with pytest.raises(ConfigError, match=f"no version 7 of model '{model}'"):
            act(model, 7)
    assert registry.list("never-heard-of") == ()


def test_the_list_covers_all_models(registry: Registry, tmp_path: Path, model: str) -> None:
    stage(registry, tmp_path / "a", model, 1)
    stage(registry, tmp_path / "b", f"{model}-b", 1)
    names = [row.model for row in registry.list()]
    assert {model, f"{model}-b"} <= set(names)
    assert names == sorted(names)
    assert all(row.manifest == "" for row in registry.list())
