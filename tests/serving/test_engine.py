from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from fedml.errors import MalformedMessage, Overloaded, Refused, TaskFailed, UnknownModel
from fedml.releases.session import Array, Session, Tensors, rehearse
from fedml.releases.shelf import Shelf
from fedml.serving.batching import Batcher
from fedml.serving.engine import Engine, best_batch
from fedml.serving.oip import Limits, Question
from tests.bundles import WIDTH, write_bundle
from tests.serving.conftest import put


def rows(count: int = 1, value: float = 1.0) -> Array:
    return np.full((count, WIDTH), value, np.float32)


def ask(inputs: Tensors | None = None, version: str = "", id: str = "") -> Question:
    return Question("heart", {"input": rows()} if inputs is None else inputs, version, id)


def assert_close(found: Array, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64))


async def test_an_answer_names_the_version_that_gave_it(engine: Engine) -> None:
    answer = await engine.infer(ask(id="7"))
    assert (answer.model, answer.version, answer.id) == ("heart", "1", "7")
    assert_close(answer.outputs["output"], [[WIDTH]])


async def test_many_at_once_each_get_their_own_answer(engine: Engine) -> None:
    async def one(value: int) -> None:
        count = value % 3 + 1
        answer = await engine.infer(ask({"input": rows(count, value)}))
        assert_close(answer.outputs["output"], np.full((count, 1), value * WIDTH))

    await asyncio.gather(*(one(value) for value in range(300)))
    pace = engine.watch.pace("heart")
    assert pace.requests == 300
    assert 0 < pace.p50 <= pace.p99


async def test_predictions_are_counted_for_prometheus(engine: Engine) -> None:
    labels = {"model": "heart", "version": "1"}
    before = REGISTRY.get_sample_value("fedml_predictions_total", labels) or 0.0
    await engine.infer(ask({"input": rows(5)}))
    assert REGISTRY.get_sample_value("fedml_predictions_total", labels) == before + 5


