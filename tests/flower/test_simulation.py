"""An app's folder is run as it is, kept, and gone on with after `kill -9` to the same bits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml.cli.main import app
from fedml.errors import FedmlError
from fedml.params import read

ROOT = Path(__file__).parents[2]
PROJECT = """
[project]
name = "walk"
version = "1.0.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "walk.server_app:app"
clientapp = "walk.client_app:app"
[tool.flwr.app.config]
rounds = 4
[tool.flwr.app.config.site]
step = 0.5
"""
SERVER = """
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
import numpy as np

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    first = ArrayRecord([np.random.normal(size=6)])
    strategy = FedAvg(fraction_train=0.6)
    print("the app speaks")
    strategy.start(grid=grid, initial_arrays=first, num_rounds=context.run_config["rounds"])
"""
CLIENT = """
import os, pathlib, signal
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
import numpy as np

app = ClientApp()

def note(context):
    with open("calls", "a") as file:
        file.write(f"{context.node_config['partition-id']}\\n")
        count = len(pathlib.Path("calls").read_text().split()) + 1
    if os.environ.get("KILL") == str(count):
        os.kill(os.getpid(), getattr(signal, os.environ["BY"]))

@app.train()
def train(message: Message, context: Context) -> Message:
    note(context)
    seen = context.state.metric_records.setdefault("seen", MetricRecord({"n": 0}))
    seen["n"] += 1
    step = context.run_config["site.step"] / seen["n"]
    arrays = message.content["arrays"].to_numpy_ndarrays()
    moved = [a + step * np.random.normal(size=a.shape) for a in arrays]
    figures = MetricRecord({"num-examples": 1, "seen": seen["n"]})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "m": figures}), reply_to=message)

@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    note(context)
    [array] = message.content["arrays"].to_numpy_ndarrays()
    figures = MetricRecord({"num-examples": 1, "size": float(abs(array).sum())})
    return Message(RecordDict({"m": figures}), reply_to=message)
"""
CALLS = 4 * (3 + 5)  # rounds of 5 sites, of whom 3 train


@pytest.fixture
def walk(tmp_path: Path) -> Path:
    """Return the folder of an app whose model walks at random."""
    package = tmp_path / "app" / "walk"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").touch()
    (package / "server_app.py").write_text(SERVER)
    (package / "client_app.py").write_text(CLIENT)
    return package.parent


@pytest.fixture
def in_process(walk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the app's folder for a run in this process, which leaves nothing behind."""
    monkeypatch.chdir(walk.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield walk
    for name in [name for name in sys.modules if name.partition(".")[0] == "walk"]:
        del sys.modules[name]


def here(*words: str) -> None:
    """Run `fedml flower run` in this process."""
    app(["flower", "run", *words], standalone_mode=False)


def fedml(
    folder: Path, *words: str, kill: int = 0, by: str = "SIGKILL"
) -> subprocess.CompletedProcess[str]:
    """Run `fedml flower run` in `folder`; its `kill`-th call of a site sends it the signal `by`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KILL": str(kill), "BY": by}
    return subprocess.run(
        [sys.executable, "-m", "fedml", "flower", "run", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=110,
    )


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().split())


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def scores(folder: Path) -> object:
    result = json.loads((folder / "result.json").read_text())
    return [result[part] for part in ("train", "evaluate", "server")]


OLD_SERVER = """
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp
import numpy as np

def server_fn(context):
    strategy = FedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(3)]))
    config = ServerConfig(num_rounds=context.run_config["rounds"])
    return ServerAppComponents(strategy=strategy, config=config)

app = ServerApp(server_fn=server_fn)
"""
OLD_CLIENT = """
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

class Client(NumPyClient):
    def fit(self, parameters, config):
        return [array + 1 for array in parameters], 10, {}

    def evaluate(self, parameters, config):
        with open("seen", "a") as file:
            print(*parameters[0].tolist(), file=file)
        return 0.5, 10, {}

