"""Options made from signatures: what the command line takes, and what it says of what it does not take."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import pytest

from srnn.bench.cases import FLOAT_DTYPES
from srnn.commands.options import FloatsChoice, Help, RunOption, StructureChoice, ValuesChoice, call, command, unquoted
from srnn.errors import UserError
from srnn.formats import PACKED_STRUCTURES, Values
from srnn.registry import Range


def paint(
    files: Annotated[list[str], Help("what to paint", metavar="FILE")],
    /,
    colour: Annotated[Literal["red", "blue"] | None, Help("of all (as they are)")] = None,
    coats: Annotated[int, Range(ge=1, lt=10), Help("of paint")] = 2,
    top_k: Annotated[int | None, Range(ge=1), Help("best brushes (all)")] = None,
    width: Annotated[float, Help("100 % is all", metavar="METRES")] = 600.0,
    dry: Annotated[bool, Help("whether to wait")] = True,
    title: Annotated[str, Help("taken literally")] = "\n",
) -> dict[str, object]:
    """Paint files.

    What is left out of the help.
    """
    return locals()


DEFAULTS = {"files": [], "colour": None, "coats": 2, "top_k": None, "width": 600.0, "dry": True, "title": "\n"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["a", "b"], {"files": ["a", "b"]}),
        (["colour=red", "coats=3", "a"], {"colour": "red", "coats": 3, "files": ["a"]}),
        (["--coats", "3", "--top-k", "1"], {"coats": 3, "top_k": 1}),
        (["top-k=4"], {"top_k": 4}),
        (["top_k=4"], {"top_k": 4}),
        (["--top_k", "4"], {"top_k": 4}),
        (["--top_k=4"], {"top_k": 4}),
        (["width=1e3", "dry=false"], {"width": 1000.0, "dry": False}),
        (["--dry", "true"], {}),
        (["dry=false", "--dry"], {}),
        (["coats=3", "--coats=4"], {"coats": 4}),
        (["--title", "colour=red"], {"title": "colour=red"}),
        (["--title", "--coats"], {"title": "--coats"}),
        (["title=-x=y"], {"title": "-x=y"}),
        (["--width", "-1"], {"width": -1.0}),
        (["srnn.plugins=off", "x=y"], {"files": ["x=y"]}),
    ],
)
def test_words_become_typed_arguments(words, expected):
    assert call(paint, words) == {**DEFAULTS, **expected}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coats=many"], "argument --coats: invalid int value: 'many'; see `srnn test_options --help`."),
        (["width=wide"], "argument --width: invalid float value: 'wide'; see `srnn test_options --help`."),
        (["dry=yes"], "argument --dry: 'yes' must be true or false; see `srnn test_options --help`."),
        (["--colour"], "argument --colour: expected one argument; see `srnn test_options --help`."),
        (["--color=x"], "unrecognized arguments: --color=x; see `srnn test_options --help`."),
        (["coats=0"], "--coats=0 must be at least 1 and below 10."),
        (["--top-k", "0"], "--top-k=0 must be at least 1."),
    ],
)
def test_mistakes_are_told(words, message):
    with pytest.raises(UserError) as told:
        call(paint, words)
    assert str(told.value) == f"test_options: {message}"


def test_a_value_that_is_no_choice_is_told_with_all_there_are():
    with pytest.raises(UserError, match=r"--colour: invalid choice: 'green' \(choose from '?red'?, '?blue'?\)"):
        call(paint, ["colour=green"])


def test_help_shows_what_the_signature_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        call(paint, ["--help"])
    assert ended.value.code == 0
    usage, _, text = capsys.readouterr().out.partition("Paint files.\n\n")
    assert usage.startswith("usage: srnn test_options [-h] [--colour {red,blue}] [--coats COATS]")
    assert text == HELP


HELP = """\
positional arguments:
  FILE                 what to paint

options:
  -h, --help           show this help message and exit
  --colour {red,blue}  of all (as they are)
  --coats COATS        of paint (2)
  --top-k TOP_K        best brushes (all)
  --width METRES       100 % is all (600)
  --dry [DRY]          whether to wait (True)
  --title TITLE        taken literally
