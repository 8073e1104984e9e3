"""A run as a state machine: rounds, retries, evaluations and gates, from a plan to a candidate.

    waiting -> round open -> committing -> waiting -> ... -> over

What comes next follows from the plan, the last committed state and the receipts alone, so a
restart is a replay: `Run.resume` with those three goes on where the journal ends. Time enters as
`now`, in seconds since the epoch, and ends up in receipts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.privacy.shares import grain_of
from fedml.protocol.messages import RunId, Scores, SiteId
from fedml.protocol.operations import Counted, Receipt, RunState
from fedml.protocol.parcels import is_coarse, rounded
from fedml.protocol.tasks import Brief
from fedml.rounds import masked
from fedml.rounds import round as rounds
from fedml.rounds.buffered import BufferedRound, Flight
from fedml.rounds.hosting import (
    Candidate,
    Command,
    Commit,
    Committed,
    End,
    Event,
    ForgetTask,
    Opened,
    SitesChanged,
    StopAsked,
    Tick,
)
from fedml.rounds.plan import Plan, about_of
from fedml.rounds.selection import Muster, Pool, Roll
from fedml.secagg import Roster, Terms
from fedml.strategies import Aggregate, ServerState, buffering_of, is_personal, reports

Barred = Mapping[rounds.Kind, Mapping[str, str]]  # reasons by site
_NONE: Barred = {}
_TURN = 1.0  # seconds, at least, between looks at a patience that other runs have used up


class Run:
    """Carries a plan through its rounds; its host feeds events and carries out commands in order.

    A failed round is tried again up to `plan.attempts` times. If sites have refused for good and
    too few are left, the run stops early, and still offers what it has if the gates pass.
    """

    def __init__(
        self,
        id: RunId,
        plan: Plan,
        state: ServerState,
        receipts: Sequence[Receipt] = (),
        reopen: Opened | None = None,
        barred: Barred = _NONE,
    ) -> None:
        """Prefer `begin` and `resume`, which say what they are for."""
        reports(plan.strategy.brief(state))  # raises if nobody here has the rule
        self.id, self.plan, self.state = id, plan, state
        self.receipts: list[Receipt] = []
        self._by_round: dict[tuple[rounds.Kind, int], list[Receipt]] = {}
        self._done = 0
        # nothing that is masked is carried over
        self._buffering = None if plan.secagg.is_on else buffering_of(plan.strategy)
        self.flight = Flight(id)  # empty but for runs that take updates as they come
        for receipt in receipts:
            self._keep(receipt)
        self._reopen = reopen
        self._pool: Pool = Roll()
        self._barred: dict[rounds.Kind, dict[str, str]] = {
            "train": {**barred.get("train", {})},
            "evaluate": {**barred.get("evaluate", {})},
        }
        self._round: rounds.Round | masked.MaskedRound | None = None
        self._roster: Roster | None = None  # of masked rounds
        self._opened: Opened | None = None
        self._commit: Commit | None = None
        self._waits, self._patience, self._need = 0, "", ""
        self._refused = ""  # why no further round can be: too many sites refused for good
        self._unscored = 0  # the round whose evaluation was given up
        self._pardoned: dict[tuple[rounds.Kind, int], int] = {}  # tries that no longer count
        self._lapsed = ""  # why the sites have forgotten the round that was open
        self._stopped = ""  # what the operator who stopped it said
        self._ending: End | None = None  # how to end once what is open is committed
        self._end: End | None = None

    @classmethod
    def begin(cls, id: RunId, plan: Plan, params: Params) -> Run:
        """Return a fresh run that starts from `params`.

        Raises `Contradiction` with every reason why the plan cannot work with such a model.
        """
        return cls(id, plan, plan.start(params))

    @classmethod
    def resume(
        cls,
        id: RunId,
        plan: Plan,
        state: ServerState,
        receipts: Sequence[Receipt],
        reopen: Opened | None = None,
        barred: Barred = _NONE,
    ) -> Run:
        """Return the run that committed `receipts` and `state`, with its last open round if any.

        That round is opened again with the same sites and task ids, so sites send the bytes
        they kept; its deadline starts anew. `barred` are the sites that its commits named as
        refusing; without it they are asked once more, and may refuse once more.
        """
        return cls(id, plan, state, receipts, reopen, barred)

    @property
    def status(self) -> tuple[RunState, str]:
        """Where the run stands, and one line about it for a person."""
        if self._end:
            return self._end.state, self._end.detail
        current = self._round  # once: a host may ask while another thread handles an event
        if current is None:
            return ("waiting", self._need) if self._patience else ("running", "committing a round")
        opening = current.opening
        where = f"round {opening.number} of {self.plan.rounds}, attempt {opening.attempt}"
        state: RunState = "running" if opening.kind == "train" else "evaluating"
        return state, f"{where}: {current.progress}"

    @property
    def asked(self) -> tuple[SiteId, ...]:
        """The sites of the round that is open; none between rounds."""
        current = self._round
        return current.opening.asked if current else ()

    @property
    def held(self) -> tuple[SiteId, ...]:
        """The sites that are asked, and those that still work for an earlier round."""
        asked, flying = self.asked, self.flight.tasks
        return (*asked, *(site for site in flying if site not in asked)) if flying else asked

    @property
    def terms(self) -> Terms | None:
        """What the round that is open is about, if it is masked."""
        current = self._round
        return current.terms if isinstance(current, masked.MaskedRound) else None

    @property
    def barred(self) -> Mapping[str, str]:
        """The sites that have refused, for good, what comes next, with their reasons."""
        step = self._next()
        return self._barred[step[0]] if step else {}

    @property
    def done(self) -> int:
        """How many rounds are committed."""
        return self._done

    def scores(self, number: int) -> Scores:
        """Return the scores of the model after round `number`; empty if it was not scored."""
        found = [r.scores for r in self._of("evaluate", number) if r.scores]
        return found[0] if found else {}

    def open(self, now: float) -> list[Command]:
        """Start, or go on after a restart."""
        reopen, self._reopen = self._reopen, None
        if reopen is not None:
            opening = reopen.opening
            next_ = (opening.kind, opening.number)
            if next_ == self._next() and opening.attempt == self._attempt(*next_):
                opened = self._play(reopen, now)
                if self._lapsed and self._round:  # nothing is sent: only its receipt is missing
                    self._pardoned[next_] = self._pardoned.get(next_, 0) + 1
                    return self._carry(self._round.abandon(self._lapsed), now)
                return opened
        return self._go_on(now)

    def halt(self, reason: str) -> None:
        """Before `open`: an operator stopped the run, so it ends; what was open has lapsed."""
        self._stopped, self._lapsed = reason, f"the run was stopped: {reason}"

    def forgive(self, receipts: int, lapsed: str) -> None:
        """Before `open`: an operator resumed the run after so many receipts.

        The tries until then no longer count against `plan.attempts`. `lapsed` says why the round
        that is open is void at the sites, "" if it is not. What was carried over before is void.
        """
        self._lapsed = lapsed
        if receipts and all(receipt.kind != "train" for receipt in self.receipts[receipts:]):
            self.flight.tasks.clear()  # when the run ended, its sites were told to forget
        for receipt in self.receipts[:receipts]:
            key = (receipt.kind, receipt.round)
            self._pardoned[key] = self._pardoned.get(key, 0) + 1

    def recall(self, states: Mapping[int, ServerState]) -> None:
        """Before `open`: the states before the rounds whose tasks are carried over, by round."""
        for number, state in states.items():
            self.flight.briefs[number] = self._trained_on(self.plan.strategy.brief(state))

    def _trained_on(self, brief: Brief) -> Brief:
        """Return a brief as the sites have it, which comes to them rounded if so planned."""
        coarse = is_coarse(self.plan.wire.down)
        return replace(brief, params=rounded(brief.params)) if coarse else brief

    def enrol(self, roster: Roster) -> None:
        """Before `open`: whose keys count in masked rounds."""
        self._roster = roster

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event in; return what the host must do now. After the end, nothing."""
        match event:
            case _ if self._end:
                return []
            case SitesChanged(statuses):
                self._pool = statuses if isinstance(statuses, Pool) else Roll(statuses)
                return self._go_on(now)
            case Tick(token):
                return self._tick(token, now)
            case StopAsked(reason):
                self._stopped = self._stopped or reason
                ended = self._round.abandon(f"the run was stopped: {reason}") if self._round else []
                return self._carry(ended, now) if ended else self._go_on(now)
            case Committed(state):
                return self._committed(state, now)
            case (
                rounds.UpdateArrived()
                | rounds.StackArrived()
                | rounds.SumArrived()
                | rounds.ReportArrived()
                | rounds.SiteLost()
                | masked.Said()
            ):
                return self._carry(self._feed(event), now)

    def _feed(self, event: rounds.Event | masked.Said) -> Sequence[rounds.Command | masked.Command]:
        """Let the round have an answer; a masked one takes none in the clear, and vice versa."""
        filling = isinstance(self._round, BufferedRound)
        if self._buffering and not filling and self.flight.hold(event):
            return []
        match self._round:
            case masked.MaskedRound() as round_:
                return round_.handle(event)
            case rounds.Round() as round_ if not isinstance(event, masked.Said):
                return round_.handle(event)
            case _:
                return []

    # what comes next

    def _keep(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)
        self._by_round.setdefault((receipt.kind, receipt.round), []).append(receipt)
        self._done += receipt.kind == "train" and bool(receipt.model)
        self.flight.note(receipt)

    def _of(self, kind: rounds.Kind, number: int) -> list[Receipt]:
        return self._by_round.get((kind, number), [])

    def _attempt(self, kind: rounds.Kind, number: int) -> int:
        return 1 + len(self._of(kind, number))

    def _tries(self, kind: rounds.Kind, number: int) -> int:
        """Count this attempt and those before it that were not forgiven."""
        return self._attempt(kind, number) - self._pardoned.get((kind, number), 0)

    def _next(self) -> tuple[rounds.Kind, int] | None:
        done = self.done
        last = done == self.plan.rounds or bool(self._refused)
        scored = (
            self.scores(done)
            or self._unscored == done
            or self._tries("evaluate", done) > self.plan.attempts
        )
        if done and not scored and self.plan.evaluation.is_due(done, last=last):
            return "evaluate", done
        return None if last else ("train", done + 1)

    def _go_on(self, now: float) -> list[Command]:
        """Do the next thing if nothing is under way."""
        if self._round or self._commit:
            return []
        if self._stopped:
            detail = f"{self._stopped}; {self.done} rounds are committed"
            return self._finish(End("stopped", detail))
        if self._ending:
            return self._finish(self._ending)
        if (step := self._next()) is None:
            return self._conclude()
        kind, number = step
        muster = self._pool.muster(self.plan, self._barred[kind])
        if hopeless := self._hopeless(kind, muster):
            self._give_up(kind, number, hopeless)
            return self._go_on(now)
        if kind == "train" and self._tries(kind, number) > self.plan.attempts:
            missing = self._of(kind, number)[-1].missing
            why = "; ".join(f"{site}: {reason}" for site, reason in missing.items())
            tries = f"round {number} failed {self.plan.attempts} times, the last time"
            return self._finish(End("failed", f"{tries} without {why or 'a usable total'}"))
        chosen = self.flight.choose(kind, number, self.plan.cohort.quorum, self._pool, muster)
        if chosen is None:
            return self._wait(muster)
        cohort, flying = self.plan.cohort, self.flight.tasks if kind == "train" else {}
        opening = rounds.Opening(
            self.id, number, self._attempt(kind, number), tuple(sorted({*chosen.asked, *flying})),
            cohort.quorum, cohort.deadline, kind, tuple(flying.values()),
        )  # fmt: skip
        return self._play(Opened(opening, chosen.left_out, now), now)

    def _hopeless(self, kind: rounds.Kind, muster: Muster) -> str:
        """Say why waiting is useless: too few sites are left that have not refused for good."""
        barred, quorum = self._barred[kind], self.plan.cohort.quorum
        unheard = isinstance(self._pool, Roll) and not self._pool.statuses
        if not barred or unheard or muster.willing >= quorum:
            return ""
        why = "; ".join(f"{site}: {reason}" for site, reason in sorted(barred.items()))
        return f"{len(barred)} sites refused for good and a quorum is {quorum} ({why})"

    def _give_up(self, kind: rounds.Kind, number: int, reason: str) -> None:
        if kind == "evaluate":
            self._unscored = number
        else:
            self._refused = reason

    def _wait(self, muster: Muster) -> list[Command]:
        why = "; ".join(f"{site}: {reason}" for site, reason in muster.left_out.items())
        ready, quorum = muster.ready, self.plan.cohort.quorum
        self._need = f"{quorum} sites are needed, {ready} are ready" + (f" ({why})" if why else "")
        if self._patience:
            return []
        self._waits += 1
        self._patience = f"patience.{self._waits}"
        return [rounds.WakeAt(self.plan.patience, self._patience)]

    def _tick(self, token: str, now: float) -> list[Command]:
        if self._round and self._round.awaits(token):
            return self._carry(self._round.handle(rounds.DeadlinePassed()), now)
        if not self._patience or token != self._patience:
            return []
        if isinstance(self._pool, Roll) and self._pool.awaits_turn:
            # other runs must not cost it its own patience
            return [rounds.WakeAt(max(self.plan.patience, _TURN), token)]
        self._patience = ""
        step = self._next()
        if step and step[0] == "evaluate":
            self._unscored = step[1]
            return self._go_on(now)
        waited = f"waited {self.plan.patience:g} s: {self._need}"
        return self._finish(End("failed", waited))

    # one round, from its opening to its commit

    def _play(self, opened: Opened, now: float) -> list[Command]:
        opening = opened.opening
        brief = self.plan.strategy.brief(self.state)
        if opening.kind == "evaluate" and not is_personal(brief):
            brief = Brief(self.state.params)
        if opening.kind == "train":
            brief = self._trained_on(brief)
        self._round, self._opened = self._new_round(opening, brief), opened
        self._patience = ""
        commands: list[Command] = [opened, *self._round.open(brief)]
        if isinstance(self._round, BufferedRound):
            for event in self.flight.take_early():  # what is too many for it waits on
                commands += self._carry(self._feed(event), now)
        return commands

    def _new_round(
        self, opening: rounds.Opening, brief: Brief
    ) -> rounds.Round | masked.MaskedRound:
        if not self.plan.secagg.is_on:
            reducer, coarse = self.plan.reducer, is_coarse(self.plan.wire.up)
            if self._buffering and opening.kind == "train":
                self.flight.briefs[opening.number] = brief
                lags = self.flight.lags(self._buffering, opening.number)
                return BufferedRound(
                    opening, reducer, reports(brief), self._buffering,
                    last=opening.number == self.plan.rounds, coarse=coarse, lags=lags,
                )  # fmt: skip
            return rounds.Round(opening, reducer, reports(brief), coarse=coarse)
        if self._roster is None:
            raise ConfigError("secagg=sa1 without a roster of the sites' identity keys")
        more = about_of(self.plan, brief)
        grain = grain_of(self.plan.training, self.plan.privacy)
        enough = self.plan.buffer if opening.kind == "train" else 0
        return masked.MaskedRound(opening, self.plan.secagg, self._roster, more, grain, enough)

    def _carry(
        self, commands: Sequence[rounds.Command | masked.Command], now: float
    ) -> list[Command]:
        carried: list[Command] = []
        for command in commands:
            match command:
                case rounds.Close(total, account):
                    carried.append(self._close(total, account, now))
                case rounds.Fail(_, account):
                    carried.append(self._settle(account, now, None))
                case _:
                    carried.append(command)
        return carried

    def _close(self, total: Aggregate | Scores, account: rounds.Account, now: float) -> Commit:
        if not isinstance(total, Aggregate):
            return self._settle(account, now, None, scores=total)
        state = self.plan.strategy.advance(self.state, total)
        if not state.params.is_finite():  # the same updates would lead there again
            number = self.done + 1
            detail = (
                f"the model diverged in round {number}: lower strategy.server_lr or training.lr"
            )
            self._ending = End("failed", detail)
            return self._settle(account, now, None)
        return self._settle(account, now, state, metrics=total.metrics, damped=total.damped)

    def _settle(
        self,
        account: rounds.Account,
        now: float,
        state: ServerState | None,
        *,
        metrics: Scores | None = None,
        scores: Scores | None = None,
        damped: Mapping[str, str] | None = None,
    ) -> Commit:
        """Write the receipt of the round that just ended; nothing goes on until it is durable."""
        assert self._opened is not None, "a round that was never opened"
        opened, opening = self._opened, self._opened.opening
        self._barred[opening.kind].update({site: account.missing[site] for site in account.final})
        outcome = self.state if scores else state
        receipt = Receipt(
            run=self.id, round=opening.number, attempt=opening.attempt, kind=opening.kind,
            asked=account.asked, counted=self._told(account.counted), missing=account.missing,
            left_out=opened.left_out, metrics=metrics or {}, scores=scores or {},
            model=outcome.params.digest() if outcome else "", opened=opened.at, closed=now,
            damped=damped or {}, stale=account.stale, carried=account.carried,
        )  # fmt: skip
        if isinstance(self._round, BufferedRound):
            self.flight.early += self._round.surplus
        self._round, self._commit = None, Commit(receipt, state, account.final)
        return self._commit

    def _told(self, counted: tuple[Counted, ...]) -> tuple[Counted, ...]:
        """Return who counted, without what would let a reader check a guess of an exact update."""
        if self.plan.privacy.mode != "site_central":
            return counted
        return tuple(replace(one, digest="") for one in counted)

    def _committed(self, state: ServerState | None, now: float) -> list[Command]:
        if self._commit is None:
            return []
        assert self._opened is not None, "a commit without a round"
        opening, commit = self._opened.opening, self._commit
        self._commit = None
        self._keep(commit.receipt)
        self.state = state or commit.state or self.state
        over = (site for site in opening.asked if site not in commit.receipt.carried)
        forget = [ForgetTask(opening.task_id(site), site) for site in over]
        return [*forget, *self._go_on(now)]

    # the end

    def _conclude(self) -> list[Command]:
        done, scores = self.done, self.scores(self.done)
        early = f"ended after round {done} of {self.plan.rounds}: {self._refused}"
        if not done:
            return self._finish(End("stopped", early))
        objections = [o for gate in self.plan.gates if (o := gate.objection(scores))]
        if objections:
            detail = "no candidate: " + "; ".join(
                [*objections, early] if self._refused else objections
            )
            return self._finish(End("stopped" if self._refused else "failed", detail))
        detail = f"candidate {early}" if self._refused else f"candidate after {done} rounds"
        candidate = Candidate(self.state.params, scores, tuple(self.receipts), detail)
        end = End("stopped" if self._refused else "done", detail)
        return [candidate, *self._finish(end)]

    def _finish(self, end: End) -> list[Command]:
        self._end, self._patience = end, ""
        flying = self.flight.tasks.items()
        cancels = [rounds.CancelTask(task, site, "the run is over") for site, task in flying]
        return [*cancels, *(ForgetTask(task, site) for site, task in flying), end]
