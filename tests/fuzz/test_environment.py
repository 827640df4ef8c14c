"""What the environment says changes nothing in a run of one device; or the run is refused before its first step."""

import os
import subprocess
import sys

import pytest

from tests.conftest import QUIET
from tests.forking import Forked
from tests.fuzz.common import generators

NUMBERS = ("", "0", "1", "3", "-1", " 1", "1.5", "999999", "junior", "0x1", "é", "1,2", "²")
COUNTED = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_JOBID",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_NNODES",
    "SLURM_JOB_NUM_NODES",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_RESTART_COUNT",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "PMIX_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    "LSB_JOBID",
    "LSB_DJOB_NUMPROC",
    "JSM_NAMESPACE_RANK",
    "JSM_NAMESPACE_SIZE",
    "JSM_NAMESPACE_LOCAL_RANK",
    "PBS_JOBID",
    "PBS_NP",
    "SGE_TASK_ID",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "PET_NPROC_PER_NODE",
    "XRT_SHARD_ORDINAL",
]
PLACES = ("", "127.0.0.1", "n[1-4]", "batch n1 n1", "/no/such/file", "none", "bash", "x y:z", "é")
PLACED = [
    "MASTER_ADDR",
    "SLURM_NODELIST",
    "SLURM_JOB_NODELIST",
    "SLURM_STEP_NODELIST",
    "LSB_HOSTS",
    "LSB_MCPU_HOSTS",
    "PBS_NODEFILE",
    "LSB_DJOB_RANKFILE",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_ERROR_FILE",
    "SLURM_JOB_NAME",
    "SLURM_SUBMIT_DIR",
    "KUBERNETES_PORT",
    "HOSTNAME",
    "GROUP_WORLD_SIZE",
]
RANKS = dict.fromkeys(COUNTED, NUMBERS) | dict.fromkeys(PLACED, PLACES)
# Lightning takes options of its Trainer from there where they are not given.
TRAINER = {
    f"PL_TRAINER_{name}": [value]
    for name, value in {
        "MAX_STEPS": "3", "MIN_STEPS": "90", "MAX_TIME": "00:00:00:00", "FAST_DEV_RUN": "1", "LIMIT_TRAIN_BATCHES": "1",
        "LIMIT_VAL_BATCHES": "0", "OVERFIT_BATCHES": "1", "VAL_CHECK_INTERVAL": "2", "CHECK_VAL_EVERY_N_EPOCH": "3",
        "DETERMINISTIC": "1", "BENCHMARK": "1", "DETECT_ANOMALY": "1", "PROFILER": "simple", "BAREBONES": "1",
        "DEFAULT_ROOT_DIR": "/no/such", "GRADIENT_CLIP_ALGORITHM": "value", "STRATEGY": "ddp", "NUM_NODES": "2",
        "MIN_EPOCHS": "9", "INFERENCE_MODE": "0", "SYNC_BATCHNORM": "1", "RELOAD_DATALOADERS_EVERY_N_EPOCHS": "1",
        "USE_DISTRIBUTED_SAMPLER": "0", "MODEL_REGISTRY": "x", "DEVICES": "4", "ACCELERATOR": "gpu", "PRECISION": "16",
        "MAX_EPOCHS": "1", "ACCUMULATE_GRAD_BATCHES": "3", "GRADIENT_CLIP_VAL": "0.001",
    }.items()
}  # fmt: skip
WANDB_NAMES = [
    "MODE",
    "DISABLED",
    "PROJECT",
    "ENTITY",
    "NAME",
    "NOTES",
    "RUN_ID",
    "RUN_GROUP",
    "TAGS",
    "RESUME",
    "DIR",
    "DATA_DIR",
    "CACHE_DIR",
    "CONFIG_DIR",
    "ARTIFACT_DIR",
    "JOB_TYPE",
    "SILENT",
    "QUIET",
    "CONSOLE",
    "BASE_URL",
    "API_KEY",
    "START_METHOD",
    "SAVE_CODE",
    "DISABLE_CODE",
    "DISABLE_GIT",
    "HTTP_TIMEOUT",
    "INIT_TIMEOUT",
    "SERVICE",
    "SERVICE_WAIT",
    "SWEEP_ID",
    "SWEEP_PARAM_PATH",
    "PROGRAM",
    "LAUNCH",
    "HOST",
    "USERNAME",
    "EMAIL",
    "IGNORE_GLOBS",
    "ANONYMOUS",
    "RESUME_FROM",
    "FORK_FROM",
    "AGENT_REPORT_INTERVAL",
    "X_DISABLE_STATS",
    "X_STATS_SAMPLING_INTERVAL",
    "X_FILE_STREAM_TIMEOUT_SECONDS",
    "DEBUG",
    "SETTINGS",
    "CONFIG_PATHS",
    "REINIT",
    "SYMLINK",
    "ROOT_DIR",
    "LOG_INTERNAL",
]
WANDB_VALUES = (
    "", "disabled", "offline", "online", "dryrun", "true", "false", "1", "0", "-1", "garbage", "/no/such/folder", "é",
    "must", "allow", "never", "a/b:c", "x" * 200, "http://[bad", "http://localhost:1", "thread", "[1]", '{"a":1}',
    "a?_step=1",
)  # fmt: skip
WANDB = {f"WANDB_{name}": WANDB_VALUES for name in WANDB_NAMES}
# Read when modules are imported, or by the interpreter itself: these runs start a process of their own.
THREADS = ("", "0", "-1", "many", "1,2", "4", "1.5", "99999")
STARTED = {
    **dict.fromkeys(["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"], NUMBERS),
    **dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"], THREADS),
    "OMP_PROC_BIND": ["true", "x"], "OMP_PLACES": ["cores", "x"], "KMP_AFFINITY": ["disabled", "x"],
    "OMP_DYNAMIC": ["true", "x"], "OMP_STACKSIZE": ["1K", "x"], "OMP_THREAD_LIMIT": ["1", "x"], "MKL_DYNAMIC": ["x"],
    "NUMBA_THREADING_LAYER": ["omp", "tbb", "workqueue", "none"], "NUMBA_CACHE_DIR": ["/no/such/folder", ""],
    "COLUMNS": ["", "0", "1", "-5", "wide", "99999", "²"], "LINES": ["", "0", "-1", "²", "tall"],
    "TERM": ["", "dumb", "xterm-256color", "nothing"], "NO_COLOR": ["", "1"], "FORCE_COLOR": ["", "1", "x"],
    "TTY_COMPATIBLE": ["1", "x"], "JUPYTER_COLUMNS": ["x", "²"], "USER": [""], "TZ": ["", "Mars/Olympus"],
    "LANG": ["", "C", "POSIX", "xx_YY", "tr_TR.UTF-8", "de_DE.ISO-8859-1"], "LC_ALL": ["", "C", "xx", "C.UTF-8"],
    "PYTHONUTF8": ["0", "1"], "PYTHONCOERCECLOCALE": ["0"], "PYTHONHASHSEED": ["0", "77"], "PYTHONOPTIMIZE": ["1", "2"],
    "PYTHONIOENCODING": ["ascii", "latin-1", "utf-16", ":replace"], "PYTHONWARNINGS": ["default", "error::x"],
    "PYTHONDONTWRITEBYTECODE": ["1"], "PYTHONUNBUFFERED": ["1"], "MPLCONFIGDIR": ["/no/such/folder", ""],
    "MPLBACKEND": ["", "agg", "nothing", "TkAgg", "module://matplotlib_inline.backend_inline"],
    "HOME": ["", "/no/such/home", "relative"], "XDG_CACHE_HOME": ["", "/no/such/folder", "relative"],
    "SRNN_CACHE": ["/no/such/folder", "relative", "/dev/null", "~no/x"], "SRNN_DEBUG": ["0", ""],
    "CUDA_VISIBLE_DEVICES": ["", "0", "-1", "x"], "HYDRA_FULL_ERROR": ["0", "x"],
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": ["1"], "TORCHINDUCTOR_CACHE_DIR": ["/no/such"],
    "TRITON_CACHE_DIR": ["/no/such"], "TORCH_DISTRIBUTED_DEBUG": ["x"], "PYTORCH_CUDA_ALLOC_CONF": ["x"],
    "PL_TRAINER_MAX_STEPS": ["2"],
}  # fmt: skip


