r"""Numbers with what stands around them in answers: `$18`, `18 km/h`, `50\%`, `3\frac{1}{2}`, `x = 5`.

Generated text is hostile input: texts are short or refused, and every expression here is linear in them.
"""

import ast
import re
from dataclasses import dataclass
from fractions import Fraction
from operator import add, mul, sub, truediv

_MAX_CHARACTERS = 400
_MAX_DIGITS = 100  # also the largest power of ten
_ROUNDED_DIGITS = 6  # significant ones, from which on a rounded number passes for what it was rounded from
_FLOAT_DIGITS, _PRINTED_DIGITS = 15, 17  # significant ones that a double keeps, and that it is printed with

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[+-]?\s*{_DECIMAL}"
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}
_SIGN = rf"(?P<sign>[+-]?)\s*(?P<currency>[{''.join(_CURRENCY)}]?)\s*(?P<sign2>[+-]?)\s*"
_FRACTION = (
    rf"\\frac\s*(?:\{{\s*(?P<above>{_SIGNED})\s*\}}|(?P<above1>\d))"
    rf"\s*(?:\{{\s*(?P<below>{_SIGNED})\s*\}}|(?P<below1>\d))"
)
_NUMBER = re.compile(
    rf"{_SIGN}(?:"
    rf"(?P<whole>{_INTEGER})(?:\s*{_FRACTION}|\s+(?P<part>\d+)\s*/\s*(?P<parts>\d+))"
    rf"|{_FRACTION.replace('P<above', 'P<over').replace('P<below', 'P<under')}"
    rf"|(?P<hour>\d{{1,2}}):00"
    rf"|(?P<decimal>{_DECIMAL})(?:\s*/\s*(?P<divisor>{_SIGNED})|[eE](?P<exponent>[+-]?\d+)"
    rf"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*(?P<power>[+-]?\d+)\s*\}}|(?P<power1>\d)))?"
    rf")(?![\d/^:!_])"
)

_SPACES = re.compile(r"\\(?:[,;:! ]|quad\b|qquad\b|displaystyle\b|left\b|right\b)|~|\s+")
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!]\s*|[\u2009\u202f])(?=\d{3}(?!\d))")
_REPEATING = re.compile(  # 0.1\overline{6}, 0.1\dot{6}, 0.1(6), 0.1666...
    r"(?<![\d.,])(?P<whole>\d{0,30})\.(?P<once>\d{0,30}?)(?:\\(?:overline|bar)\s*\{(?P<over>\d{1,50})\}|\((?P<in>\d{1,50})\)"
    r"|\\dot\s*(?P<dot>\d|\{\d\}(?:\d{0,50}\\dot\s*\{\d\})?)"
    r"|(?:(?P<digit>\d)(?P=digit){2,30}|(?P<block>\d{2,8}?)(?P=block){1,30})(?:\.{3}|\\[lc]?dots(?![a-z])|\u2026))"
)
_STYLED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|bm|operatorname)\s*\{([^{}]*)\}")
_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{ALMOST EQUAL TO}": r"\approx ",
        "\N{DEGREE SIGN}": r"^\circ ",
        "\N{SUPERSCRIPT TWO}": "^2",
        "\N{SUPERSCRIPT THREE}": "^3",
        "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}",
        "\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}",
        "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}",
        "\N{NO-BREAK SPACE}": " ",
    }
)

