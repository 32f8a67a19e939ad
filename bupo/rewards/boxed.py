r"""Finds answers in a \boxed{} and compares them as strings (reward.function=strict).

This module imports nothing from the project, so that worker processes start fast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last complete \boxed{...} (or \fbox), with braces matched."""
    closing = _closing(text)
    for place in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(?=\{)", text))):
        content = _content(text, place.end(), closing)
        if content is not None:
            return content
    return None


def _closing(text: str) -> dict[int, int]:
    """Returns the place of the closing brace for each opening one that is closed. It takes a single
    pass, because a model that repeats itself may open thousands of braces."""
    opened: list[int] = []
    found: dict[int, int] = {}
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            found[opened.pop()] = brace.start()
    return found


def _content(text: str, brace: int, closing: dict[int, int]) -> str | None:
    return text[brace + 1 : closing[brace]].strip() if brace in closing else None


def extract(text: str) -> str | None:
    r"""Returns the answer of a response for `strict` in its normal form: the content of the last
    \boxed, or of the last \fbox if there is no \boxed. If that one is not closed there is no
    answer, even if an earlier one is closed. `\boxed 5` without braces ends at the next $ or at the
    end of the text."""
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    if start < 0:
        return None
    macro = re.compile(r"\\(?:boxed|fbox)(?:\s*(?P<brace>\{)|\s+(?P<bare>[^{$\s][^$]*))?")
    found = macro.match(text, start)
    assert found is not None
    if found["brace"]:
        content = _content(text, found.start("brace"), _closing(text))
    else:
        content = found["bare"]
    return None if content is None else normal_form(content)


_DROPPED = re.compile(
    r"\n|\\!"  # line breaks and negative spaces
    r"|\\left(?![a-z])|\\right(?![a-z])"  # sizes of brackets, not \leftarrow
    r"|\^\{\\circ\}|\^\\circ(?![a-z])"  # degrees
    r"|\\\$|\\%|%"  # currency and per cent
)


def normal_form(answer: str) -> str:
    r"""Returns an answer in the form that `strict` compares. These are the usual steps for MATH
    answers, in their usual order:

    1. line breaks, `\!`, `\left`, `\right`, degrees, `\$` and `\%` are removed; `\\` becomes `\`;
       `\tfrac` and `\dfrac` become `\frac`
    2. a unit in `\text{ ...}` (with the space) is removed with everything after it
    3. `.5` becomes `0.5` at the start, after a space and after `{`
    4. `x = 5` becomes `5` if the left side has at most two characters
    5. `\sqrt3` becomes `\sqrt{3}`; spaces are removed; `\frac12` and `\frac1{2}` become
       `\frac{1}{2}`
    6. `0.5` alone becomes `\frac{1}{2}`; `a/b` of whole numbers becomes `\frac{a}{b}`

    Nothing is computed: `2/4` is not `1/2`, `(1, 2)` equals `(1,2)` and not `(2,1)`.
    """
    text = _DROPPED.sub("", answer.replace("\\\\", "\\"))
    text = re.sub(r"\\[td]frac", r"\\frac", text)
    text = text.partition("\\text{ ")[0]
    text = re.sub(r"(^|[ {])\.(?=\d)", r"\g<1>0.", text.strip())
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left.strip()) <= 2:
        text = right
    text = re.sub(r"\\sqrt\s*([^\s{\[\\])", r"\\sqrt{\1}", text)
    text = "".join(text.split())
    text = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{\\])(?=\{)", r"\\frac{\1}", text)
    if text == "0.5":
        return "\\frac{1}{2}"
    ratio = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return f"\\frac{{{ratio[1]}}}{{{ratio[2]}}}" if ratio else text


def strict(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Returns 1 for each response whose last boxed answer equals the ground truth as a string, else
    0. This is the paper's reward (arXiv 2512.19673). It is fast, but equal values that are written
    differently do not match."""
    return [float(extract(r) == normal_form(a)) for r, a in zip(responses, answers)]
