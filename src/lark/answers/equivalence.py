r"""LaTeX answers made ready for math-verify, and what is decided without it because it cannot tell.

Both sides go through the same steps, all linear in the text.
"""

import re

from lark.answers.quantities import (
    find_scale_words,
    is_same_quantity,
    parse_quantity,
    to_plain_notation,
    write_out_repeating,
)

_NUMERAL = re.compile(r"\(?\s*([A-Z]{0,9}\d[0-9A-Z]{0,99})\s*\)?\s*_\s*(?:\{\s*(\d{1,2})\s*\}|(\d{1,2}))")
_DIGITS = re.compile(r"[0-9A-Z]{1,100}")
_IDLE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
_DELIMITERS = re.compile(r"\\[()\[\]]|(?<!\\)\$|\*\*|`")
_SPELLED = (
    (re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!]\s*)(?=\d{3}(?!\d))"), ""),  # before 10\,000 is read as 10 times 000
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile("\N{DEGREE SIGN}"), r"^\\circ"),
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile("\N{INFINITY}"), r"\\infty "),
    (re.compile("\N{GREEK SMALL LETTER PI}"), r"\\pi "),
    (re.compile("\N{SQUARE ROOT}" r"\s*(?:\(([^()]*)\)|(\w+))"), r"\\sqrt{\1\2}"),
    (re.compile("\N{LESS-THAN OR EQUAL TO}"), r"\\le "),
    (re.compile("\N{GREATER-THAN OR EQUAL TO}"), r"\\ge "),
    (re.compile("\N{UNION}"), r"\\cup "),
    (re.compile(r"\\(?:mathbf|boldsymbol|bm)(?![A-Za-z])"), ""),
    (re.compile(r"\\textbf(?![A-Za-z])"), r"\\text"),
)


def tidy_latex(text: str) -> str:
    r"""Return the expression without math delimiters, emphasis and a final full stop, in math-verify's spelling."""
    text = write_out_repeating(_DELIMITERS.sub(" ", text))
    for spelled, instead in _SPELLED:
        text = spelled.sub(instead, text)
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def compare_as_written(gold: str, answer: str) -> bool | None:
    r"""Tell whether two answers are equal, where that shows without algebra; None if it takes algebra.

    Numbers with units, percent or currency are compared by `is_same_quantity`. Numerals with a base as subscript
    (2516_8) are equal if their values are, and if only one side names the base, if their digits are.
    """
    plain = to_plain_notation(gold), to_plain_notation(answer)
    if _IDLE_SPACE.sub("", plain[0]) == _IDLE_SPACE.sub("", plain[1]):
        return True
    if any(map(_NUMERAL.fullmatch, plain)):
        return _is_same_numeral(*plain)
    wanted, stated = parse_quantity(gold), parse_quantity(answer, equations=True)
    if wanted is not None and stated is not None:
        return is_same_quantity(wanted, stated)
    # math-verify would not look at the words.
    return None if find_scale_words(plain[0]) == find_scale_words(plain[1]) else False


def _is_same_numeral(gold: str, answer: str) -> bool | None:
    sides = []
    for text in (gold, answer):
        if match := _NUMERAL.fullmatch(text):
            sides.append((match[1], int(match[2] or match[3])))
        elif match := _DIGITS.fullmatch(text):
            sides.append((match[0], None))
        else:
            return None
    (digits, base), (other_digits, other_base) = sides
    if base is None or other_base is None:
        return digits.lstrip("0") == other_digits.lstrip("0")
    if not (2 <= base <= 36 and 2 <= other_base <= 36):
        return None
    try:
        return int(digits, base) == int(other_digits, other_base)
    except ValueError:  # 9_8: no digits of that base
        return None
