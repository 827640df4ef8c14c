"""Choices that a user may make: values of the right type and within bounds, odd together, of small runs on a text."""

import typing
from types import UnionType

from srnn.config.settings import SECTIONS, options_of
from srnn.registry import Range, register

SMALLEST = [
    "trainer=fast", "trainer.limit_train_batches=4", "trainer.limit_eval_batches=2",
    "model.hidden_size=8", "model.embedding_size=4", "dataset=text", "dataset.eval_streams=2", "dataset.batch_size=2",
    "dataset.sequence_length=8", "tracking.mode=disabled", "kernel=dense", "srnn.plugins=off",
]  # fmt: skip
PRESETS = {
    "model": ["rnn", "gru", "lstm"],
    "pruning": ["none", "gradual", "block", "cubic", "hard", "random", "rigl"],
    "optimizer": ["adam", "adamw", "sgd"],
    "schedule": ["constant", "step", "cosine", "plateau"],
    "averaging": ["none", "none", "ema", "asgd"],
    "kernel": ["dense", "dense", "csr"],
}
# Texts that have a grammar of their own, and mappings: what they take beside anything of their type.
SPELT = {
    "structure": ["element", "4x1", "8x1", "16x1", "4x4", "1x4", "2:4", "1:2"],
    "scope": ["{*weight_hh*:{sparsity:0.5}}", "{rnn*:{structure:4x1}}", "{decoder*:{sparsity:0.99}}", "null"],
    "q": ["auto", "0.001", "{recurrent:0.01}"],
    "layer_types": ["[recurrent]", "[linear,embedding]", "[recurrent,linear]"],
    "plugins": ["off"], "vocabulary_limit": ["null", "3", "1000"], "tags": ["[]", "[a]"],
}  # fmt: skip
MOMENTS = ["0", "1", "3", "0.1", "0.5", "1.0", "auto", "'1 epoch'", "'2 epochs'", "pruning_end", "19", "20"]
# They are given, cost minutes, need a GPU or other data, or name a file.
LEFT_ALONE = {
    "name", "path", "accelerator", "devices", "max_epochs", "limit_epochs", "limit_train_batches", "limit_eval_batches",
    "teacher", "mode", "project", "group",
}  # fmt: skip


def within(option, rng):
    """A value of an option's type and bounds, as it is typed; None for what is left alone."""
    if option.name in LEFT_ALONE:
        return None
    if option.name in SPELT and typing.get_origin(option.type) is not typing.Literal:
        return rng.choice(SPELT[option.name])
    if option.name.endswith("_itr") or option.type == (int | float | str) or option.type == (int | float | str | None):
        return rng.choice(MOMENTS)
    return _of_type(option.type, option.default, rng)


def _of_type(kind, default, rng):
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return str(rng.choice(args))
    if origin in (typing.Union, UnionType):
        return _of_type(rng.choice(args), default, rng)
    if kind is type(None):
        return "null"
    if kind is bool:
        return rng.choice(["true", "false"])
    bounds = next((mark for mark in args[1:] if isinstance(mark, Range)), None) if origin is typing.Annotated else None
    if (args[0] if origin is typing.Annotated else kind) is int:
        least = int(bounds.ge or 0) if bounds else 0
        return str(rng.choice([least, least, least + 1, least + 2, rng.randint(least, least + 20)]))
    if bounds is None:
        return None
    low, high = bounds.gt if bounds.ge is None else bounds.ge, bounds.lt if bounds.le is None else bounds.le
    edges = [float(bounds.ge)] if bounds.ge is not None else [low + 1e-6]
    if high == 1:
        return repr(rng.choice([*edges, rng.random() or 0.5, rng.random() or 0.5, 0.999]))
    return repr(rng.choice([*edges, low + 10 ** rng.uniform(-3, 1)]))


def choices(rng, most=6):
    """Overrides of one run: some presets, and options of what was chosen."""
    chosen = {group: rng.choice(names) for group, names in PRESETS.items()}
    words = [f"{group}={name}" for group, name in chosen.items() if group != "kernel" or name != "dense"]
    options = {f"{section}.{o.name}": o for section, make in SECTIONS.items() for o in options_of(make).values()}
    components = {f"{group}.{o.name}": o for group, name in [*chosen.items(), ("dataset", "text")]
                  for o in register.get(group, name).options.values()}  # fmt: skip
    for key, option in rng.sample(sorted((options | components).items()), rng.randint(1, most)):
        value = within(option, rng)
        if value is not None and key.partition(".")[0] != "distill":
            words.append(f"{key}={value}")
    return words