app = ClientApp(client_fn=lambda context: Client().to_client())
"""


def test_an_app_from_before_messages_runs_too(walk: Path, tmp_path: Path) -> None:
    (walk / "walk/server_app.py").write_text(OLD_SERVER)
    (walk / "walk/client_app.py").write_text(OLD_CLIENT)
    done = fedml(tmp_path, "app", "--sites", "3", "-c", "rounds=2", "--folder", "out")
    assert done.returncode == 0, done.stderr
    assert "12 messages in" in done.stdout
    assert (tmp_path / "seen").read_text().splitlines() == ["1.0 1.0 1.0"] * 3 + ["2.0 2.0 2.0"] * 3


def assert_one_line(done: subprocess.CompletedProcess[str], text: str) -> None:
    """Hold that a command failed with one line that has `text` in it."""
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "the app speaks" not in line]
    assert line.startswith("error: ")
    assert text in line


def test_the_app_of_flowers_template_runs_unchanged(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests/flower/quickstart", tmp_path / "app")
    config = "num-server-rounds=3 local-epochs=3 save-model=true"
    done = fedml(tmp_path, "app", "-c", config, "--num-supernodes", "2", "--folder", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    for number in (1, 2, 3):
        figures = "train: train_loss .*  evaluate: eval_loss .*, eval_acc .*  server: accuracy .*"
        assert re.search(f"^round {number}  {figures}$", done.stdout, re.M), done.stdout
    assert re.search(
        r"3 rounds in .* s, once warm .* ms each; kept in out/model.safetensors", done.stdout
    )
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["server"]["3"]["accuracy"] > result["server"]["0"]["accuracy"]
    assert [each["asked"] for each in result["exchanges"]] == [2] * 6
    import torch

    saved = torch.load(tmp_path / "final_model.pt", weights_only=True)
    kept = read(tmp_path / "out/model.safetensors")[""]
    assert all(torch.equal(kept[name], tensor) for name, tensor in saved.items())


def test_settings_and_number_of_sites_reach_the_app(walk: Path, tmp_path: Path) -> None:
    done = fedml(tmp_path, "app", "--sites", "7", "-c", "rounds=2 site.step=0.0", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [each["asked"] for each in result["exchanges"]] == [4, 7, 4, 7]
    assert result["evaluate"]["1"] == result["evaluate"]["2"]
    assert (tmp_path / result["folder"] / "result.json").exists()
    assert "the app speaks" in done.stderr


@pytest.mark.parametrize("when", [1, CALLS - 5])
def test_a_run_killed_in_the_middle_goes_on_to_the_same_bits(
    in_process: Path, tmp_path: Path, when: int
) -> None:
    here("app", "--sites", "5", "--folder", "whole")
    assert calls(tmp_path) == CALLS
    (tmp_path / "calls").unlink()
    words = ("app", "--sites", "5", "--folder", "cut", "--keep-every", "0")
    done = fedml(tmp_path, *words, kill=when)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut/result.json").exists()
    here("--resume", "cut")
    assert calls(tmp_path) == CALLS + 1  # the one that was under way, and no other, worked twice
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")
    assert not (tmp_path / "cut/replies.bin").exists()
    assert "is over" in refusal("--resume", "cut")


def test_a_run_that_is_stopped_says_how_to_go_on_and_has_kept_everything(
    in_process: Path, tmp_path: Path
) -> None:
    words = ("app", "--sites", "5", "--folder", "cut", "--keep-every", "1000")
    done = fedml(tmp_path, *words, kill=20, by="SIGINT")
    assert done.returncode == 130
    assert "go on with: fedml flower run --resume cut\n" in done.stderr
    assert calls(tmp_path) == 20
    here("--resume", "cut")
    assert calls(tmp_path) == CALLS + 1


def test_another_seed_is_another_run_and_the_same_is_the_same(in_process: Path) -> None:
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        here("app", "--seed", seed, "--folder", folder)
    a, b, c = (scores(Path(folder)) for folder in "abc")
    assert a == b
    assert a != c


def test_a_run_whose_app_was_changed_is_not_gone_on_with(in_process: Path, tmp_path: Path) -> None:
    fedml(tmp_path, "app", "--folder", "cut", "--keep-every", "0", kill=9)
    change(in_process / "walk/client_app.py", "1, ", "2, ")
    assert "is not what it was when cut was begun; restore" in refusal("--resume", "cut")


def test_a_server_app_that_asks_otherwise_when_played_again_is_told(
    walk: Path, tmp_path: Path
) -> None:
    seed = "np.random.default_rng().normal(size=6)"
    change(walk / "walk/server_app.py", "np.random.normal(size=6)", seed)
    fedml(tmp_path, "app", "--folder", "cut", "--keep-every", "0", kill=9)
    done = fedml(tmp_path, "--resume", "cut")
    assert_one_line(done, "other than before it was interrupted")


def test_a_site_that_raises_is_named_and_the_others_go_on(walk: Path, tmp_path: Path) -> None:
    fault = 'if context.node_config["partition-id"] == 1: raise ValueError("no rows")'
    change(walk / "walk/client_app.py", "    seen =", f"    {fault}\n    seen =")
    change(walk / "walk/server_app.py", "fraction_train=0.6", "")
    done = fedml(tmp_path, "app", "--sites", "3", "--folder", "out")
    assert done.returncode == 0, done.stderr
    assert "failed: ValueError: no rows (site 1; see out/errors.log)" in done.stderr
    log = (tmp_path / "out/errors.log").read_text()
    assert 'raise ValueError("no rows")' in log
    assert "client_app.py" in log


def refusal(*words: str) -> str:
    """Return the one line that `fedml flower run` fails with."""
    with pytest.raises(FedmlError) as caught:
        here(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "old", "new", "text"),
    [
        ("pyproject.toml", "[tool.flwr.app.components]", "[tool.other]", "is no Flower app"),
        ("pyproject.toml", "clientapp =", "client =", "has no clientapp"),
        ("pyproject.toml", "rounds = 4", "rounds = [4]", "rounds [4]: must be a number"),
        ("pyproject.toml", "client_app:app", "client_app", "write module:attribute"),
        ("pyproject.toml", "client_app:app", "client_app:np", "is module, not ClientApp"),
        ("pyproject.toml", "client_app:app", "nowhere:app", "no module 'walk.nowhere'; is it in"),
        ("walk/client_app.py", "import os", "import os, no_such_thing", "install what the app's"),
        ("walk/client_app.py", "app = ", "app = = ", "SyntaxError"),
        (
            "walk/client_app.py",
            "    note(context)",
            "    1 / 0",
            "every site failed: ZeroDivisionError",
        ),
        ("walk/server_app.py", "strategy.start(", "strategy.begin(", "no attribute 'begin'"),
        ("walk/server_app.py", "0.6", "0.6, min_available_nodes=99", "more sites than the 10"),
        ("walk/client_app.py", '"num-examples"', '"rows"', "Missing required key `num-examples`"),
    ],
)
def test_what_is_wrong_with_an_app_is_said_in_one_line(
    in_process: Path, file: str, old: str, new: str, text: str
) -> None:
    change(in_process / file, old, new)
    assert text in refusal("app", "--folder", "out")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere"], "nowhere/pyproject.toml does not exist; make an app with 'flwr new'"),
        (["app", "--sites", "0"], "--num-supernodes 0: at least one site"),
        (["app", "--seed", "-1"], "--seed -1: must be from 0"),
        (["app", "-c", "roundz=3"], "--run-config roundz: the app has no such setting; there are"),
        (["app", "-c", "rounds=three"], "write 'rounds=3"),
        (["app", "-c", "rounds"], "'rounds' is no key=value"),
        (["app", "-c", "missing.toml"], "--run-config 'missing.toml': "),
        (["app", "--resume", "out"], "--resume takes everything from the run's folder"),
        (["--resume", "app"], "app is no run of a Flower app"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(in_process: Path, words: list[str], text: str) -> None:
    assert text in refusal(*words)


def test_without_flower_the_command_says_how_to_get_it(walk: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['flwr'] = None; sys.argv = ['fedml', 'flower', 'run', 'app'];"
        "from fedml.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert_one_line(done, "pip install 'fedml-consortium[flower]'")


def test_a_folder_that_has_a_run_takes_no_other(in_process: Path) -> None:
    here("app", "--folder", "out", "-c", "rounds=1")
    assert "out has a run already; --resume out, or another --folder" in refusal(
        "app", "--folder", "out"
    )


def test_what_is_gone_on_with_has_the_settings_sites_and_seed_of_the_run(
    in_process: Path, tmp_path: Path
) -> None:
    words = ("--sites", "4", "-c", "rounds=3 site.step=0.25", "--seed", "5")
    here("app", *words, "--folder", "whole")
    (tmp_path / "calls").unlink()
    done = fedml(tmp_path, "app", *words, "--folder", "cut", "--keep-every", "0", kill=9)
    assert done.returncode == -signal.SIGKILL
    here("--resume", "cut")
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")
