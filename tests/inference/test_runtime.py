"""A packed file that runs: loading, stepping, writing, threads, memory."""

import resource
import subprocess
import sys
import threading

import pytest
import torch

import srnn
from srnn.errors import UserError
from tests.inference.test_packed_file import packed_model, sparse_model, write


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "model.safetensors", packed_model(sparse_model(), "fp16"))
    return tmp_path / "model.safetensors"


def test_steps_and_sequences_agree(path):
    model = srnn.load(path, kernel="cpu")
    tokens = torch.randint(11, (2, 9))
    with torch.inference_mode():
        whole, end = model(tokens)
        state = None
        for t in range(9):
            logits, state = model.step(tokens[:, t], state)
            torch.testing.assert_close(logits, whole[:, t], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-6)


def test_writing_is_the_same_with_the_same_seed_on_any_kernel(path):
    texts = []
    for kernel in ("cpu", "csr", "dense", "auto"):
        model = srnn.load(path, kernel=kernel)
        prompt = model.vocabulary.encode("abc").tolist()
        texts.append(list(model.generate(prompt, 30, temperature=0.8, top_k=4, seed=3)))
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert list(model.generate(prompt, 30, temperature=0.8, seed=4)) != texts[0]
    assert list(model.generate(prompt, 5, temperature=0)) == list(model.generate(prompt, 5, temperature=0, seed=9))
    assert list(model.generate(prompt, 5, temperature=1e-300)) == list(model.generate(prompt, 5, temperature=0))
    for _ in model.generate(prompt, 1):
        assert not torch.is_inference_mode_enabled(), "what happens between two tokens is the caller's"


@pytest.mark.parametrize(("prompt", "what"), [("abc", "text"), ("", "empty"), ([], "empty")])
def test_a_prompt_that_is_no_tokens_is_told_what_gives_them(path, prompt, what):
    with pytest.raises(UserError, match=f"the prompt is {what}: .* model.vocabulary.encode"):
        next(srnn.load(path, kernel="csr").generate(prompt, 1))


def test_one_file_and_one_network_serve_eight_threads(path):
    model = srnn.load(path, kernel="cpu")
    tokens = torch.randint(11, (8, 40))

    def run(network, row):
        state, outputs = None, []
        with torch.inference_mode():
            for t in range(40):
                logits, state = network.step(tokens[row : row + 1, t], state)
                outputs.append(logits)
        return torch.cat(outputs)

    alone = [run(model, row) for row in range(8)]
    together: dict[int, torch.Tensor] = {}

    def work(row):
        together[row] = run(model if row % 2 else srnn.load(path, kernel="cpu"), row)

    workers = [threading.Thread(target=work, args=(row,)) for row in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(together[row], alone[row]) for row in range(8))


def test_a_stream_does_not_grow(path):
    model = srnn.load(path, kernel="cpu")
    token, state = torch.tensor([1]), None
    with torch.inference_mode():
        for _ in range(500):
            _, state = model.step(token, state)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(5000):
            _, state = model.step(token, state)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2000  # KB


def test_running_needs_no_training_stack(path):
    code = f"""
import sys, torch, srnn
model = srnn.load({str(path)!r}, kernel="cpu")
assert "torch._dynamo" not in sys.modules, "which takes seconds to import"
model.step(torch.tensor([1]))
heavy = {{'pytorch_lightning', 'hydra', 'omegaconf', 'wandb', 'matplotlib', 'pydantic', 'rich'}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import os, srnn.__main__
os.chdir({str(path.parent)!r})  # where no project names plug-ins, which may import anything
assert srnn.__main__.main(["generate", {str(path)!r}, "--length=2", "--kernel=cpu"]) == 0
heavy -= {{'rich'}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_kernel_there_is_not(path):
    with pytest.raises(UserError, match="no such kernel"):
        srnn.load(path, kernel="gpu")
