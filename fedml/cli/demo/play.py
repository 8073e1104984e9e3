"""The demonstration, scene by scene."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import typer

from fedml.cli.demo import alone
from fedml.cli.demo.federation import Federation, free_ports
from fedml.cli.demo.hospitals import BUDGET, DELTA, Case, admit, allow
from fedml.errors import ConfigError, TaskFailed, Unreachable

if TYPE_CHECKING:
    from fedml.learning.recipe import Recipe
    from fedml.protocol.messages import SiteId
    from fedml.protocol.operations import RunDetail, RunInfo
    from fedml.rounds import Plan
    from fedml.simulation.executors.base import Holding
    from fedml.transport.link import Operations

T = TypeVar("T")
_ROUNDS, _EPSILON = 20, 3.0
_EVALUATE_EVERY, _EVALUATION_EPSILON = 10, 1.5
_MARKER = ".fedml-demo"


@dataclass(frozen=True)
class SiteFacts:
    """One row of the closing table."""

    site: str
    rows: int
    held_out: int
    local_accuracy: float  # of the model it trained alone, on all hospitals' held-out rows
    federated_accuracy: float  # of the released model, on its own held-out rows
    epsilon: float  # spent after the first run
    budget: float
    release: str  # digest
    version: int
    p50_ms: float
    offline_predictions: int  # served with the coordinator dead, all equal to before


@dataclass
class Summary:
    """What `summary.json` holds."""

    case: str
    sites: list[SiteFacts] = field(default_factory=list)
    federated_accuracy: float = 0.0  # on the held-out rows of all hospitals
    delta: float = DELTA
    epsilon_asked: float = _EPSILON
    model: str = ""
    version: int = 0
    release: str = ""
    run: str = ""
    rounds: int = 0
    reported: list[tuple[int, float]] = field(default_factory=list)  # round, noised accuracy
    measured: list[tuple[int, float]] = field(default_factory=list)  # round, true accuracy
    spent: dict[str, list[float]] = field(default_factory=dict)  # site, epsilon by round
    cross_site: dict[str, dict[str, float]] = field(default_factory=dict)  # model, hospital
    second_run: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0


def play(data: str, data_dir: Path | None, folder: Path, *, split_seed: int, as_json: bool) -> None:
    """Play it all, and write `summary.json` and `report.html` into `folder`."""
    start = time.monotonic()
    _clear(folder)
    case = admit(data, data_dir, folder / "sites", split_seed)
    with Federation(folder) as federation:
        summary = _Stage(case, federation, quiet=as_json).play()
    summary.seconds = round(time.monotonic() - start, 1)
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2))
    from fedml.cli.demo.report import write

    write(summary, case, folder / "report.html")
    if as_json:
        typer.echo(json.dumps(asdict(summary)))
    else:
        _print(summary, case, folder)


def _clear(folder: Path) -> None:
    """Empty a folder that an earlier demonstration made; any other must be empty."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            raise ConfigError(f"{folder} holds other files; name an empty --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()


