"""Recipes for the medium LSTM of Penn Treebank, trained side by side on one GPU: a first look at many, with one seed.

    python docs/screen_ptb.py recipes.json scores.jsonl data=FOLDER epochs=28 [teacher=weights.pt]

The file has a list of recipes: {"name": ..., "method": "gradual", "pruning": {"sparsity": 0.9}, "schedule": ["preset"],
"dropout": 0.5, "distill": [weight, temperature], "mask_gradients": true, "save": "weights.pt"}. All that is left out is
as in conf/experiment/ptb_medium.yaml. The whole step of all networks is one CUDA graph, so nothing of a Trainer is in
the way; masks come from srnn's own ``Pruner``. Only the validation part is read. Matrix products may use TF32.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srnn.pruning import Pruner, RunLength

B, T, H = 20, 35, 650  # streams, steps of a batch, units
LR, CLIP = 35.0, 5 / 35
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
State = list[tuple[Tensor, ...]]


def read(folder: Path) -> tuple[Tensor, Tensor, int]:
    """The tokens of the training and the validation part, and how many different ones there are."""
    words: dict[str, int] = {}
    parts = []
    for part in ("train", "valid"):
        lines = (folder / f"ptb.{part}.txt").read_text().splitlines()
        tokens = [words.setdefault(word, len(words)) for line in lines for word in [*line.split(), "<eos>"]]
        parts.append(torch.tensor(tokens))
    return parts[0], parts[1], len(words)


def streams(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets as B streams, [time, B]."""
    length = (len(tokens) - 1) // B
    inputs, targets = tokens[: length * B], tokens[1 : length * B + 1]
    return inputs.view(B, length).t().contiguous().to(DEVICE), targets.view(B, length).t().contiguous().to(DEVICE)


def zero_state() -> State:
    """That of two layers."""
    return [tuple(torch.zeros(1, B, H, device=DEVICE) for _ in range(2)) for _ in range(2)]


def keep(state: State, new: State) -> None:
    """Write a state where the next batch finds it."""
    for old, found in zip(state, new, strict=True):
        for to, value in zip(old, found, strict=True):
            to.copy_(value)


