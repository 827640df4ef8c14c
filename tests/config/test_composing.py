import pytest
import yaml

from srnn.config.command_line import check_command_line
from srnn.config.composing import compose_settings, conf_folder, presets, slug, split_overrides
from srnn.config.settings import GROUPS, TrackingConfig, TrainerConfig
from srnn.errors import UserError
from srnn.registry import KINDS, register


def test_the_main_job_composes():
    settings = compose_settings(["model=gru", "pruning=gradual"])
    assert settings.model == register.get("model", "gru").defaults()
    assert settings.model["hidden_size"] == 256
    assert settings.pruning["sparsity"] == 0.9
    assert settings.tracking.mode == "offline"
    assert settings.trainer.max_epochs >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_yaml_shows_every_option_with_its_default_and_a_word_on_it(kind):
    for path in (conf_folder() / kind).glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# "), f"{path} opens with what it is"
        shown = yaml.safe_load(text)
        assert shown == register.get(kind, shown["name"]).defaults(), path
        for line in text.splitlines():
            key = line.partition(":")[0]
            if key in shown and key != "name":
                assert "  # " in line, f"{path}: {key} needs a word"


def test_section_presets_match_their_schema():
    trainer = yaml.safe_load((conf_folder() / "trainer/default.yaml").read_text())
    assert trainer == vars(TrainerConfig())
    for path in (conf_folder() / "trainer").glob("*.yaml"):
        assert path.read_text().startswith("# "), path
        assert yaml.safe_load(path.read_text()).keys() - {"defaults"} <= trainer.keys(), path
    assert yaml.safe_load((conf_folder() / "tracking/default.yaml").read_text()) == vars(TrackingConfig())


def test_what_is_named_wins_over_an_experiment():
    settings = compose_settings(["experiment=ptb_medium", "trainer=fast", "model=gru", "model.dropout=0.1", "seed=3"])
    assert settings.trainer.epochs == 5
    assert settings.trainer.limit_train_batches == 8
    assert (settings.model["name"], settings.model["hidden_size"], settings.model["dropout"]) == ("gru", 650, 0.1)
    assert settings.seed == 3


def test_a_preset_of_a_preset():
    settings = compose_settings(["experiment=ptb_medium_sparse", "pruning.sparsity=0.95"])
    medium = compose_settings(["experiment=ptb_medium"])
    assert settings.model == medium.model | {"dropout": 0.35, "embedding_dropout": 0.35}
    assert settings.optimizer == medium.optimizer | {"lr_decay_after": 13}
    assert (settings.dataset, settings.trainer) == (medium.dataset, medium.trainer)
    assert (settings.pruning["name"], settings.pruning["sparsity"]) == ("obd", 0.95)
    assert (settings.distill.teacher, settings.distill.weight) == ("outputs/ptb_medium", 0.6)


def test_options_of_a_preset_that_another_component_lacks():
    with pytest.raises(UserError) as error:
        compose_settings(["experiment=ptb_medium", "optimizer=adam"])
    assert str(error.value) == (
        "experiment=ptb_medium sets optimizer.momentum, an option that optimizer=adam does not have. Drop what it "
        "lacks by adding '~optimizer.momentum' '~optimizer.nesterov'; the others the experiment sets there stay."
    )
    dropped = ["~optimizer.momentum", "~optimizer.nesterov", "optimizer.lr=0.002"]
    assert compose_settings(["experiment=ptb_medium", "optimizer=adam", *dropped]).optimizer["lr_decay_after"] == 6
    with pytest.raises(UserError, match=r"sets pruning\.structure, an option that pruning=none does not"):
        compose_settings(["experiment=ptb_large_blocks", "pruning=none"])


def test_experiments_open_with_what_they_show():
    for path in (conf_folder() / "experiment").glob("*.yaml"):
        head = path.read_text().partition("defaults:")[0]
        for word in ("# @package _global_", "# Shows: ", "# Expected: ", "# Time: ", "# Command:  srnn experiment="):
            assert word in head, (path, word)


