from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from fedml.errors import ConfigError
from fedml.releases.session import Array
from fedml.releases.shelf import Shelf
from fedml.serving.engine import Engine
from fedml.serving.faces import Access, Server
from fedml.serving.oip import Limits
from tests.bundles import WIDTH
from tests.serving.conftest import put


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, server: Server) -> tuple[Any, Any]:
    """Triton's own client, unchanged: the module, and a client to our server."""
    if request.param == "http":
        return triton_http, triton_http.InferenceServerClient(f"127.0.0.1:{server.rest_port}")
    return triton_grpc, triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")


async def calling(work: Callable[[], object]) -> object:
    """Triton's client blocks; our server is on this loop."""
    return await asyncio.to_thread(work)


async def test_tritonclient_finds_the_server_and_its_models(triton: tuple[Any, Any]) -> None:
    def work() -> None:
        client = triton[1]
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("heart") and client.is_model_ready("heart", "1")
        assert not client.is_model_ready("lungs") and not client.is_model_ready("heart", "9")
        meta = client.get_server_metadata()
        assert (meta["name"] if isinstance(meta, dict) else meta.name) == "fedml"
        meta = client.get_model_metadata("heart")
        inputs = meta["inputs"][0] if isinstance(meta, dict) else meta.inputs[0]
        if isinstance(meta, dict):
            assert meta["versions"] == ["1"] and meta["platform"] == "onnxruntime_onnx"
            assert inputs == {"name": "input", "datatype": "FP32", "shape": [-1, WIDTH]}
        else:
            assert list(meta.versions) == ["1"] and meta.platform == "onnxruntime_onnx"
            assert (inputs.name, inputs.datatype, list(inputs.shape)) == (
                "input", "FP32", [-1, WIDTH],
            )  # fmt: skip
        index = client.get_model_repository_index()
        row = index[0] if isinstance(index, list) else index.models[0]
        state = row["state"] if isinstance(row, dict) else row.state
        assert state == "READY"
        client.close()

    await calling(work)


async def test_tritonclient_infers(triton: tuple[Any, Any]) -> None:
    module, client = triton
    data = np.arange(6, dtype=np.float32).reshape(2, WIDTH)

    def work() -> None:
        value = module.InferInput("input", [2, WIDTH], "FP32")
        wanted = module.InferRequestedOutput("output")
        for outputs, version in ((None, ""), ([wanted], "1")):
            value.set_data_from_numpy(data)
            result = client.infer("heart", [value], version, outputs, request_id="42")
            np.testing.assert_allclose(result.as_numpy("output"), [[3], [12]])
            response = result.get_response()
            found = response["id"] if isinstance(response, dict) else response.id
            assert found == "42"
        if module is triton_http:
            value.set_data_from_numpy(data, binary_data=False)
            wanted = module.InferRequestedOutput("output", binary_data=False)
            result = client.infer("heart", [value], outputs=[wanted])
            np.testing.assert_allclose(result.as_numpy("output"), [[3], [12]])
        client.close()

    await calling(work)


async def test_tritonclient_hears_what_is_wrong(triton: tuple[Any, Any]) -> None:
    module, client = triton

    def infer(model: str, name: str, data: Array, datatype: str) -> object:
        value = module.InferInput(name, list(data.shape), datatype)
        value.set_data_from_numpy(data)
        return client.infer(model, [value])

    good = np.ones((1, WIDTH), np.float32)
    cases = [
        ("lungs", "input", good, "FP32", ("404", "NOT_FOUND"), "'lungs' is not served"),
        ("heart", "x", good, "FP32", ("400", "INVALID_ARGUMENT"), "takes the inputs"),
        ("heart", "input", good.astype("f8"), "FP64", ("400", "INVALID_ARGUMENT"), "is FP32"),
        ("heart", "input", good[:, :2], "FP32", ("400", "INVALID_ARGUMENT"), "not [1, 2]"),
        ("heart", "input", np.ones((5000, WIDTH), np.float32), "FP32",
         ("413", "RESOURCE_EXHAUSTED"), "split it"),
    ]  # fmt: skip

    def work() -> None:
        for model, name, data, datatype, codes, words in cases:
            with pytest.raises(InferenceServerException) as caught:
                infer(model, name, data, datatype)
            assert words in caught.value.message()
            assert caught.value.status().removeprefix("StatusCode.") in codes
        client.close()

    await calling(work)


async def post(
    server: Server, body: bytes, headers: dict[str, str] | None = None
) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.rest_port}") as client:
        return await client.post("/v2/models/heart/infer", content=body, headers=headers or {})


