"""Which folders of plug-ins a command loads."""

import pytest

from srnn.__main__ import main
from srnn.errors import UserError
from srnn.registry import register
from srnn.registry.plugins import passed_over, plugin_folders

ASKS = '[tool.srnn]\nplugins = "{}"\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a plug-in that nobody asked for."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/strange.py").write_text("raise SystemExit('code of a stranger ran')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(register, "broken_plugins", {})
    return tmp_path


def test_files_that_nobody_asked_for_are_passed_over(folder, capsys):
    assert plugin_folders() == []
    assert main(["list", "optimizer"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"srnn: the plug-ins in {folder}/plugins are passed over: add srnn.plugins=on, or")
    assert shown.err.count("\n") == 1
    assert main(["list", "optimizer", "srnn.plugins=on"]) == 0
    assert "strange.py is left out: SystemExit: code of a stranger ran" in capsys.readouterr().err


@pytest.mark.parametrize("project", ["", "[tool.other]\nplugins = 'plugins'\n", "tool = 3\n", "[[[ no toml"])
def test_a_project_that_does_not_say_so_wants_none(folder, project):
    (folder / "pyproject.toml").write_text(project)
    assert plugin_folders() == []
    assert passed_over("auto")
    assert not passed_over("off")


def test_a_project_says_which_it_wants(folder):
    (folder / "pyproject.toml").write_text(ASKS.format("plugins"))
    assert plugin_folders() == [folder / "plugins"]
    assert passed_over("auto") is None
    assert plugin_folders("off") == []
    (folder / "mine").mkdir()
    assert plugin_folders("mine") == plugin_folders(str(folder / "mine")) == [folder / "mine"]
    (folder / "pyproject.toml").write_text(ASKS.format("absent"))
    with pytest.raises(UserError, match=r"pyproject\.toml: tool\.srnn\.plugins=absent: there is no folder"):
        plugin_folders()
    (folder / "pyproject.toml").write_text("[tool.srnn]\nplugins = 3\n")
    with pytest.raises(UserError, match="must be the name of a folder"):
        plugin_folders()