_PERCENT = Fraction(1, 100)
_POWERS = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_SCALES = {"%": _PERCENT, "percent": _PERCENT, "dozen": Fraction(12)} | {
    name: Fraction(10**power) for name, power in _POWERS.items()
}
_PARTS = frozenset(
    f"{part}th{plural}" for part in ("ten", "hundred", "thousand", "million", "billion") for plural in ("", "s")
)
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(size))
    for dimension, names in {
        "length": {
            "mm millimeter millimetre": "1/1000",
            "cm centimeter centimetre": "1/100",
            "m meter metre": "1",
            "km kilometer kilometre": "1000",
            "in inch inches": "0.0254",
            "ft foot feet": "0.3048",
            "yd yard": "0.9144",
            "mi mile": "1609.344",
        },
        "mass": {"mg milligram": "1/1000", "g gram": "1", "kg kilogram": "1000"},
        "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
        "time": {"s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
        "dollar": {"dollar usd": "1", "cent": "1/100"},
        "euro": {"euro eur": "1"},
        "pound sterling": {"gbp": "1"},
        "degrees": {"degree deg": "1"},
        "radians": {"radian rad": "1"},
        "before noon": {"am": "1"},
        "after noon": {"pm": "1"},
    }.items()
    for words, size in names.items()
    for name in words.split()
}
# Shorter words are units only if they are these: 5x and 5ab are products.
_SHORT_WORDS = {"N", "J", "W", "V", "K", "C", "F", "lb", "oz", "am", "pm", "AM", "PM", "hp", "Hz", "Pa", "kW", "of"}
# With these words a text states more, or something else, than the number before them: "5 and a half", "5 to six".
_OTHER_NUMBERS = """
    and or to plus minus through until versus vs not nor but half halves quarter quarters third thirds
    pi squared cubed factorial root remainder mod modulo
    zero one two three four five six seven eight nine ten eleven twelve
    twenty thirty forty fifty sixty seventy eighty ninety
"""
_REFUSED = frozenset(_OTHER_NUMBERS.split()) | _PARTS
# Before a number they make it another one, or none: "less than 5".
_BOUNDS = """
    less more fewer greater than least most over under above below between from up nearly almost no never cannot
    isn aren doesn negative sin cos tan log ln sqrt sum product
"""
_REFUSED_BEFORE = (_REFUSED | frozenset(_BOUNDS.split()) | _SCALES.keys()) - {"and"}
_WORDS = re.compile(r"[^\W\d_]+|\^\s*(?:\{\s*-?\d\s*\}|\d)|\\cdot|\\circ|[%$€£¥₹]|[\s/.'()\-*]+")
_NAME = re.compile(r"\\?[A-Za-z]+'?(?:_(?:\w|\{\w+\}))?(?:\([A-Za-z0-9]\))?")
_INTRODUCED = re.compile(
    r"(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|:)\s*)?(?:(?:about|approximately|approx\.?|roughly)\s+)?",
    re.IGNORECASE,
)
_BEFORE = re.compile(r"(?:[A-Za-z\s,'\"]|(?<=[a-z])-(?=[a-z]))+(?=[$€£¥₹+.\d-])")
_ARITHMETIC = re.compile(r"(?:[\d\s.()]|[+-]|(?<!\*)\*(?!\*)|(?<!/)/(?!/))+")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)|\\approx(?![a-z])")


@dataclass(frozen=True)
class Quantity:
    """A number as it is written, and what stands around it."""

    written: Fraction
    """The number alone: 50 for 50%."""
    scale: Fraction = Fraction(1)
    """What a percent sign or a word such as million or dozen makes of it."""
    unit: tuple[str, Fraction] | None = None
    """(dimension, size in the dimension's own unit), where the unit is a known one."""
    name: str | None = None
    """What it is said to be the value of: x for `x = 5`."""


def parse_number(text: str) -> Fraction | None:
    r"""Return the number a text states, or None: `parse_quantity` without what is around the number; 50% gives 50."""
    quantity = parse_quantity(text)
    return None if quantity is None else quantity.written


def is_same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Tell whether two quantities agree: as written, or in value.

    A gold answer of 50 or of 0.5 is both met by 50%, since nothing tells which of the two was asked for; 0.5 does not
    meet 50, nor 5 million 5. Units matter where both sides have one that is known: 5 cm is 50 mm, and neither 5 m nor
    5 kg.
    """
    if gold.name and answer.name and gold.name != answer.name:
        return False
    size = Fraction(1)
    if gold.unit and answer.unit:
        if gold.unit[0] != answer.unit[0]:
            return False
        size = answer.unit[1] / gold.unit[1]
    as_written = {gold.scale, answer.scale} <= {1, _PERCENT}
    return (as_written and is_same_number(gold.written, answer.written * size)) or is_same_number(
        gold.written * gold.scale, answer.written * answer.scale * size
    )


def is_same_number(one: Fraction, other: Fraction) -> bool:
    """Tell whether two numbers are equal, or one is a rounding of the other to six or more significant digits.

    Only what is no decimal of up to 15 digits may be rounded: 1/3 to 0.333333, and 0.30000000000000004, as a computer
    prints it, to 0.3; but 0.1234567 is not 0.123457.
    """
    return one == other or _is_rounding(one, other) or _is_rounding(other, one)


def _is_rounding(rounded: Fraction, exact: Fraction) -> bool:
    shown, digits = _find_significand(rounded), _find_significand(exact)
    if not shown or exact.denominator == 1 or (digits and digits < 10**_FLOAT_DIGITS):
        return False
    if shown < 10 ** (_ROUNDED_DIGITS - 1):
        if digits is None or digits >= 10**_PRINTED_DIGITS:
            return False
        shown *= 10 ** (_FLOAT_DIGITS - len(str(shown)))  # the zeros after the digits are not written
    return abs(rounded - exact) * 2 * shown <= abs(rounded)  # half a unit in the last place


def _find_significand(number: Fraction) -> int | None:
    """Return a decimal's digits without the zeros at both ends, 25 for 0.0250; None for what is no decimal."""
    rest, places = number.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        places = max(places, power)
    digits = abs(int(number * 10**places))
    while digits and digits % 10 == 0:
        digits //= 10
    return digits if rest == 1 else None


