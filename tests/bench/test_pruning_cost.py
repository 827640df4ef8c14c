import csv

from srnn.__main__ import main
from srnn.bench.pruning_cost import PRUNING_METHODS


def test_pruning_is_timed_for_each_method(tmp_path, capsys):
    assert main(["bench", "bench=pruning", "shapes=gru:24,relu:40,product:40x20", f"output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "pruning.csv").read_text().splitlines()))
    assert {row["shape"] for row in rows} == {"gru:24", "relu:40", "product:40x20"}
    assert {row["method"] for row in rows} == set(PRUNING_METHODS)
    assert all(float(row["update_ms"]) > 0 and float(row["step_ms"]) > 0 for row in rows)
    assert {int(row["weights"]) for row in rows} == {6 * 24 * 24, 2 * 40 * 40, 800}
    assert "update" in capsys.readouterr().out
