from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedml.errors import ConfigError, TaskFailed, Untrusted
from fedml.params import Params
from fedml.releases.bundle import build
from fedml.releases.manifest import MANIFEST, MODEL, WEIGHTS, Manifest, TensorSpec, open_bundle
from tests.bundles import facts


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.softmax(self.body(rows), dim=1)


class BakedBatch(nn.Module):
    """Answers by the rows' place in the batch: right for no other batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 2))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight + torch.from_numpy(np.full((1, 2), float(len(rows)), np.float32))


class Restless(nn.Module):
    """Never answers the same question alike."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 2))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight + torch.rand(2)


class Gossip(nn.Module):
    """Answers each row by what the others in its batch are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 2))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - rows.mean(dim=0)) @ self.weight


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Net]:
    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(7)
    net = Net()
    params = Params({**net.state_dict()})
    # in a child process, as the coordinator does it
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        arguments = (folder, Net(), params, torch.randn(40, 5), facts())
        manifest = pool.apply(build, arguments)
    return folder, manifest, net


def test_a_built_bundle_is_whole_and_named_by_the_digest_of_its_manifest(
    built: tuple[Path, Manifest, Net],
) -> None:
    folder, manifest, _ = built
    assert open_bundle(folder, manifest.digest) == manifest
    assert manifest.digest == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert manifest.inputs == (TensorSpec("input", "FP32", (-1, 5)),)
    assert manifest.outputs == (TensorSpec("output", "FP32", (-1, 2)),)
    assert manifest.environment is not None
    packages = (folder / "environment.txt").read_bytes()
    assert manifest.environment.digest == hashlib.sha256(packages).hexdigest()
    assert b"torch==" in packages


def test_onnx_answers_as_torch_does_for_any_number_of_rows(
    built: tuple[Path, Manifest, Net],
) -> None:
    folder, _, net = built
    session = onnxruntime.InferenceSession(str(folder / MODEL))
    net.eval()
    for rows in (1, 2, 33):
        batch = torch.randn(rows, 5)
        found = session.run(["output"], {"input": batch.numpy()})[0]
        np.testing.assert_allclose(found, net(batch).detach().numpy(), atol=1e-5)


def test_the_weights_open_with_any_safetensors_reader(built: tuple[Path, Manifest, Net]) -> None:
    folder, _, net = built
    found = load_file(folder / WEIGHTS)
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_the_onnx_file_tells_nothing_about_the_machine_that_made_it(
    built: tuple[Path, Manifest, Net],
) -> None:
    folder, _, _ = built
    data = (folder / MODEL).read_bytes()
    assert b".py" not in data
    assert str(Path.cwd()).encode() not in data


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (BakedBatch(), "ONNX export of 1 rows"),
        (Restless(), "differently from torch"),
        (Gossip(), "when it comes alone"),
    ],
)
def test_a_module_that_does_not_export_faithfully_is_no_release(
    tmp_path: Path, module: nn.Module, why: str
) -> None:
    with pytest.raises(TaskFailed, match=why):
        build(tmp_path, module, Params(module.state_dict()), torch.randn(4, 5), facts())


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not fit the module"):
        build(tmp_path, Net(), Params({"w": torch.ones(2)}), torch.randn(4, 5), facts())


def test_a_module_whose_answers_do_not_match_the_names_is_refused(tmp_path: Path) -> None:
    net = Net()
    with pytest.raises(ConfigError, match="expected one tensor"):
        build(tmp_path, net, Params(net.state_dict()), torch.randn(4, 5), facts(), ("one", "two"))


def test_a_changed_byte_in_any_file_is_noticed(
    built: tuple[Path, Manifest, Net], tmp_path: Path
) -> None:
    folder, manifest, _ = built
    for victim in (*manifest.files, MANIFEST):
        for name in (*manifest.files, MANIFEST):
            data = bytearray((folder / name).read_bytes())
            if name == victim:
                data[len(data) // 2] ^= 1
            (tmp_path / name).write_bytes(data)
        with pytest.raises(Untrusted):
            open_bundle(tmp_path, manifest.digest)
