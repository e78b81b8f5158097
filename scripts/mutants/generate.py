"""A copy of the package whose modules hold all mutants of their functions, and what they change."""

from __future__ import annotations

import difflib
import shutil
from fnmatch import fnmatch
from pathlib import Path

from mutmut.configuration import config
from mutmut.mutation.file_mutation import MutatedFile, mutate_file_contents

from scripts.mutants.listed import Change

COPIED = ("drlora_core", "scripts", "tests", "pyproject.toml")
SEPARATOR = "__mutmut_"


def generate(folder: Path, only: str) -> dict[str, Change]:
    """Write the copy to a new folder; return the mutants of some modules and what they change.

    A name is that of the module, a dot, a mangled name of the function, and ``__mutmut_<number>``.
    """
    for name in COPIED:
        copy = shutil.copytree if Path(name).is_dir() else shutil.copy
        copy(name, folder / name)
    mutants: dict[str, Change] = {}
    for path in sorted(config().only_mutate):
        module = path.removesuffix(".py").replace("/", ".")
        if not fnmatch(module, only):
            continue
        mutated = mutate_file_contents(path, Path(path).read_text())
        (folder / path).write_text(mutated.code)
        mutants |= {
            f"{module}.{name}": _describe(module, name, mutated) for name in mutated.mutant_names
        }
    return mutants


def _describe(module: str, name: str, mutated: MutatedFile) -> Change:
    """Say what a mutant changes: the lines that differ, without their indentation."""
    function, lines = name.partition(SEPARATOR)[0], mutated.code.splitlines()
    before, after = (
        [line.replace(each, "") for line in lines[span.start - 1 : span.end]]
        for each in (f"{function}{SEPARATOR}orig", name)
        for span in (mutated.line_span_by_function_name[each],)
    )
    diff = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    was, becomes = (" ".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+")
    plain = function.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return Change(f"{module}.{plain}", was, becomes)
