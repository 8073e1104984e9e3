"""The worker runs what the site allows, within its limits, and its end is never the daemon's."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
import torch

from fedml import durable
from fedml.errors import TaskFailed
from fedml.learning.recipe import identify
from fedml.params import Params, decode, encode
from fedml.protocol import codec
from fedml.protocol.messages import Privacy
from fedml.site.foreman import Foreman
from fedml.site.policy import Policy
from tests.site.test_gate import TASK

pytestmark = pytest.mark.asyncio(loop_scope="module")
RECIPE = '''
import os, signal, sys, time
from pathlib import Path
import torch
from fedml.learning.recipe import Rows

class Odd:
    """A recipe whose data file says how to misbehave."""
    labels = ("no", "yes")

    def build(self):
        return torch.nn.Linear(2, 2)

    def loss(self, output, target):
        if self.what == "mourn":
            raise KeyError("no such ward")
        return torch.nn.functional.cross_entropy(output, target)

    def score(self, output, target):
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path):
        with Path(path).with_name("warm").open("w") as note:
            note.write(str("opacus" in sys.modules))
        what = self.what = Path(path).read_text()
        if what == "sleep":
            time.sleep(600)
        if what == "eat":
            self.food = [torch.ones(2**20) for _ in range(4000)]
            time.sleep(600)
        if what == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "raise":
            raise RuntimeError("no such ward\\nsecond line")
        if what == "print":
            print("noise on standard output", flush=True)
        return Rows(torch.ones(8, 2), (torch.arange(8) % 3 == 0).long())

    def example(self, rows):
        return torch.zeros(rows, 2)

class Calm(Odd):
    """A recipe with a layer whose rows' gradients take Opacus."""

    def build(self):
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
'''
MODELS = {
    "Odd": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)},
    "Calm": {"0.weight": torch.ones(2, 2), "0.bias": torch.zeros(2),
             "1.weight": torch.ones(2), "1.bias": torch.zeros(2)},
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def foreman() -> AsyncIterator[Foreman]:
    """Return one for all tests, whatever they do to its worker: it takes seconds to start."""
    worker = Foreman(Policy(task_seconds=30.0, task_memory_mb=1500))
    await worker.start()
    yield worker
    await worker.stop()


def prepared(
    folder: Path, what: str, name: str = "Odd", **changes: object
) -> tuple[Mapping[str, object], Path]:
    (folder / "recipe.py").write_text(RECIPE)
    files = {"odd": f"{folder / 'recipe.py'}:{name}"}
    changes = {"recipe": identify("odd", files), "privacy": Privacy(), **changes}
    durable.replace(folder / "assignment", codec.encode(replace(TASK, **changes)))  # type: ignore[arg-type]
    model = Params(MODELS[name])
    (folder / "model").write_bytes(b"".join(encode({"": model})))
    (folder / "rows").write_text(what)
    job = {
        "folder": str(folder),
        "site": "bern",
        "model": str(folder / "model"),
        "slots": str(folder / "slots"),
        "private": False,
        "rows": str(folder / "rows"),
        "public_rows": 8,
        "device": "cpu",
        "threads": 1,
        "recipe_files": files,
    }
    return job, folder / "outcome.json"


async def test_a_task_leaves_its_update_on_the_disk(foreman: Foreman, tmp_path: Path) -> None:
    job, outcome = prepared(tmp_path, "print")
    said = await foreman.run(job, outcome)
    assert said["weight"] == 8.0
    update = decode((tmp_path / "update.safetensors").read_bytes())
    assert update["delta"].norm() > 0


async def test_what_a_model_needs_beside_torch_is_loaded_once_and_by_no_other_model(
    foreman: Foreman, tmp_path: Path
) -> None:
    privacy = Privacy("record", 3.0, 1e-5)
    warm = list[str]()
    for name in ("Odd", "Odd", "Calm", "Calm"):
        folder = tmp_path / str(len(warm))
        folder.mkdir()
        job, outcome = prepared(folder, "fine", name, privacy=privacy)
        await foreman.run({**job, "private": True}, outcome)
        warm.append((folder / "warm").read_text())
    assert warm == ["False", "False", "False", "True"]


@pytest.mark.parametrize(("bias", "right"), [((5.0, -5.0), 5.0), ((-5.0, 5.0), 3.0)])
async def test_a_site_s_own_parameters_are_scored_with_the_model(
    foreman: Foreman, tmp_path: Path, bias: tuple[float, float], right: float
) -> None:
    own = Params({"weight": torch.zeros(2, 2), "bias": torch.tensor(bias)})
    (tmp_path / "slots").write_bytes(b"".join(encode({"home": own})))
    job, outcome = prepared(tmp_path, "fine", kind="evaluate", rule="home", settings={"bias": 1.0})
    said = await foreman.run(job, outcome)
    assert (said["totals"], said["count"]) == ({"accuracy": right}, 8.0)


async def test_the_worker_outlives_every_bad_task(foreman: Foreman, tmp_path: Path) -> None:
    for number, (what, message) in enumerate(
        [("die", "the worker crashed \\(SIGSEGV\\)"), ("raise", "^RuntimeError: no such ward$")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        job, outcome = prepared(folder, what)
        with pytest.raises(TaskFailed, match=message):
            await foreman.run(job, outcome)
    folder = tmp_path / "good"
    folder.mkdir()
    assert await foreman.run(*prepared(folder, "work"))


@pytest.mark.parametrize(
    ("private", "message"),
    [(False, "Error: .?no such ward"), (True, "stays in the site's log")],
)
@pytest.mark.parametrize("what", ["raise", "mourn"], ids=["reading", "training"])
async def test_an_error_that_quotes_rows_is_no_way_round_the_ledger(
    foreman: Foreman, tmp_path: Path, private: bool, message: str, what: str
) -> None:
    job, outcome = prepared(tmp_path, what)
    with structlog.testing.capture_logs() as logs, pytest.raises(TaskFailed, match=message):
        await foreman.run({**job, "private": private}, outcome)
    assert ["no such ward" in line["reason"] for line in logs] == [True] * private


async def test_a_setting_that_is_wrong_is_told_under_privacy_too(
    foreman: Foreman, tmp_path: Path
) -> None:
    job, outcome = prepared(tmp_path, "fine")
    with pytest.raises(TaskFailed, match="but this machine has no usable GPU"):
        await foreman.run({**job, "private": True, "device": "cuda:9"}, outcome)


async def test_a_task_over_its_memory_is_stopped(foreman: Foreman, tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match="policy task_memory_mb = 1500; raise it or use smaller"):
        await foreman.run(*prepared(tmp_path, "eat"))


async def test_a_task_over_its_time_is_stopped(tmp_path: Path) -> None:
    foreman = Foreman(Policy(task_seconds=0.3))
    try:
        with pytest.raises(TaskFailed, match="longer than policy task_seconds"):
            await foreman.run(*prepared(tmp_path, "sleep"))
    finally:
        await foreman.stop()


async def test_cancelling_kills_the_task_and_keeps_the_worker(
    foreman: Foreman, tmp_path: Path
) -> None:
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    slow.mkdir()
    quick.mkdir()
    task = asyncio.create_task(foreman.run(*prepared(slow, "sleep")))
    await asyncio.sleep(0)  # let it begin
    before = foreman.process
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await foreman.run(*prepared(quick, "work"))
    assert foreman.process == before


async def test_cancelling_twice_leaves_no_half_an_answer_for_the_next(
    foreman: Foreman, tmp_path: Path
) -> None:
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    slow.mkdir()
    quick.mkdir()
    task = asyncio.create_task(foreman.run(*prepared(slow, "sleep")))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await foreman.run(*prepared(quick, "work"))
    assert (quick / "update.safetensors").exists()


async def test_a_worker_that_dies_as_its_task_is_cancelled_costs_the_next_task_nothing(
    foreman: Foreman, tmp_path: Path
) -> None:
    complaints: list[Mapping[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    slow.mkdir()
    quick.mkdir()
    task = asyncio.create_task(foreman.run(*prepared(slow, "sleep")))
    await asyncio.sleep(0)  # let it begin
    os.kill(foreman.process, signal.SIGKILL)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await foreman.run(*prepared(quick, "work"))
    gc.collect()
    assert not complaints


async def test_the_worker_dies_with_the_daemon(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, signal\n"
        "from fedml.site.foreman import Foreman\n"
        "from fedml.site.policy import Policy\n"
        "async def main():\n"
        "    foreman = Foreman(Policy())\n"
        "    await foreman.start()\n"
        "    print(foreman.process, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await daemon.communicate()
    worker = int(output)
    async with asyncio.timeout(60):
        while _is_running(worker):  # noqa: ASYNC110 - not our child, nothing to wait on
            await asyncio.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
