from torch import nn

from srnn.pruning import Pruner
from srnn.recording import plots


def test_groups_of_one_forecast_share_a_line(monkeypatch, tmp_path):
    """Of three that lie on each other, two could not be found."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    model = nn.Sequential(nn.Embedding(40, 7), nn.Linear(7, 30), nn.Linear(30, 7))
    scope = {"1.weight": {"sparsity": 0.5}}
    plots.plot_plan(Pruner(model, "cubic", 500, None, sparsity=0.9, share="matrix", scope=scope), tmp_path / "plan.png")
    lines = [line for line in figures[0].axes[0].get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["1.weight 0.5", "2.weight, 0.weight"]
