"""Problems that stand in two places: evaluation problems in the pool, and problems that the pool asks twice.

Two problems overlap if they share 13 words in a row, the measure of GPT-3's contamination analysis (arXiv 2005.14165,
appendix C), or if their texts are equal but for case and white space; words are lower-case runs of letters and digits,
and single characters of scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer and others).
Shorter problems can only be equal: `2 + 3` is not `2 - 3`. As there, a phrase of 13 words that more than 10 problems
share is a form of words (the instructions that every problem of a generated set repeats) and says nothing.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WORDS = 13  # in a row
COMMON = 10  # problems on either side that may share a phrase before it is a form of words

# Thai to Myanmar, Khmer, kana, Han with its extensions.
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"(?=\w)[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def fold_text(text: str) -> str:
    """Return the text without differences of case and white space, by which two problems are told apart."""
    return " ".join(text.lower().split())


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Holds what evaluation sets and a pool have in common."""

    evaluation: dict[str, list[str]]
    """Evaluation set -> ids of its problems that the pool has, in the set's order."""
    pool: dict[str, str]
    """Id of a pool's problem that an evaluation set has -> the set and the id there, as `set/id`, in the pool's order.
    """


def find_overlap(sets: Mapping[str, Sequence[tuple[str, str]]], pool: Iterable[tuple[str, str]]) -> Overlap:
    """Compare evaluation sets with a pool, which is read once.

    sets: name -> (problem id, text) of its problems.   pool: (problem id, text), each problem once.

    Memory: about 100 bytes a word of the evaluation sets, nothing for the pool but what is found.
    """
    phrases: dict[bytes, set[tuple[str, str]]] = defaultdict(set)  # phrase -> (set, problem id) that have it
    texts: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for name, problems in sets.items():
        for identifier, text in problems:
            texts[hash_question(text)].append((name, identifier))
            for phrase in _hash_phrases(text):
                phrases[phrase].add((name, identifier))
    phrases = {phrase: where for phrase, where in phrases.items() if len(where) <= COMMON}

    equal: dict[str, tuple[str, str]] = {}
    shared: dict[bytes, list[str]] = defaultdict(list)
    found: set[tuple[str, str]] = set()
    order: dict[str, int] = {}
    for position, (identifier, text) in enumerate(pool):
        if same := texts.get(hash_question(text)):
            equal[identifier] = same[0]
            found.update(same)
            order[identifier] = position
        for phrase in phrases.keys() & set(_hash_phrases(text)):
            if len(shared[phrase]) <= COMMON:  # one more than that and it is a form of words
                shared[phrase].append(identifier)
                order[identifier] = position
    for phrase, identifiers in shared.items():
        if len(identifiers) <= COMMON:
            found |= phrases[phrase]
            for identifier in identifiers:
                equal.setdefault(identifier, min(phrases[phrase]))
    return Overlap(
        evaluation={
            name: [identifier for identifier, _ in problems if (name, identifier) in found]
            for name, problems in sets.items()
        },
        pool={identifier: "/".join(equal[identifier]) for identifier in sorted(equal, key=order.__getitem__)},
    )


def find_repeated_problems(pool: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Group the ids of problems whose text is the same but for case and white space; 100 bytes a problem of memory."""
    first: dict[bytes, str] = {}
    more: dict[bytes, list[str]] = {}
    for identifier, text in pool:
        digest = hash_question(text)
        if digest in first:
            more.setdefault(digest, [first[digest]]).append(identifier)
        else:
            first[digest] = identifier
    return list(more.values())


def hash_question(text: str) -> bytes:
    """Return 16 bytes that texts share which differ in case and white space only."""
    return hashlib.blake2b(fold_text(text).encode(errors="surrogatepass"), digest_size=16).digest()


def _hash_phrases(text: str) -> Iterator[bytes]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
    for start in range(len(words) - WORDS + 1):
        phrase = " ".join(words[start : start + WORDS])
        yield hashlib.blake2b(phrase.encode(errors="surrogatepass"), digest_size=8).digest()
