"""Configs composed by Hydra: where its files are, choices among groups, overrides, and one message for each mistake."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from srnn.config.hydra_internals import apply_overrides
from srnn.config.settings import COMPONENTS, GROUPS, Settings
from srnn.errors import UserError, did_you_mean
from srnn.files import PACKAGE
from srnn.registry import register

# What a command line takes beside the keys of a config.
BESIDE = ("experiment", "resume", "hydra")
# Options that say nothing without another one, the file of a network.
_NEEDS = {"distill.temperature": "distill.teacher", "distill.weight": "distill.teacher", "init_partly": "init_from"}
# What opens and closes a level of YAML, and how many levels a run's config may have.
_STARTS = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken,
)  # fmt: skip
_ENDS = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
_DEEPEST = 30


def conf_folder() -> Path:
    """The folder with the YAML files: inside an installed package, or beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def conf_folders() -> list[Path]:
    """srnn's own, then those of installed plug-ins."""
    return [conf_folder(), *register.conf_folders]


class _PluginConf(SearchPathPlugin):
    """Tells Hydra about the ``conf/`` folders of installed plug-ins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append them: srnn's own names win."""
        for folder in register.conf_folders:
            search_path.append("srnn-plugin", f"file://{folder}")


def presets(group: str) -> list[str]:
    """The names ``group=`` takes: YAML files, and registered components without one."""
    files = [path.stem for folder in conf_folders() for path in (folder / group).glob("*.yaml")]
    return sorted({*files, *(register.names(group) if group in COMPONENTS else [])})


