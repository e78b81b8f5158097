"""Rules about the source itself: import direction, sizes, documented names, no torch below."""

from __future__ import annotations

import ast
import graphlib
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("drlora_core", "drlora_torch", "benchmarks", "examples", "scripts")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CORE = sorted((ROOT / "drlora_core").rglob("*.py"))
TORCH = sorted((ROOT / "drlora_torch").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 50

# A module of the core imports from its own level and from those above it in this list. Whatever is
# not named (replay, plan ...) stands on the engine, below the command line.
LEVELS: tuple[set[str], ...] = (
    {"locks"},
    {
        *("errors", "bounds", "validation", "notebook", "atomic", "timetable", "ema", "saliency"),
        "driver",
    },
    {"config", "policies", "pruning", "moving", "pools", "state"},
    {"events", "frames", "new_layers", "samples", "snapshot"},
    {"recording"},
    {"profiles"},
    {"engine"},
    set(),  # the unnamed ones
    {"__init__"},
    {"cli"},
)
UNNAMED = 6
# Likewise the parts of drlora_torch, from the ground up; a part imports from lower floors alone.
FLOORS: tuple[set[str], ...] = (
    {"errors", "lora", "embedded", "signals"},
    {"quantized"},
    {"models", "options"},
    {"attached"},
    {"weight_gradients"},
    {"step"},
    {"lifecycle"},
    {"storage"},
    {"merge", "summary"},
    {"adapter"},
    {"api"},
    {"integrations", "inspection", "profiling"},
    {"finetune"},
    {"cli"},
    {"__init__"},
)
OFF_LIMITS = {"torch", "transformers", "drlora_torch", "peft", "accelerate", "datasets", "trl"}
MAY_IMPORT_TRANSFORMERS = ("models", "integrations", "finetune", "cli")
INSIDE = [
    path
    for path in TORCH
    if path.relative_to(ROOT / "drlora_torch").parts[0] not in MAY_IMPORT_TRANSFORMERS
]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path, root: Path = ROOT) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports anywhere, lazily too, with their lines.

    ``from a import b`` gives ``a.b``: b may be a module.
    """
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)


def core_module(dotted: str) -> str | None:
    """The first part below drlora_core of an imported name; ``__init__`` for a public name."""
    parts = dotted.split(".")
    if parts[0] != "drlora_core":
        return None
    known = {path.relative_to(ROOT / "drlora_core").parts[0].removesuffix(".py") for path in CORE}
    return parts[1] if len(parts) > 1 and parts[1] in known else "__init__"


def level(module: str) -> int:
    return next((i for i, names in enumerate(LEVELS) if module in names), UNNAMED)


@pytest.mark.parametrize("path", CORE, ids=label)
def test_core_imports_only_what_is_below(path: Path) -> None:
    own = path.relative_to(ROOT / "drlora_core").parts[0].removesuffix(".py")
    wrong = [
        f"line {line}: {own} imports {name}"
        for name, line in imported(path)
        if (module := core_module(name)) is not None
        and module != own
        and level(module) > level(own)
    ]
    assert wrong == []


def test_core_has_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in CORE:
        own = path.relative_to(ROOT / "drlora_core").parts[0].removesuffix(".py")
        modules = {core_module(name) for name, _ in imported(path)}
        graph.setdefault(own, set()).update(module for module in modules - {own} if module)
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def find_circle(root: Path, packages: Sequence[str]) -> str | None:
    """A circle of imports among the files of packages; None if there is none.

    Lazy and TYPE_CHECKING imports count; names that an ``__init__`` passes on do not.
    """
    files: dict[str, Path] = {}
    for path in (file for package in packages for file in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        if path.name != "__init__.py":
            files[name] = path
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = {dotted for dotted, _ in imported(path, root)}
        found |= {dotted.rpartition(".")[0] for dotted in found}  # from module import name
        graph[name] = (found & files.keys()) - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return None


def test_no_import_circle() -> None:
    assert find_circle(ROOT, ["drlora_core", "drlora_torch", "benchmarks"]) is None


def upward_imports(root: Path, package: str, floors: Sequence[set[str]]) -> list[str]:
    """Imports that do not lead down: from a part of a package to one of its own floor or above."""
    floor = {name: number for number, names in enumerate(floors) for name in names}
    wrong = []
    for path in sorted((root / package).rglob("*.py")):
        own = path.relative_to(root / package).parts[0].removesuffix(".py")
        for dotted, line in imported(path, root):
            top, *rest = dotted.split(".")
            part = rest[0] if rest and rest[0] in floor else "__init__"
            if top == package and own not in (part, "__init__") and floor[part] >= floor[own]:
                wrong.append(f"{path.relative_to(root)}:{line} imports {dotted}")
    return wrong


def test_drlora_torch_imports_only_what_is_below() -> None:
    """State at the bottom, operations above it, one front door; lazy imports count."""
    assert upward_imports(ROOT, "drlora_torch", FLOORS) == []


@pytest.mark.parametrize(
    "source",
    ["from fake.high import run", "def f():\n    from fake.high import run", "import fake"],
)
def test_an_import_that_leads_up_is_found(tmp_path: Path, source: str) -> None:
    (tmp_path / "fake" / "low").mkdir(parents=True)
    for name, text in {"low/leaf": "import json", "high": "from fake.low import leaf"}.items():
        (tmp_path / "fake" / f"{name}.py").write_text(text)
    floors: list[set[str]] = [{"low"}, {"high"}, {"__init__"}]
    assert upward_imports(tmp_path, "fake", floors) == []
    (tmp_path / "fake" / "low" / "leaf.py").write_text(source)
    assert len(upward_imports(tmp_path, "fake", floors)) == 1


@pytest.mark.parametrize(
    ("source", "circle"),
    [
        ("from fake.top import run", {"fake.low", "fake.top"}),
        ("def f():\n    from fake import top", {"fake.low", "fake.top"}),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .top import run",
            {"fake.low", "fake.top"},
        ),
        ("from .part.leaf import x", {"fake.low", "fake.part.leaf"}),
        ("import json\nfrom fake import run", None),  # through __init__
    ],
)
def test_a_circle_of_imports_is_found(tmp_path: Path, source: str, circle: set[str] | None) -> None:
    """One import of a clean tree is turned around."""
    (tmp_path / "fake" / "part").mkdir(parents=True)
    files = {
        "__init__": "from fake.top import run",
        "low": "import json",
        "top": "from fake import low\nrun = low",
        "part/__init__": "",
        "part/leaf": "from ..low import json as x",
    }
    for name, text in files.items():
        (tmp_path / "fake" / f"{name}.py").write_text(text)
    assert find_circle(tmp_path, ["fake"]) is None
    (tmp_path / "fake" / "low.py").write_text(source)
    found = find_circle(tmp_path, ["fake"])
    assert (None if found is None else set(found.split(" imports "))) == circle


@pytest.mark.parametrize("path", CORE, ids=label)
def test_core_imports_no_framework(path: Path) -> None:
    assert [name for name, _ in imported(path) if name.split(".")[0] in OFF_LIMITS] == []


@pytest.mark.parametrize("path", INSIDE, ids=label)
def test_transformers_is_imported_at_the_edge_only(path: Path) -> None:
    found = [f"line {line}: {n}" for n, line in imported(path) if n.split(".")[0] == "transformers"]
    assert found == []


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=label)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its name to its end; its docstring does not count."""
    length = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        length -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return length


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_functions_are_short(path: Path) -> None:
    long = [
        f"{node.name}, line {node.lineno}: {length} lines"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := code_lines(node)) > FUNCTION_LINES
    ]
    assert long == []


