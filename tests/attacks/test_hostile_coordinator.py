"""A coordinator that says whatever it likes to a real site: it gets nothing beyond the policy.

The daemon, its worker and its ledger are real; the far end of the link is drawn by hypothesis.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedml.errors import FedmlError, MalformedMessage, Refused, Unreachable, Untrusted
from fedml.learning.recipe import identify
from fedml.params import Params, encode
from fedml.privacy import accounting, chain
from fedml.protocol.messages import (
    Assignment,
    Beat,
    Blob,
    Cancel,
    Command,
    Declined,
    Failed,
    Forget,
    Privacy,
    RecipeId,
    ReleaseNotice,
    RunId,
    Scored,
    SiteEvent,
    TaskId,
    Trained,
    Training,
    Welcome,
)
from fedml.site.memory import Memory
from fedml.site.policy import AllowedRecipe, Dataset, Policy
from fedml.transport.chunks import BlobStore
from tests.site.wire import Wire, running

LIMIT, DELTA = 3.0, 1e-5
ROWS, COUNT = 20, 17  # as declared, and as they are
RECIPE = '''
import torch
from fedml.learning.recipe import Rows

class Ward:
    """A recipe over two columns that need no file to speak of."""
    labels = ("no", "yes")

    def build(self):
        return torch.nn.Linear(2, 2)

    def loss(self, output, target):
        return torch.nn.functional.cross_entropy(output, target)

    def score(self, output, target):
        told = output.argmax(1)
        return {"right": (told == target).float(), "no": 1.0 - told, "yes": told.float()}

    def read(self, path):
        return Rows(torch.arange(34.0).reshape(17, 2) / 17, torch.arange(17) % 2)

    def example(self, rows):
        return torch.zeros(rows, 2)
'''
MODEL = b"".join(encode({"": Params({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})}))
GOOD = Blob(blake3(MODEL).hexdigest(), len(MODEL))


@dataclass
class Hostile(Wire):
    """A link at whose far end is the attacker. It notes what it got, and whether it was paid."""

    folder: Path = Path()
    got: dict[str, set[bytes]] = field(default_factory=dict)  # updates, by task
    faults: list[str] = field(default_factory=list)

    async def send(self, event: SiteEvent) -> None:
        await super().send(event)
        if isinstance(event, Trained | Scored):
            self._judge(event)

    async def download(self, blob: Blob, into: BlobStore) -> None:
        if blob != GOOD:
            raise Refused("there is no such model")
        into.put_bytes(MODEL)

    async def upload(self, blob: Blob, source: BlobStore, task: TaskId) -> None:
        self.got.setdefault(task, set()).add(source.path(blob.digest).read_bytes())

    def _judge(self, answer: Trained | Scored) -> None:
        """Hold what just came against the site's policy, as the disk is at this moment."""
        task, order = answer.task, Memory(self.folder).assignment(answer.task)
        assert order is not None
        if order.recipe.name != "ward":
            self.faults.append(f"{task}: a recipe off the list")
        if order.dataset != "records":
            return
        if _states(self.folder).get(task) != "charged":
            self.faults.append(f"{task}: an answer without a charge")
        told = {"steps", "noise_multiplier"}
        if isinstance(answer, Trained) and (answer.weight != ROWS or answer.metrics.keys() - told):
            self.faults.append(f"{task}: numbers of rows, {answer.weight}, {answer.metrics}")
        if isinstance(answer, Scored) and answer.count == COUNT and _are_whole(answer):
            # noise leaves a count as it is now and then, and each total whole once in a thousand
            self.faults.append(f"{task}: an exact count")


def _are_whole(answer: Scored) -> bool:
    return all(total == round(total) for total in answer.totals.values())


def _states(folder: Path) -> dict[str, str]:
    path = folder / "ledger" / "records.jsonl"
    return {entry.task: entry.state for entry in chain.read(path)}


