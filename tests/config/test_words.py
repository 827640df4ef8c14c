"""Words of a command line that other Hydra programs take, and values that Hydra cannot read without quotes."""

import pytest

from srnn.__main__ import main
from srnn.config.command_line import check_command_line
from srnn.config.composing import compose_settings
from srnn.errors import UserError
from srnn.registry import register


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("init_from=epoch=3-step=40.ckpt", "epoch=3-step=40.ckpt"),
        ("init_from=größe.ckpt", "größe.ckpt"),
        ("init_from='epoch=3-step=40.ckpt'", "epoch=3-step=40.ckpt"),
        ("init_from=runs/a/best.ckpt", "runs/a/best.ckpt"),
        ("init_from=a b&c.ckpt", "a b&c.ckpt"),
    ],
)
def test_a_value_needs_no_quotes_of_its_own(word, value):
    line = check_command_line([word])
    assert compose_settings([w for w in line.argv if w.startswith("init_from")]).init_from == value


def test_presets_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(register, "conf_folders", list(register.conf_folders))
    (tmp_path / "myconf/experiment").mkdir(parents=True)
    (tmp_path / "myconf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: lstm\nseed: 5\nmodel:\n  hidden_size: 24\n"
    )
    assert main(["--config-dir", str(tmp_path / "myconf"), "experiment=mine", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "name: lstm" in shown
    assert "hidden_size: 24" in shown
    assert "seed: 5" in shown


def test_flags_that_srnn_does_not_have_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config-dir .*missing: no such folder"):
        check_command_line(["--config-dir", str(tmp_path / "missing")])
    for flag in ("--config-name", "--config-path", "--experimental-rerun"):
        with pytest.raises(UserError, match=f"{flag}: srnn has one config"):
            check_command_line([flag, "x"])


def test_the_version_is_srnns(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("srnn 0.")


def test_a_name_in_a_list_that_needs_quotes_says_so():
    with pytest.raises(UserError, match=r"tracking.tags=\[größe\]: .*Quote a name with such a character"):
        check_command_line(["tracking.tags=[größe]"])
    assert check_command_line(["tracking.tags=['größe']"]).sweep is None
