"""Everything that may cross the wire survives the trip; everything else is refused by one error."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import ConfigError, MalformedMessage
from fedml.protocol import codec, messages, operations, requests
from fedml.protocol._generated import fedml_pb2
from fedml.protocol.generate import NAMES, OUT, generate
from fedml.protocol.messages import (
    Accepted,
    Assignment,
    Beat,
    Blob,
    Cancel,
    Command,
    DatasetCard,
    Declined,
    Failed,
    Forget,
    Hello,
    Parcel,
    Privacy,
    RecipeId,
    ReleaseNotice,
    RunId,
    Scored,
    Serving,
    SiteEvent,
    SiteId,
    TaskId,
    Trained,
    Training,
    Welcome,
)

KINDS = [
    kind
    for module in (messages, operations, requests)
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind)
    and isinstance(kind, type)
    and kind.__module__ == module.__name__
]

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-9, max_value=1e9)
counts = st.integers(0, 2**62)
texts = st.text(max_size=20)
names = st.from_regex(r"[a-z0-9]([._-]?[a-z0-9_-]){0,31}", fullmatch=True)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
scores = st.dictionaries(texts, finite, max_size=4)
tasks = st.from_regex(r"[a-z0-9]{1,8}(\.[a-z0-9_-]{1,8}){0,3}", fullmatch=True).map(TaskId)
runs = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,19}", fullmatch=True).map(RunId)
sites = names.map(SiteId)
blobs = st.builds(Blob, digests, counts)
parcels = st.lists(
    st.builds(Parcel, names, blobs, st.one_of(st.just(""), digests)), max_size=3
).map(tuple)
recipes = st.builds(RecipeId, names, digests)
trainings = st.builds(
    lambda lr, n, epochs, momentum: Training(
        lr, steps=0 if epochs else n, epochs=n if epochs else 0, momentum=momentum
    ),
    positive,
    st.integers(1, 10_000),
    st.booleans(),
    st.floats(0, 0.99),
)
privacies = st.one_of(
    st.just(Privacy()),
    st.builds(Privacy, st.just("record"), positive, st.floats(1e-9, 0.5), positive),
    st.builds(
        Privacy,
        st.sampled_from(["record_distributed", "site_distributed"]),
        positive,
        st.floats(1e-9, 0.5),
        sharers=st.integers(1, 10_000),
    ),
)
assignments = st.builds(
    Assignment,
    task=tasks,
    run=runs,
    round=st.integers(1, 1000),
    kind=st.sampled_from(["train", "evaluate"]),
    recipe=recipes,
    dataset=names,
    model=blobs,
    training=trainings,
    privacy=privacies,
    rule=texts,
    settings=scores,
    cohort=st.integers(1, 1000),
    seed=st.integers(-(2**63), 2**63 - 1),
    deadline=positive,
    parcels=parcels,
    up=texts,
    keep_model=st.booleans(),
    app=texts,
)
cards = st.builds(DatasetCard, names, counts, digests)
servings = st.builds(
    Serving, texts, counts, texts, st.sampled_from(["live", "refused", "none"]), texts
)
commands = st.one_of(
    st.builds(Welcome, texts, positive),
    assignments,
    st.builds(Cancel, tasks, texts),
    st.builds(Forget, tasks),
    st.builds(ReleaseNotice, names),
    st.just(Beat()),
)


def several(items: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(items, max_size=3).map(tuple)


events = st.one_of(
    st.builds(
        Hello,
        texts,
        texts,
        several(recipes),
        several(cards),
        several(servings),
        apps=several(recipes),
    ),
    st.builds(Accepted, tasks),
    st.builds(Declined, tasks, texts),
    st.builds(Failed, tasks, texts),
    st.builds(Trained, tasks, blobs, finite, scores, finite, parcels),
    st.builds(Scored, tasks, scores, finite, finite),
    servings,
    st.just(Beat()),
)
roles = st.sampled_from(["site", "operator", "viewer"])
notes = st.dictionaries(texts, texts, max_size=3)
receipts = st.builds(
    operations.Receipt,
    run=runs,
    round=counts,
    attempt=counts,
    asked=st.lists(sites, max_size=3).map(tuple),
    counted=st.lists(st.builds(operations.Counted, sites, finite, texts, finite), max_size=3).map(
        tuple
    ),
    missing=notes,
    left_out=notes,
    metrics=scores,
    scores=scores,
    model=texts,
    opened=finite,
    closed=finite,
)
states = st.sampled_from(get_args(operations.RunState))
infos = st.builds(
    operations.RunInfo, runs, names, states, counts, counts, finite, texts, counts, scores
)
versions = st.builds(
    operations.ModelVersion,
    names,
    counts,
    runs,
    st.sampled_from(["candidate", "live", "withdrawn"]),
    digests,
    finite,
    scores,
    scores,
    texts,
)
singles = st.one_of(
    recipes,
    trainings,
    privacies,
    cards,
    blobs,
    receipts,
    infos,
    versions,
    st.builds(operations.RunDetail, infos, texts, st.lists(receipts, max_size=2).map(tuple)),
    st.builds(
        operations.SiteInfo,
        sites,
        st.booleans(),
        finite,
        texts,
        texts,
        several(cards),
        several(servings),
    ),
    st.builds(operations.Invitation, texts, names, roles, finite),
    st.builds(requests.JoinRequest, texts, texts, st.binary(max_size=50)),
    st.builds(requests.RenewRequest, st.binary(max_size=50)),
    st.builds(requests.Admission, st.binary(max_size=50), st.binary(max_size=50), texts),
    st.builds(requests.DownloadRequest, digests, counts),
    st.builds(requests.FetchRequest, texts),
    st.builds(requests.Stored, counts, st.booleans()),
    st.builds(requests.SubmitRequest, texts),
    st.just(requests.ListRequest()),
    st.builds(requests.RunRequest, runs),
    st.builds(requests.ModelRequest, names, st.integers(1, 2**31)),
    st.builds(requests.RollbackRequest, names),
    st.builds(requests.InviteRequest, names, roles, finite),
    st.builds(requests.RevokeRequest, names),
    st.just(requests.Done()),
)
parts = st.one_of(
    st.builds(requests.UploadStart, blobs, tasks),
    st.builds(requests.Chunk, st.binary(max_size=100)),
)

ASSIGNMENT = Assignment(
    task=TaskId("t"),
    run=RunId("r"),
    round=1,
    kind="train",
    recipe=RecipeId("heart", "0" * 64),
    dataset="heart",
    model=Blob("1" * 64, 10),
    training=Training(0.1, steps=1),
    privacy=Privacy(),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_dataclass_has_a_protobuf_message_with_the_same_fields(kind: type) -> None:
    foreign = getattr(fedml_pb2, kind.__name__).DESCRIPTOR
    assert [f.name for f in foreign.fields] == [f.name for f in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ("name", "union"),
    [("Command", Command), ("SiteEvent", SiteEvent), ("UploadPart", requests.UploadPart)],
)
def test_each_union_has_a_oneof_with_the_same_members(name: str, union: object) -> None:
    members = [field.message_type.name for field in getattr(fedml_pb2, name).DESCRIPTOR.fields]
    assert members == [kind.__name__ for kind in get_args(union)]


def test_the_generated_code_is_what_the_proto_file_says() -> None:
    fresh = generate()
    assert {name: (OUT / name).read_bytes() for name in NAMES} == fresh


def test_no_field_number_is_used_twice_or_out_of_sight() -> None:
    for kind in fedml_pb2.DESCRIPTOR.message_types_by_name.values():
        assert [f.number for f in kind.fields] == sorted({f.number for f in kind.fields})


@given(commands)
def test_a_command_survives_the_trip(command: Command) -> None:
    assert codec.decode_command(codec.encode_command(command)) == command


@given(assignments)
def test_an_order_s_parcels_survive_it_though_they_are_no_part_of_its_terms(
    order: Assignment,
) -> None:
    after = codec.decode_command(codec.encode_command(order))
    assert isinstance(after, Assignment)
    assert after.parcels == order.parcels
    assert dataclasses.replace(order, parcels=()) == order


@given(events)
def test_an_event_survives_the_trip(event: SiteEvent) -> None:
    assert codec.decode_event(codec.encode_event(event)) == event


@given(singles)
def test_every_other_message_survives_the_trip(message: object) -> None:
    assert codec.decode(type(message), codec.encode(message)) == message


@given(parts)
def test_an_upload_part_survives_the_trip(part: requests.UploadPart) -> None:
    assert codec.decode_part(codec.encode_part(part)) == part


def decoders() -> list[Callable[[bytes], object]]:
    unions = [codec.decode_command, codec.decode_event, codec.decode_part]
    return [*unions, *(partial(codec.decode, kind) for kind in KINDS)]


@given(st.binary(max_size=400))
def test_random_bytes_are_malformed_or_a_message_but_never_another_error(data: bytes) -> None:
    for decode in decoders():
        with_only_our_error(decode, data)


@settings(max_examples=200)
@given(
    st.one_of(
        commands.map(codec.encode_command),
        events.map(codec.encode_event),
        singles.map(codec.encode),
    ),
    st.data(),
)
def test_damaged_messages_are_malformed_or_a_message_but_never_another_error(
    whole: bytes, data: st.DataObject
) -> None:
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    spot = data.draw(st.integers(0, max(len(whole) - 1, 0)))
    flipped = whole[:spot] + bytes([data.draw(st.integers(0, 255))]) + whole[spot + 1 :]
    for decode in decoders():
        with_only_our_error(decode, cut)
        with_only_our_error(decode, flipped)


def with_only_our_error(decode: Callable[[bytes], object], data: bytes) -> None:
    try:
        message = decode(data)
    except MalformedMessage:
        return
    assert message is None or dataclasses.is_dataclass(message)  # None: of a newer version


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_from_a_site_must_be_finite(number: float) -> None:
    foreign = fedml_pb2.SiteEvent(
        trained=fedml_pb2.Trained(
            task="t", update=fedml_pb2.Blob(digest="0" * 64), metrics={"loss": number}
        )
    )
    with pytest.raises(MalformedMessage, match=r"metrics\['loss'\]: .* not finite"):
        codec.decode_event(foreign.SerializeToString())
    with pytest.raises(MalformedMessage, match=r"Scored.count: .* not finite"):
        codec.encode_event(Scored(TaskId("t"), {}, number))


def test_an_operator_may_read_that_a_score_is_undefined() -> None:
    info = operations.RunInfo(RunId("r"), "m", "done", 1, 1, 0.0, scores={"auc": math.nan})
    back = codec.decode(operations.RunInfo, codec.encode(info))
    assert math.isnan(back.scores["auc"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: m.ClearField("recipe"), "Assignment.recipe is missing"),
        (lambda m: m.ClearField("training"), "Assignment.training is missing"),
        (lambda m: setattr(m, "kind", "steal"), "Assignment.kind: 'steal', expected one of"),
        (lambda m: setattr(m, "task", "../../etc/passwd"), "Assignment.task: .* is no id"),
        (lambda m: setattr(m, "task", "/etc/passwd"), "Assignment.task: .* is no id"),
        (lambda m: setattr(m, "task", "a\nb"), "Assignment.task: .* is no id"),
        (lambda m: setattr(m, "task", "a/b"), "Assignment.task: 'a/b' is no id"),
        (lambda m: setattr(m, "task", "."), "Assignment.task: '.' is no id"),
        (lambda m: setattr(m, "task", "a..b"), "Assignment.task: 'a..b' is no id"),
        (lambda m: setattr(m, "run", ""), "Assignment.run: '' is no id"),
        (lambda m: setattr(m, "dataset", "../x"), "dataset '../x'"),
        (lambda m: setattr(m.model, "digest", "AB"), "'AB' is no SHA-256"),
        (lambda m: setattr(m.model, "size", -1), "blob size -1"),
        (lambda m: setattr(m, "deadline", math.inf), "Assignment.deadline: inf is not finite"),
        (lambda m: setattr(m.training, "lr", -1.0), "training.lr -1.0"),
        (lambda m: setattr(m, "rule", "x" * 65_537), "Assignment.rule: 65537 bytes, limit 65536"),
        (
            lambda m: m.settings.update({str(i): 0.0 for i in range(10_001)}),
            "Assignment.settings: 10001 entries, limit 10000",
        ),
    ],
)
def test_a_bad_field_is_named_with_its_value(change: Callable, line: str) -> None:  # type: ignore[type-arg]
    command = fedml_pb2.Command.FromString(codec.encode_command(ASSIGNMENT))
    change(command.assignment)
    with pytest.raises(MalformedMessage, match=line) as caught:
        codec.decode_command(command.SerializeToString())
    assert "\n" not in str(caught.value)


def test_a_union_without_a_member_is_malformed() -> None:
    for decode in (codec.decode_command, codec.decode_event, codec.decode_part):
        with pytest.raises(MalformedMessage, match="holds nothing"):
            decode(b"")


def test_a_kind_that_only_newer_versions_know_is_passed_over() -> None:
    newer = b"\xfa\x06\x02\x08\x01"  # field 111, a message
    assert codec.decode_command(newer) is None
    assert codec.decode_event(newer) is None
    with pytest.raises(MalformedMessage, match="part of an upload that this version does not"):
        codec.decode_part(newer)  # a transfer without a part is another transfer


def test_a_message_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(MalformedMessage, match="limit 4194304"):
        codec.decode_event(bytes(codec.MAX_MESSAGE + 1))


def test_lists_have_an_end() -> None:
    hello = fedml_pb2.Hello(recipes=[fedml_pb2.RecipeId(name="a", digest="0" * 64)] * 10_001)
    with pytest.raises(MalformedMessage, match=r"Hello.recipes: 10001 items, limit 10000"):
        codec.decode_event(fedml_pb2.SiteEvent(hello=hello).SerializeToString())


def test_a_plan_may_be_long_and_nothing_else() -> None:
    plan = "x" * (codec.MAX_DOCUMENT - 1)
    assert codec.decode(requests.SubmitRequest, codec.encode(requests.SubmitRequest(plan)))
    with pytest.raises(MalformedMessage, match=r"SubmitRequest.plan: .* limit 2097152"):
        codec.encode(requests.SubmitRequest(plan + "xx"))
    with pytest.raises(MalformedMessage, match="limit 65536"):
        codec.encode_event(Failed(TaskId("t"), plan))


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (Failed(TaskId("t"), "\ud800"), "Failed"),
        (Failed(TaskId("t"), None), "Failed.reason: NoneType is no text"),  # type: ignore[arg-type]
        (Serving("m", 2**63, "", "live"), "Serving.version: no 64-bit integer"),
        (Serving("m", 10**5000, "", "live"), "Serving.version: no 64-bit integer"),
        (Scored(TaskId("t"), {}, 10**400), "Scored.count: too large"),
        (Scored(TaskId("t"), {}, "1"), "Scored.count: str is no number"),  # type: ignore[arg-type]
        (Scored(TaskId("t"), (), 1.0), "Scored.totals: tuple is no map"),  # type: ignore[arg-type]
        (Hello("1", "cpu", recipes="abc"), "Hello.recipes: str is no list"),  # type: ignore[arg-type]
        (Welcome("1", 1.0), "Welcome is no SiteEvent"),
    ],
)
def test_a_value_of_our_own_that_does_not_fit_is_refused_where_it_is_sent(
    value: SiteEvent, line: str
) -> None:
    with pytest.raises(MalformedMessage, match=re.escape(line)):
        codec.encode_event(value)


def test_unknown_fields_of_a_newer_version_are_skipped() -> None:
    data = codec.encode_event(Accepted(TaskId("t"))) + b"\x9a\x3e\x01x"  # field 995, one byte
    assert codec.decode_event(data) == Accepted(TaskId("t"))


def test_requests_check_themselves() -> None:
    with pytest.raises(ConfigError, match="versions start at 1"):
        requests.ModelRequest("m", 0)
    with pytest.raises(ConfigError, match=r"'\.\./ledger' is no id"):
        requests.UploadStart(Blob("0" * 64, 10), TaskId("../ledger"))


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2**20 - 5, 2**20])
def test_chunks_framed_by_hand_are_what_protobuf_writes(size: int) -> None:
    chunk = requests.Chunk(random.Random(size).randbytes(size))
    plain = fedml_pb2.Chunk(data=bytes(chunk.data))
    part = fedml_pb2.UploadPart(chunk=plain)
    assert codec.encode(chunk) == plain.SerializeToString()
    assert codec.encode_part(chunk) == part.SerializeToString()
    assert codec.decode(requests.Chunk, plain.SerializeToString()) == chunk
    assert codec.decode_part(part.SerializeToString()) == chunk
    assert codec.encode(requests.Chunk(memoryview(chunk.data))) == codec.encode(chunk)


@given(st.binary(max_size=12))
def test_foreign_chunks_are_read_as_protobuf_reads_them(data: bytes) -> None:
    plain = fedml_pb2.Chunk()
    try:
        plain.ParseFromString(data)
    except DecodeError:
        with pytest.raises(MalformedMessage):
            codec.decode(requests.Chunk, data)
    else:
        assert codec.decode(requests.Chunk, data).data == plain.data


def test_a_chunk_too_large_is_refused_at_both_ends() -> None:
    large = bytes(codec.MAX_CHUNK + 1)
    for send in (codec.encode, codec.encode_part):
        with pytest.raises(MalformedMessage, match="1048577 bytes"):
            send(requests.Chunk(large))
    plain = fedml_pb2.Chunk(data=large)
    with pytest.raises(MalformedMessage, match="more than 1048576"):
        codec.decode(requests.Chunk, plain.SerializeToString())
    with pytest.raises(MalformedMessage, match="more than 1048576"):
        codec.decode_part(fedml_pb2.UploadPart(chunk=plain).SerializeToString())