class Lstm(nn.Module):
    """The network of Zaremba et al. 2014."""

    def __init__(self, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, H)
        self.rnn = nn.ModuleList([nn.LSTM(H, H), nn.LSTM(H, H)])
        self.decoder = nn.Linear(H, vocabulary)
        self.dropout = dropout
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05)

    def forward(self, tokens_TB: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits, and the state after."""
        y, after = F.dropout(self.embedding(tokens_TB), self.dropout, self.training), []
        for layer, before in zip(self.rnn, state, strict=True):
            y, new = layer(y, before)
            y = F.dropout(y, self.dropout, self.training)
            after.append(new)
        return self.decoder(y), after


class Recipe:
    """A network, and all that its training keeps, at addresses that stay."""

    def __init__(self, config: dict[str, Any], vocabulary: int, run: RunLength) -> None:
        self.config, self.run = config, run
        torch.manual_seed(config.get("seed", 0))
        self.model = Lstm(vocabulary, config.get("dropout", 0.5)).to(DEVICE)
        self.parameters = dict(self.model.named_parameters())
        self.masks = {name: torch.ones_like(parameter) for name, parameter in self.parameters.items()}
        self.lr = torch.zeros((), device=DEVICE)
        self.state = zero_state()
        self.history: list[tuple[int, float, float]] = []
        self.pruner = None
        self.end = run.total_steps // 2
        if "method" in config:
            self.pruner = Pruner(self.model, config["method"], run, **config.get("pruning", {}))
            self.end = self.pruner.method.done_from
            self.pruner._gradient_masks.remove()  # hooks do not act in a graph; ``step`` masks gradients

    def factor(self, itr: int) -> float:
        """Of the step size: ``["preset"]``, ``["cosine"]`` or ``["step", decay]`` from the end of pruning on."""
        name, *options = self.config.get("schedule", ["preset"])
        if name == "preset":
            return float(0.8333 ** max(0, itr // self.run.steps_per_epoch + 1 - 6))
        since = max(0, itr - self.end)
        if name == "step":
            return float(options[0] ** (since // self.run.steps_per_epoch))
        return (1 + math.cos(math.pi * since / (self.run.total_steps - self.end))) / 2

    def step(self, inputs: Tensor, targets: Tensor, taught: Tensor | None) -> None:
        """One optimiser step, all of it on the GPU."""
        logits, new = self.model(inputs, self.state)
        logits, wanted = logits.flatten(0, 1), targets.flatten()
        loss = F.cross_entropy(logits, wanted)
        if "distill" in self.config:
            assert taught is not None
            weight, t = self.config["distill"]
            soft = torch.softmax(taught.flatten(0, 1) / t, -1)
            loss = (1 - weight) * loss + weight * t * t * F.cross_entropy(logits / t, soft)
        parameters: list[Tensor] = list(self.parameters.values())
        masks: list[Any] = list(self.masks.values())
        gradients = list(torch.autograd.grad(loss, parameters))
        masked_first = self.config.get("mask_gradients", True)
        with torch.no_grad():
            if masked_first:
                torch._foreach_mul_(gradients, masks)
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, self.lr * (CLIP / (norm + 1e-6)).clamp(max=1.0))
            torch._foreach_sub_(parameters, gradients)
            if not masked_first:
                torch._foreach_mul_(parameters, masks)
            keep(self.state, new)

    @torch.no_grad()
    def prune(self, itr: int) -> None:
        """After step ``itr``: new masks, if it is time."""
        if self.pruner is None or not self.pruner.method.is_update(itr):
            return
        self.pruner.itr = itr - 1
        self.pruner.step()
        for name, mask in self.pruner.masks().items():
            self.masks[name].copy_(mask)
            self.parameters[name].mul_(self.masks[name])

    @torch.no_grad()
    def validate(self, inputs: Tensor, targets: Tensor, epoch: int) -> None:
        """Perplexity of the validation part."""
        self.model.eval()
        state, nats = zero_state(), torch.zeros((), dtype=torch.float64, device=DEVICE)
        for at in range(0, len(inputs), 2 * T):
            logits, state = self.model(inputs[at : at + 2 * T], state)
            nats += F.cross_entropy(logits.flatten(0, 1), targets[at : at + 2 * T].flatten(), reduction="sum")
        self.model.train()
        sparsity = self.pruner.sparsity if self.pruner else 0.0
        self.history.append((epoch, round(math.exp(float(nats) / targets.numel()), 2), round(sparsity, 4)))


def recorded(step: Any, recipes: list[Recipe]) -> Any:
    """The step as a CUDA graph; the few that it takes to record leave no trace in weights. As it is on a CPU."""
    if DEVICE.type == "cpu":
        return step
    before = [[parameter.detach().clone() for parameter in recipe.parameters.values()] for recipe in recipes]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for recipe, weights in zip(recipes, before, strict=True):
            for parameter, weight in zip(recipe.parameters.values(), weights, strict=True):
                parameter.copy_(weight)
    return graph.replay


def main() -> None:
    """Train all recipes; write a line for each, anew after each validation."""
    recipes_file, scores_file, *rest = sys.argv[1:]
    options = dict(part.split("=", 1) for part in rest)
    torch.backends.cuda.matmul.allow_tf32 = True
    train, valid, vocabulary = read(Path(options["data"]))
    (all_inputs, all_targets), held_out = streams(train), streams(valid)
    batches, epochs = len(all_inputs) // T, int(options["epochs"])
    run = RunLength(batches * epochs, batches)
    recipes = [Recipe(config, vocabulary, run) for config in json.loads(Path(recipes_file).read_text())]
    inputs, targets = all_inputs[:T].clone(), all_targets[:T].clone()
    teacher, teachers_state, taught = None, zero_state(), None
    if "teacher" in options:
        teacher = Lstm(vocabulary, 0.0).to(DEVICE).requires_grad_(False)
        teacher.load_state_dict(torch.load(options["teacher"], map_location=DEVICE))
        taught = torch.zeros(T, B, vocabulary, device=DEVICE)

    def step() -> None:
        if teacher is not None and taught is not None:
            with torch.no_grad():
                logits, new = teacher(inputs, teachers_state)
                taught.copy_(logits)
                keep(teachers_state, new)
        for recipe in recipes:
            recipe.step(inputs, targets, taught)

    run_step, began, itr = recorded(step, recipes), time.time(), 0
    for epoch in range(1, epochs + 1):
        for state in (teachers_state, *(recipe.state for recipe in recipes)):
            keep(state, zero_state())
        for batch in range(batches):
            inputs.copy_(all_inputs[batch * T : (batch + 1) * T])
            targets.copy_(all_targets[batch * T : (batch + 1) * T])
            for recipe in recipes:
                recipe.lr.fill_(LR * recipe.factor(itr))
            run_step()
            itr += 1
            for recipe in recipes:
                recipe.prune(itr)
        for recipe in recipes:
            recipe.validate(*held_out, epoch)
        scores = [{"config": r.config, "seconds": round(time.time() - began), "valid": r.history} for r in recipes]
        Path(scores_file).write_text("".join(json.dumps(line) + "\n" for line in scores))
        print(epoch, [(r.config["name"], *r.history[-1][1:]) for r in recipes], flush=True)
    for recipe in recipes:
        if "save" in recipe.config:
            torch.save(recipe.model.state_dict(), recipe.config["save"])


if __name__ == "__main__":
    main()
