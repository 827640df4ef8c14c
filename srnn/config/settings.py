"""A run's config as typed data, checked against the registry before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from srnn.errors import UserError
from srnn.registry import Component, Option, Range, check_options, register
from srnn.registry.option_types import Positive

SELF = "self"  # as distill.teacher: the network's own best dense moment


@dataclass(frozen=True)
class TrainerConfig:
    """The training loop."""

    max_epochs: Annotated[int, Range(ge=0, le=1_000_000)] = 8
    gradient_clip_val: Annotated[float, Range(gt=0)] | None = 1.0
    accumulate_grad_batches: Annotated[int, Range(ge=1, le=1_000_000)] = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Annotated[int, Range(ge=1, le=1024)] = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    cuda_graph: bool = False
    checkpoint_minutes: Annotated[float, Range(gt=0, le=1e6)] = 10.0
    limit_epochs: Annotated[int, Range(ge=1)] | None = None
    limit_train_batches: Annotated[int, Range(ge=1)] | None = None
    limit_eval_batches: Annotated[int, Range(ge=1)] | None = None

    @property
    def epochs(self) -> int:
        """Passes over the training data."""
        return min(self.max_epochs, self.limit_epochs or self.max_epochs)


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "srnn"
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PackedConfig:
    """The packed file."""

    values: Literal["fp32", "fp16", "bf16", "int8"] = "fp16"
    structure: Literal["auto", "element", "4x1", "8x1", "16x1", "32x1"] = "auto"


@dataclass(frozen=True)
class DistillConfig:
    """A trained network to learn from, or several."""

    teacher: str | list[str] | None = None
    temperature: Positive = 2.0
    weight: Annotated[float, Range(gt=0, le=1)] = 0.5


def teachers_of(given: str | list[str] | None) -> list[str]:
    """The networks that ``distill.teacher`` names, which a resumed run may look for from another folder.

    Raises:
        UserError: the network itself is among several.
    """
    names = [given] if isinstance(given, str) else given or []
    if len(names) > 1 and SELF in names:
        raise UserError(f"distill.teacher={names}: self teaches alone: leave it out, or name no other teacher.")
    return [str(Path(name).expanduser().resolve()) for name in names if name not in ("", SELF)]


@dataclass(frozen=True)
class SrnnConfig:
    """Which plug-ins are loaded."""

    plugins: str = "auto"  # or on, off, or a folder


@dataclass(frozen=True)
class Settings:
    """A whole config, checked. Components are mappings of ``name`` and options, complete with defaults."""

    model: dict[str, Any]
    dataset: dict[str, Any]
    pruning: dict[str, Any]
    kernel: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    averaging: dict[str, Any]
    trainer: TrainerConfig
    tracking: TrackingConfig
    packed: PackedConfig
    distill: DistillConfig
    srnn: SrnnConfig
    seed: Annotated[int, Range(ge=0, le=2**32 - 1)] = 0
    init_from: str | None = None
    init_partly: bool = False
    init_map: dict[str, str] | None = None
    init_vocabulary: str | None = None

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> Settings:
        """Check a plain config. Raises UserError for the first thing wrong."""
        root = options_of(cls)
        given = check_options(
            {k: Option(k, Any) if k in SECTIONS or k in COMPONENTS else root[k] for k in root},
            EARLIER | dict(config),
            "",
        )
        for key in (*COMPONENTS, *SECTIONS):
            if not isinstance(given[key], Mapping):
                raise UserError(f"{key}={given[key]!r} must be a mapping, such as {key}.OPTION=value.")
        parts: dict[str, Any] = {kind: register.check(kind, given[kind]) for kind in COMPONENTS}
        sections = {key: make(**check_options(options_of(make), given[key], key)) for key, make in SECTIONS.items()}
        return cls(**given | parts | sections)

    def located(self) -> Settings:
        """With teachers that are found from another folder too. Raises UserError."""
        if not (teachers := teachers_of(self.distill.teacher)):
            return self
        teacher = teachers[0] if isinstance(self.distill.teacher, str) else teachers
        return replace(self, distill=replace(self.distill, teacher=teacher))

    def as_dict(self) -> dict[str, Any]:
        """Plain data again."""
        return {key: dict(vars(value)) if key in SECTIONS else value for key, value in vars(self).items()}


# What a config chooses by name from the registry. The data set names its own objective.
COMPONENTS = ("model", "dataset", "pruning", "kernel", "optimizer", "schedule", "averaging")
# What a config of an earlier version, which lacks them, meant.
EARLIER: dict[str, Any] = {"schedule": {"name": "constant"}, "averaging": {"name": "none"}, "distill": {}}
SECTIONS: dict[str, type] = {
    "trainer": TrainerConfig,
    "tracking": TrackingConfig,
    "packed": PackedConfig,
    "distill": DistillConfig,
    "srnn": SrnnConfig,
}
# What `group=name` can choose: components, and presets of a section.
GROUPS = (*COMPONENTS, "trainer", "tracking", "experiment")


def options_of(section: type) -> dict[str, Option]:
    """What a config may set in a section: name -> option."""
    return Component("", "", section, "").options
