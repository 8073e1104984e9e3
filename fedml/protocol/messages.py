"""What sites and the coordinator say to each other, as frozen dataclasses.

Commands go to a site (`Command`), events come from it (`SiteEvent`); tensors travel apart, as
`Blob`s named by digest. Nothing else leaves a site: this file is the whole list. A region, which
is a coordinator to its leaves and a site to its parent, says a few things besides. No torch here,
so that a site's daemon, which never looks into a tensor, stays small.

Each value checks itself at birth and raises `ConfigError` with the bad value; a codec or a
host that meets foreign input turns that into its own error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NewType, get_args

from fedml.errors import ConfigError

SiteId = NewType("SiteId", str)
RunId = NewType("RunId", str)
TaskId = NewType("TaskId", str)
Scores = Mapping[str, float]  # metric name to value

_NAME = re.compile(r"(?!.*\.\.)[a-z0-9][a-z0-9._-]{0,62}")
_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_name(what: str, name: str) -> str:
    """Return `name` if it is fit for a file, a URL and a certificate; else raise `ConfigError`."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r}: use 1-63 of a-z 0-9 . _ - without '..', start with a-z or 0-9"
        )
    return name


def check_id(what: str, id: str) -> str:
    """Return `id`, of a task, run or site, if it is one file name; else raise `ConfigError`.

    Ids of tasks name folders at a site, so one from a hostile peer must not lead out of them.
    """
    if not _ID.fullmatch(id):
        raise ConfigError(f"{what}: {id[:70]!r} is no id; 1-200 of A-Z a-z 0-9 . _ -")
    return id


def check_digest(what: str, digest: str) -> str:
    """Return `digest` if it is one of 256 bits in lower-case hex; else raise `ConfigError`."""
    if not _DIGEST.fullmatch(digest):
        raise ConfigError(f"{what} {digest[:70]!r} is no SHA-256 in lower-case hex")
    return digest


@dataclass(frozen=True)
class Blob:
    """Bytes that travel apart from messages: their digest in hex, and length in bytes.

    Models and updates are named by BLAKE3, files of releases by SHA-256, as in what is signed.
    """

    digest: str
    size: int

    def __post_init__(self) -> None:
        check_digest("blob", self.digest)
        if self.size < 0:
            raise ConfigError(f"blob size {self.size}")


@dataclass(frozen=True)
class Parcel:
    """A blob packed for its way: unpacked it is, to the bit, the model or update it stands for.

    `form` is one of `FORMS`, or one that only newer versions know; `base` the digest of the model
    that a "delta" is the difference to. What is packed how: `fedml.protocol.parcels`.
    """

    form: str
    blob: Blob
    base: str = ""

    def __post_init__(self) -> None:
        check_name("form", self.form)
        if self.base:
            check_digest("base", self.base)


FORMS = ("bf16", "zstd", "delta")  # of parcels


@dataclass(frozen=True)
class RecipeId:
    """A recipe by name and by the SHA-256 of its source, so both ends mean the same code."""

    name: str
    digest: str

    def __post_init__(self) -> None:
        check_name("recipe", self.name)
        check_digest("recipe digest", self.digest)


