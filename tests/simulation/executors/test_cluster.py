"""Ray: a machine that goes down costs a retry, and a missing extra is one line."""

from __future__ import annotations

import sys

import pytest

from fedml.errors import ConfigError
from fedml.protocol.messages import RunId, TaskId
from fedml.protocol.tasks import Brief, Task, Update
from fedml.simulation.executors.base import Memory
from fedml.simulation.executors.cluster import Cluster
from fedml.simulation.executors.inline import Inline
from tests.simulation.worlds import holdings, plan, recipe, singles, start


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_goes_down_costs_a_retry_and_workers_serve_one_executor_after_another() -> None:
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from tests.simulation.ray_nodes import two_nodes

    brief = Brief(start())
    work = [Task(TaskId(f"r.1.{s}"), RunId("r"), 1, s, "train", brief) for s in holdings()]
    with two_nodes() as nodes:
        executor = Cluster(plan(), recipe(), holdings(), Memory())
        answers = executor.run(work)
        found = [next(answers)]
        nodes.remove_node(nodes.list_all_nodes()[1])
        found += answers
        expected = {one.site: one for one in singles(Inline(plan(), recipe(), holdings()), work)}
        assert {one.site: one for one in found if isinstance(one, Update)} == expected
        kept = {hand.actor for hand in executor._hands}  # maybe one that finds no machine, too
        del answers, executor

        other = Cluster(plan(), recipe(), holdings(), Memory())
        assert {one.site: one for one in singles(other, work)} == expected
        again = {hand.actor for hand in other._hands}
        assert again
        assert again <= kept  # no worker was started anew
        for actor in again:
            ray.kill(actor)
        del other

        third = Cluster(plan(), recipe(), holdings(), Memory())
        assert {one.site: one for one in singles(third, work)} == expected
        assert not again & {hand.actor for hand in third._hands}


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"ray is missing: pip install 'fedml-consortium\[ray\]'"):
        Cluster(plan(), recipe(), holdings(), Memory())


def test_a_number_of_workers_that_cannot_be_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"executor.workers 0: must be 1 or more, or null"):
        Cluster(plan(), recipe(), holdings(), Memory(), workers=0)
