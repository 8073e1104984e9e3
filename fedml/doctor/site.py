"""The doctor looks at a site's folder."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedml import codebase, durable
from fedml.doctor import books, machine, papers
from fedml.doctor.finding import Finding, attempt, is_sound
from fedml.doctor.line import line
from fedml.errors import ConfigError, Corrupt, FedmlError
from fedml.identity.certificates import Credentials
from fedml.learning.recipe import installed
from fedml.site.departure import departure
from fedml.site.door import books as kept
from fedml.site.policy import Dataset, Policy, read_policy
from fedml.site.settings import Settings, read_settings

_FILES = 256  # more than a site ever opens
_READING = 300.0  # seconds for all data files
_COPIES = 3  # of a model, in a task: what came, what goes, what the algorithm keeps
_RENEWAL = "the daemon renews it by itself: run it, and see that it reaches the coordinator"


async def examine_site(folder: Path, clock: Callable[[], float]) -> list[Finding]:
    """Return all findings about a site."""
    if gone := departure(folder):
        advice = f"join again with a new token: fedml site join TOKEN --dir {folder}"
        return [Finding("warn", "membership", str(gone), advice)]
    who = durable.holder(folder)
    findings = [
        *attempt("program", lambda: machine.holder(folder, f"start it: fedml site run {folder}")),
        *await _identity(folder, clock),
        *attempt("settings", lambda: _ports(read_settings(folder), who)),
        *attempt("files", lambda: machine.files(_FILES, who)),
        *attempt("packages", lambda: machine.packages("site")),
    ]
    try:
        policy = read_policy(folder / "policy.toml")
    except FedmlError as error:
        return [*findings, Finding.of("policy", error)]
    return [
        *findings,
        *attempt("disk", lambda: machine.disk(folder, _need(folder, policy))),
        *_books(folder, policy, clock()),
        *attempt("recipes", lambda: check_recipes(policy)),
        *attempt("apps", lambda: check_apps(policy)),
        *await _data(folder, policy),
    ]


async def _identity(folder: Path, clock: Callable[[], float]) -> list[Finding]:
    secrets = [path for path in (folder / "secret",) if path.exists()]
    try:
        own = Credentials.load(folder / "identity")
    except (FedmlError, OSError) as error:
        return [Finding.of("certificate", error)]
    looked = papers.credentials(own, clock(), renewal=_RENEWAL)
    return [
        *looked,
        *papers.private(folder / "identity" / "identity.json", *secrets),
        *await line(own, clock, sound=is_sound(looked)),
    ]


def _ports(settings: Settings, who: str) -> list[Finding]:
    ports = {"REST": settings.rest_port, "gRPC": settings.grpc_port}
    return [machine.port(name, settings.serve_host, port, who) for name, port in ports.items()]


def _need(folder: Path, policy: Policy) -> float:
    model = machine.largest([folder / "tasks", folder / "shelf"])
    return float(model * _COPIES * policy.runs_at_once)


def _books(folder: Path, policy: Policy, now: float) -> list[Finding]:
    findings: list[Finding] = []
    for book in kept(folder, policy):
        findings += attempt(books.title(book), lambda: books.ledger(book))  # noqa: B023
        if findings[-1].state != "fail" and book.path.exists():
            findings += books.latest(durable.read_log(book.path), "time", now)
    return findings


def check_recipes(policy: Policy) -> Iterator[Finding]:
    """Look at whether each recipe of the policy is installed, with the very source it names."""
    here = {recipe.name: recipe.digest for recipe in installed(policy.recipe_files)}
    for name, recipe in policy.recipes.items():
        what = f"recipe {name}"
        if name not in here:
            advice = f"install it, or take its entries out; there are {', '.join(here)}"
            yield Finding("fail", what, "is not installed", advice)
        elif here[name] != recipe.digest:
            found = f"the policy allows {recipe.digest[:12]}…, installed is {here[name][:12]}…"
            advice = f'look at what changed; if you agree, write digest = "{here[name]}"'
            yield Finding("fail", what, found, advice)
        else:
            yield Finding("ok", what, f"installed, {recipe.digest[:12]}…")


def check_apps(policy: Policy) -> Iterator[Finding]:
    """Look at whether the copy of each Flower app is what the policy allows, and may say so."""
    for name, app in policy.apps.items():
        what, again = f"app {name}", "take its section out, and run 'fedml site allow-app' again"
        barred = [each for each in app.datasets if policy.datasets[each].privacy != "none"]
        try:
            here = codebase.digest(app.folder)
        except ConfigError as error:
            yield Finding("fail", what, str(error), again)
            continue
        if here != app.digest:
            found = f"the policy allows {app.digest[:12]}…, in {app.folder} is {here[:12]}…"
            yield Finding("fail", what, found, again)
        elif barred:
            found = f"it is told of dataset {barred[0]}, whose policy wants privacy"
            yield Finding("fail", what, found, "it is refused until one of the two is changed")
        else:
            yield Finding("ok", what, f"allowed, {app.digest[:12]}…; without privacy")


def check_files(policy: Policy) -> Iterator[Finding]:
    """Look at whether each data file can be opened by us."""
    for name, dataset in policy.datasets.items():
        for path in (dataset.train, dataset.held_out):
            if path is not None:
                yield _openable(name, path)


def _openable(name: str, path: Path) -> Finding:
    try:
        path.open("rb").close()
    except OSError as error:
        found = f"{path}: {error.strerror}"
        return Finding("fail", f"data {name}", found, "put it there, readable by the daemon's user")
    return Finding("ok", f"data {name}", f"{path} can be opened")


async def _data(folder: Path, policy: Policy) -> list[Finding]:
    closed = [finding for finding in check_files(policy) if finding.state == "fail"]
    if not policy.datasets:
        advice = "see fedml site allow --help; until then all tasks are refused"
        return [Finding("warn", "data", "the policy has no dataset", advice)]
    if closed:
        return closed
    reader = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fedml.doctor.rows",
        str(folder / "policy.toml"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = await asyncio.wait_for(reader.communicate(), _READING)
    except TimeoutError:
        reader.kill()
        await reader.wait()
        found = f"not read within {_READING:.0f} s"
        return [Finding("warn", "data", found, "smaller files, or a faster disk")]
    answers = [json.loads(row) for row in output.splitlines()]
    findings = [_judge_answer(policy, answer) for answer in answers]
    if reader.returncode != 0:
        found = f"reading the files ended with status {reader.returncode}"
        findings.append(
            Finding("fail", "data", found, "a recipe ends its process; see it read the file alone")
        )
    return findings


def _judge_answer(policy: Policy, answer: Mapping[str, object]) -> Finding:
    if "device" in answer:
        found = f"policy device = {answer['device']!r}"
        if answer["usable"]:
            return Finding("ok", "device", found)
        advice = 'mend the driver, or write device = "cpu"'
        return Finding("fail", "device", f"{found}: no usable GPU", advice)
    name, part = str(answer["dataset"]), str(answer["part"])
    if "error" in answer:
        return Finding.of(f"data {name}", Corrupt(f"{part}: {answer['error']}"))
    return judge_rows(policy.datasets[name], name, part, int(str(answer["rows"])))


def judge_rows(dataset: Dataset, name: str, part: str, rows: int) -> Finding:
    """Return whether a file with so many rows is what the policy says it is."""
    what, found = f"data {name}", f"{part}: {rows} rows"
    if rows == 0:
        return Finding("fail", what, found, "put rows into the file, or take it out of the policy")
    if part == "train" and not dataset.rows / 2 <= rows <= dataset.rows * 2:
        advice = f"noise and weight follow the stated number: correct datasets.{name}.rows"
        return Finding("warn", what, f"{found}; the policy states {dataset.rows}", advice)
    return Finding("ok", what, found)