@dataclass(frozen=True)
class Training:
    """How a site trains in one round: plain SGD, for `steps` batches or for `epochs` passes.

    `batch_size` 0 takes all rows in each step. Under record-level privacy a batch is a Poisson
    sample of that expected size, and `steps` is required.
    """

    lr: float
    steps: int = 0
    epochs: int = 0
    batch_size: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"training.lr {self.lr}: must be above 0")
        if (self.steps > 0) == (self.epochs > 0) or min(self.steps, self.epochs) < 0:
            raise ConfigError(
                f"training.steps {self.steps} and training.epochs {self.epochs}: set exactly one"
            )
        if self.batch_size < 0:
            raise ConfigError(f"training.batch_size {self.batch_size}: 0 (all rows) or more")
        if not (0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise ConfigError(
                f"training.momentum {self.momentum}, weight_decay {self.weight_decay}: "
                "momentum lies in [0, 1), weight_decay is 0 or more"
            )


PrivacyMode = Literal[
    "none", "record", "patient", "site_central", "record_distributed", "site_distributed"
]


@dataclass(frozen=True)
class Privacy:
    """The guarantee a run asks of each site; the site's own policy may refuse it.

    Mode `record` is (epsilon, delta)-DP for adding or removing one row, over the whole run:
    `epsilon` for a training row after `rounds` rounds, and `evaluation_epsilon` for each
    evaluation of a held-out row (0: no scores leave the site). `clip` bounds the L2 norm of one
    row's gradient. Mode `none` promises nothing but that rows stay home.

    Mode `patient` is the same promise for adding or removing a person with all of his rows:
    `clip` bounds the norm of the mean of a person's gradients, and a batch is of persons.

    Mode `record_distributed` is the same promise for the sum of all sites' updates, each of which
    has a share of the noise alone: the shares of `sharers` sites make up the whole. It holds if
    nobody sees less than their sum.

    Mode `site_central` is (epsilon, delta)-DP for one site's updates, there or zero, against
    everybody but the coordinator, which is trusted to add the noise: sites bound their updates to
    L2 norm `clip`, and all of them weigh the same. Mode `site_distributed` trusts `sharers` sites
    in the place of the coordinator: each adds its share of the noise to its bounded update.
    """

    mode: PrivacyMode = "none"
    epsilon: float = 0.0
    delta: float = 0.0
    clip: float = 1.0
    rounds: int = 1
    evaluation_epsilon: float = 0.0
    sharers: int = 0

    @property
    def in_training(self) -> bool:
        """True if training itself is private: rows' gradients are clipped, and drowned in noise."""
        return self.mode not in ("none", "site_central", "site_distributed")

    @property
    def shares_noise(self) -> bool:
        """True if a site's answer has a share of the noise, which their sum has whole."""
        return self.mode in ("record_distributed", "site_distributed")

    def __post_init__(self) -> None:
        if self.mode not in get_args(PrivacyMode):
            modes = ", ".join(get_args(PrivacyMode))
            raise ConfigError(f"privacy.mode {self.mode!r}: use one of {modes}")
        if self.mode != "none" and not (0 < self.epsilon < math.inf and 0 < self.delta < 1):
            raise ConfigError(
                f"privacy.epsilon {self.epsilon}, delta {self.delta}: epsilon > 0, 0 < delta < 1"
            )
        if not 0 < self.clip < math.inf:
            raise ConfigError(f"privacy.clip {self.clip}: must be above 0")
        if self.rounds < 1 or not 0 <= self.evaluation_epsilon < math.inf:
            raise ConfigError(
                f"privacy.rounds {self.rounds}, evaluation_epsilon {self.evaluation_epsilon}: "
                "rounds is 1 or more, evaluation_epsilon 0 or more"
            )
        if (self.sharers > 0) != self.shares_noise:
            raise ConfigError(
                f"privacy.sharers {self.sharers} with mode {self.mode!r}: in modes "
                "record_distributed and site_distributed give the number of sites whose noise "
                "adds up, else leave it 0"
            )


# --- commands: what the coordinator sends down a site's stream --------------------------------


@dataclass(frozen=True)
class Welcome:
    """First command on a stream: the coordinator's version, and its heartbeat in seconds.

    `now` is its time, in seconds since the epoch; 0 from a version that does not tell it.
    """

    version: str
    heartbeat: float
    now: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat < math.inf:
            raise ConfigError(f"heartbeat {self.heartbeat} s: must be above 0")


@dataclass(frozen=True)
class Assignment:
    """A task as it travels: `model` holds the brief's tensors, part "" the parameters.

    `deadline` is in seconds from receipt; the coordinator stops waiting then. `parcels` are ways
    to get the model in fewer bytes, the best first; a site that can use none gets it whole. They
    are no part of the order's terms. `up` is how the update is wanted, as in `Wire`, "" whole; a
    site may send it whole in any case. `keep_model`: the next one may come as a difference to it.
    """

    task: TaskId
    run: RunId
    round: int
    kind: Literal["train", "evaluate"]
    recipe: RecipeId
    dataset: str
    model: Blob
    training: Training
    privacy: Privacy
    rule: str = "plain"
    settings: Mapping[str, float] = field(default_factory=dict)
    cohort: int = 1  # how many sites were asked; a site's policy may want a minimum
    seed: int = 0  # of batch order and dropout; never of privacy noise
    deadline: float = 600.0
    parcels: tuple[Parcel, ...] = field(default=(), compare=False)
    up: str = ""
    keep_model: bool = False
    masking: str = ""  # `secagg.Masking` as JSON if the round is masked: the answer must be
    app: str = (
        ""  # `apps.AppTerms` as JSON if the recipe is a Flower app, the model a message to it
    )

    def __post_init__(self) -> None:
        check_id("task", self.task)
        check_id("run", self.run)
        check_name("dataset", self.dataset)
        if self.kind not in ("train", "evaluate"):
            raise ConfigError(f"task kind {self.kind!r}: 'train' or 'evaluate'")
        if self.round < 1 or self.cohort < 1 or not 0 < self.deadline < math.inf:
            raise ConfigError(
                f"task {self.task}: round {self.round}, cohort {self.cohort}, "
                f"deadline {self.deadline}: all must be positive"
            )


@dataclass(frozen=True)
class Cancel:
    """Stop working on a task; its result is no longer wanted."""

    task: TaskId
    reason: str


@dataclass(frozen=True)
class Forget:
    """The task's round is over: the site may delete what it kept for it.

    `counted` says that the update entered the model, so the algorithm's own state at the site
    moves on with it. `run`, unless it is empty, is over as well: that state may go.
    """

    task: TaskId
    counted: bool
    run: str = ""


@dataclass(frozen=True)
class ReleaseNotice:
    """A release was published or rolled back; look at the signed channel of `model`."""

    model: str

    def __post_init__(self) -> None:
        check_name("model", self.model)


@dataclass(frozen=True)
class Beat:
    """I am alive; sent both ways on a quiet stream."""


@dataclass(frozen=True)
class SecaggTold:
    """The coordinator's part in masking a task's round; `data` is a message of `secagg`."""

    task: TaskId
    word: Literal["adverts", "boxes", "survivors", "consents"]
    data: bytes


@dataclass(frozen=True)
class Lot:
    """One leaf's part in `Orders`: the task that it would get from us, and its seed."""

    site: SiteId
    task: TaskId
    seed: int


@dataclass(frozen=True)
class Orders:
    """To a region: one order for many of its leaves, but for what each one's lot says.

    The order's own task is that of the round, the leaf left out. The lots are all that are open:
    when the region comes back, or is reminded, it hears of them anew.
    """

    order: Assignment
    lots: tuple[Lot, ...]


@dataclass(frozen=True)
class Errand:
    """To a region: an encoded `Command` for one of its leaves."""

    site: SiteId
    command: bytes


@dataclass(frozen=True)
class Errands:
    """To a region: what else its leaves shall hear."""

    errands: tuple[Errand, ...]


Command = (
    Welcome | Assignment | Cancel | Forget | ReleaseNotice | Beat
    | Orders | Errands | SecaggTold
)  # fmt: skip


# --- events: all that a site ever sends -------------------------------------------------------


@dataclass(frozen=True)
class DatasetCard:
    """A site's dataset as the operator made it public: no row, no count that was not declared.

    `rows` is the public row count from the site's policy. `digest` is keyed with a secret of the
    site (HMAC-SHA-256): equal while the data stay the same, and no oracle for guessing them.
    """

    name: str
    rows: int
    digest: str

    def __post_init__(self) -> None:
        check_name("dataset", self.name)
        check_digest("dataset digest", self.digest)
        if self.rows < 0:
            raise ConfigError(f"dataset {self.name}: {self.rows} rows")


@dataclass(frozen=True)
class Serving:
    """What a site's endpoint serves: the release's manifest digest, "" when none."""

    model: str
    version: int
    digest: str
    state: Literal["live", "refused", "none"]
    detail: str = ""


@dataclass(frozen=True)
class Hello:
    """First event on a stream: who speaks is in the certificate, this is what it can do.

    `kept` are the tasks whose results the site still holds, `runs` those of which it has an
    algorithm's own state, or a model; it is told which it may forget.
    `runs_at_once` is in how many runs it takes part at a time; 0 is as many as there are.
    `roster` is the digest, in hex, of the roster of masked rounds that its operator accepted.
    `apps` are the Flower apps that it runs.
    """

    version: str
    device: str
    recipes: tuple[RecipeId, ...] = ()
    datasets: tuple[DatasetCard, ...] = ()
    serving: tuple[Serving, ...] = ()
    kept: tuple[TaskId, ...] = ()
    runs: tuple[RunId, ...] = ()
    runs_at_once: int = 0
    roster: str = ""
    apps: tuple[RecipeId, ...] = ()


@dataclass(frozen=True)
class Accepted:
    """The site has the task on its disk and works on it."""

    task: TaskId


@dataclass(frozen=True)
class Declined:
    """The site's policy refuses the task; asking again is useless, unless it is `for_now`."""

    task: TaskId
    reason: str
    for_now: bool = False


@dataclass(frozen=True)
class Failed:
    """The site tried and could not; asking again may help."""

    task: TaskId
    reason: str


@dataclass(frozen=True)
class Trained:
    """The update is on the site's disk, charged, and uploaded as `update`, or as its one parcel.

    Parts of the blob: `delta`, and each slot by its name. Of a masked round, whatever its kind,
    the blob is masked words, and weight and metrics are in them.
    """

    task: TaskId
    update: Blob
    weight: float
    metrics: Scores = field(default_factory=dict)
    epsilon: float = 0.0
    parcels: tuple[Parcel, ...] = ()

    @property
    def sent(self) -> Blob:
        """What is uploaded."""
        return self.parcels[0].blob if self.parcels else self.update


@dataclass(frozen=True)
class Scored:
    """An evaluation's sums; see `Report`."""

    task: TaskId
    totals: Scores
    count: float
    epsilon: float = 0.0


@dataclass(frozen=True)
class Leaf:
    """A site behind a region, whether it is connected there, and what it said of itself.

    To the tasks that it keeps the region adds those that it keeps for it.
    """

    site: SiteId
    here: bool
    hello: Hello


@dataclass(frozen=True)
class Roster:
    """From a region: leaves that came, went or changed; at first all that it knows."""

    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class Relayed:
    """From a region: an encoded `SiteEvent` of one of its leaves."""

    site: SiteId
    event: bytes


@dataclass(frozen=True)
class Summand:
    """A leaf's update in its region's sum, as its `Trained` told of it, with its own digest."""

    site: SiteId
    task: TaskId
    weight: float
    digest: str
    metrics: Scores = field(default_factory=dict)
    epsilon: float = 0.0


@dataclass(frozen=True)
class Summed:
    """From a region: the exact sum of its leaves' updates is on its disk, and uploaded as `total`.

    `reach` is, for each part of an update, what bounds every element of its sum, in grid steps.
    """

    total: Blob
    summands: tuple[Summand, ...]
    reach: Mapping[str, int]


@dataclass(frozen=True)
class SecaggSaid:
    """The site's part in masking a task's round; `data` is a message of `secagg`."""

    task: TaskId
    word: Literal["advert", "shares", "consent", "unmasking"]
    data: bytes


SiteEvent = (
    Hello | Accepted | Declined | Failed | Trained | Scored | Serving | Beat
    | Roster | Relayed | Summed | SecaggSaid
)  # fmt: skip
