from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Blob(_message.Message):
    __slots__ = ("digest", "size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Parcel(_message.Message):
    __slots__ = ("form", "blob", "base")
    FORM_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    form: str
    blob: Blob
    base: str
    def __init__(self, form: _Optional[str] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., base: _Optional[str] = ...) -> None: ...

class RecipeId(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Training(_message.Message):
    __slots__ = ("lr", "steps", "epochs", "batch_size", "momentum", "weight_decay")
    LR_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    lr: float
    steps: int
    epochs: int
    batch_size: int
    momentum: float
    weight_decay: float
    def __init__(self, lr: _Optional[float] = ..., steps: _Optional[int] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., momentum: _Optional[float] = ..., weight_decay: _Optional[float] = ...) -> None: ...

class Privacy(_message.Message):
    __slots__ = ("mode", "epsilon", "delta", "clip", "rounds", "evaluation_epsilon", "sharers")
    MODE_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_EPSILON_FIELD_NUMBER: _ClassVar[int]
    SHARERS_FIELD_NUMBER: _ClassVar[int]
    mode: str
    epsilon: float
    delta: float
    clip: float
    rounds: int
    evaluation_epsilon: float
    sharers: int
    def __init__(self, mode: _Optional[str] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., clip: _Optional[float] = ..., rounds: _Optional[int] = ..., evaluation_epsilon: _Optional[float] = ..., sharers: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "heartbeat", "now")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    version: str
    heartbeat: float
    now: float
    def __init__(self, version: _Optional[str] = ..., heartbeat: _Optional[float] = ..., now: _Optional[float] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("task", "run", "round", "kind", "recipe", "dataset", "model", "training", "privacy", "rule", "settings", "cohort", "seed", "deadline", "parcels", "up", "keep_model", "masking", "app")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    PARCELS_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    KEEP_MODEL_FIELD_NUMBER: _ClassVar[int]
    MASKING_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    task: str
    run: str
    round: int
    kind: str
    recipe: RecipeId
    dataset: str
    model: Blob
    training: Training
    privacy: Privacy
    rule: str
    settings: _containers.ScalarMap[str, float]
    cohort: int
    seed: int
    deadline: float
    parcels: _containers.RepeatedCompositeFieldContainer[Parcel]
    up: str
    keep_model: bool
    masking: str
    app: str
    def __init__(self, task: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., kind: _Optional[str] = ..., recipe: _Optional[_Union[RecipeId, _Mapping]] = ..., dataset: _Optional[str] = ..., model: _Optional[_Union[Blob, _Mapping]] = ..., training: _Optional[_Union[Training, _Mapping]] = ..., privacy: _Optional[_Union[Privacy, _Mapping]] = ..., rule: _Optional[str] = ..., settings: _Optional[_Mapping[str, float]] = ..., cohort: _Optional[int] = ..., seed: _Optional[int] = ..., deadline: _Optional[float] = ..., parcels: _Optional[_Iterable[_Union[Parcel, _Mapping]]] = ..., up: _Optional[str] = ..., keep_model: _Optional[bool] = ..., masking: _Optional[str] = ..., app: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("task", "reason")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task: str
    reason: str
    def __init__(self, task: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Forget(_message.Message):
    __slots__ = ("task", "counted", "run")
    TASK_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    task: str
    counted: bool
    run: str
    def __init__(self, task: _Optional[str] = ..., counted: _Optional[bool] = ..., run: _Optional[str] = ...) -> None: ...

class ReleaseNotice(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Lot(_message.Message):
    __slots__ = ("site", "task", "seed")
    SITE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    site: str
    task: str
    seed: int
    def __init__(self, site: _Optional[str] = ..., task: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class Orders(_message.Message):
    __slots__ = ("order", "lots")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    LOTS_FIELD_NUMBER: _ClassVar[int]
    order: Assignment
    lots: _containers.RepeatedCompositeFieldContainer[Lot]
    def __init__(self, order: _Optional[_Union[Assignment, _Mapping]] = ..., lots: _Optional[_Iterable[_Union[Lot, _Mapping]]] = ...) -> None: ...

class Errand(_message.Message):
    __slots__ = ("site", "command")
    SITE_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    site: str
    command: bytes
    def __init__(self, site: _Optional[str] = ..., command: _Optional[bytes] = ...) -> None: ...

class Errands(_message.Message):
    __slots__ = ("errands",)
    ERRANDS_FIELD_NUMBER: _ClassVar[int]
    errands: _containers.RepeatedCompositeFieldContainer[Errand]
    def __init__(self, errands: _Optional[_Iterable[_Union[Errand, _Mapping]]] = ...) -> None: ...

class SecaggTold(_message.Message):
    __slots__ = ("task", "word", "data")
    TASK_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    task: str
    word: str
    data: bytes
    def __init__(self, task: _Optional[str] = ..., word: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("welcome", "assignment", "cancel", "forget", "release_notice", "beat", "orders", "errands", "secagg_told")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    RELEASE_NOTICE_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    ERRANDS_FIELD_NUMBER: _ClassVar[int]
    SECAGG_TOLD_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    assignment: Assignment
    cancel: Cancel
    forget: Forget
    release_notice: ReleaseNotice
    beat: Beat
    orders: Orders
    errands: Errands
    secagg_told: SecaggTold
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., forget: _Optional[_Union[Forget, _Mapping]] = ..., release_notice: _Optional[_Union[ReleaseNotice, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., orders: _Optional[_Union[Orders, _Mapping]] = ..., errands: _Optional[_Union[Errands, _Mapping]] = ..., secagg_told: _Optional[_Union[SecaggTold, _Mapping]] = ...) -> None: ...

class DatasetCard(_message.Message):
    __slots__ = ("name", "rows", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    digest: str
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class Serving(_message.Message):
    __slots__ = ("model", "version", "digest", "state", "detail")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    digest: str
    state: str
    detail: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "device", "recipes", "datasets", "serving", "kept", "runs", "runs_at_once", "roster", "apps")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RECIPES_FIELD_NUMBER: _ClassVar[int]
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    RUNS_AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    APPS_FIELD_NUMBER: _ClassVar[int]
    version: str
    device: str
    recipes: _containers.RepeatedCompositeFieldContainer[RecipeId]
    datasets: _containers.RepeatedCompositeFieldContainer[DatasetCard]
    serving: _containers.RepeatedCompositeFieldContainer[Serving]
    kept: _containers.RepeatedScalarFieldContainer[str]
    runs: _containers.RepeatedScalarFieldContainer[str]
    runs_at_once: int
    roster: str
    apps: _containers.RepeatedCompositeFieldContainer[RecipeId]
    def __init__(self, version: _Optional[str] = ..., device: _Optional[str] = ..., recipes: _Optional[_Iterable[_Union[RecipeId, _Mapping]]] = ..., datasets: _Optional[_Iterable[_Union[DatasetCard, _Mapping]]] = ..., serving: _Optional[_Iterable[_Union[Serving, _Mapping]]] = ..., kept: _Optional[_Iterable[str]] = ..., runs: _Optional[_Iterable[str]] = ..., runs_at_once: _Optional[int] = ..., roster: _Optional[str] = ..., apps: _Optional[_Iterable[_Union[RecipeId, _Mapping]]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: str
    def __init__(self, task: _Optional[str] = ...) -> None: ...

class Declined(_message.Message):
    __slots__ = ("task", "reason", "for_now")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FOR_NOW_FIELD_NUMBER: _ClassVar[int]
    task: str
    reason: str
    for_now: bool
    def __init__(self, task: _Optional[str] = ..., reason: _Optional[str] = ..., for_now: _Optional[bool] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("task", "reason")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task: str
    reason: str
    def __init__(self, task: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Trained(_message.Message):
    __slots__ = ("task", "update", "weight", "metrics", "epsilon", "parcels")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    PARCELS_FIELD_NUMBER: _ClassVar[int]
    task: str
    update: Blob
    weight: float
    metrics: _containers.ScalarMap[str, float]
    epsilon: float
    parcels: _containers.RepeatedCompositeFieldContainer[Parcel]
    def __init__(self, task: _Optional[str] = ..., update: _Optional[_Union[Blob, _Mapping]] = ..., weight: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., epsilon: _Optional[float] = ..., parcels: _Optional[_Iterable[_Union[Parcel, _Mapping]]] = ...) -> None: ...

class Scored(_message.Message):
    __slots__ = ("task", "totals", "count", "epsilon")
    class TotalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    task: str
    totals: _containers.ScalarMap[str, float]
    count: float
    epsilon: float
    def __init__(self, task: _Optional[str] = ..., totals: _Optional[_Mapping[str, float]] = ..., count: _Optional[float] = ..., epsilon: _Optional[float] = ...) -> None: ...

class Leaf(_message.Message):
    __slots__ = ("site", "here", "hello")
    SITE_FIELD_NUMBER: _ClassVar[int]
    HERE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    site: str
    here: bool
    hello: Hello
    def __init__(self, site: _Optional[str] = ..., here: _Optional[bool] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("leaves",)
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    leaves: _containers.RepeatedCompositeFieldContainer[Leaf]
    def __init__(self, leaves: _Optional[_Iterable[_Union[Leaf, _Mapping]]] = ...) -> None: ...

class Relayed(_message.Message):
    __slots__ = ("site", "event")
    SITE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    site: str
    event: bytes
    def __init__(self, site: _Optional[str] = ..., event: _Optional[bytes] = ...) -> None: ...

class Summand(_message.Message):
    __slots__ = ("site", "task", "weight", "digest", "metrics", "epsilon")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SITE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    site: str
    task: str
    weight: float
    digest: str
    metrics: _containers.ScalarMap[str, float]
    epsilon: float
    def __init__(self, site: _Optional[str] = ..., task: _Optional[str] = ..., weight: _Optional[float] = ..., digest: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., epsilon: _Optional[float] = ...) -> None: ...

class Summed(_message.Message):
    __slots__ = ("total", "summands", "reach")
    class ReachEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    SUMMANDS_FIELD_NUMBER: _ClassVar[int]
    REACH_FIELD_NUMBER: _ClassVar[int]
    total: Blob
    summands: _containers.RepeatedCompositeFieldContainer[Summand]
    reach: _containers.ScalarMap[str, int]
    def __init__(self, total: _Optional[_Union[Blob, _Mapping]] = ..., summands: _Optional[_Iterable[_Union[Summand, _Mapping]]] = ..., reach: _Optional[_Mapping[str, int]] = ...) -> None: ...

class SecaggSaid(_message.Message):
    __slots__ = ("task", "word", "data")
    TASK_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    task: str
    word: str
    data: bytes
    def __init__(self, task: _Optional[str] = ..., word: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class SiteEvent(_message.Message):
    __slots__ = ("hello", "accepted", "declined", "failed", "trained", "scored", "serving", "beat", "roster", "relayed", "summed", "secagg_said")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    RELAYED_FIELD_NUMBER: _ClassVar[int]
    SUMMED_FIELD_NUMBER: _ClassVar[int]
    SECAGG_SAID_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    accepted: Accepted
    declined: Declined
    failed: Failed
    trained: Trained
    scored: Scored
    serving: Serving
    beat: Beat
    roster: Roster
    relayed: Relayed
    summed: Summed
    secagg_said: SecaggSaid
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., declined: _Optional[_Union[Declined, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., trained: _Optional[_Union[Trained, _Mapping]] = ..., scored: _Optional[_Union[Scored, _Mapping]] = ..., serving: _Optional[_Union[Serving, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., roster: _Optional[_Union[Roster, _Mapping]] = ..., relayed: _Optional[_Union[Relayed, _Mapping]] = ..., summed: _Optional[_Union[Summed, _Mapping]] = ..., secagg_said: _Optional[_Union[SecaggSaid, _Mapping]] = ...) -> None: ...

class Advert(_message.Message):
    __slots__ = ("context", "site", "box_key", "mask_key", "signature")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    BOX_KEY_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    site: str
    box_key: bytes
    mask_key: bytes
    signature: bytes
    def __init__(self, context: _Optional[bytes] = ..., site: _Optional[str] = ..., box_key: _Optional[bytes] = ..., mask_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Adverts(_message.Message):
    __slots__ = ("context", "adverts")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ADVERTS_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    adverts: _containers.RepeatedCompositeFieldContainer[Advert]
    def __init__(self, context: _Optional[bytes] = ..., adverts: _Optional[_Iterable[_Union[Advert, _Mapping]]] = ...) -> None: ...

class Shares(_message.Message):
    __slots__ = ("context", "site", "boxes", "commitment")
    class BoxesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    site: str
    boxes: _containers.ScalarMap[str, bytes]
    commitment: bytes
    def __init__(self, context: _Optional[bytes] = ..., site: _Optional[str] = ..., boxes: _Optional[_Mapping[str, bytes]] = ..., commitment: _Optional[bytes] = ...) -> None: ...

class Boxes(_message.Message):
    __slots__ = ("context", "boxes")
    class BoxesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    boxes: _containers.ScalarMap[str, bytes]
    def __init__(self, context: _Optional[bytes] = ..., boxes: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("context", "sites")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    sites: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, context: _Optional[bytes] = ..., sites: _Optional[_Iterable[str]] = ...) -> None: ...

class Consent(_message.Message):
    __slots__ = ("context", "site", "signature")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    site: str
    signature: bytes
    def __init__(self, context: _Optional[bytes] = ..., site: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Consents(_message.Message):
    __slots__ = ("context", "signatures")
    class SignaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    signatures: _containers.ScalarMap[str, bytes]
    def __init__(self, context: _Optional[bytes] = ..., signatures: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Unmasking(_message.Message):
    __slots__ = ("context", "site", "seeds", "keys")
    class SeedsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class KeysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    context: bytes
    site: str
    seeds: _containers.ScalarMap[str, bytes]
    keys: _containers.ScalarMap[str, bytes]
    def __init__(self, context: _Optional[bytes] = ..., site: _Optional[str] = ..., seeds: _Optional[_Mapping[str, bytes]] = ..., keys: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Counted(_message.Message):
    __slots__ = ("site", "weight", "digest", "epsilon")
    SITE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    site: str
    weight: float
    digest: str
    epsilon: float
    def __init__(self, site: _Optional[str] = ..., weight: _Optional[float] = ..., digest: _Optional[str] = ..., epsilon: _Optional[float] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("run", "round", "attempt", "asked", "counted", "missing", "left_out", "metrics", "scores", "model", "opened", "closed", "kind", "damped", "about", "stale", "carried")
    class MissingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class LeftOutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class DampedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class StaleEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class CarriedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DAMPED_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    CARRIED_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    asked: _containers.RepeatedScalarFieldContainer[str]
    counted: _containers.RepeatedCompositeFieldContainer[Counted]
    missing: _containers.ScalarMap[str, str]
    left_out: _containers.ScalarMap[str, str]
    metrics: _containers.ScalarMap[str, float]
    scores: _containers.ScalarMap[str, float]
    model: str
    opened: float
    closed: float
    kind: str
    damped: _containers.ScalarMap[str, str]
    about: str
    stale: _containers.ScalarMap[str, str]
    carried: _containers.ScalarMap[str, str]
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., asked: _Optional[_Iterable[str]] = ..., counted: _Optional[_Iterable[_Union[Counted, _Mapping]]] = ..., missing: _Optional[_Mapping[str, str]] = ..., left_out: _Optional[_Mapping[str, str]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., scores: _Optional[_Mapping[str, float]] = ..., model: _Optional[str] = ..., opened: _Optional[float] = ..., closed: _Optional[float] = ..., kind: _Optional[str] = ..., damped: _Optional[_Mapping[str, str]] = ..., about: _Optional[str] = ..., stale: _Optional[_Mapping[str, str]] = ..., carried: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RunInfo(_message.Message):
    __slots__ = ("id", "model", "state", "round", "rounds", "submitted", "detail", "version", "scores", "starts")
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    state: str
    round: int
    rounds: int
    submitted: float
    detail: str
    version: int
    scores: _containers.ScalarMap[str, float]
    starts: float
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., submitted: _Optional[float] = ..., detail: _Optional[str] = ..., version: _Optional[int] = ..., scores: _Optional[_Mapping[str, float]] = ..., starts: _Optional[float] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("link", "signature")
    LINK_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    link: str
    signature: str
    def __init__(self, link: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class RunDetail(_message.Message):
    __slots__ = ("info", "plan", "receipts", "seals", "sealer", "result")
    INFO_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    SEALS_FIELD_NUMBER: _ClassVar[int]
    SEALER_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    info: RunInfo
    plan: str
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    seals: _containers.RepeatedCompositeFieldContainer[Seal]
    sealer: str
    result: str
    def __init__(self, info: _Optional[_Union[RunInfo, _Mapping]] = ..., plan: _Optional[str] = ..., receipts: _Optional[_Iterable[_Union[Receipt, _Mapping]]] = ..., seals: _Optional[_Iterable[_Union[Seal, _Mapping]]] = ..., sealer: _Optional[str] = ..., result: _Optional[str] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("model", "version", "run", "state", "digest", "created", "scores", "epsilon", "manifest")
    class ScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class EpsilonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    run: str
    state: str
    digest: str
    created: float
    scores: _containers.ScalarMap[str, float]
    epsilon: _containers.ScalarMap[str, float]
    manifest: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., run: _Optional[str] = ..., state: _Optional[str] = ..., digest: _Optional[str] = ..., created: _Optional[float] = ..., scores: _Optional[_Mapping[str, float]] = ..., epsilon: _Optional[_Mapping[str, float]] = ..., manifest: _Optional[str] = ...) -> None: ...

class SiteInfo(_message.Message):
    __slots__ = ("site", "connected", "seen", "device", "version", "datasets", "serving", "region")
    SITE_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    site: str
    connected: bool
    seen: float
    device: str
    version: str
    datasets: _containers.RepeatedCompositeFieldContainer[DatasetCard]
    serving: _containers.RepeatedCompositeFieldContainer[Serving]
    region: str
    def __init__(self, site: _Optional[str] = ..., connected: _Optional[bool] = ..., seen: _Optional[float] = ..., device: _Optional[str] = ..., version: _Optional[str] = ..., datasets: _Optional[_Iterable[_Union[DatasetCard, _Mapping]]] = ..., serving: _Optional[_Iterable[_Union[Serving, _Mapping]]] = ..., region: _Optional[str] = ...) -> None: ...

class Invitation(_message.Message):
    __slots__ = ("token", "name", "role", "expires")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    token: str
    name: str
    role: str
    expires: float
    def __init__(self, token: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[str] = ..., expires: _Optional[float] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("id", "secret", "csr")
    ID_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    id: str
    secret: str
    csr: bytes
    def __init__(self, id: _Optional[str] = ..., secret: _Optional[str] = ..., csr: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("certificate", "ca", "address")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    ca: bytes
    address: str
    def __init__(self, certificate: _Optional[bytes] = ..., ca: _Optional[bytes] = ..., address: _Optional[str] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class UploadStart(_message.Message):
    __slots__ = ("blob", "task")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    blob: Blob
    task: str
    def __init__(self, blob: _Optional[_Union[Blob, _Mapping]] = ..., task: _Optional[str] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("upload_start", "chunk")
    UPLOAD_START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    upload_start: UploadStart
    chunk: Chunk
    def __init__(self, upload_start: _Optional[_Union[UploadStart, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Stored(_message.Message):
    __slots__ = ("size", "go")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    GO_FIELD_NUMBER: _ClassVar[int]
    size: int
    go: bool
    def __init__(self, size: _Optional[int] = ..., go: _Optional[bool] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("plan", "starts")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    plan: str
    starts: float
    def __init__(self, plan: _Optional[str] = ..., starts: _Optional[float] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Pong(_message.Message):
    __slots__ = ("time", "version")
    TIME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    time: float
    version: str
    def __init__(self, time: _Optional[float] = ..., version: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ModelRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class InviteRequest(_message.Message):
    __slots__ = ("name", "role", "ttl")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    ttl: float
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., ttl: _Optional[float] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