def check_public_names(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert names
    assert len(set(names)) == len(names)
    for name in names:
        value = getattr(package, name)
        if inspect.isclass(value) or callable(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), f"{name} has no docstring"
            own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert own, f"{name} only inherits a docstring"
        if inspect.isclass(value):
            assert undocumented_methods(value, package.__name__) == []  # type: ignore[attr-defined]


def undocumented_methods(cls: type, package: str) -> list[str]:
    """Public methods and properties without a docstring, inherited ones of the package included."""
    found = []
    for base in (base for base in cls.__mro__ if base.__module__.split(".")[0] == package):
        for name, member in vars(base).items():
            function = getattr(member, "fget", getattr(member, "__func__", member))
            if not name.startswith("_") and inspect.isfunction(function) and not function.__doc__:
                found.append(f"{base.__name__}.{name}")
    return found


def test_undocumented_methods_are_found() -> None:
    class Base:
        def bare(self) -> None: ...

        @property
        def size(self) -> int:
            return 0

        @classmethod
        def make(cls) -> None: ...

        def told(self) -> None:
            """Say something."""

        def _private(self) -> None: ...

    class Derived(Base):
        pass

    found = undocumented_methods(Derived, Base.__module__.split(".")[0])
    assert found == ["Base.bare", "Base.size", "Base.make"]


def test_public_names_of_the_core_are_documented() -> None:
    import drlora_core

    check_public_names(drlora_core)


def test_public_names_of_the_torch_package_are_documented() -> None:
    pytest.importorskip("torch")
    import drlora_torch

    check_public_names(drlora_torch)


WITHOUT_TORCH = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"torch", "transformers", "drlora_torch"}:
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocked())
    try:
        import torch
    except ImportError:
        pass
    else:
        raise SystemExit("torch was not blocked")

    from drlora_core import AllocatorConfig, AllocatorEngine

    engine = AllocatorEngine(AllocatorConfig(
        r_init=1, r_target=2, r_max=3, warmup_steps=0, growth_interval=1, growth_end=1))
    engine.add_layer("experts", num_experts=2)
    engine.observe("experts", routing=[0.1, 0.9], importance=[1.0, 1.0])
    print(engine.step().ranks["experts"].tolist())
    optional = {"hypothesis", "pandas", "plotly", "typer", "rich", "scipy", "jinja2"}
    print(sorted(optional & set(sys.modules)))
"""


def test_core_allocates_where_torch_cannot_be_imported() -> None:
    """In a fresh interpreter; and importing the core pulls in no optional library either."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCH)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[1, 3]", "[]"]
    assert done.returncode == 0