class _Stage:
    """The scenes, in their order, and what is carried from one to the next."""

    def __init__(self, case: Case, federation: Federation, *, quiet: bool) -> None:
        from fedml.learning.recipe import identify, load

        self.case, self.federation, self._quiet = case, federation, quiet
        self.recipe: Recipe = load(identify(case.recipe))
        self.names = [hospital.name for hospital in case.hospitals]
        self.ports: dict[str, int] = {}
        self.rows: Mapping[SiteId, Holding] = alone.read_all(
            case, self.recipe, federation.folder / "sites"
        )

    def play(self) -> Summary:
        """Return all that came of it."""
        summary = Summary(self.case.recipe)
        self._say("a coordinator, and four hospitals that join it with one-time tokens")
        self._found()
        plan = self._plan()
        self._say(f"training under record-level privacy, epsilon {_EPSILON:g}, delta {DELTA:g}")
        models: dict[int, bytes] = {}
        detail = self._train(plan, models)
        self._note_run(summary, detail, models)
        self._say(f"release {summary.model}/{summary.version}: signed, sent, verified at each site")
        self._release(summary)
        self._say("each hospital predicts its own held-out rows at its own endpoint")
        answers, paces = self._predict_everywhere()
        self._say("what each could have done alone, under the same privacy")
        local = self._compare(plan, summary, answers)
        self._say("kill -9 the coordinator; the hospitals go on predicting")
        self.federation.kill("coordinator")
        offline = self._predict_offline(answers)
        self._say("it comes back; a second run goes on from the version until the ledgers refuse")
        self.federation.start_coordinator()
        self._second_run(summary)
        self._fill_table(summary, detail, local, answers, paces, offline)
        return summary

    def _say(self, text: str) -> None:
        if not self._quiet:
            typer.secho(f"• {text}", err=True)

    def _found(self) -> None:
        federation = self.federation
        port, enrolment, *rest = free_ports(2 + 2 * len(self.names))
        self.ports = dict(zip(self.names, rest[::2], strict=True))
        federation.command(
            "coordinator", "init", str(federation.hub),
            "--port", str(port), "--enrolment-port", str(enrolment),
        )  # fmt: skip
        federation.start_coordinator()

        async def invite(coordinator: Operations) -> list[str]:
            return [(await coordinator.invite(n, "site", 3600.0)).token for n in self.names]

        tokens = federation.ask(invite)
        federation.commands(
            [
                ["site", "join", token, "--dir", str(federation.site(name)),
                 "--rest-port", str(rest_port), "--grpc-port", str(grpc_port)]
                for name, token, rest_port, grpc_port in zip(
                    self.names, tokens, rest[::2], rest[1::2], strict=True
                )
            ]
        )  # fmt: skip
        federation.commands(
            [allow(self.case, h, federation.site(h.name)) for h in self.case.hospitals]
        )
        for hospital in self.case.hospitals:
            federation.start(hospital.name, "site", "run", str(federation.site(hospital.name)))

    def _plan(self, *more: str) -> Plan:
        from fedml.cli.compose import compose_plan

        return compose_plan(
            "run",
            [
                *self.case.overrides,
                f"rounds={_ROUNDS}",
                f"privacy.epsilon={_EPSILON}",
                f"privacy.delta={DELTA}",
                f"privacy.evaluation_epsilon={_EVALUATION_EPSILON}",
                f"evaluation.every={_EVALUATE_EVERY}",
                f"cohort.quorum={len(self.names)}",
                "cohort.deadline=120",
                *more,
            ],
        )

    def _train(self, plan: Plan, models: dict[int, bytes]) -> RunDetail:
        detail = self._run(plan, models)
        if not detail.info.version:
            raise TaskFailed(f"the run made no version: {detail.info.detail}")
        return detail

    def _run(self, plan: Plan, models: dict[int, bytes]) -> RunDetail:
        """Submit a run, follow it to its end, and return it with its receipts.

        Looks over the coordinator's shoulder meanwhile: what it can catch of the model after
        each round goes into `models`, for the curve that only a referee can draw.
        """
        from fedml.cli.console import progress, scores

        states = self.federation.hub / "states"

        async def go(coordinator: Operations) -> RunDetail:
            run = (await coordinator.submit(plan.to_json())).id
            async for info in coordinator.watch_run(run):
                say(_line(info) + scores(info.scores.items()))
                with suppress(OSError):
                    models[info.round] = (states / f"{run}.{info.round}.safetensors").read_bytes()
            return await coordinator.show_run(run)

        def _line(info: RunInfo) -> str:
            return f"{info.id}: {info.state}, round {info.round} of {info.rounds}  "

        with progress("submitting", lines=False) as say:
            return self.federation.ask(go)

    def _note_run(self, summary: Summary, detail: RunDetail, models: Mapping[int, bytes]) -> None:
        from fedml.params import decode

        info = detail.info
        summary.model, summary.version, summary.run = info.model, info.version, info.id
        summary.rounds = info.round
        held = [rows.held_out for rows in self.rows.values()]
        total = sum(len(rows) for rows in held)
        for number, data in sorted(models.items()):
            params = decode(data)[""]
            right = sum(alone.count_right(self.recipe, params, rows) for rows in held)
            summary.measured.append((number, right / total))
        for receipt in detail.receipts:
            if "accuracy" in receipt.scores:
                summary.reported.append((receipt.round, receipt.scores["accuracy"]))
            for counted in receipt.counted if receipt.kind == "train" else ():
                summary.spent.setdefault(counted.site, []).append(counted.epsilon)

    def _release(self, summary: Summary) -> None:
        model, version = summary.model, summary.version
        released = self.federation.ask(lambda c: c.release(model, version))
        summary.release = released.digest
        self.federation.wait_until_serving(self.names, released.digest)

    def _predict_everywhere(self) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
        """Return each site's answers to its held-out rows, and its median milliseconds a row."""
        answers: dict[str, list[list[float]]] = {}
        paces: dict[str, float] = {}
        for name in self.names:
            seconds = []
            answers[name] = []
            for row in self._held_out(name):
                start = time.perf_counter()
                answers[name] += self._ask(name, [row])
                seconds.append(time.perf_counter() - start)
            paces[name] = 1e3 * median(seconds)
        return answers, paces

    def _predict_offline(self, before: Mapping[str, Sequence[object]]) -> dict[str, int]:
        """Ask again with the coordinator dead; every answer must be the same."""
        try:
            self.federation.ask(lambda c: c.list_runs())
        except Unreachable:
            pass
        else:
            raise TaskFailed("the coordinator was killed, and still answers")
        counts = {}
        for name in self.names:
            again = self._ask(name, self._held_out(name))
            if not _same(again, before[name]):
                raise TaskFailed(f"{name} answers differently with the coordinator dead")
            counts[name] = len(again)
        return counts

    def _held_out(self, name: str) -> list[list[float]]:
        from fedml.protocol.messages import SiteId

        rows: list[list[float]] = self.rows[SiteId(name)].held_out.x.tolist()
        return rows

    def _ask(self, name: str, rows: list[list[float]]) -> list[list[float]]:
        from fedml.serving.client import predict

        answers = predict(f"http://127.0.0.1:{self.ports[name]}", self.case.recipe, rows)
        return [list(row) for row in next(iter(answers.values()))]

    def _compare(
        self, plan: Plan, summary: Summary, answers: Mapping[str, list[list[float]]]
    ) -> dict[str, float]:
        """Score every local model, and the served one, on every hospital's held-out rows."""
        held = {site: rows.held_out for site, rows in self.rows.items()}
        total = sum(len(rows) for rows in held.values())
        local = {}
        for site, holding in self.rows.items():
            params = alone.train_alone(plan, self.recipe, site, holding)
            right = {s: alone.count_right(self.recipe, params, rows) for s, rows in held.items()}
            summary.cross_site[f"{site} alone"] = {s: n / len(held[s]) for s, n in right.items()}
            local[str(site)] = sum(right.values()) / total
        right = {site: _right(answers[site], rows.y.tolist()) for site, rows in held.items()}
        summary.cross_site["federated"] = {s: n / len(held[s]) for s, n in right.items()}
        summary.federated_accuracy = sum(right.values()) / total
        return local

    def _second_run(self, summary: Summary) -> None:
        detail = self._run(self._plan(f"parent={summary.version}"), {})
        refusals: dict[str, str] = {}
        for receipt in detail.receipts:
            if receipt.kind == "train":
                refusals |= {s: why for s, why in receipt.missing.items() if "epsilon" in why}
        if not refusals:
            raise TaskFailed(f"no ledger refused the second run: {detail.info.detail}")
        summary.second_run = {
            "run": detail.info.id,
            "parent": summary.version,
            "state": detail.info.state,
            "rounds": detail.info.round,
            "refusals": refusals,
        }

    def _fill_table(
        self,
        summary: Summary,
        detail: RunDetail,
        local: Mapping[str, float],
        answers: Mapping[str, list[list[float]]],
        paces: Mapping[str, float],
        offline: Mapping[str, int],
    ) -> None:
        spent: dict[str, float] = {}
        for receipt in detail.receipts:
            for counted in receipt.counted:
                spent[counted.site] = max(spent.get(counted.site, 0.0), counted.epsilon)
        for hospital in self.case.hospitals:
            name = hospital.name
            summary.sites.append(
                SiteFacts(
                    site=name,
                    rows=hospital.train,
                    held_out=hospital.held_out,
                    local_accuracy=local[name],
                    federated_accuracy=summary.cross_site["federated"][name],
                    epsilon=spent[name],
                    budget=BUDGET,
                    release=summary.release,
                    version=summary.version,
                    p50_ms=paces[name],
                    offline_predictions=offline[name],
                )
            )


