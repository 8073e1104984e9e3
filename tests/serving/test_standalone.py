from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from fedml.errors import ConfigError, Unreachable, Untrusted
from fedml.releases.session import rehearse
from fedml.releases.shelf import Shelf
from fedml.releases.signing import Repository
from fedml.serving.client import predict
from fedml.serving.engine import Engine
from fedml.serving.faces import Access, Server
from fedml.serving.oip import Question
from fedml.serving.standalone import follow, run
from tests.bundles import write_bundle
from tests.releases.offices import Office
from tests.serving.conftest import put


async def test_a_changed_pointer_is_followed_within_a_second(engine: Engine, shelf: Shelf) -> None:
    stop, changed, seconds = asyncio.Event(), asyncio.Event(), list[float]()
    async with asyncio.TaskGroup() as group:
        group.create_task(follow(engine, shelf.folder, stop, changed.set))
        async with asyncio.timeout(60):
            await changed.wait()  # the first look
            for version in (2, 3, 4):
                changed.clear()
                await asyncio.to_thread(put, shelf, version)
                start = time.perf_counter()
                await changed.wait()
                seconds.append(time.perf_counter() - start)
                assert [s.version for s in engine.serving()] == [version]
        stop.set()
    assert min(seconds) < 1.0  # the others may have been a busy machine's


async def test_predict_asks_over_rest(engine: Engine, server: Server) -> None:
    url = f"http://127.0.0.1:{server.rest_port}"
    rows = [[1, 2, 3], [4, 5, 6]]
    assert await asyncio.to_thread(predict, url, "heart", rows) == {"output": [[6.0], [15.0]]}
    with pytest.raises(ConfigError, match="'lungs' is not served here"):
        await asyncio.to_thread(predict, url, "lungs", rows)
    with pytest.raises(ConfigError, match="shape"):
        await asyncio.to_thread(predict, url, "heart", [[1, 2]])
    async with Server(engine, access=Access("s3cret")) as locked:
        url = f"http://127.0.0.1:{locked.rest_port}"
        with pytest.raises(ConfigError, match="Bearer"):
            await asyncio.to_thread(predict, url, "heart", rows)
        found = await asyncio.to_thread(lambda: predict(url, "heart", rows, token="s3cret"))
        assert found == {"output": [[6.0], [15.0]]}


def test_predict_says_when_nobody_serves() -> None:
    with pytest.raises(Unreachable, match="is it serving"):
        predict("http://127.0.0.1:1", "heart", [[1]])
    with pytest.raises(ConfigError, match="http://"):
        predict("file:///etc/passwd", "heart", [[1]])
    with pytest.raises(ConfigError, match="address"):
        predict("http://127.0.0.1:port", "heart", [[1]])


def test_a_missing_shelf_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        run(tmp_path / "nowhere")


async def test_serving_goes_on_with_expired_metadata(tmp_path: Path) -> None:
    """The coordinator has gone for a week: no updates, and every prediction."""
    then = datetime.now(UTC) - timedelta(days=30)
    office = Office(tmp_path, Repository.create(tmp_path / "r"))
    write_bundle(tmp_path / "b")
    office.repository.publish(tmp_path / "b")
    shelf, site = Shelf(tmp_path / "shelf"), office.site()
    shelf.add(site.obtain("heart"))
    shelf.activate("heart", 1, rehearse)
    office.repository = Repository.create(tmp_path / "r2", clock=lambda: then)
    with pytest.raises(Untrusted):
        site.refresh()
    engine = Engine(shelf)
    await engine.refresh()
    answer = await engine.infer(Question("heart", {"input": np.ones((1, 3), np.float32)}))
    assert answer.version == "1"
    await engine.close()


_PROGRAM = """
import sys
from pathlib import Path
import fedml.releases.trust, fedml.serving.client
from fedml.serving.standalone import run
from fedml.telemetry import configure_logging
heavy = {"torch", "mlflow", "opacus", "onnx", "pandas"} & set(sys.modules)
assert not heavy, heavy
configure_logging()
run(Path(sys.argv[1]), 0, 0)
"""


def test_a_process_of_its_own_serves_without_torch_and_ends_on_a_signal(shelf: Shelf) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(shelf.folder)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stderr
    try:
        lines = (json.loads(line) for line in child.stderr if line.startswith("{"))
        port = next(line["rest_port"] for line in lines if line["event"] == "serving")
        found = predict(f"http://127.0.0.1:{port}", "heart", [[1, 1, 1]])
        assert found == {"output": [[3.0]]}
    finally:
        child.send_signal(signal.SIGTERM)
        errors = child.communicate(timeout=60)[1]
    assert child.returncode == 0, errors
