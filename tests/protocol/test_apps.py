"""What is said of a Flower app's run survives the trip; what does not fit is refused."""

import json

import pytest

from fedml.errors import ConfigError, MalformedMessage
from fedml.protocol.apps import AppPlan, AppTerms, is_app_plan
from fedml.protocol.messages import RecipeId

PLAN = AppPlan(RecipeId("ward", "ab" * 32), {"lr": 0.5, "rounds": 3, "name": "x", "on": True}, 3, 7)


def test_a_plan_and_an_orders_terms_read_as_they_were_written() -> None:
    assert AppPlan.from_json(PLAN.to_json()) == PLAN
    terms = AppTerms(1001, 4, PLAN.config)
    assert AppTerms.from_json(terms.to_json()) == terms
    kinds = [type(value) for value in AppTerms.from_json(terms.to_json()).config.values()]
    assert sorted(kind.__name__ for kind in kinds) == ["bool", "float", "int", "str"]


def test_an_apps_plan_is_told_from_others() -> None:
    assert is_app_plan(PLAN.to_json())
    assert not is_app_plan('{"model": "ward"}')
    assert not is_app_plan("[" * 100_000)
    assert not is_app_plan("no JSON")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"least": 0}, "--num-supernodes 0"),
        ({"seed": -1}, "--seed -1"),
        ({"app": {"name": "ward", "digest": "ab"}}, "is no SHA-256"),
        ({"config": {"lr": [1]}}, "must be an object of texts, numbers and booleans"),
        ({"config": {"text": "x" * 40_000}}, "settings take 400"),
        ({"model": "other"}, "called after it"),
        ({"rounds": 3}, "called after it"),
        ({"code": "import os"}, "plan.code is unknown"),
        ({"app": "ward"}, "does not read"),
    ],
)
def test_a_wrong_plan_is_refused(change: dict[str, object], reason: str) -> None:
    text = json.dumps({**json.loads(PLAN.to_json()), **change})
    with pytest.raises(ConfigError, match=reason):
        AppPlan.from_json(text)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"node": 1, "messages": 0, "config": 3}'])
def test_wrong_terms_are_malformed(text: str) -> None:
    with pytest.raises(MalformedMessage):
        AppTerms.from_json(text)