def parse_quantity(text: str, *, equations: bool = False) -> Quantity | None:
    r"""The one number a text states, or None if it states none, several, or something else.

    Reads integers, decimals, thousands commas, a/b, \frac{a}{b}, mixed numbers (3 1/2), powers of ten (1.5 \times 10^3,
    1e3), full hours (2:00), a currency sign, percent, scale words, a unit or other words after it, and a name before an
    equals sign (x = 5). Numbers of more than 100 digits and texts of more than 400 characters are refused, so the cost
    is bounded whatever the text.

    Args:
        equations: also read what a gold answer does not look like: the last side of an equation (9 \times 2 = 18; sides
            that are numbers must agree, and of 16/3 \approx 5.33 the exact one counts), a sum not worked out (9 + 9),
            and a sentence with one number in it (The game lasted 53 minutes).
    """
    if len(text) > _MAX_CHARACTERS or sum(map(str.isdecimal, text)) > _MAX_DIGITS:
        return None
    text = to_plain_notation(text)
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and not re.search(r"[(){}]", text[1:-1]):
        text = text[1:-1].strip()
    sides, signs = _EQUALS.split(text), _EQUALS.findall(text)
    last = _read_quantity(sides[-1])
    if last is None and equations and len(sides) == 1:
        return _read_sentence(text) or _compute_arithmetic(text)
    if last is None:
        return None
    name = None
    for i, (side, sign) in enumerate(zip(sides[:-1], signs, strict=True)):
        side = side.strip()
        if i == 0 and _NAME.fullmatch(side) and side.lower() not in _REFUSED:
            name = re.sub(r"[{}\\]", "", side)
        elif (number := _read_quantity(side)) is not None and equations:
            rounded = sign != "=" and _is_rounded_to(number.written, sides[-1])
            if not rounded and not is_same_quantity(number, last):
                return None
            last = number if rounded else last
        elif not (equations and _is_calculation(side, words=i == 0)) and (side or sign == "="):
            return None
    return Quantity(last.written, last.scale, last.unit, name)


def to_plain_notation(text: str) -> str:
    r"""Return the text without emphasis, math delimiters, \text and the like, spacing commands and digit groups."""
    text = write_out_repeating(_GROUPED.sub("", text.replace(r"{,}", ",")))
    text = text.translate(_CHARACTERS).strip().strip("*`").strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text.strip("$")
    text = re.sub(r"\\[()\[\]]", " ", text)
    for _ in range(3):  # styles within styles
        text = _STYLED.sub(r" \1 ", text)
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text.replace(r"\$", "$").replace(r"\%", "%"))
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", " degrees ", text)
    text = _SPACES.sub(" ", text).strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    return text.strip("*` ")


def find_scale_words(text: str) -> set[str]:
    """Find the words, such as million, that make a number another one."""
    return {word.removesuffix("s") for word in re.findall("[a-z]+", text.lower())} & {"dozen", *_POWERS, *_PARTS}


def write_out_repeating(text: str) -> str:
    r"""Return the text with repeating decimals as fractions: 0.1\overline{6} is \frac{15}{90}."""

    def make_fraction(match: re.Match[str]) -> str:
        whole, once = match["whole"], match["once"]
        block = re.sub(r"\D", "", match["over"] or match["in"] or match["dot"] or match["digit"] or match["block"])
        above = int(whole + once + block) - int(whole + once or "0")
        return rf"\frac{{{above}}}{{{'9' * len(block)}{'0' * len(once)}}}"

    return _REPEATING.sub(make_fraction, text)


def _read_quantity(text: str) -> Quantity | None:
    text = _INTRODUCED.sub("", text.strip(), count=1)
    match = _NUMBER.match(text)
    if match is None or not text.isprintable() or any(c.isdecimal() and not c.isascii() for c in text):
        return None
    written = _compute_value(match.groupdict())
    if written is None:
        return None
    unit = (_CURRENCY[match["currency"]], Fraction(1)) if match["currency"] else None
    after = _read_unit(text[match.end() :])
    if after is None or (unit and after[1] and unit != after[1]):
        return None
    return Quantity(written, after[0], unit or after[1])


def _read_sentence(text: str) -> Quantity | None:
    before = _BEFORE.match(text)
    words = re.findall(r"[a-z]+", before[0].lower()) if before else []
    if before is None or len(words) < 2 or _REFUSED_BEFORE.intersection(words):
        return None
    return _read_quantity(text[before.end() :])


