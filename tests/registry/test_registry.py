import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from srnn.errors import UserError
from srnn.registry import KINDS, Option, Range, Registry, check_options, register, type_name


@pytest.fixture
def registry():
    # What is first imported while a copy stands in the registry's place would register itself there.
    assert all(register.names(kind) for kind in KINDS)
    return Registry(dict(register.components))


def test_signature_is_the_schema(registry):
    @registry.model("mine")
    def mine(width: int, scale: float = 0.5, mode: Literal["a", "b"] = "a", *, vocabulary_size: int):
        """My model."""
        return width, scale, mode, vocabulary_size

    component = registry.get("model", "mine")
    assert component.defaults() == {"name": "mine", "width": "???", "scale": 0.5, "mode": "a"}
    assert component.supplied == ["vocabulary_size"]
    assert component.summary == "My model."
    assert registry.build("model", {"name": "mine", "width": 3, "scale": 1}, vocabulary_size=9) == (
        3,
        1.0,
        "a",
        9,
    )


def test_dataclass_is_a_schema_too(registry):
    @registry.pruning("mine")
    @dataclass
    class Mine:
        """Mine."""

        types: list[str] = field(default_factory=lambda: ["x"])

    assert registry.get("pruning", "mine").defaults() == {"name": "mine", "types": ["x"]}
    assert registry.build("pruning", {"name": "mine"}).types == ["x"]


def test_a_taken_name_raises(registry):
    with pytest.raises(UserError, match=r"model 'gru' is registered already, by srnn\.models\.recurrent\.gru"):
        registry.model("gru")(lambda: None)


def test_what_a_plugin_brings_has_to_be_loaded_first(tmp_path):
    registry = Registry()
    with pytest.raises(
        UserError, match=r"no such pruning.* not loaded: in Python register\.load_plugins\(\[.*plugins=on"
    ):
        registry.build("pruning", {"name": "lottery"})
    registry.plugin_folders = []
    with pytest.raises(UserError, match=r"There are: \.$"):
        registry.build("pruning", {"name": "lottery"})


def test_unknown_names_and_kinds(registry):
    with pytest.raises(
        UserError, match=r"model=grru: no such model\. Did you mean 'gru'\? There are: deepspeech2, .*gru, lstm, rnn"
    ):
        registry.get("model", "grru")
    with pytest.raises(AttributeError, match="the kinds are model, dataset"):
        registry.modle("x")
    with pytest.raises(UserError, match=r"model\.name=None must be the name of a model"):
        registry.check("model", {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lrr": 1}, r"optimizer\.lrr: unknown option of optimizer\. Did you mean 'lr'\? Allowed: lr, "),
        ({"lr": "fast"}, r"optimizer\.lr='fast' must be float above 0"),
        ({"lr": -1.0}, r"optimizer\.lr=-1\.0 must be above 0"),
        ({"lr": True}, r"optimizer\.lr=True must be float"),
        ({"lr": float("nan")}, r"optimizer\.lr=nan must be above 0"),
        ({"lr": None}, r"optimizer\.lr=None must be float"),
        ({"nesterov": 1}, r"optimizer\.nesterov=1 must be bool"),
    ],
)
def test_bad_options_name_key_value_and_what_is_allowed(given, message):
    with pytest.raises(UserError, match=message):
        check_options(register.get("optimizer", "sgd").options, given, "optimizer")


def test_what_has_no_options_says_so():
    with pytest.raises(UserError, match=r"^pruning\.sparsity: unknown option of pruning: .* there has no options\.$"):
        register.check("pruning", {"name": "none", "sparsity": 0.9})


@pytest.mark.parametrize(
    ("bounds", "value", "of_percent"),
    [
        (Range(gt=0, lt=1), 90, " (90 % is 0.9)"),
        (Range(ge=0, le=1), 12.5, " (12.5 % is 0.125)"),
        (Range(ge=0, le=0.9999), 95, " (95 % is 0.95)"),
        (Range(gt=0, lt=1), 100, ""),  # 1 is not allowed
        (Range(gt=0, lt=1), 1, ""),
        (Range(gt=0, lt=1), 101, ""),
        (Range(gt=0, lt=1), -5, ""),
        (Range(gt=0, lt=1), float("nan"), ""),
        (Range(ge=0.5, le=1), 90, ""),  # no share
        (Range(ge=0, le=5), 6, ""),
    ],
)
def test_a_share_given_in_percent_is_answered_with_the_share(bounds, value, of_percent):
    with pytest.raises(ValueError, match=f"^must be {re.escape(f'{bounds}{of_percent}')}$"):
        bounds.check(value)


def test_a_missing_option_says_how_to_give_it():
    with pytest.raises(UserError, match=r"dataset\.path must be given \(str\): add dataset\.path="):
        register.check("dataset", {"name": "text"})


def test_type_names_are_what_one_types():
    assert type_name(int | float | Literal["auto"]) == "int or float or 'auto'"
    assert type_name(Annotated[float, Range(gt=0, lt=1)] | None) == "float above 0 and below 1 or null"
    assert type_name(dict[str, list[int]]) == "mapping of str to list of int"


PLUGIN = """
from srnn.registry import register
@register.model("{name}")
def made(size: int = 3, *, vocabulary_size: int):
    "A model from a file."
"""


def test_plugins_are_found_and_broken_ones_isolated(registry, tmp_path, monkeypatch):
    (tmp_path / "good_one.py").write_text(PLUGIN.format(name="from_file"))
    (tmp_path / "breaks.py").write_text(PLUGIN.format(name="half") + "1 / 0")
    (tmp_path / "clashes.py").write_text(PLUGIN.format(name="gru"))
    (tmp_path / "syntax_error.py").write_text("def")
    again = "from srnn.models.recurrent import gru\nfrom srnn.registry import register\nregister.model('{}')(gru)\n"
    (tmp_path / "unread.py").write_text(PLUGIN.format(name="unread").replace("size: int", "size: Elsewhere"))
    (tmp_path / "takes.py").write_text(again.format("taken"))
    (tmp_path / "takes_and_breaks.py").write_text(again.format("half_taken") + "1 / 0")
    (tmp_path / "_helper.py").write_text("raise RuntimeError")
    monkeypatch.setattr("srnn.registry.register", registry)
    registry.load_plugins([tmp_path, tmp_path / "absent"])
    assert registry.get("model", "from_file").origin == "plug-in good_one.py"
    assert registry.get("model", "taken").origin == "plug-in takes.py", "though srnn made what it registers"
    assert not {"half", "half_taken", "unread"} & set(registry.names("model")), "nothing of a broken plug-in stays"
    assert registry.get("model", "gru").origin == "srnn.models.recurrent.gru"
    reasons = {path.rpartition("/")[2]: reason for path, reason in registry.broken_plugins.items()}
    assert reasons.keys() == {"breaks.py", "clashes.py", "syntax_error.py", "takes_and_breaks.py", "unread.py"}
    assert "ZeroDivisionError" in reasons["breaks.py"]
    assert "'Elsewhere' is not defined" in reasons["unread.py"]
    assert "registered already" in reasons["clashes.py"]


def test_every_kind_has_components():
    assert all(register.names(kind) for kind in KINDS)


def test_an_option_of_a_tuple_takes_one():
    options = {"pair": Option("pair", tuple[int, int]), "many": Option("many", list[int])}
    assert check_options(options, {"pair": (1, 2), "many": (1, 2)}, "") == {"pair": (1, 2), "many": [1, 2]}
