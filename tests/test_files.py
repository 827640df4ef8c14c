import csv
import io
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from srnn.files import csv_bytes

TEXTS = st.text(st.sampled_from("ab ,\"'\n;\té"), max_size=4)
CELLS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.lists(TEXTS, max_size=2)
ROWS = st.lists(st.dictionaries(st.sampled_from(["a", "b,c", "d e", '"f"']), CELLS, min_size=2), max_size=4)


@given(ROWS, st.sampled_from(["\n", "\r\n"]))
def test_csv_is_what_the_standard_library_writes(rows, line_end):
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    assert csv_bytes(rows, line_end=line_end) == text.getvalue().encode()


@dataclass
class Point:
    x: float
    name: str | None = None


def test_csv_of_dataclasses_with_quoted_columns():
    assert csv_bytes([Point(1.0), Point(2.5, 'a "b"')]) == b'x,name\n1.0,\n2.5,"a ""b"""\n'
    assert csv_bytes([Point(1.0, "a"), Point(2.0)], quoted=("name",)) == b'x,name\n1.0,"a"\n2.0,""\n'
    assert csv_bytes([], columns=["x", "name"]) == b"x,name\n"
