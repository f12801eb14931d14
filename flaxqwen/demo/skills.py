"""What the demo model can do: questions with one right answer, and which of them are held out of training.

A question is held out by what it is about, not by its wording: operands or words whose hash says so never occur in
training, in any phrasing.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable

# One question in this many is held out.
HELD_OUT = 16
ORDINALS = ("first", "second", "third", "fourth", "fifth")
ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "r",
    "s",
    "sh",
    "sl",
    "sp",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "y",
    "z",
] + [""] * 4
NUCLEI = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "ie", "oa", "oo", "ou"]
CODAS = [
    "ck",
    "d",
    "g",
    "l",
    "ll",
    "m",
    "n",
    "nd",
    "ng",
    "nt",
    "p",
    "r",
    "rk",
    "rn",
    "s",
    "ss",
    "st",
    "t",
    "th",
    "x",
] + [""] * 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, its one right answer, the skill, and its operands or words; where they are "", it is never held out."""

    skill: str
    prompt: str
    answer: str
    subject: str

    @property
    def is_held_out(self) -> bool:
        """Whether the subject is one that training never sees; by a hash, so no list has to be kept."""
        return bool(self.subject) and zlib.crc32(self.subject.encode()) % HELD_OUT == 0


def operands(a: int, b: int) -> str:
    """What a question about two numbers is about, in either order; those of two digits are all in training."""
    return f"{min(a, b)} {max(a, b)}" if max(a, b) > 9 else ""


def number(rng: random.Random) -> int:
    """Up to three digits; fewer digits are drawn more often than by chance."""
    return rng.randrange(rng.choice((10, 100, 1000, 1000)))


def word(rng: random.Random, longest: int = 8) -> str:
    """2 to `longest` letters: syllables as in English, or now and then any letters."""
    length = rng.randint(2, longest)
    if rng.random() < 0.3:
        return "".join(rng.choices(LETTERS, k=length))
    letters = ""
    while len(letters) < length:
        letters += rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS)
    return letters[:length]


def add(rng: random.Random) -> Question:
    """a + b, up to three digits each."""
    a, b = number(rng), number(rng)
    phrase = rng.choice(("What is {a} + {b}?", "What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}."))
    return Question("add", phrase.format(a=a, b=b), str(a + b), operands(a, b))


def subtract(rng: random.Random) -> Question:
    """a - b, up to three digits each; the answer may be negative."""
    a, b = number(rng), number(rng)
    phrase = rng.choice(("What is {a} - {b}?", "What is {a} - {b}?", "{a} - {b} = ?", "Subtract {b} from {a}."))
    return Question("subtract", phrase.format(a=a, b=b), str(a - b), operands(a, b))


def multiply(rng: random.Random) -> Question:
    """A number up to 99 times a digit, in either order."""
    a, b = rng.randrange(rng.choice((10, 100, 100))), rng.randrange(10)
    a, b = rng.choice(((a, b), (b, a)))
    phrase = rng.choice(("What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b} = ?", "Multiply {a} by {b}."))
    return Question("multiply", phrase.format(a=a, b=b), str(a * b), operands(a, b))


def long_multiply(rng: random.Random) -> Question:
    """A number up to 9,999 times a digit: training alone, for the procedure that small products let a model forgo.

    There are 900 of those: a model trained on them alone knew them by heart, and 72 % of the held-out ones.
    """
    a, b = rng.randrange(rng.choice((1000, 10000))), rng.randrange(2, 10)
    a, b = rng.choice(((a, b), (b, a)))
    phrase = rng.choice(("What is {a} * {b}?", "{a} * {b} = ?"))
    return Question("long multiply", phrase.format(a=a, b=b), str(a * b), operands(a, b))


def reverse(rng: random.Random) -> Question:
    """The letters of a word in reverse order."""
    w = word(rng)
    phrase = rng.choice(("Reverse {w}.", "Reverse the word {w}.", "Spell {w} backwards."))
    return Question("reverse", phrase.format(w=w), w[::-1], w)


def sort(rng: random.Random) -> Question:
    """The letters of a word in alphabetical order."""
    w = word(rng)
    phrase = rng.choice(("Sort the letters of {w}.", "Sort the letters in {w}."))
    return Question("sort", phrase.format(w=w), "".join(sorted(w)), w)


def count(rng: random.Random) -> Question:
    """How many letters a word has, or how often it has one letter."""
    w = word(rng)
    if rng.random() < 0.4:
        phrase = rng.choice(("How many letters are in {w}?", "How many letters does {w} have?"))
        return Question("count", phrase.format(w=w), str(len(w)), w)
    letter = rng.choice(w) if rng.random() < 0.8 else rng.choice(LETTERS)
    if rng.random() < 0.5:  # words with letters that occur several times are rare
        places = rng.sample(range(len(w)), rng.randint(1, min(3, len(w))))
        w = "".join(letter if i in places else c for i, c in enumerate(w))
    phrase = rng.choice(("How many {c} are in {w}?", "How often is {c} in {w}?", "Count the letter {c} in {w}."))
    return Question("count", phrase.format(c=letter, w=w), str(w.count(letter)), w)


def upper(rng: random.Random) -> Question:
    """A word in upper case."""
    w = word(rng)
    phrase = rng.choice(("Write {w} in upper case.", "Upper case of {w}?"))
    return Question("upper", phrase.format(w=w), w.upper(), w)


def nth(rng: random.Random) -> Question:
    """The n-th, or the last, of two to five words."""
    words = [word(rng, 6) for _ in range(rng.randint(2, 5))]
    n = rng.randrange(len(words))
    ordinal = "last" if n == len(words) - 1 and rng.random() < 0.5 else ORDINALS[n]
    phrase = rng.choice(("What is the {n} word of {w}?", "Which word is {n} in {w}?"))
    return Question("nth", phrase.format(n=ordinal, w=" ".join(words)), words[n], " ".join(words))


def compare(rng: random.Random) -> Question:
    """Whether a number is greater or less than another; half of the pairs are close together."""
    a = number(rng)
    b = rng.choice((number(rng), min(999, max(0, a + rng.randint(-12, 12)))))
    greater = rng.random() < 0.5
    relation = rng.choice(("greater than", "more than", ">") if greater else ("less than", "smaller than", "<"))
    answer = "yes" if (a > b if greater else a < b) else "no"
    return Question("compare", f"Is {a} {relation} {b}?", answer, operands(a, b))


# How often each is asked in training; the harder, the more often.
TRAINING: dict[Callable[[random.Random], Question], int] = {
    add: 14, subtract: 23, multiply: 10, long_multiply: 15, reverse: 4, sort: 6, count: 14, upper: 2, nth: 6,
    compare: 7,
}  # fmt: skip
# Of the held-out questions, each skill is as many.
EVALUATION = dict.fromkeys((add, subtract, multiply, reverse, sort, count, upper, nth, compare), 1)


def questions(seed: int, total: int, held_out: bool) -> list[Question]:
    """`total` questions: of those that are held out, each skill as often, or of the others, as TRAINING says."""
    rng = random.Random(seed)
    skills = EVALUATION if held_out else TRAINING
    makers, weights = list(skills), list(skills.values())
    drawn: list[Question] = []
    while len(drawn) < total:
        question = rng.choices(makers, weights)[0](rng)
        if question.is_held_out == held_out:
            drawn.append(question)
    return drawn
