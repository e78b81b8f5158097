"""A new domain: translation of English phrases into a small invented language.

Its verb comes last and carries tense and negation, adjectives and numbers follow their noun and
agree with its class, and the plural is an ending; the lexicon has about sixty words.
"""

from __future__ import annotations

import numpy as np

from benchmarks.quality.tasks.task import Row, Task, generate, words

NOUNS = (
    *("bird", "fish", "horse", "dog", "cat", "bear", "wolf", "king"),
    *("farmer", "child", "sister", "friend", "tree", "river", "stone", "house"),
    *("door", "boat", "star", "moon", "fire", "book", "song", "letter"),
)
LIVING = 12
"""The first 12 nouns belong to the living class; adjectives agree with the class."""
VERBS = (
    *("see", "find", "carry", "hear", "follow", "love", "fear", "hide"),
    *("break", "bring", "watch", "lose", "want", "keep", "paint", "touch"),
)
ADJECTIVES = (
    *("old", "young", "red", "white", "small", "great"),
    *("quiet", "cold", "strong", "strange", "lost", "bright"),
)
NUMBERS = ("one", "two", "three", "four", "five")
ADVERBS = ("today", "often", "in winter", "at night", "slowly")
TENSES = ("", "will ", "did ")
TENSE_ENDINGS = ("a", "eru", "oti")
PLURAL, LIVING_ENDING, NEGATION = "im", "ne", "ka"


def _noun_phrase(rng: np.random.Generator, lexicon: dict[str, str]) -> tuple[str, str]:
    """Return a noun phrase in English and in the invented language."""
    at = int(rng.integers(len(NOUNS)))
    number = int(rng.integers(len(NUMBERS)))
    adjective = ADJECTIVES[rng.integers(len(ADJECTIVES))] if rng.random() < 0.6 else ""
    english = " ".join(filter(None, (NUMBERS[number], adjective, NOUNS[at])))
    own = lexicon[NOUNS[at]] + (PLURAL if number else "")
    if adjective:
        own += f" {lexicon[adjective]}" + (LIVING_ENDING if at < LIVING else "")
    return english, f"{own} {lexicon[NUMBERS[number]]}"


def _sentence(rng: np.random.Generator, lexicon: dict[str, str]) -> Row:
    """Return one sentence and its translation."""
    subject, own_subject = _noun_phrase(rng, lexicon)
    found, own_found = _noun_phrase(rng, lexicon)
    verb, tense = VERBS[rng.integers(len(VERBS))], int(rng.integers(len(TENSES)))
    negated = rng.random() < 0.25
    adverb = ADVERBS[rng.integers(len(ADVERBS))] if rng.random() < 0.4 else ""
    prompt = f"{subject} {TENSES[tense]}{'not ' if negated else ''}{verb} {found} {adverb}".strip()
    own_verb = (NEGATION if negated else "") + lexicon[verb] + TENSE_ENDINGS[tense]
    parts = (own_subject, own_found, lexicon[adverb] if adverb else "", own_verb)
    return {"prompt": f"{prompt} =", "completion": "".join(f" {p}" for p in parts if p)}


def language() -> Task:
    """Translate English phrases into an invented, regular language."""
    vocabulary = (*NOUNS, *VERBS, *ADJECTIVES, *NUMBERS, *ADVERBS)
    invented = words(np.random.default_rng(23), len(vocabulary))
    lexicon = dict(zip(vocabulary, invented, strict=True))
    return generate("language", lambda rng, _: _sentence(rng, lexicon))
