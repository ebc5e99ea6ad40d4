"""Directions of imports, allowed packages, and requirements on every module (docs/DESIGN.md, section 2).

    cli → driver → worker → {cluster, storage} → {original, export} → evaluation → {training, inference, reporting}
        → {optim, data, model}

Imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracked_files import tracked_files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "savant_ray"
MODULES = tracked_files("savant_ray/*.py")

EVERYBODY_MAY = {"errors", "events", "config", "locations"}
ALLOWED = {
    "cli": {"commands", "streams"},
    "api": {"driver", "cluster", "reporting", "settings", "storage", "streams"},
    "streams": set(),
    "command_line": {"settings"},
    "commands": {
        "command_line",
        "chat",
        "serving",
        "sweep",
        "driver",
        "cluster",
        "storage",
        "original",
        "evaluation",
        "export",
        "training",
        "reporting",
        "data",
        "benchmarks",
        "completion",
        "doctor",
        "settings",
    },
    "completion": {"settings"},
    "doctor": {"cluster", "training", "settings"},
    "sweep": {"api", "cluster", "storage", "reporting", "data", "settings"},
    "chat": {"command_line", "evaluation", "training", "inference", "reporting", "data", "model"},
    "serving": {"command_line", "cluster", "storage", "evaluation", "inference", "data"},
    "benchmarks": {
        "driver",
        "worker",
        "cluster",
        "storage",
        "evaluation",
        "training",
        "reporting",
        "inference",
        "optim",
        "data",
        "model",
        "settings",
    },
    "driver": {
        "worker",
        "cluster",
        "storage",
        "original",
        "evaluation",
        "training",
        "reporting",
        "data",
        "model",
        "ray_internals",
    },
    "worker": {"cluster", "storage", "evaluation", "training", "reporting", "data", "model", "ray_internals"},
    "cluster": {"ray_internals"},
    "storage": {"original", "training", "reporting", "data", "ray_internals"},
    "original": {"training", "optim", "data", "model"},
    "export": {"evaluation", "training", "inference", "reporting", "data", "model"},
    "evaluation": {"training", "inference", "data", "model"},
    "training": {"optim", "data", "model"},
    "reporting": set(),
    "inference": {"data", "model"},
    "optim": set(),
    "data": {"ray_internals"},
    "model": set(),
    "ray_internals": set(),
    "config": {"settings"},
    "settings": set(),
    "events": set(),
    "locations": set(),
    "errors": set(),
}
THIRD_PARTY = {
    "cli": set(),
    "api": set(),
    "streams": set(),
    "command_line": set(),
    "commands": set(),
    "completion": set(),
    "doctor": {"packaging", "psutil", "ray", "torch"},
    "sweep": {"ray", "rich"},
    "chat": {"orjson", "prompt_toolkit", "rich", "torch"},
    "serving": {"orjson", "pydantic", "ray", "starlette", "uvicorn"},
    "benchmarks": {"numpy", "orjson", "psutil", "pyarrow", "ray", "rich", "tokenizers", "torch"},
    "driver": {"pyarrow", "ray", "torch"},
    "worker": {"numpy", "psutil", "pyarrow", "ray", "torch"},
    "cluster": {"psutil", "ray"},
    "storage": {"obstore", "psutil", "pyarrow", "ray"},
    "original": {"torch"},
    "export": {"torch", "transformers", "yaml"},
    "evaluation": {"numpy", "orjson", "torch"},
    "training": {"numpy", "psutil", "pynvml", "safetensors", "torch"},
    "reporting": {"jinja2", "mlflow", "numpy", "pandas", "pydantic", "rich", "tensorboard", "wandb"},
    "inference": {"torch"},
    "optim": {"torch"},
    "data": {
        "fsspec",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "orjson",
        "pyarrow",
        "ray",
        "tokenizers",
        "yaml",
    },
    "model": {"torch"},
    "ray_internals": {"ray"},
    "config": {"pydantic", "yaml"},
    "settings": {"pydantic", "yaml"},
    "events": set(),
    "locations": set(),
    "errors": set(),
}
RAY_TRAIN = ("ray.train", "ray.tune")
KNOW_RAY_TRAIN = ("sweep", "driver", "worker", "cluster", "storage", "benchmarks", "ray_internals")
NOT_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}


def name_of(path: Path) -> str:
    """`savant_ray.data.order` of its file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """`data` of `savant_ray.data.order`; the package itself is nobody's part."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever in it."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


KNOWN = {name_of(path): path for path in MODULES}


def own_imports(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    return {name for name in imports(path) if name in KNOWN and name != name_of(path)}


def foreign_imports(path: Path) -> set[str]:
    """The packages of others that a file imports."""
    tops = {name.partition(".")[0] for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"savant_ray"}


def part_modules(part: str) -> list[Path]:
    return [path for path in MODULES if part_of(name_of(path)) == part]


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {part_of(name) for name in KNOWN} - {""} <= set(ALLOWED) == set(THIRD_PARTY)


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_lower_layers(part: str) -> None:
    allowed = ALLOWED[part] | EVERYBODY_MAY | {part, ""}
    for path in part_modules(part):
        wrong = {name for name in own_imports(path) if part_of(name) not in allowed}
        assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


@pytest.mark.parametrize("part", THIRD_PARTY)
def test_a_part_imports_only_the_packages_in_its_row(part: str) -> None:
    for path in part_modules(part):
        wrong = foreign_imports(path) - THIRD_PARTY[part]
        assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


def test_ray_train_is_imported_only_by_the_packages_that_run_on_it() -> None:
    for path in MODULES:
        if part_of(name_of(path)) not in KNOW_RAY_TRAIN:
            wrong = {name for name in imports(path) if name.startswith(RAY_TRAIN)}
            assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


def private_names_of_ray(path: Path) -> set[str]:
    """Return the modules and names of Ray that a file imports and that have a part with a leading underscore."""
    return {name for name in imports(path) if name.startswith("ray.") and any(p[:1] == "_" for p in name.split("."))}


def test_private_modules_of_ray_are_imported_in_one_file() -> None:
    assert [name_of(path) for path in MODULES if private_names_of_ray(path)] == ["savant_ray.ray_internals"]


def test_data_uses_tensors_only_as_arrays() -> None:
    assert all("torch" not in foreign_imports(path) for path in part_modules("data"))


def test_no_modules_import_each_other_in_a_cycle() -> None:
    graph = {name: own_imports(path) for name, path in KNOWN.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_module_has_a_name_without_meaning() -> None:
    assert not [name for name in KNOWN if set(name.split(".")) & NOT_NAMES]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_docstring_and_every_function_a_return_type(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree)
    assert docstring and docstring.splitlines()[0].strip()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.returns is not None, f"{node.name} does not say what it returns"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_name_that_a_module_uses_is_defined(path: Path) -> None:
    """Names of modules that nothing runs in a quick test (those for a GPU) are found as well."""
    whole = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
    known = {symbol.get_name() for symbol in whole.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    known |= set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    used = {symbol.get_name() for scope in scopes(whole) for symbol in scope.get_symbols() if symbol.is_global()}
    assert not used - known


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """Yield the table and all tables below it."""
    yield table
    for child in table.get_children():
        yield from scopes(child)


@pytest.mark.parametrize("path", tracked_files("jobs/*.py"), ids=lambda path: path.stem)
def test_a_job_is_one_call(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.For | ast.While)]
    own = {name for name in imports(path) if name.startswith("savant_ray")}
    assert own == {"savant_ray.cli", "savant_ray.cli.main"}
