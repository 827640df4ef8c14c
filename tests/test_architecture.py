"""How srnn is laid out: imports point one way, and one name stands for one thing."""

import ast
from collections import defaultdict

import pytest

from tests.conftest import ROOT

# Each room may import rooms of the lines above its own, and itself.
LEVELS = [
    {"errors", "files", "importing", "interrupts", "terminal"},
    {"run_folder", "cuda_graphs", "meta_device", "formats", "cells", "registry", "distributed", "vocabulary", "audio"},
    {"sparse"},
    {"models", "datasets", "pruning", "kernels"},
    {"objectives", "inference"},
    {"config", "exporting"},
    {"recording"},
    {"training", "comparing"},
    {"bench"},
    {"commands"},
    {"__main__", "__init__", "deploy"},  # the entry, the lazy public names, and paths that are deprecated
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = {path.relative_to(ROOT).with_suffix(""): path for path in sorted((ROOT / "srnn").rglob("*.py"))}
# File names that may stand in several rooms: each is what the room's own contract calls it.
SAME_FILE_NAMES = {"__init__", "base", "backend", "plan", "layout", "kernel"}
# Public names that may stand in several files.
SAME_NAMES = {"main"}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 7
# Compiled by Triton or numba, where a kernel is one function and takes what it needs one by one.
COMPILED = ("kernels/triton/", "kernels/cpu/", "models/recurring_kernel", "pruning/cutting_kernel")


def module_of(file):
    parts = file.parts[:-1] if file.name == "__init__" else file.parts
    return ".".join(parts)


MODULES = {module_of(file): ast.parse(path.read_text()) for file, path in FILES.items()}


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(tree):
    """The modules of srnn that a file imports, those inside functions too; but not for type checkers alone."""
    apart = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in apart:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name in MODULES}
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            submodules = {f"{node.module}.{name.name}" for name in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return found


GRAPH = {module: imported(tree) - {module} for module, tree in MODULES.items()}


def test_every_room_has_its_level():
    assert {room_of(module) for module in MODULES} == LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for other in GRAPH[module]:
        here, there = room_of(module), room_of(other)
        assert here == there or LEVEL[there] < LEVEL[here] or other == "srnn", f"{module} imports {other}"


def test_there_is_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for other in sorted(GRAPH[module]):
            visit(other)
        done.add(path.pop())

    for module in MODULES:
        visit(module)


def defined(tree):
    """The public names that a file defines at its top level."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_a_public_name_is_defined_once():
    places = defaultdict(set)
    for module, tree in MODULES.items():
        for name in defined(tree):
            if not name.startswith("_") and name not in SAME_NAMES:
                places[name].add(module)
    assert not {name: sorted(modules) for name, modules in places.items() if len(modules) > 1}


def test_a_file_name_stands_in_one_room():
    rooms = defaultdict(set)
    for file in FILES:
        if file.name not in SAME_FILE_NAMES and room_of(module_of(file)) != "deploy":
            rooms[file.name].add(file.parent.as_posix())
    assert not {name: sorted(folders) for name, folders in rooms.items() if len(folders) > 1}


def functions():
    for file, path in FILES.items():
        compiled = any(f"srnn/{place}" in path.as_posix() for place in COMPILED)
        for node in ast.walk(MODULES[module_of(file)]):
            if isinstance(node, ast.FunctionDef):
                decorated = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
                yield f"{file}: {node.name}", node, decorated, compiled


def is_built_by_options(decorated, name):
    """Whether its arguments are the options of a registered component, or of a command."""
    return "register." in decorated or "command" in decorated.split() or name in ("__init__", "build")


def test_files_and_functions_stay_small():
    long = {str(file): len(path.read_text().splitlines()) for file, path in FILES.items()}
    assert not {file: lines for file, lines in long.items() if lines > LONGEST_FILE}
    lengths = {
        name: node.end_lineno - node.lineno + 1
        for name, node, decorated, _ in functions()
        if "jit" not in decorated and "intrinsic" not in decorated
    }
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION}


def test_functions_take_few_parameters():
    many = {}
    for name, node, decorated, compiled in functions():
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([a for a in arguments if a not in ("self", "cls")])
        if count > MOST_PARAMETERS and not compiled and not is_built_by_options(decorated, node.name):
            many[name] = count
    assert not many


def test_the_runtime_needs_no_training_stack():
    """``sparse``, ``kernels``, ``inference`` and ``exporting`` import neither Lightning nor Hydra nor W&B."""
    for module, tree in MODULES.items():
        if room_of(module) in ("sparse", "kernels", "inference", "exporting", "formats", "cells"):
            names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
            names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"pytorch_lightning", "lightning_fabric", "hydra", "omegaconf", "wandb"}, module


def test_only_one_file_reads_what_hydra_keeps_private():
    for module, tree in MODULES.items():
        private = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "hydra._internal" in str(n.module)]
        assert not private or module == "srnn.config.hydra_internals", module


def test_only_the_run_folder_names_the_files_of_a_run():
    names = (
        "config.yaml",
        "report.json",
        "metrics.csv",
        "environment.json",
        "model.safetensors",
        "last.ckpt",
        "best.ckpt",
    )
    for module, tree in MODULES.items():
        if module == "srnn.run_folder":
            continue
        documents = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documents:
                assert not node.value.endswith(names) or " " in node.value, f"{module}: {node.value}"