def slug(text: str) -> str:
    """A name for a folder: only letters, digits, dot, underscore and dash; at most 100 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-.")[:100] or "run"


def connect_hydra() -> None:
    """Tell Hydra about our resolver and about components that have no YAML file."""
    OmegaConf.register_new_resolver("slug", slug, replace=True)
    Plugins.instance().register(_PluginConf)
    store = ConfigStore.instance()
    for kind in COMPONENTS:
        for name in register.names(kind):
            if not any((folder / kind / f"{name}.yaml").exists() for folder in conf_folders()):
                store.store(group=kind, name=name, node=register.get(kind, name).defaults())


def parse_override(text: str) -> Override:
    """One ``key=value`` of a command line. Raises UserError."""
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:  # Python's own: too many digits, or brackets
        hint = r" Brackets in a name are escaped, as in \[z\]." if re.search(r"\w\[\w", text) else ""
        if "token recognition" in str(error):
            hint = " Quote a name with such a character, and all of it for a shell: \"tracking.tags=['größe',b]\"."
        raise UserError(f"{text}: not an override such as model.hidden_size=256: {_first_line(error)}{hint}") from None


def split_overrides(text: str) -> list[str]:
    """``a=1 b='x y' c=[1, 2]`` as a shell would hand them over: blanks inside quotes and brackets part nothing."""
    words, quote, depth = [""], "", 0
    for before, char in zip(f" {text}", text, strict=False):
        if quote:
            quote = "" if char == quote and before != "\\" else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "[{(") - (char in ")}]")
        if char.isspace() and not quote and depth <= 0:
            words.append("")
        else:
            words[-1] += char
    return [word for word in words if word]


def compose_settings(overrides: Sequence[str], beside: Sequence[str] = BESIDE) -> Settings:
    """The checked config of one job.

    Args:
        overrides: options, each of one value.
        beside: what else the command takes, for messages.

    Raises:
        UserError: one is wrong.
    """
    compose = functools.cache(compose_config)
    for error in unknown_options(overrides, compose, beside).values():
        raise error
    return settings_of(with_options(overrides, compose))


# Composes a config of choices among the groups; of many jobs with the same choices it need do so only once.
Compose = Callable[[tuple[str, ...]], DictConfig]


def unknown_options(overrides: Sequence[str], compose: Compose, beside: Sequence[str] = BESIDE) -> dict[str, UserError]:
    """The overrides of one job that set what its choices don't have or pass over, and what to say about each.

    Raises:
        UserError: a choice that is not there.
    """
    chosen, options = _split(overrides)
    for override in chosen:
        check_choice(override)
    base = compose(_lines(chosen))
    unknown = {}
    for override in options:
        key = str(override.key_or_group)
        if not override.is_hydra_override():
            try:  # what is added to a part of the config is checked with that part
                _check_key(key.partition(".")[0] if override.is_add() else key, base, beside)
            except UserError as error:
                unknown[str(override.input_line)] = error
    return unknown | _passed_over([o for o in options if str(o.input_line) not in unknown], base)


def _passed_over(options: Sequence[Override], base: DictConfig) -> dict[str, UserError]:
    """The options that others leave without effect."""
    texts = {str(o.key_or_group): str(o.input_line) for o in options}
    given = {str(o.key_or_group): o.value() for o in options if not o.is_delete()}
    found = {
        texts[key]: UserError(f"{texts[key]} has no effect without {needed}=FILE: give that too, or leave this out.")
        for key, needed in _NEEDS.items()
        # What it is anyway does no harm.
        if key in given and given[key] != OmegaConf.select(base, key)
        if not given.get(needed, OmegaConf.select(base, needed))
    }
    epochs, limit = given.get("trainer.max_epochs"), OmegaConf.select(base, "trainer.limit_epochs")
    if "trainer.limit_epochs" not in texts and isinstance(epochs, int) and limit and epochs > limit:
        text = texts["trainer.max_epochs"]
        found[text] = UserError(
            f"{text} has no effect: trainer.limit_epochs={limit} of a preset ends the run before. Give "
            f"trainer.limit_epochs={epochs} too, or another trainer."
        )
    return found


def with_options(overrides: Sequence[str], compose: Compose) -> DictConfig:
    """The config of one job: its choices composed, then its options set, as Hydra does. Raises UserError."""
    chosen, options = _split(overrides)
    config = copy.deepcopy(compose(_lines(chosen)))
    try:
        # Hydra applies options to a whole `hydra` node, too, which the config of a job has no more.
        apply_overrides([o for o in options if not o.is_hydra_override()], config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_first_line(error)) from None
    _check_options_of_experiment(config, {override.key_or_group: str(override.value()) for override in chosen})
    return config


def _check_options_of_experiment(config: DictConfig, chosen: Mapping[str, str]) -> None:
    """Refuse what an experiment sets of a component, where another one is chosen beside it that has no such option."""
    for group in COMPONENTS:
        if "experiment" not in chosen or group not in chosen:
            continue
        node = config[group]
        options = register.get(group, node["name"]).options
        if strange := [str(key) for key in node if key != "name" and key not in options]:
            drop = " ".join(f"'~{group}.{key}'" for key in strange)
            raise UserError(
                f"experiment={chosen['experiment']} sets {group}.{strange[0]}, an option that {group}={chosen[group]} "
                f"does not have. Drop what it lacks by adding {drop}; the others the experiment sets there stay."
            )


def _split(overrides: Sequence[str]) -> tuple[list[Override], list[Override]]:
    """Choices among groups, and options."""
    parsed = [parse_override(text) for text in overrides]
    return [o for o in parsed if o.key_or_group in GROUPS], [o for o in parsed if o.key_or_group not in GROUPS]


def _lines(overrides: Sequence[Override]) -> tuple[str, ...]:
    return tuple(str(override.input_line) for override in overrides)


def check_choice(override: Override) -> None:
    """Refuse ``group=name`` where there is no such name, with the nearest one."""
    group, value = override.key_or_group, str(override.value())
    names = presets(group)
    if value not in names:
        raise UserError(
            f"{group}={value}: no {group} has that name.{did_you_mean(value, names)} There are: {', '.join(names)}."
        )


def _check_key(key: str, base: DictConfig, beside: Sequence[str]) -> None:
    """Refuse a key that the config does not have, naming the nearest one it has."""
    node: Any = base
    for depth, part in enumerate(key.split(".")):
        # `part in node` would say no to an option that must be given still.
        if not isinstance(node, DictConfig) or part not in list(node):
            path = key.split(".")[:depth]
            allowed = [str(k) for k in node] if isinstance(node, DictConfig) else []
            where, others = ".".join(path) or "the config", ""
            if where in COMPONENTS:  # its name is its group's value
                allowed.remove("name")
                others = _those_with(part, where)
                where += f"={node['name']}"
            elif not path:
                allowed += beside
            what = f"{key}: unknown option of {where}"
            if not allowed:
                raise UserError(f"{what}, which has no options.{others}")
            raise UserError(f"{what}.{did_you_mean(part, allowed)} Allowed: {', '.join(allowed)}.{others}")
        node = None if OmegaConf.is_missing(node, part) else node[part]
        if node is None or (isinstance(node, DictConfig) and key.startswith("pruning.q.")):
            return


def _those_with(option: str, group: str) -> str:
    names = [name for name in register.names(group) if option in register.get(group, name).options]
    return f" These have it: {group}={', '.join(names)}." if names else ""


def compose_hydra(overrides: Sequence[str]) -> DictConfig:
    """Hydra's own part of a config: how and where jobs run. Raises UserError."""
    return compose_config(overrides, return_hydra_config=True).hydra