MUST_BE_GIVEN = {
    "text": ["path"],
    "fsdd": ["path"],
    "librispeech": ["folder"],
    "manifest": ["train", "valid", "test"],
    "synthetic_speech": ["sentences"],
}


def test_every_choice_composes():
    for group in GROUPS:
        for name in presets(group):
            extra = [f"dataset.{key}=x" for key in MUST_BE_GIVEN.get(name, ())]
            compose_settings([f"{group}={name}", *extra])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pruning.sparcity=0.8"],
            r"pruning\.sparcity: unknown option of pruning=gradual\. Did you mean 'sparsity'\?",
        ),
        (["modle=gru"], r"modle: unknown option of the config\. Did you mean 'model'\?"),
        (["+extra=1"], r"extra: unknown option of the config"),
        (["+pruning.extra=1"], r"pruning\.extra: unknown option of pruning"),
        (
            ["pruning=gradul"],
            r"pruning=gradul: no pruning has that name\. Did you mean 'gradual'\? There are: ",
        ),
        (
            ["model=lstm", "model.nonlinearity=relu"],
            r"model\.nonlinearity: unknown option of model=lstm\..* These have it: model=rnn\.$",
        ),
        (
            ["pruning=none", "pruning.sparsity=0.9"],
            r"unknown option of pruning=none, which has no options\. These have it: pruning=.*gradual.*\.$",
        ),
        (["pruning=none", "pruning.sparcity=0.9"], r"unknown option of pruning=none, which has no options\.$"),
        (["model.hidden_size=big"], r"model\.hidden_size='big' must be int from 1 to 1,000,000"),
        (["model.hidden_size=0"], r"model\.hidden_size=0 must be from 1 to 1,000,000"),
        (["pruning.sparsity=1"], r"pruning\.sparsity=1 must be above 0 and below 1"),
        (["pruning.sparsity=90"], r"pruning\.sparsity=90 must be above 0 and below 1 \(90 % is 0\.9\)\.$"),
        (["pruning.layer_types=[gates]"], r"pruning\.layer_types=\['gates'\] must be list of 'recurrent' or"),
        (["dataset=text"], r"dataset\.path must be given"),
        (["trainer.max_epochs=1e9"], r"trainer\.max_epochs=1000000000\.0 must be int"),
        (["seed=-1"], r"seed=-1 must be"),
        (["experiment=ptb_smal"], r"no experiment has that name\. Did you mean 'ptb_small'"),
        (["trainer.precision=fp8"], r"trainer\.precision='fp8' must be '32-true' or"),
        (["init_from=[1]"], r"init_from=\[1\] must be str or null"),
        (["seed=x"], r"seed='x' must be int"),
        (["init_from="], r"init_from=: no value is given\. Leave it out for its default"),
        (["init_from= "], r"init_from=: no value is given"),
        (["-m", "seed=0,1", "hydra.run.dir="], r"hydra\.run\.dir=: no value is given"),
        (["tracking.mode=off"], r"tracking\.mode='off' must be 'online' or 'offline' or 'disabled'"),
        (["model.hidden_size"], r"model\.hidden_size: not an override such as"),
        (
            ["pruning.scope={*_l0[z]: {sparsity: 0}}"],
            r"not an override such as.*Brackets in a name are escaped, as in \\\[",
        ),
        (["model.hidden_size=${nothing}"], r"nothing"),
        (
            ["trainer=fast", "trainer.max_epochs=60"],
            r"max_epochs=60 has .*_epochs=5 .* Give trainer\.limit_epochs=60 too",
        ),
        (["trainer=fast", "trainer.max_epochs=8"], r"max_epochs=8 has no effect"),
        (["-m", "trainer=fast", "trainer.max_epochs=3,60", "pruning=none"], r"max_epochs=60 has no effect"),
        (["distill.weight=0.8"], r"distill\.weight=0\.8 has no effect without distill\.teacher=FILE"),
        (["experiment=main_obd", "distill.temperature=3"], r"distill\.temperature=3 has no effect"),
        (["init_partly=true"], r"init_partly=true has no effect without init_from=FILE"),
        (["-m", "seed=0,1", "hydra.run.dir=x"], r"hydra\.run\.dir=x has no effect on a sweep: give hydra\.sweep\.dir="),
        (["experiment=pareto", "hydra.run.dir=x", "--cfg", "job"], r"hydra\.run\.dir=x has no effect on a sweep"),
        (["hydra.sweep.dir=x"], r"hydra\.sweep\.dir=x has no effect on a single run: give hydra\.run\.dir=FOLDER"),
        (["seed=0", "--nope", "model=gru"], r"--nope: no such flag; options are GROUP\.OPTION=VALUE"),
        (["seed=0", "--cfg", "jobs"], r"--cfg/-c: invalid choice: 'jobs'"),
        (["seed=0,1"], r"seed=0,1: several values make a sweep; add -m"),
        (["-m", "seed=0,1", "pruning=none,gradul"], r"pruning=gradul: no pruning"),
    ],
)
def test_mistakes_are_found_before_anything_runs(overrides, message):
    with pytest.raises(UserError, match=message):
        check_command_line(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer=fast", "trainer.max_epochs=60", "trainer.limit_epochs=60"],
        ["trainer=fast", "trainer.max_epochs=60", "trainer.limit_epochs=5"],
        ["trainer=fast", "trainer.max_epochs=60", "~trainer.limit_epochs"],
        ["trainer=fast", "trainer.max_epochs=5"],
        ["trainer=fast", "experiment=ptb_small"],
        ["distill.weight=0.5", "init_partly=false"],
        ["experiment=ptb_medium_sparse", "distill.weight=0.8"],
        ["distill.teacher=x", "distill.weight=0.8"],
    ],
)
def test_what_has_an_effect_is_not_refused(overrides):
    compose_settings(overrides)


