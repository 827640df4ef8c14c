import os

import pytest
from matplotlib.figure import Figure
from torch import nn

from srnn.pruning import Pruner
from srnn.recording import plots


def test_groups_of_one_forecast_share_a_line(monkeypatch, tmp_path):
    """Of three that lie on each other, two could not be found."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    model = nn.Sequential(nn.Embedding(40, 7), nn.Linear(7, 30), nn.Linear(30, 7))
    scope = {"1.weight": {"sparsity": 0.5}}
    plots.plot_plan(Pruner(model, "cubic", 500, None, sparsity=0.9, share="matrix", scope=scope), tmp_path / "plan.png")
    lines = [line for line in figures[0].axes[0].get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["1.weight 0.5", "2.weight, 0.weight"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    read = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # else writing into it would wait
    with pytest.raises(OSError, match="no file, but a folder, a device or a pipe"):
        plots.save_figure(Figure(), pipe)
    assert not os.read(read, 8)
    os.close(read)
    assert plots.save_figure(Figure(), tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.png", "pipe.png"]