def drawn(rng, table, most):
    return {name: rng.choice(table[name]) for name in rng.sample(sorted(table), rng.randint(1, most))}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Arguments of a run, and its folder in an environment that says nothing."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "texté.txt").write_text("It was the best of times, it was the wörst of times.\n" * 60, encoding="utf-8")
    chosen = [*QUIET, "model.hidden_size=8", "dataset=text", f"dataset.path='{folder}/texté.txt'",
              "dataset.eval_streams=2", "dataset.batch_size=2", "srnn.plugins=off"]  # fmt: skip
    code, said = Forked([*chosen, "hydra.run.dir=run"], folder).end()
    assert code == 0, said
    return chosen, folder / "run"


def check(code, said, run, reference, environment):
    assert "Traceback" not in said, (environment, said)
    if code == 0:
        for name in ("metrics.csv", "model.safetensors"):
            assert (run / name).read_bytes() == (reference / name).read_bytes(), (name, environment, said)
    else:
        assert code == 2, (environment, said)
        assert "srnn: " in said, (environment, said)
        assert not (run / "metrics.csv").exists(), (environment, said)
    return code


@pytest.mark.slow
@pytest.mark.parametrize(("table", "count"), [("RANKS", 4), ("TRAINER", 2)])
def test_variables_of_allocations(tmp_path, reference, table, count):
    chosen, whole = reference
    for number, rng in enumerate(generators(table, count)):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = drawn(rng, globals()[table], 12)
        code, said = Forked([*chosen, "hydra.run.dir=run"], folder, environment).end()
        assert check(code, said, folder / "run", whole, environment) == 0, (environment, said)


@pytest.mark.slow
def test_variables_of_wandb(tmp_path, reference):
    """W&B may fail; the run does not."""
    chosen, whole = reference
    for number, rng in enumerate(generators("WANDB", 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = drawn(rng, WANDB, 8) | {"WANDB_ERROR_REPORTING": "false"}
        words = [*chosen, "tracking.mode=offline", "hydra.run.dir=run"]
        code, said = Forked(words, folder, environment).end()
        assert check(code, said, folder / "run", whole, environment) == 0, (environment, said)


@pytest.mark.slow
def test_variables_that_are_read_at_the_start(tmp_path, reference):
    """Dense: kernels that are compiled and cannot be kept have a test of their own, and take a minute."""
    chosen, whole = reference
    for number, rng in enumerate(generators("STARTED", 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = drawn(rng, STARTED, 14)
        done = subprocess.run(
            [sys.executable, "-m", "srnn", *chosen, "kernel=dense", "hydra.run.dir=run"],
            cwd=folder, env=os.environ | environment, capture_output=True, check=False, timeout=300,
        )  # fmt: skip
        said = (done.stdout + done.stderr).decode(errors="replace")
        assert check(done.returncode, said, folder / "run", whole, environment) == 0, (environment, said)