def site(folder: Path, *, guarded: bool = True) -> Policy:
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "rows").touch()
    file = f"{folder / 'recipe.py'}:Ward"
    digest = identify("ward", {"ward": file}).digest
    return Policy(
        minimum_cohort=2,
        recipes={"ward": AllowedRecipe(digest, file), "stranger": AllowedRecipe(digest, file)},
        datasets={
            "records": Dataset(
                folder / "rows", ROWS, ("ward",), folder / "rows", epsilon=LIMIT, delta=DELTA,
                privacy="record" if guarded else "none",
            ),
            "open": Dataset(folder / "rows", ROWS, ("ward",), privacy="none"),
        },
    )  # fmt: skip


def mostly(good: object, *bad: object) -> st.SearchStrategy[object]:
    """Draw `good` more often than not, so that much of what is drawn is carried out."""
    return st.one_of(st.just(good), st.just(good), st.sampled_from([good, *bad]))


privacies = st.builds(
    Privacy,
    mode=mostly("record", "none"),
    epsilon=st.sampled_from([0.5, 1.0, 2.9, 3.0, 50.0]),
    delta=mostly(DELTA, 1e-9, 0.4),
    clip=mostly(0.5, 1e-6, 1e6),
    rounds=st.sampled_from([1, 1, 2, 5]),
    evaluation_epsilon=st.sampled_from([0.0, 0.3, 1.5, 40.0]),
)
assignments = st.builds(
    Assignment,
    task=st.sampled_from([TaskId(f"t{number}") for number in range(6)]),
    run=st.sampled_from([RunId("run-1"), RunId("run-2")]),
    round=st.integers(1, 3),
    kind=mostly("train", "evaluate"),
    recipe=mostly("ward", "stranger", "unknown", "other digest"),
    dataset=mostly("records", "open", "payroll"),
    model=mostly(GOOD, Blob("0" * 64, 7)),
    training=mostly(
        Training(lr=0.5, steps=2),
        Training(lr=0.5, steps=1, batch_size=5),
        Training(lr=1e30, steps=1),
        Training(lr=0.1, epochs=1),
    ),
    privacy=privacies,
    rule=mostly("plain", "prox", "scaffold", "newton", "qfedavg", "home", "nonsense"),
    settings=mostly({}, {"mu": 0.1}, {"bias": 1.0}, {"q": 1.0}),
    cohort=mostly(3, 1),
    seed=st.integers(0, 2),
)
others = st.one_of(
    st.builds(Cancel, st.sampled_from([TaskId(f"t{n}") for n in range(6)]), st.just("?")),
    st.builds(
        Forget,
        st.sampled_from([TaskId(f"t{n}") for n in range(6)]),
        st.booleans(),
        st.sampled_from(["", "run-1", "../ledger"]),
    ),
    st.sampled_from(
        [Beat(), Welcome("liar", 60.0), ReleaseNotice("ward"), MalformedMessage("garbage"),
         Untrusted("nonsense"), Unreachable("cut")]
    ),
)  # fmt: skip
bursts = st.lists(
    st.one_of(st.lists(assignments, min_size=1, max_size=3), st.lists(others, max_size=2)),
    min_size=4,
    max_size=12,
)


def named(order: Assignment, policy: Policy) -> Assignment:
    """Put the recipe's real digest in the place of its drawn name."""
    digest = policy.recipes["ward"].digest
    name = str(order.recipe)
    recipe = RecipeId("ward", "ab" * 32) if name == "other digest" else RecipeId(name, digest)
    object.__setattr__(order, "recipe", recipe)
    return order


async def play(folder: Path, policy: Policy, story: Sequence[Sequence[object]]) -> Hostile:
    """Say a whole story to a fresh site; return what the attacker got of it."""
    wire = Hostile(folder=folder)
    async with running(folder, wire, policy):
        for burst in story:
            orders = [named(one, policy) for one in burst if isinstance(one, Assignment)]
            wire.say(*(one for one in burst if isinstance(one, Command | FedmlError)))
            await _quiet(wire, {order.task for order in orders})
    return wire


async def _quiet(wire: Hostile, tasks: set[TaskId]) -> None:
    """Wait until each of the tasks was answered in one way or another."""
    async with asyncio.timeout(120):
        while tasks:
            event = await wire.events.get()
            if isinstance(event, Answer):
                tasks.discard(event.task)


