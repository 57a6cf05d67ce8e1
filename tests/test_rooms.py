"""Which rooms may know which: the import rules of docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("crab_jax", "data_pipelines")
# Each line may import those above it and nothing below. Files of one line that are no room of their own stand alone.
LAYERS = """
    io  former_names
    tasks
    visualize  data_pipelines  models
    losses  optim  generate  parallel  questions
    checkpoints  defaults  aot
    config
    runs
    training  inference  convert
    router  evaluation
    reports  api
    tiny_world
    verbs
"""
VERBS = {"compare", "compile", "demo", "evaluate", "inspect", "predict", "recipe", "report", "sizes", "stages"}
VERBS |= {"train", "warmup"}


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in (*PACKAGES, "configs")}


def modules() -> dict[str, set[str]]:
    """Every module of the library -> the modules that it imports (of a package it does not wait for the package)."""
    files = {
        str(file.relative_to(REPOSITORY))[:-3].replace("/", ".").removesuffix(".__init__"): imports(file)
        for package in PACKAGES
        for file in (REPOSITORY / package).glob("**/*.py")
    }
    del files["crab_jax"]  # which imports nothing until it is asked

    def module(name: str) -> str:
        return name if name in files or "." not in name else module(name.rpartition(".")[0])

    return {name: {module(other) for other in names} - {"crab_jax"} for name, names in files.items()}


def room(module: str) -> str:
    """The room of a module: a package of crab_jax, data_pipelines, a file that stands alone, or the verbs."""
    top, *rest = module.split(".")
    if rest and (rest[-1] == "__main__" or (len(rest) == 1 and top == "crab_jax" and rest[0] in VERBS)):
        return "verbs"
    return top if top == "data_pipelines" or not rest else rest[0]


def test_every_room_knows_only_those_below_it():
    layers = [line.split() for line in LAYERS.split("\n") if line.strip()]
    level = {name: number for number, line in enumerate(layers) for name in line}
    assert {room(module) for module in modules()} == level.keys(), "a room has no place in LAYERS"
    for module, names in modules().items():
        for other in names:
            if room(other) != room(module):
                assert level[room(other)] < level[room(module)], f"{module} imports {other}"


def test_verbs_import_no_verbs():
    shims = {f"crab_jax.{name}" for name in VERBS}
    for module, names in modules().items():
        if room(module) == "verbs":
            assert not names & shims, f"{module} imports {names & shims}"


def test_nothing_that_is_installed_imports_the_config_files():
    for package in PACKAGES:
        for file in (REPOSITORY / package).glob("**/*.py"):
            assert not {name for name in imports(file) if name.split(".")[0] == "configs"}, file


def test_no_modules_import_each_other_in_a_circle():
    names = modules()
    left = {
        name: {other for other in others if other in names and not f"{name}.".startswith(f"{other}.")}
        for name, others in names.items()
    }
    done: set[str] = set()
    while ready := [name for name, others in left.items() if name not in done and others <= done]:
        done |= set(ready)
    assert done == left.keys(), "in a circle: " + ", ".join(sorted(left.keys() - done))


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("crab_jax", ("jax", "numpy", "flax")),
        ("crab_jax.evaluate", ("matplotlib", "crab_jax.train", "crab_jax.training", "tensorboardX")),
        ("crab_jax.predict", ("matplotlib", "crab_jax.train", "crab_jax.training", "tensorboardX")),
        ("data_pipelines.mixture", ("matplotlib", "crab_jax.models", "crab_jax.optim")),
    ],
)
def test_an_import_loads_no_more_than_it_needs(module, never):
    code = f"import sys, {module}; print([name for name in {never} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def readers_of_the_run_config() -> list[str]:
    """The functions that take the RunConfig on its way through `train`: the calls are followed from train.train, as the
    code is written, wherever a parameter is annotated as RunConfig."""
    trees = {
        str(file.relative_to(REPOSITORY))[:-3].replace("/", ".").removesuffix(".__init__"): ast.parse(file.read_text())
        for file in (REPOSITORY / "crab_jax").glob("**/*.py")
    }
    imported = {
        module: {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for module, tree in trees.items()
    }
    functions = {
        f"{module}.{node.name}": node
        for module, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(arg.annotation is not None and ast.unparse(arg.annotation) == "RunConfig" for arg in node.args.args)
    }
    passed: list[str] = []

    def enter(name: str) -> None:
        if name not in functions or name in passed:
            return
        passed.append(name)
        module = name.rpartition(".")[0]
        for call in (node.func for node in ast.walk(functions[name]) if isinstance(node, ast.Call)):
            if isinstance(call, ast.Name):
                enter(imported[module].get(call.id, f"{module}.{call.id}"))
            elif isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
                enter(f"{imported[module].get(call.value.id, '')}.{call.attr}")

    enter("crab_jax.train.train")
    return passed


def test_the_run_config_makes_few_stops_on_its_way_through_train():
    stops = readers_of_the_run_config()
    assert "crab_jax.training.train_step.compile_step" in stops, "the walk does not reach the step"
    assert len(stops) <= 20, stops