def body(**change: object) -> bytes:
    tensor = {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    return json.dumps({"inputs": [{**tensor, **change}]}).encode()


async def test_plain_json_nested_or_flat_is_answered(server: Server) -> None:
    for data in ([1, 2, 3], [[1, 2.0, 3]]):
        answer = await post(server, body(data=data))
        assert answer.status_code == 200
        assert answer.json() == {
            "model_name": "heart",
            "model_version": "1",
            "outputs": [{"name": "output", "datatype": "FP32", "shape": [1, 1], "data": [6.0]}],
        }


_LENGTH = "Inference-Header-Content-Length"


_MALFORMED: list[tuple[bytes, dict[str, str], str]] = [
        (b"", {}, "no inference request"),
        (b"{", {}, "no inference request"),
        (b"\xff\xfe", {}, "no inference request"),
        (b"[]", {}, "no inference request"),
        (b"7", {}, "no inference request"),
        (b"{}", {}, "'inputs'"),
        (b"[" * 100_000, {}, "no inference request"),
        (b'{"inputs": 3}', {}, "no inference request"),
        (b'{"inputs": [3]}', {}, "no inference request"),
        (b'{"inputs": [], "outputs": [3]}', {}, "no inference request"),
        (b'{"inputs": []}', {}, "takes the inputs"),
        (body(data=None), {}, "no FP32"),
        (body(data=["a", "b", "c"]), {}, "no FP32"),
        (body(data=[[1, 2], [3]]), {}, "no regular array"),
        (body(data=[True, False, True]), {}, "no FP32"),
        (body(data=[1, 2]), {}, "2 values for shape [1, 3]"),
        (body(data=[1e39, 2, 3]), {}, "out of FP32's range"),
        (body(data=[10**400, 2, 3]), {}, "input"),
        (body(shape=[1, -3]), {}, "shape"),
        (body(shape=[10**18, 10**18]), {}, "shape"),
        (body(shape=["1", 3]), {}, "shape"),
        (body(shape=[1.0, 3]), {}, "shape"),
        (body(shape=[2**30, 3]), {}, "3 values for shape"),
        (body(datatype="BYTES"), {}, "'BYTES' is not served"),
        (body(datatype="FP64"), {}, "is FP32, not FP64"),
        (body(datatype="INT8", data=[1, 2, 300]), {}, "out of INT8's range"),
        (body(datatype="INT64", data=[1.5, 2, 3]), {}, "no INT64"),
        (body(parameters={"binary_data_size": 12}), {}, "binary_data_size 12"),
        (body(parameters={"binary_data_size": -1}), {}, "binary_data_size -1"),
        (body(parameters={"binary_data_size": "x"}), {}, "binary_data_size x"),
        (body() + b"1234", {_LENGTH: str(len(body()))}, "belong to no input"),
        (body(), {_LENGTH: "99999"}, _LENGTH),
        (body(), {_LENGTH: "-1"}, _LENGTH),
        (body(), {_LENGTH: "x"}, _LENGTH),
        (body(), {"content-encoding": "gzip"}, "compressed"),
        (body()[:-3] + b',"parameters":{"binary_data_size":4}}]}xxxx',
         {_LENGTH: str(len(body()) + 36)}, "4 bytes, FP32 of shape [1, 3] takes 12"),
    ]  # fmt: skip


async def test_a_malformed_body_gets_status_400_and_one_clear_line(server: Server) -> None:
    for data, headers, words in _MALFORMED:
        answer = await post(server, data, headers)
        assert answer.status_code == 400, (data[:200], headers, answer.text)
        error = answer.json()["error"]
        assert words in error, (data[:200], headers, error)
        assert "\n" not in error and len(error) < 600
    assert (await post(server, body())).status_code == 200


async def test_too_large_a_body_is_cut_off(engine: Engine, shelf: Shelf) -> None:
    small = Engine(shelf, Limits(bytes=1000))
    await small.refresh()
    async with Server(small) as server:
        assert (await post(server, b" " * 1001)).status_code == 413

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 100

        async with httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{server.rest_port}/v2/models/heart/infer"
            assert (await client.post(url, content=endless())).status_code == 413
    await small.close()


async def test_nan_cannot_travel_as_json_and_the_answer_says_so(server: Server) -> None:
    answer = await post(server, body(data=[float("nan"), 1, 2]))
    assert answer.status_code == 500
    assert "NaN or infinity" in answer.json()["error"]


async def test_answers_do_not_wait_for_the_network_to_fill_a_packet(server: Server) -> None:
    """A kept connection without TCP_NODELAY takes 40 ms for each answer."""

    def work() -> float:
        connection = http.client.HTTPConnection("127.0.0.1", server.rest_port)
        seconds = []
        for _ in range(30):
            start = time.perf_counter()
            connection.request("POST", "/v2/models/heart/infer", body())
            assert connection.getresponse().read()
            seconds.append(time.perf_counter() - start)
        connection.close()
        return min(seconds[15:])  # the kernel waits for none of the first; a busy machine for some

    assert await asyncio.to_thread(work) < 0.03


async def test_an_empty_shelf_is_live_and_not_ready(tmp_path: Path) -> None:
    engine = Engine(Shelf(tmp_path))
    await engine.refresh()
    async with Server(engine) as server, httpx.AsyncClient() as client:
        base = f"http://127.0.0.1:{server.rest_port}"
        assert (await client.get(f"{base}/v2/health/live")).status_code == 200
        assert (await client.get(f"{base}/v2/health/ready")).status_code == 503
        answer = await client.get(f"{base}/v2/models/heart")
        assert (answer.status_code, answer.json()) == (
            404, {"error": "model 'heart' is not served here"},
        )  # fmt: skip
        answer = await client.get(f"{base}/nonsense")
        assert answer.status_code == 404 and "error" in answer.json()
    await engine.close()


async def test_metrics_are_served_beside_predictions(server: Server) -> None:
    await post(server, body())
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://127.0.0.1:{server.rest_port}/metrics")).text
    assert 'fedml_predictions_total{model="heart",version="1"}' in text
    assert 'fedml_inference_seconds_bucket{le="0.0005",model="heart"}' in text


def on(engine: Engine, face: str, port: int | None) -> Server:
    return Server(engine, port, 0) if face == "REST" else Server(engine, 0, port)


@pytest.mark.parametrize("face", ["REST", "gRPC"])
async def test_a_taken_port_is_named(engine: Engine, face: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{face} port {port} .* in use"):
            async with on(engine, face, port):
                pass
    async with Server(engine) as first:
        port = first.rest_port if face == "REST" else first.grpc_port
        with pytest.raises(ConfigError, match="in use"):
            async with on(engine, face, port):
                pass
        assert (await post(first, body())).status_code == 200


async def test_a_face_can_be_left_out(engine: Engine) -> None:
    async with Server(engine, grpc_port=None) as server:
        assert server.grpc_port is None and server.rest_port


async def test_a_switch_under_load_loses_no_request_on_either_face(
    server: Server, engine: Engine, shelf: Shelf
) -> None:
    stop = asyncio.Event()
    seen: set[str] = set()
    noted = asyncio.Event()
    ports = server.rest_port, server.grpc_port

    async def rest() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[0]}") as client:
            while not stop.is_set():
                answer = await client.post("/v2/models/heart/infer", content=body())
                assert answer.status_code == 200
                seen.add("rest " + answer.json()["model_version"])
                noted.set()

    async def rpc() -> None:
        import tritonclient.grpc.aio as triton

        async with triton.InferenceServerClient(f"127.0.0.1:{ports[1]}") as client:
            value = triton.InferInput("input", [1, WIDTH], "FP32")
            value.set_data_from_numpy(np.ones((1, WIDTH), np.float32))
            while not stop.is_set():
                answer = await client.infer("heart", [value])
                seen.add("grpc " + answer.get_response().model_version)
                noted.set()

    async def until(words: set[str]) -> None:
        while not words <= seen:
            noted.clear()
            await noted.wait()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(rest())
            group.create_task(rpc())
        await until({"rest 1", "grpc 1"})
        await asyncio.to_thread(put, shelf, 2)
        await engine.refresh()
        await until({"rest 2", "grpc 2"})
        stop.set()


def method(channel: grpc.aio.Channel, name: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
    path = f"/inference.GRPCInferenceService/{name}"
    return channel.unary_unary(path, lambda data: data, lambda data: data)


async def test_a_token_is_wanted_for_all_but_health(engine: Engine) -> None:
    async with (
        Server(engine, access=Access(token="s3cret")) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.rest_port}") as client,
    ):
        assert (await client.get("/v2/health/live")).status_code == 200
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            answer = await client.post("/v2/models/heart/infer", content=body(), headers=header)
            assert answer.status_code == 401 and "Bearer" in answer.json()["error"]
        header = {"authorization": "Bearer s3cret"}
        answer = await client.post("/v2/models/heart/infer", content=body(), headers=header)
        assert answer.status_code == 200
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}")
        async with channel:
            assert await method(channel, "ServerLive")(b"") == b"\x08\x01"
            call = method(channel, "ServerMetadata")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", metadata=(("authorization", "Bearer wrong"),))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert await call(b"", metadata=(("authorization", "Bearer s3cret"),))


@contextmanager
def certificate(folder: Path) -> Iterator[tuple[Path, Path]]:
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "c.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "k.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    yield folder / "c.pem", folder / "k.pem"


async def test_both_faces_speak_tls_when_told_to(engine: Engine, tmp_path: Path) -> None:
    import ssl

    with certificate(tmp_path) as (cert, key):
        async with Server(engine, access=Access("", cert, key)) as server:
            trust = ssl.create_default_context(cafile=str(cert))
            async with httpx.AsyncClient(verify=trust) as client:
                url = f"https://127.0.0.1:{server.rest_port}/v2/health/ready"
                assert (await client.get(url)).status_code == 200
            credentials = grpc.ssl_channel_credentials(cert.read_bytes())
            address = f"127.0.0.1:{server.grpc_port}"
            async with grpc.aio.secure_channel(address, credentials) as channel:
                assert await method(channel, "ServerReady")(b"") == b"\x08\x01"
        with pytest.raises(ConfigError, match="both"):
            Access("", cert)
        key.write_bytes(b"junk")
        with pytest.raises(ConfigError, match="TLS"):
            async with Server(engine, grpc_port=None, access=Access("", cert, key)):
                pass


def test_generated_code_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedml.serving.generate", "--check"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
