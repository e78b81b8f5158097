"""Patterns of PEFT are read as PEFT reads them, without running a regular expression of a file."""

from __future__ import annotations

import itertools
import re

import pytest

from drlora_torch.storage.peft import files
from drlora_torch.storage.peft.patterns import MOST_NESTED, MOST_PARTS, Patterns

LAYERS = ("model.layers.0", "model.layers.1", "layers.1", "xlayers.1")
EXPERTS = ("experts.0", "experts.1", "shared")
NAMES = [
    *(".".join(parts) for parts in itertools.product(LAYERS, EXPERTS, ("w1", "w2", "w1.weight"))),
    *("w1", "experts.0", "model", "lm_head", "layers.1.shared", "layers.1.shared.weight"),
]
OWN = [
    files.pattern((layer, expert, "w1") for layer in LAYERS[:2] for expert in EXPERTS[:2]),
    files.pattern([(LAYERS[0], EXPERTS[0], "w1"), (LAYERS[1], EXPERTS[2], "w2")]),
    files.pattern([(LAYERS[2], "", "shared")]),
]
READ = [
    *OWN,
    *(rf"(?:{own})(?:\.weight)?" for own in OWN),
    "w1",
    "lm_head",
    "experts.0.w1",
    "layers.1.experts.0.w1",
    r"^w1$",
    r"^model\.layers\.0\.shared\.w2$",
    "^model.layers.0.shared.w2",
    r"experts\.0\.w1$",
    r".*\.experts\.0\.w1",
    r".*\.w1",
    r".*layers\.1\.shared\.w2",
    r"^.*\.shared\.w2",
    r"(layers\.0|layers\.1)\.(?:experts\.(?:0|1)|shared)\.w1",
    r"^model\.layers\.0\.shared\.w2$|^w1$",
    r"shared\.w2|.*\.experts\.1\.w2",
]


@pytest.mark.parametrize("pattern", READ)
def test_as_peft_reads_it(pattern: str) -> None:
    found = Patterns({pattern: 1})
    wanted = [name for name in NAMES if re.match(rf"(.*\.)?({pattern})$", name)]
    assert [name for name in NAMES if found.find(name)] == wanted
    assert wanted


def test_the_first_wins() -> None:
    found = Patterns({r"^w1$": 1, "w1": 2, r"(?:shared|w1)": 3, "shared": 4})
    assert [found.find(name) for name in ("w1", "a.w1", "a.shared", "b")] == [1, 2, 3, None]


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "",
            "(",
            ")",
            "a)",
            "(a",
            "(?:)",
            "(a|)",
            "|a",
            "a|",
            "a||b",
            "a$b",
            "$",
            "a^",
            "^",
            ".*",
        ),
        *(r"(a+)+$", "a*", "a?", "(a)*", "(a)+", "(a){2}", "a{9}", "[ab]", r"\d", r"\w+", "a.*b"),
        *("(?=a)", "(?P<x>a)", "(?i:a)", "a\\", "(a)??", "(" * 2000, "(" * 9 + "a" + ")" * 9),
    ],
)
def test_what_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="is no pattern of names at character"):
        Patterns({pattern: 1})


def test_limits() -> None:
    nested = "(" * MOST_NESTED + "a" + ")" * MOST_NESTED
    assert Patterns({nested: 1}).find("a") == 1
    assert Patterns({"|".join(["(?:a)"] * (MOST_PARTS // 2)): 1}).find("a") == 1
    with pytest.raises(ValueError, match="more than 20,000 alternatives"):
        Patterns({"|".join(["(?:a)"] * MOST_PARTS): 1})
    with pytest.raises(ValueError, match="more than 20,000 alternatives"):
        Patterns({f"(?:a)(?:{n})": 1 for n in range(MOST_PARTS)})


def test_time_does_not_explode() -> None:
    """With ``re`` this takes 2^40 steps."""
    assert Patterns({"(?:a|a)" * 40 + "b": 1}).find("a" * 40) is None
    assert Patterns({"(?:a)?" * 40 + "b": 1}).find("a" * 40) is None
