"""Health checks tell the truth, also of a program that no longer does."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fedml import health, telemetry
from fedml.errors import ConfigError
from fedml.releases.shelf import Shelf
from fedml.serving.engine import Engine
from fedml.serving.faces import Access, Server


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_it_says_whether_a_program_lives_and_is_ready_and_why_not() -> None:
    reason = ""
    async with health.serve("127.0.0.1", 0, lambda: reason) as port:
        assert await asyncio.to_thread(get, port, "/healthz") == (200, "ok\n")
        assert await asyncio.to_thread(get, port, "/readyz?verbose") == (200, "ok\n")
        assert await asyncio.to_thread(get, port, "/readyz", "HEAD") == (200, "")
        reason = "going down"
        assert await asyncio.to_thread(get, port, "/readyz") == (503, "going down\n")
        assert await asyncio.to_thread(get, port, "/healthz") == (200, "ok\n")
        telemetry.ROUNDS.labels("committed")
        status, text = await asyncio.to_thread(get, port, "/metrics")
        assert (status, "fedml_rounds_total" in text) == (200, True)
        assert (await asyncio.to_thread(get, port, "/"))[0] == 404
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(get, port, "/healthz")


async def test_a_loop_that_stands_still_is_told_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "_PATIENCE", 0.2)
    told: list[tuple[int, str]] = []
    async with health.serve("127.0.0.1", 0, lambda: "") as port:
        asking = threading.Thread(target=lambda: told.append(get(port, "/healthz")))
        asking.start()
        asking.join(60)  # so nothing turns here meanwhile
        assert told == [(503, "the event loop stands still for 0.2 s\n")]
        assert await asyncio.to_thread(get, port, "/healthz") == (200, "ok\n")


async def test_a_port_that_is_taken_is_named_with_the_way_out() -> None:
    async with health.serve("127.0.0.1", 0, lambda: "") as port:
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} .*another health_port, or 0"):
            async with health.serve("127.0.0.1", port, lambda: ""):
                pass


async def test_a_site_answers_beside_its_predictions_without_a_token(tmp_path: Path) -> None:
    reason, engine = "", Engine(Shelf(tmp_path))
    access = Access("secret")
    async with Server(engine, 0, None, access=access, unready=lambda: reason) as server:
        port = server.rest_port or 0
        assert await asyncio.to_thread(get, port, "/healthz") == (200, "ok\n")
        assert await asyncio.to_thread(get, port, "/readyz") == (200, "ok\n")
        reason = "the site is going down"
        assert await asyncio.to_thread(get, port, "/readyz") == (503, f"{reason}\n")
        assert (await asyncio.to_thread(get, port, "/metrics"))[0] == 401
    await engine.close()