def _right(answers: Sequence[Sequence[float]], labels: Sequence[int]) -> int:
    return sum(
        max(range(len(answer)), key=lambda place: answer[place]) == label
        for answer, label in zip(answers, labels, strict=True)
    )


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    import numpy as np

    return bool(np.allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-6))


def _print(summary: Summary, case: Case, folder: Path) -> None:
    from fedml.cli.console import show

    typer.echo(f"\n{case.title}: {summary.model}/{summary.version}, release {summary.release}")
    show(
        summary.sites,
        {
            "site": lambda s: s.site,
            "rows": lambda s: f"{s.rows} + {s.held_out}",
            "local only": lambda s: f"{s.local_accuracy:.3f}",
            "federated": lambda s: f"{s.federated_accuracy:.3f}",
            "epsilon": lambda s: f"{s.epsilon:.2f} of {s.budget:g}",
            "release": lambda s: s.version,
            "p50": lambda s: f"{s.p50_ms:.1f} ms",
            "offline": lambda s: f"{s.offline_predictions} rows",
        },
        as_json=False,
    )
    typer.echo(
        f"federated accuracy on all hospitals' held-out rows: {summary.federated_accuracy:.3f} "
        f"(alone: {', '.join(f'{s.local_accuracy:.3f}' for s in summary.sites)})"
    )
    second = summary.second_run
    refusals = dict(second["refusals"])  # type: ignore[call-overload]
    typer.echo(f"second run {second['run']}: {second['state']} after {second['rounds']} rounds")
    for site, why in refusals.items():
        typer.echo(f"  {site}: {why}")
    typer.echo(f"{summary.seconds:.0f} s; see {folder / 'report.html'} and summary.json")