def _is_calculation(text: str, *, words: bool) -> bool:
    """Tell whether a side of an equation is numbers, operators and words (not 2x) or, with `words`, words alone."""
    if _REFUSED.intersection(re.findall(r"[a-z]+", text.lower())):
        return False
    rest = _spell_operators(re.sub(r"[%^]|(?<![\\A-Za-z])[A-Za-z]{2,}(?:'[a-z]+)?", " ", text)).strip()
    return bool(_ARITHMETIC.fullmatch(rest)) if rest else words and bool(text.strip())


def _spell_operators(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[$€£¥₹]", "", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    return re.sub(r"\\div(?![a-z])|÷", "/", re.sub(r"\\(?:times|cdot)(?![a-z])", "*", text))


def _compute_arithmetic(text: str) -> Quantity | None:
    """Compute the value of a sum of plain numbers; None for anything else."""
    text = _spell_operators(text).strip()
    if not _ARITHMETIC.fullmatch(text):
        return None
    try:
        return Quantity(_evaluate(ast.parse(text, mode="eval").body, text))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):  # the last two: deep nesting
        return None


def _evaluate(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(text[node.col_offset : node.end_col_offset])
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return _evaluate(node.operand, text) * (-1 if isinstance(node.op, ast.USub) else 1)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
            operate = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}[type(node.op)]
            return operate(_evaluate(node.left, text), _evaluate(node.right, text))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def _compute_value(parts: dict[str, str | None]) -> Fraction | None:
    sign = -1 if (parts["sign"] == "-") ^ (parts["sign2"] == "-") else 1
    if parts["sign"] and parts["sign2"]:
        return None
    above = parts["above"] or parts["above1"] or parts["over"] or parts["over1"] or parts["part"]
    below = parts["below"] or parts["below1"] or parts["under"] or parts["under1"] or parts["parts"] or parts["divisor"]
    if parts["decimal"] or parts["hour"]:
        above = parts["decimal"] or parts["hour"]
    assert above is not None, "every alternative of the pattern has a numerator"
    divisor = _parse_fraction(below or "1")
    if divisor == 0:
        return None
    value = _parse_fraction(above) / divisor
    if power := parts["power"] or parts["power1"] or parts["exponent"]:
        if len(power) > 4 or abs(int(power)) > _MAX_DIGITS:
            return None
        value *= Fraction(10) ** int(power)
    if parts["whole"]:
        if not 0 < value < 1:  # 3 4/2 is no mixed number
            return None
        value += _parse_fraction(parts["whole"])
    return sign * value


def _read_unit(text: str) -> tuple[Fraction, tuple[str, Fraction] | None] | None:
    """Return (scale, unit) of what follows a number, or None if it is not a unit."""
    if not text.strip():
        return Fraction(1), None
    tokens = _WORDS.findall(text)
    if "".join(tokens) != text:
        return None
    words = [token for token in tokens if token[0].isalpha() or token[0] in _CURRENCY or token == "%"]
    if not words or _REFUSED.intersection(word.lower() for word in words) or text.lstrip()[0] in "/.-*'^":
        return None
    scale = _SCALES.get(words[0].lower().removesuffix("age").removesuffix("s"))
    rest = words if scale is None else words[1:]
    attached = text[0] == rest[0][0] if rest else False
    for i, word in enumerate(rest):
        known = _find_unit(word) is not None or word in _SHORT_WORDS
        shortest = 4 if attached and i == 0 else 1 if i else 3
        if not known and len(word) < shortest:
            return None
    if any(word == "%" or word.lower() in _SCALES for word in rest):
        return None
    powers = any(token[0] == "^" for token in tokens)
    compound = powers or "/" in text or "per" in rest or len(rest) != 1
    unit = None if compound or not rest else _find_unit(rest[0])
    return scale or Fraction(1), unit


def _find_unit(word: str) -> tuple[str, Fraction] | None:
    if word in _CURRENCY:
        return _CURRENCY[word], Fraction(1)
    lower = word if len(word) == 1 else word.lower()  # M and S are no metres and seconds
    singular = lower[:-1] if lower.endswith("s") and len(lower) > 2 else lower
    return _UNITS.get("l" if lower == "L" else lower) or _UNITS.get(singular)


def _is_rounded_to(exact: Fraction, written: str) -> bool:
    """Tell whether the exact number, rounded to as many places as are written, is the written one."""
    number = _read_quantity(written)
    decimals = re.search(r"\.(\d+)", written)
    places = len(decimals[1]) if decimals else 0
    return number is not None and abs(exact - number.written) * 2 <= Fraction(1, 10**places)


def _parse_fraction(decimal: str) -> Fraction:
    return Fraction(re.sub(r"[,\s]", "", decimal))
