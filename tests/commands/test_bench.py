import pytest
import torch

from srnn.__main__ import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [["device=cuda"], ["bench=gpu"], ["bench=network"]])
def test_without_a_gpu_it_says_so(options, tmp_path, capsys):
    assert main(["bench", *options, f"output={tmp_path}"]) == 2
    assert "torch finds no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shapes=gru", "a shape is gru:2560"),
        ("shapes=cnn:12", "a shape is gru:2560"),
        ("shapes=gru:0", "a shape is gru:2560"),
        ("shapes=product:12", "a shape is gru:2560"),
        ("sparsity=1.0", "--sparsity=1.0 must be a number from 0 to"),
        ("sparsity=90", "--sparsity=90 must be a number from 0 to 0.9999 (90 % is 0.9)."),
        ("sparsity=x", "--sparsity=x must be a number"),
        ("batch=0", "--batch=0 must be a number from 1"),
        ("threads=4096", "--threads=4096 must be a number from 1"),
        ("steps=0", "--steps=0 must be a number from 1 to 1,048,576."),
        ("bench=stream steps=0", "--steps=0 must be"),
        ("structure=2x2", "structure=2x2: there are element"),
        ("values=fp64", "--values=fp64: there are fp32"),
        ("kernels=gpu", "--kernels=gpu: there are"),
        ("limit=-1", "--limit=-1 must be above 0"),
        ("bench=all", "invalid choice: 'all'"),
        ("output=/dev/null/x", "--output=/dev/null/x: this folder cannot be written: Not a directory"),
        ("run=nowhere", "no such folder"),
        (
            "bench=pruning structure=16x1",
            "--structure does nothing with bench=pruning, which takes device, output, shapes",
        ),
        ("bench=gpu config=x", "--config does nothing with bench=gpu, which takes batch, device"),
        ("run=nowhere bench=gpu", "--bench does nothing with run=nowhere, which takes limit"),
        ("bench=network device=cpu", "bench=network runs on a CUDA GPU, not with device=cpu"),
    ],
)
def test_mistakes_are_told(argument, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *argument.split()]) == 2
    assert message in capsys.readouterr().err


def test_options_of_a_run_may_hold_blanks(capsys):
    config = "dataset=text dataset.path='my books/*.txt' trainer.max_epochs=4"
    assert main(["bench", "bench=training", f"config={config}"]) == 2
    assert "training needs five epochs" in capsys.readouterr().err