@pytest.mark.parametrize(
    ("question", "error", "words"),
    [
        (Question("lungs", {"input": rows()}), UnknownModel, "'lungs' is not served"),
        (ask(version="9"), UnknownModel, "version '9' is not served"),
        (ask({"x": rows()}), MalformedMessage, r"takes the inputs \['input'\], not \['x'\]"),
        (ask({}), MalformedMessage, "takes the inputs"),
        (ask({"input": rows().astype("f8")}), MalformedMessage, "is FP32, not FP64"),
        (ask({"input": rows()[0]}), MalformedMessage, r"shape \[-1, 3\], not \[3\]"),
        (ask({"input": rows().T}), MalformedMessage, r"not \[3, 1\]"),
        (ask({"input": rows(0)}), MalformedMessage, "is empty"),
        (ask({"input": rows(5000)}), Refused, "5000 rows in one request, the limit is 4096"),
        (
            Question("heart", {"input": rows()}, outputs=("nope",)),
            MalformedMessage,
            r"outputs \['output'\]",
        ),
    ],
)
async def test_a_question_that_does_not_fit_gets_one_clear_line(
    engine: Engine, question: Question, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        await engine.infer(question)
    assert "\n" not in str(caught.value)


async def test_a_release_that_fails_its_golden_check_is_refused_and_the_old_one_stays(
    engine: Engine, shelf: Shelf, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "bad", version=2, golden_error=0.01)
    shelf.add(tmp_path / "bad")
    shelf.activate("heart", 2, lambda _: None)  # a site that did not look
    live, refused = await engine.refresh()
    assert (live.version, live.state) == (1, "live")
    assert (refused.version, refused.state) == (2, "refused")
    assert "golden inputs differently" in refused.detail
    assert (await engine.infer(ask())).version == "1"
    put(shelf, 3)
    assert [(s.version, s.state) for s in await engine.refresh()] == [(3, "live")]


async def test_a_bundle_damaged_on_the_disk_is_not_loaded(engine: Engine, shelf: Shelf) -> None:
    put(shelf, 2)
    (shelf.bundle("heart", 2) / "model.onnx").write_bytes(b"junk")
    states = {(s.version, s.state) for s in await engine.refresh()}
    assert states == {(1, "live"), (2, "refused")}
    (shelf.folder / "heart" / "current.json").write_bytes(b"")
    await engine.refresh()
    assert (await engine.infer(ask())).version == "1"


async def test_the_version_before_can_still_be_asked_by_number_and_back_is_instant(
    engine: Engine, shelf: Shelf
) -> None:
    put(shelf, 2, factor=2.0)
    await engine.refresh()
    assert engine.card("heart").versions == ("1", "2")
    assert (await engine.infer(ask())).version == "2"
    assert (await engine.infer(ask(version="1"))).version == "1"
    shelf.back("heart")
    shutil.rmtree(shelf.folder / "heart" / "1")  # it is in memory
    await engine.refresh()
    assert (await engine.infer(ask())).version == "1"


async def test_a_switch_under_load_loses_no_request(engine: Engine, shelf: Shelf) -> None:
    stop = asyncio.Event()
    factors = {"1": 1.0, "2": 2.0, "3": 3.0}
    seen: list[str] = []

    async def load() -> None:
        last = 1
        while not stop.is_set():
            answer = await engine.infer(ask())
            assert int(answer.version) >= last  # a client never meets a step back
            last = int(answer.version)
            expected = WIDTH * factors[answer.version]
            assert_close(answer.outputs["output"], [[expected]])
            seen.append(answer.version)

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(load())
        for version in (2, 3):
            await asyncio.to_thread(put, shelf, version, factor=float(version))
            await engine.refresh()
            assert (await engine.infer(ask())).version == str(version)
        stop.set()
    assert set(seen) == {"1", "2", "3"}


async def test_a_model_taken_off_the_shelf_is_unknown(engine: Engine, shelf: Shelf) -> None:
    put(shelf, 1, model="lungs")
    assert len(await engine.refresh()) == 2
    shutil.rmtree(shelf.folder / "heart")
    assert [s.model for s in await engine.refresh()] == ["lungs"]
    with pytest.raises(UnknownModel):
        await engine.infer(ask())


class Held:
    """A session that waits for a sign before each batch, and notes the batches."""

    def __init__(self, session: Session) -> None:
        self.inputs, self.outputs, self.has_rows = session.inputs, session.outputs, True
        self.go, self.batches, self._real = threading.Semaphore(0), list[int](), session

    def run(self, inputs: Tensors) -> dict[str, Array]:
        assert self.go.acquire(timeout=60)
        array = inputs["input"]
        self.batches.append(len(array))
        if float(np.asarray(array, np.float64).min()) < 0:
            raise TaskFailed("negative")
        return self._real.run(inputs)


@pytest.fixture
def held(tmp_path: Path) -> Held:
    write_bundle(tmp_path / "b")
    return Held(rehearse(tmp_path / "b"))


def batcher(engine: Engine, held: Held, most: int = 64, queue: int = 100) -> Batcher:
    return Batcher(held, engine._pool, most=most, queue=queue)  # type: ignore[arg-type]


async def test_what_queues_while_a_batch_runs_becomes_the_next_batch(
    engine: Engine, held: Held
) -> None:
    batching = batcher(engine, held, most=8)
    futures = [batching.submit({"input": rows(2, n)}, 2) for n in range(8)]
    held.go.release(100)
    answers = await asyncio.gather(*futures)
    assert held.batches == [2, 8, 6]
    for n, answer in enumerate(answers):
        assert_close(answer["output"], np.full((2, 1), n * WIDTH))


async def test_a_full_queue_refuses_at_once_and_the_rest_is_answered(
    engine: Engine, held: Held
) -> None:
    batching = batcher(engine, held, queue=3)
    futures = [batching.submit({"input": rows()}, 1) for _ in range(4)]  # one runs, three wait
    with pytest.raises(Overloaded, match="3 requests wait already"):
        batching.submit({"input": rows()}, 1)
    held.go.release(100)
    assert len(await asyncio.gather(*futures)) == 4


async def test_one_poisoned_request_does_not_spoil_the_batch(engine: Engine, held: Held) -> None:
    batching = batcher(engine, held)
    futures = [batching.submit({"input": rows(1, n)}, 1) for n in (1, 2, -1, 3)]
    held.go.release(100)
    found = await asyncio.gather(*futures, return_exceptions=True)
    assert [isinstance(each, TaskFailed) for each in found] == [False, False, True, False]


async def test_an_abandoned_request_is_not_computed(engine: Engine, held: Held) -> None:
    batching = batcher(engine, held)
    first, second, third = (batching.submit({"input": rows()}, 1) for _ in range(3))
    second.cancel()
    held.go.release(100)
    await asyncio.gather(first, third)
    await batching.drain()
    assert held.batches == [1, 1]


async def test_closing_answers_what_waits(shelf: Shelf) -> None:
    engine = Engine(shelf)
    await engine.refresh()
    waiting = [asyncio.ensure_future(engine.infer(ask())) for _ in range(50)]
    await asyncio.sleep(0)
    await engine.close()
    assert all(answer.version == "1" for answer in await asyncio.gather(*waiting))


def test_the_best_batch_is_within_its_bound(shelf: Shelf) -> None:
    session = rehearse(shelf.bundle("heart", 1))
    found = best_batch(session, {"input": rows(4)}, 16)
    assert found in (1, 2, 4, 8, 16)
    assert best_batch(session, {"input": rows(4)}, 1) == 1
    assert Limits().batch >= 1
