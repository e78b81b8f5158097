"""Values of options that a command line writes in one word and a YAML file as a list or mapping."""

from __future__ import annotations


def parse_names(value: object) -> object:
    """Split ``a,b`` at its commas; other values are as they were.

    Example:
        >>> parse_names("q_proj, v_proj")
        ('q_proj', 'v_proj')
    """
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return value


def parse_pairs(value: object) -> object:
    """Read ``a=b,c=d`` as a mapping; other values are as they were.

    Raises:
        ValueError: a part without ``=``, or a name twice.

    Example:
        >>> parse_pairs("prompt=question,completion=answer")
        {'prompt': 'question', 'completion': 'answer'}
    """
    if not isinstance(value, str):
        return value
    pairs: dict[str, str] = {}
    for word in value.split(","):
        name, equals, text = (part.strip() for part in word.partition("="))
        if not (name and equals and text):
            raise ValueError(f"write FIELD=COLUMN,FIELD=COLUMN, got {word!r}")
        if name in pairs:
            raise ValueError(f"{name!r} is given twice")
        pairs[name] = text
    return pairs


def format_word(value: object) -> str:
    """Write a value as one word of a command line; the inverse of the parsers above.

    Example:
        >>> format_word({"prompt": "question"}), format_word(("a", "b")), format_word(3)
        ('prompt=question', 'a,b', '3')
    """
    if isinstance(value, dict):
        return ",".join(f"{name}={text}" for name, text in value.items())
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value)
