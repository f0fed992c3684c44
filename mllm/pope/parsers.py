"""A model's words as "yes", "no" or "invalid": lmms-eval's rule, POPE's own, and one that allows for punctuation."""

from collections.abc import Callable, Iterable


def parse_lmms_eval(answer: str) -> str:
    """lmms-eval's rule: the whole answer, stripped and in lower case, is yes or no ("Yes." is invalid)."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else "invalid"


def parse_strict(answer: str) -> str:
    """One word, yes or no, whatever its case and closing punctuation."""
    return parse_lmms_eval(answer.strip().rstrip(".,!"))


def parse_official(answer: str) -> str:
    """The rule of POPE's own script: no if a word of the first sentence is No, no or not; all else is yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


PARSERS: dict[str, Callable[[str], str]] = {
    "lmms_eval": parse_lmms_eval,
    "strict": parse_strict,
    "official": parse_official,
}


def parse(answers: Iterable[str | None], parser: str = "lmms_eval") -> list[str]:
    """Answers as yes, no or invalid by one of `PARSERS`; None, which is no answer, is invalid by each of them."""
    return ["invalid" if answer is None else PARSERS[parser](answer) for answer in answers]
