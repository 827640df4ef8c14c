"""The wheel, and the README's commands."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import QUIET, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, ROOT], check=True)
    (built,) = folder.glob("srnn-*.whl")
    return built


@pytest.mark.slow
def test_conf_and_plugins_travel_inside_the_package(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"srnn", "hydra_plugins"}
    assert "srnn/conf/config.yaml" in names
    assert "srnn/conf/experiment/ptb_small.yaml" in names
    assert "srnn/plugins/brackets.py" in names
    assert "srnn/py.typed" in names
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_an_installed_wheel_runs_in_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import srnn; print(srnn.__file__)"],
        cwd=elsewhere,
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    brackets = [*QUIET, "dataset=brackets", "dataset.train_characters=5000"]
    built_in = subprocess.run(
        [site / "bin" / "srnn", *brackets], cwd=elsewhere, env=environment, text=True, capture_output=True, check=False
    )
    assert built_in.returncode == 2
    assert "dataset=brackets: no dataset has that name" in built_in.stderr, "the examples are nobody's plug-ins"
    examples = f"srnn.plugins={site}/srnn/plugins"
    for command in (
        [site / "bin" / "srnn", *brackets, examples],
        [sys.executable, "-m", "srnn", "list", "dataset", examples],
    ):
        done = subprocess.run(command, cwd=elsewhere, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "(plug-in brackets.py)" in " ".join(done.stdout.split())  # it may be on two lines
    assert len(list(elsewhere.glob("outputs/*/model.safetensors"))) == 1


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2, "one to run the main job, one to pass the tests"
    assert commands[0].endswith("python -m srnn model=gru pruning=gradual")
    assert commands[1] in (ROOT / ".ci/run").read_text().splitlines()