"""


@command
def visit(place: Annotated[str | None, Help("where", choices=("here", "there"))] = None, /, *, how: str = "") -> int:
    """Go somewhere."""
    return len(f"{place}{how}")


def test_a_command_reads_its_words():
    assert visit([]) == len("None")
    assert visit(["there", "how=fast"]) == len("therefast")
    assert visit.__doc__ == "Go somewhere."
    with pytest.raises(UserError, match="argument place: invalid choice: 'nowhere'"):
        visit(["nowhere"])


def test_what_must_be_given_is_told():
    def needs(folder: Annotated[str, Help("which", metavar="FOLDER")], /, by: str) -> str:
        return f"{folder}, {by}"

    assert call(needs, ["by=b", "a"]) == "a, b"
    with pytest.raises(UserError, match="the following arguments are required: FOLDER, --by; see"):
        call(needs, [])


def test_a_dataclass_holds_the_options_of_a_large_command():
    @dataclass(frozen=True)
    class Options:
        """Many."""

        size: int = 3
        name: str | None = None

    assert call(Options, ["size=4"]) == Options(4, None)


def test_choices_are_those_of_the_formats():
    """They stand there again, so that ``--help`` need not import torch."""
    assert get_args(ValuesChoice) == get_args(Values)
    assert get_args(FloatsChoice) == tuple(FLOAT_DTYPES)
    assert get_args(StructureChoice) == ("auto", *PACKED_STRUCTURES)


def score(run: RunOption, kernel: str = "auto") -> tuple[str, str]:
    """Score a run."""
    return run, kernel


@dataclass(frozen=True)
class Time:
    """Time a run, or something else."""

    kernel: str = "auto"
    run: str | None = None


def gather(runs: list[str], /, kernel: str = "auto") -> tuple[list[str], str]:
    """Gather runs."""
    return runs, kernel


@pytest.mark.parametrize("words", [["R"], ["run=R"], ["--run", "R"], ["--run=R"]])
@pytest.mark.parametrize("beside", [[], ["kernel=cpu"], ["--kernel", "cpu"]])
def test_a_run_is_named_bare_or_with_its_key(words, beside):
    kernel = "cpu" if beside else "auto"
    for given in (words + beside, beside + words):
        assert call(score, given) == ("R", kernel)
        assert call(Time, given) == Time(kernel, "R")
        assert call(gather, ["A", *given]) == (["A", "R"], kernel)
    assert call(Time, beside) == Time(kernel, None)


@pytest.mark.parametrize(
    ("given", "run"),
    [("'a b'", "a b"), ('"a b"', "a b"), (r"'it\'s'", "it's"), ("it's'", "it's'"), ("'a", "'a"), ("'", "'"), ("", "")],
)
def test_quotes_around_a_whole_value_are_hydras(given, run):
    assert unquoted(given) == run
    assert call(score, [f"run={given}"]) == (run, "auto")
    for word in ("--run", f"--run={given}"):
        assert call(score, [word, given] if word == "--run" else [word]) == (given, "auto"), "taken literally"


def test_a_run_is_named_once():
    assert call(score, ["outputs/lr=0.1"]) == ("outputs/lr=0.1", "auto")
    assert call(score, ["--run", "kernel=x"]) == ("kernel=x", "auto")
    for words in (["R", "S"], ["run=R", "S"], ["--run", "R", "S"]):
        with pytest.raises(UserError, match="unrecognized arguments: S"):
            call(score, words)
    for words in (["R", "colour=red"], ["colour=red"]):
        with pytest.raises(UserError, match="unrecognized arguments: colour=red"):
            call(score, words)
    which = r"which run\? Give its folder, as `srnn test_options outputs/RUN`"
    with pytest.raises(UserError, match=which):
        call(score, ["kernel=cpu"])


def test_a_folder_may_be_named_like_an_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert call(score, ["lr=0.1"]) == ("lr=0.1", "auto")


def test_help_names_both_ways_to_name_a_run(capsys):
    with pytest.raises(SystemExit):
        call(score, ["--help"])
    assert "a run's folder, or a packed file; also run=RUN" in " ".join(capsys.readouterr().out.split())