def test_the_names_allowed_are_all_there_are():
    def allowed(option):
        with pytest.raises(UserError) as error:
            compose_settings([option])
        return set(str(error.value).partition("Allowed: ")[2].rstrip(".").split(", "))

    sections = compose_settings([]).as_dict()
    assert allowed("modle=gru") == allowed("+modle=gru") == {*sections, *GROUPS, "resume", "hydra"}
    assert allowed("tracking.nam=x") == set(vars(TrackingConfig()))
    assert allowed("model.x=1") == set(register.get("model", "gru").options)
    with pytest.raises(UserError, match="Did you mean 'resume'"):
        compose_settings(["resum=outputs/RUN"])


@pytest.mark.parametrize("q", ["0.3", "{recurrent: 0.1, linear: 0.2, embedding: 1.0}", "some/dense.ckpt"])
def test_q_takes_a_number_a_mapping_or_a_path(q):
    assert compose_settings([f"pruning.q={q}"]).pruning["q"] == yaml.safe_load(q)


def test_slugs_are_plain():
    assert slug("model.hidden_size=256,dataset.path=/a b/ü") == "model.hidden_size-256-dataset.path-a-b"
    assert slug("///") == "run"
    assert len(slug("x" * 500)) == 100


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  model=gru\n seed=1 ", ["model=gru", "seed=1"]),
        ("dataset.path='a b' seed=1", ["dataset.path='a b'", "seed=1"]),
        ('dataset.path="it\'s here" seed=1', ['dataset.path="it\'s here"', "seed=1"]),
        (r"dataset.path='it\'s here' seed=1", [r"dataset.path='it\'s here'", "seed=1"]),
        ("tracking.tags=[a, 'b c'] pruning.q={a: 1}", ["tracking.tags=[a, 'b c']", "pruning.q={a: 1}"]),
        ("dataset.path='a b", ["dataset.path='a b"]),  # which Hydra refuses
    ],
)
def test_overrides_in_one_text_are_parted_at_blanks_outside_quotes_and_brackets(text, words):
    assert split_overrides(text) == words
