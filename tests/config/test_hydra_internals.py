"""What Hydra keeps private is where this version of srnn looks for it."""

import hydra
from omegaconf import OmegaConf

from srnn.config.composing import parse_override

ADVICE = f"Hydra {hydra.__version__} has moved what srnn/config/hydra_internals.py imports: adapt that file"


def test_hydra_has_what_is_imported():
    try:
        from srnn.config.hydra_internals import apply_overrides, flags_parser
    except ImportError as error:
        raise AssertionError(ADVICE) from error
    config = OmegaConf.create({"model": {"hidden_size": 1}})
    apply_overrides([parse_override("model.hidden_size=2"), parse_override("+model.new=3")], config)
    assert config == {"model": {"hidden_size": 2, "new": 3}}, ADVICE
    arguments = flags_parser().parse_args(["-m", "model=gru"])
    assert (arguments.multirun, arguments.overrides) == (True, ["model=gru"]), ADVICE
