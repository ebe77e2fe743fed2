"""Formulas from LaTeX to MathML, which browsers set without a script."""

import re
import unicodedata

from latex2mathml.converter import convert

# What latex2mathml does not know, in words it knows.
_SPELLING = {r"\arg": r"\mathrm{arg}\,", r"\Big\|": r"\|"}
_STYLES = {"script": "SCRIPT", "bold": "BOLD", "double-struck": "DOUBLE-STRUCK"}


def formula(latex: str, block: bool = False) -> str:
    """``latex`` (without its dollars) as a MathML element, ``block`` on a line of its own.

    ValueError for a command that cannot be set.
    """
    text = latex.strip()
    for unknown, known in _SPELLING.items():
        text = re.sub(re.escape(unknown) + r"(?![a-zA-Z])", known.replace("\\", r"\\"), text)
    try:
        mathml = convert(text, display="block" if block else "inline")
    except Exception as error:  # each of its own dozen classes means the same here
        raise ValueError(f"the formula ${latex}$ cannot be set: {type(error).__name__} {error}") from error
    if unknown_commands := re.findall(r"\\[a-zA-Z]+|\\.", mathml):
        raise ValueError(f"the formula ${latex}$ has commands that cannot be set: {', '.join(unknown_commands)}")
    mathml = re.sub(r'<(m[in]) mathvariant="([a-z-]+)">(\w)</\1>', _styled, mathml)
    return mathml.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')


def _styled(found: re.Match[str]) -> str:
    """A letter in its own character, as browsers no longer heed ``mathvariant``."""
    tag, variant, letter = found.groups()
    if variant not in _STYLES:
        return found[0]
    kind = unicodedata.name(letter).removeprefix("LATIN ").removesuffix(f" LETTER {letter.upper()}")
    for start in ("MATHEMATICAL ", ""):  # some letters were in Unicode before the mathematical block
        name = f"{start}{_STYLES[variant]} {kind}" + (f" {letter.upper()}" if letter.isalpha() else "")
        try:
            return f"<{tag}>{unicodedata.lookup(name)}</{tag}>"
        except KeyError:
            continue
    return found[0]
