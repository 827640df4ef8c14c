"""Train many medium LSTMs of Penn Treebank at once on one GPU: how the tables of docs/results/quality.md are repeated.

    python docs/screen_ptb.py recipes.json scores.jsonl [seconds=540] [precision=fp16] [OPTION=VALUE ...]

It is not the command: no Lightning, no run folders. Data, first weights, step sizes, teachers and pruning are srnn's
own, and a recipe is what the command takes: {"name": ..., "options": "experiment=ptb_medium_sparse pruning=obd"}. With
"save": FILE its best weights are written to a packed file. More OPTION=VALUE hold for all recipes.
Random numbers of dropout are others, and products take 16 bits (precision=fp16), TF32 or fp32 (precision=fp32).
graph=false launches each step piece by piece, and kernels=false leaves Triton out, where either fails.

All networks make each step together, in one CUDA graph (``stacked_lstm.py``): 16 take 7 minutes on an H200, 39 epochs
each. After each epoch the validation part is read, and scores.jsonl written anew; at the end the test part, once, with
each network's best weights. What does not fit into ``seconds`` is left out from the end of the list; a training that
still takes longer ends after an epoch.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import stacked_lstm_kernels as kernels
import torch
from stacked_lstm import Stack, State, changing, largest_difference, recorded, seconds_of
from torch import Tensor

import srnn
from srnn.config.composing import compose_settings
from srnn.config.settings import Settings
from srnn.errors import UserError
from srnn.files import write_atomically
from srnn.inference.packed_file import read, write
from srnn.inference.packing import pack
from srnn.inference.unpacking import unpack
from srnn.pruning import Pruner, RunLength
from srnn.registry import register
from srnn.training.preparing import build_data

BEGAN = time.perf_counter()
TOLERANCE = 0.02  # relative, of what two steps change: of kernels against plain torch
BESIDE = 1.15  # of a step: pruning and validation take a share of its time
OWN = ("seconds", "precision", "graph", "kernels")  # options that are no recipe's
AFTER = 20.0  # seconds for the test part and for saving


class Network:
    """A network of the stack, and what the command would have beside it."""

    def __init__(self, recipe: dict[str, Any], settings: Settings, sizes: dict[str, int]) -> None:
        self.recipe, self.settings = recipe, settings
        pl.seed_everything(settings.seed, workers=True, verbose=False)
        self.model = register.build("model", settings.model, **sizes)
        self.history: list[float] = []
        self.best, self.best_epoch, self.test = math.inf, 0, None
        self.pruner: Any = None
        self.seconds = 0.0

    def prune_with(self, run: RunLength) -> None:
        """Build the optimiser, which tells the step size, and the pruner: parameters are where they stay."""
        built = register.build(
            "optimizer", self.settings.optimizer, parameters=list(self.model.parameters()), fused=False
        )
        self.optimizer = built["optimizer"] if isinstance(built, dict) else built
        self.schedule = built["lr_scheduler"] if isinstance(built, dict) else None
        method = register.build("pruning", self.settings.pruning)
        if self.settings.pruning["name"] == "random":  # drawn on a CPU, and the same at each update
            drawn, drawing = {}, method.importance
            method.importance = lambda piece: drawn[piece.key] if piece.key in drawn else drawn.setdefault(
                piece.key, drawing(piece)
            )  # fmt: skip
        self.pruner = Pruner(self.model, method, run, self.optimizer)
        self.pruner._gradient_hooks.remove()  # hooks do not act in a graph; the stack masks gradients

    @property
    def averages(self) -> bool:
        """Whether it needs a mean of squared gradients."""
        return bool(self.settings.pruning["name"] == "obd")

    def row(self, epochs: int, together: int, skipped: float) -> dict[str, Any]:
        """What is known of it by now."""
        pruner = self.pruner
        masks = pruner.masks().values()
        dense = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "name": self.recipe["name"], "options": self.recipe["options"], "epochs": len(self.history),
            "complete": len(self.history) == epochs, "best_epoch": self.best_epoch,
            "valid_perplexity": round(self.best, 3) if self.best_epoch else None, "test_perplexity": self.test,
            "sparsity": round(pruner.sparsity, 5), "nonzeros": dense - sum(int((~mask).sum()) for mask in masks),
            "done_from": pruner.method.done_from, "pruning_seconds": round(pruner.seconds, 1),
            "seconds": round(self.seconds, 1), "together": together, "skipped_steps": int(skipped),
            "valid": [round(value, 3) for value in self.history],
            "sparsities": {name: round(value, 4) for name, value in pruner.sparsities().items()},
        }  # fmt: skip


class Training:
    """All networks, trained together."""

    def __init__(self, recipes: Sequence[dict[str, Any]], options: dict[str, str], common: Sequence[str]) -> None:
        self.options, self.limit = options, float(options.get("seconds", "inf")) - AFTER
        settings = [compose_settings([*shlex.split(recipe["options"]), *common]) for recipe in recipes]
        _check(settings)
        self.data = build_data(settings[0].dataset)
        self.networks = [Network(r, s, self.data.sizes) for r, s in zip(recipes, settings, strict=True)]
        if (limits := settings[0].trainer).limit_train_batches is not None:
            self.data.limits["train"] = limits.limit_train_batches
        if limits.limit_eval_batches is not None:
            self.data.limits |= {"valid": limits.limit_eval_batches, "test": limits.limit_eval_batches}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batches = [(a.to(self.device), b.to(self.device)) for a, b in self.data.limited("train")]
        self.epochs = settings[0].trainer.epochs
        half = options.get("precision", "fp16") == "fp16" and self.device.type == "cuda"
        self.dtype = torch.float16 if half else torch.float32
        self._build(settings)

    def _build(self, settings: list[Settings]) -> None:
        dataset, clip = settings[0].dataset, settings[0].trainer.gradient_clip_val
        averages = [network.averages for network in self.networks]
        models = [network.model for network in self.networks]
        fused = kernels.CAN_FUSE and self.options.get("kernels", "true") == "true"
        self.stack = Stack(models, self.device, self.dtype, clip or math.inf, averages, fused)
        self.state = State(self.stack, dataset["sequence_length"], dataset["batch_size"])
        self.held_out = State(self.stack, dataset["sequence_length"], dataset["eval_streams"])
        self.nats = torch.zeros(len(models), dtype=torch.float64, device=self.device)
        self.state.batch(*self.batches[0])
        self._teach(settings)
        run = RunLength(len(self.batches) * self.epochs, len(self.batches))
        for k, network in enumerate(self.networks):
            network.prune_with(run)
            if network.averages:  # the stack's own, which the step keeps up
                row = int(self.stack.mean_row[k])
                network.pruner.method._own = {name: mean[row] for name, mean in self.stack.means.items()}
            self.stack.decay[k] = network.settings.optimizer["weight_decay"]
            self._written(k)
        self.best = {name: weight.clone() for name, weight in self.stack.weights.items()}

    def _teach(self, settings: list[Settings]) -> None:
        """The teachers' log probabilities of all batches: without dropout they are the same in each epoch."""
        named = [[s.distill.teacher] if isinstance(s.distill.teacher, str) else s.distill.teacher for s in settings]
        different = [list(one) for one in dict.fromkeys(tuple(one) for one in named if one)]
        for k, (names, each) in enumerate(zip(named, settings, strict=True)):
            if names:
                self.stack.teacher[k] = different.index(names)
                self.stack.weight[k], self.stack.temperature[k] = each.distill.weight, each.distill.temperature
        self.lessons = [self._lessons(names) for names in different]
        if different:
            self.stack.taught = torch.stack([lesson[0] for lesson in self.lessons])

    @torch.no_grad()
    def _lessons(self, names: Sequence[str]) -> list[Tensor]:
        """Of each batch [N, V]: the mean of several teachers' logits, as srnn's ``Several``, normalised."""
        packed = [read(Path(name)) for name in names]
        for name, one in zip(names, packed, strict=True):
            if one.vocabulary is None or one.vocabulary.to_dict() != self.data.vocabulary.to_dict():
                raise UserError(f"distill.teacher={name}: its vocabulary is not this run's.")
        models = [unpack(one).to(self.device).eval() for one in packed]
        states, lessons = [None] * len(models), []
        for tokens_BT, _ in self.batches:
            outputs = [model(tokens_BT, state) for model, state in zip(models, states, strict=True)]
            states = [state for _, state in outputs]
            logits = torch.stack([logits_BTV for logits_BTV, _ in outputs]).mean(0).transpose(0, 1).flatten(0, 1)
            missing = self.state.T * self.state.B - len(logits)
            lessons.append(torch.nn.functional.pad(logits.log_softmax(1), (0, 0, 0, missing)).half())
        return lessons

    def _written(self, k: int) -> None:
        """The pruner has written weights and masks."""
        for name, mask in self.networks[k].pruner.masks().items():
            self.stack.keep[name][k].copy_(mask)
        for name in self.stack.matrices:
            self.stack.refresh(name, k)

    def _record(self) -> None:
        """The steps as CUDA graphs, after a look at the kernels."""
        stack = self.stack
        self.step: Any = lambda: stack.step(self.state)
        self.evaluate: Any = lambda: stack.evaluate(self.held_out, self.nats)
        self._set_rates()
        if stack.fused:
            try:
                difference = largest_difference(stack, self.state)
            except Exception as problem:
                difference, stack.fused = math.inf, False
                print(f"kernels: {problem!r}"[:2000], flush=True)
            stack.fused = difference < TOLERANCE
            print(f"kernels: {difference:.3g} from plain torch, {'used' if stack.fused else 'NOT used'}", flush=True)
        if self.device.type == "cuda" and self.options.get("graph", "true") == "true":
            try:
                self.step = recorded(self.step, changing(stack, self.state))
                self.evaluate = recorded(self.evaluate, [self.nats, *self.held_out.y, *self.held_out.c])
            except Exception as problem:
                raise SystemExit(f"graph=true: {problem!r}: start it again with graph=false") from problem

    def _set_rates(self) -> None:
        rates = [network.optimizer.param_groups[0]["lr"] for network in self.networks]
        self.stack.lr.copy_(torch.tensor(rates))

    def _set_flags(self) -> list[Network]:
        """What is special about the step that comes; the networks whose masks are updated after it."""
        pruners = [network.pruner for network in self.networks]
        due = [pruner.method.is_update(pruner.itr + 1) for pruner in pruners]
        wants = [pruner._wants_gradients() for pruner in pruners]
        free = [one and two for one, two in zip(due, wants, strict=True)]
        # At an update the method itself takes in the step's gradients, after it has ranked by those before.
        averages = [
            network.averages and not now and network.pruner.itr < network.pruner.method.done_from
            for network, now in zip(self.networks, due, strict=True)
        ]
        if (flags := (wants, free, averages)) != self.flags:
            self.flags = flags
            for to, values in zip((self.stack.wants, self.stack.free, self.stack.averages), flags, strict=True):
                to.copy_(torch.tensor(values))
        return [network for network, now in zip(self.networks, due, strict=True) if now]

    def _prune(self, due: Sequence[Network]) -> None:
        """After a step: new masks, where it is time."""
        for k, network in enumerate(self.networks):
            if network not in due:
                network.pruner.itr += 1
                continue
            for name, parameter in network.model.named_parameters():
                parameter.grad = self.stack.gradient(name, k) if name in self.stack.keep else None
            network.pruner.step()
            network.model.zero_grad()
            self._written(k)

    def fitting(self) -> int:
        """How many of the networks there is time for, as long as a step takes."""
        self.flags: Any = None
        self._record()
        windows = {} if self.device.type == "cuda" else {"times": 1, "windows": 1}
        took = seconds_of(self.step, changing(self.stack, self.state), **windows)
        needed = BESIDE * took * len(self.batches) * self.epochs
        start, count = time.perf_counter() - BEGAN, len(self.networks)
        left = self.limit - start
        print(f"{count} networks: {1000 * took:.3f} ms a step, {needed:.0f} s in all, {left:.0f} s left", flush=True)
        return count if needed <= left else max(1, int(count * (left - start) / needed))  # which start again

    def train(self, scores: Path) -> None:
        """All epochs, or as many as there is time for; then the test part."""
        torch.manual_seed(0)  # of dropout
        began = time.perf_counter()
        for epoch in range(1, self.epochs + 1):
            self.state.restart()
            self._set_rates()
            for index, batch in enumerate(self.batches):
                self.state.batch(*batch)
                for m, lesson in enumerate(self.lessons):
                    self.stack.taught[m].copy_(lesson[index])
                due = self._set_flags()
                self.step()
                self._prune(due)
            self._validate(epoch)
            elapsed = time.perf_counter() - began
            for network in self.networks:
                network.seconds = elapsed
                if network.schedule is not None:
                    network.schedule.step()
            self.write(scores)
            print(f"{epoch}: {elapsed:.1f} s", [round(network.history[-1], 2) for network in self.networks], flush=True)
            if time.perf_counter() - BEGAN + elapsed / epoch > self.limit:
                break
        self._test()
        self.write(scores)

    def _perplexities(self, part: Any) -> list[float]:
        self.held_out.restart()
        self.nats.zero_()
        count = 0
        for tokens_BT, targets_BT in self.data.limited(part):
            self.held_out.batch(tokens_BT.to(self.device), targets_BT.to(self.device))
            self.evaluate()
            count += int((targets_BT != kernels.IGNORED).sum())
        return [math.exp(min(nats / count, 700.0)) if math.isfinite(nats) else math.inf for nats in self.nats.tolist()]

    def _validate(self, epoch: int) -> None:
        """Keep the best weights of those that are sparse enough, as the command does."""
        for k, (network, perplexity) in enumerate(zip(self.networks, self._perplexities("valid"), strict=True)):
            network.history.append(perplexity)
            if perplexity < network.best and network.pruner.reached():
                network.best, network.best_epoch = perplexity, epoch
                for name, weight in self.stack.weights.items():
                    self.best[name][k].copy_(weight[k])

    def _test(self) -> None:
        """Score the test part, once, and save what was asked for."""
        for name, weight in self.stack.weights.items():
            weight.copy_(self.best[name])
        for name in self.stack.matrices:
            for k in range(self.stack.K):
                self.stack.refresh(name, k)
        for network, perplexity in zip(self.networks, self._perplexities("test"), strict=True):
            network.test = round(perplexity, 3) if network.best_epoch else None
            if "save" in network.recipe and network.best_epoch:
                self._save(network)

    def _save(self, network: Network) -> None:
        """A packed file, as that of a run."""
        settings = network.settings
        about = {
            "dataset": self.data.located(dict(settings.dataset)), "pruning": settings.pruning,
            "seed": settings.seed, "srnn": srnn.__version__,
        }  # fmt: skip
        packed = pack(copy.deepcopy(network.model).cpu(), settings.model, self.data.sizes, "fp16")
        write(network.recipe["save"], replace(packed, vocabulary=self.data.vocabulary, about=about))

    def write(self, scores: Path) -> None:
        """A line for each recipe."""
        skipped = self.stack.skipped.tolist()
        rows = [n.row(self.epochs, len(skipped), s) for n, s in zip(self.networks, skipped, strict=True)]
        write_atomically(scores, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _check(settings: Sequence[Settings]) -> None:
    """Refuse what is not here, and what all networks must share. Raises UserError."""
    first = settings[0]
    for each in settings:
        named = (each.schedule["name"], each.averaging["name"], each.optimizer["name"], each.model["name"])
        if named != ("constant", "none", "sgd", "lstm") or each.optimizer["momentum"] or each.init_from:
            raise UserError(f"{named}: only SGD without momentum, averaging or a schedule, of LSTMs from the start.")
        if each.pruning.get("group_lasso") or each.distill.teacher == "self":
            raise UserError("pruning.group_lasso and distill.teacher=self are the command's.")
        alike = {"dropout": 0.0, "embedding_dropout": 0.0}
        if (each.dataset, each.trainer, each.model | alike) != (first.dataset, first.trainer, first.model | alike):
            raise UserError("all recipes have to share data, epochs, clipping and the size of networks.")


def main(arguments: Sequence[str]) -> None:
    """Train all recipes."""
    recipes, scores, *rest = arguments
    own = dict(part.split("=", 1) for part in rest if part.split("=", 1)[0] in OWN)
    common = [part for part in rest if part.split("=", 1)[0] not in own]
    warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    wanted = json.loads(Path(recipes).read_text())
    training = Training(wanted, own, common)
    fitting = training.fitting()
    if fitting < len(wanted):
        print(f"left out: {[recipe['name'] for recipe in wanted[fitting:]]}", flush=True)
        del training
        gc.collect()  # with its memory, and its graphs
        training = Training(wanted[:fitting], own, common)
        training.fitting()
    training.train(Path(scores))


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