Answer = Trained | Scored | Declined | Failed


@given(bursts)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
def test_a_hostile_coordinator_gets_nothing_beyond_the_policy(
    story: list[list[Command | FedmlError]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wire = asyncio.run(play(folder, site(folder), story))
        spent = {
            part: accounting.epsilon(
                [e.event for e in _entries(folder) if e.part == part and e.state == "charged"],
                DELTA,
            )
            for part in chain.PARTS
        }
    assert wire.faults == []
    assert all(epsilon <= LIMIT + 1e-6 for epsilon in spent.values()), spent
    assert all(len(answers) == 1 for answers in wire.got.values())


def _entries(folder: Path) -> tuple[chain.Entry, ...]:
    return chain.read(folder / "ledger" / "records.jsonl")


def plainly(task: str, **changes: object) -> Assignment:
    settings: dict[str, object] = {
        "task": TaskId(task), "run": RunId("run-1"), "round": 1, "kind": "train",
        "recipe": "ward", "dataset": "records", "model": GOOD,
        "training": Training(lr=0.5, steps=2), "privacy": Privacy("record", 2.0, DELTA),
        "cohort": 3,
    }  # fmt: skip
    return Assignment(**{**settings, **changes})  # type: ignore[arg-type]


async def test_the_site_of_these_attacks_does_answer(tmp_path: Path) -> None:
    """Else nothing would be shown: an order within the policy is trained, another one scored."""
    score = plainly(
        "b", kind="evaluate", privacy=Privacy("record", 1.0, DELTA, evaluation_epsilon=1)
    )
    dear = plainly("c", privacy=Privacy("record", 2.9, DELTA))
    wire = await play(tmp_path, site(tmp_path), [[plainly("a"), score], [dear]])
    answers = {e.task: type(e) for e in wire.heard if isinstance(e, Answer)}
    assert answers == {"a": Trained, "b": Scored, "c": Declined}
    assert wire.faults == []


WAYS: dict[str, dict[str, object]] = {
    "a recipe off the list": {"recipe": "stranger"},
    "a recipe nobody knows": {"recipe": "unknown"},
    "other code under a name on the list": {"recipe": "other digest"},
    "rows of no recipe": {"dataset": "payroll"},
    "no privacy": {"privacy": Privacy()},
    "a looser delta": {"privacy": Privacy("record", 2.0, 0.4)},
    "more than the budget": {"privacy": Privacy("record", 50.0, DELTA)},
    "a cohort of one": {"cohort": 1},
}


@pytest.mark.parametrize("way", WAYS)
async def test_each_way_beyond_the_policy_is_declined_at_the_gate(tmp_path: Path, way: str) -> None:
    wire = await play(tmp_path, site(tmp_path), [[plainly("a", **WAYS[way])]])
    [answer] = [event for event in wire.heard if isinstance(event, Answer)]
    assert isinstance(answer, Declined)
    assert (wire.got, wire.faults, _entries(tmp_path)) == ({}, [], ())


async def test_no_count_of_rows_is_told_as_it_is(tmp_path: Path) -> None:
    """A single one may be right by chance, one in eighty; not a dozen."""
    privacy = Privacy("record", 1.0, DELTA, evaluation_epsilon=0.1)
    story = [[plainly(f"t{n}", kind="evaluate", privacy=privacy)] for n in range(12)]
    wire = await play(tmp_path, site(tmp_path), story)
    counts = [event.count for event in wire.heard if isinstance(event, Scored)]
    assert len(counts) == 12
    assert set(counts) != {COUNT}


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "undefended"])
async def test_a_policy_that_asks_for_no_privacy_is_what_the_attacker_needs(
    tmp_path: Path, guarded: bool
) -> None:
    """The same order, with the defence switched off by the operator: exact numbers leave."""
    order = plainly("a", privacy=Privacy())
    wire = await play(tmp_path, site(tmp_path, guarded=guarded), [[order]])
    assert bool(wire.got) is not guarded
    assert bool(wire.faults) is not guarded