def run_folder(overrides: Sequence[str]) -> Path:
    """Where Hydra will put a run, but for the time in its name. Raises UserError."""
    config = compose_config(overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # for ${hydra:...} in it
    try:
        return Path(config.hydra.run.dir)
    except OmegaConfBaseException as error:
        raise UserError(f"hydra.run.dir: {_first_line(error)}") from None


def compose_config(overrides: Sequence[str], return_hydra_config: bool = False) -> DictConfig:
    """A config as Hydra composes it, not checked yet. Raises UserError."""
    connect_hydra()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
            return compose("config", list(overrides), return_hydra_config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_first_line(error)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:  # of a preset of the user's own
        raise UserError(f"a config file is no YAML: {' '.join(str(error).split())}.") from None


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "hydra"}


def settings_of(config: DictConfig) -> Settings:
    """Check what Hydra hands to a job."""
    return Settings.check(_plain(config))


def read_settings(path: Path) -> Settings:
    """The checked config of a run's ``config.yaml``.

    Args:
        path: the file. Its plug-ins must have been loaded: what it says of them loads none.

    Raises:
        UserError: the file is damaged, or an option is none.
    """
    config = read_plain(path)
    try:
        return Settings.check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_plain(path: Path) -> dict[str, Any]:
    """A run's ``config.yaml`` as plain data, not checked yet. Raises UserError for a damaged file."""
    try:
        text = path.read_text(encoding="utf-8")
        _check_size(path, text)
        config = OmegaConf.to_container(OmegaConf.create(text))
    except UserError:
        raise
    except Exception as error:  # whatever a file made by hand brings about, in YAML, OmegaConf or Python
        raise UserError(f"{path} is damaged: {type(error).__name__}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it holds no options.")
    return {str(key): value for key, value in config.items()}


def _check_size(path: Path, text: str) -> None:
    """Refuse what a few bytes of YAML can grow to: aliases stand for gigabytes, brackets in brackets take hours."""
    depth = 0
    for token in yaml.scan(text):  # one by one, so that it ends in time
        depth += isinstance(token, _STARTS) - isinstance(token, _ENDS)
        if isinstance(token, yaml.AliasToken) or depth > _DEEPEST:
            what = "an alias (*name)" if depth <= _DEEPEST else f"more than {_DEEPEST} levels"
            raise UserError(f"{path} is damaged: it has {what}, which no config of a run has.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."
