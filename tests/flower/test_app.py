"""Settings are read as `flwr run` reads them."""

import shutil
from pathlib import Path

import pytest
from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args

from fedml.errors import ConfigError
from fedml.flower.app import overridden, read

DEFAULTS: dict[str, bool | float | int | str] = {
    "rounds": 3,
    "lr": 0.1,
    "name": "a",
    "on": False,
    "deep.er": 1,
    "deep.two": "x",
}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["rounds=5"],
        ["rounds=5 lr=0.5", "name='two words' on=true"],
        ['name="a=b" deep.er=7'],
        ["lr=1", "lr=2"],
        ["deep.two='y' deep.er=2"],
        ["name='' rounds=-1 lr=1e-3"],
    ],
)
def test_overrides_are_what_flower_makes_of_them(words: list[str]) -> None:
    theirs = fuse_dicts(DEFAULTS, parse_config_args(words))
    assert overridden(DEFAULTS, words) == theirs


def test_a_file_overrides_as_flower_has_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("rounds = 9\n[deep]\ner = 4\n")
    theirs = fuse_dicts(DEFAULTS, parse_config_args([str(path)]))
    assert overridden(DEFAULTS, [str(path)]) == theirs
    assert theirs["deep.er"] == 4


@pytest.mark.parametrize("words", ["lr", "lr=0.5 and", "lr=[1]", "=3", "lr=one"])
def test_what_is_no_override_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="--run-config"):
        overridden(DEFAULTS, [words])


def test_the_templates_settings_are_what_flower_makes_of_them() -> None:
    import tomllib

    folder = Path(__file__).parent / "quickstart"
    raw = tomllib.loads((folder / "pyproject.toml").read_text())
    app = read(folder)
    assert app.config == flatten_dict(raw["tool"]["flwr"]["app"]["config"])
    assert app.server == "pytorchexample.server_app:app"
    assert app.client == "pytorchexample.client_app:app"
    assert app.sites == 10  # that a simulation has


def test_an_older_apps_federation_says_how_many_sites(tmp_path: Path) -> None:
    text = (Path(__file__).parent / "quickstart/pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace("supernodes = 10", "supernodes = 23"))
    assert read(tmp_path).sites == 23
    (tmp_path / "pyproject.toml").write_text(text.split("[tool.flwr.federations]")[0])
    assert read(tmp_path).sites is None


def test_an_app_s_digest_is_of_its_code_and_settings_alone(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "quickstart"
    app = tmp_path / "app"
    shutil.copytree(folder, app)
    before = read(app).digest()
    (app / "final_model.pt").write_bytes(b"weights")
    (app / "outputs").mkdir()
    (app / "outputs" / "run.json").write_text("{}")
    (app / "venv").mkdir()
    (app / "venv" / "pyvenv.cfg").touch()
    (app / "venv" / "site.py").touch()
    (app / "round").symlink_to(app)
    assert read(app).digest() == before
    task = app / "pytorchexample" / "task.py"
    task.write_text(task.read_text() + "\n")
    assert read(app).digest() != before
