"""Texts as they stand on labels, plates, displays, receipts and forms."""

import string
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
CAPITALS, SMALL, DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
UNITS = (
    "kg", "g", "lb", "oz", "ml", "l", "cm", "mm", "m", "km", "mi", "h", "min", "s", "kWh", "V", "A",
    "W", "Hz", "C", "F", "%", "m3", "bar", "psi", "EUR", "USD", "RM", "$",
)  # fmt: skip


class LineText:
    """Texts as they stand on labels, plates, displays, receipts and forms.

    Args:
        rng: a `random.Random`.
        low, high: the fewest and most characters.
        alphabet: those that may occur.

    Phrases, in assets/phrases.txt, have {n} for a number, {d} for a digit, {dd} for two,
    {A} for a capital, {x} for either, {w} and {W} for a word, {U} for a unit.
    """

    def __init__(self, rng, low, high, alphabet):
        self.rng, self.low, self.high, self.alphabet = rng, low, high, alphabet
        self.allowed = set(alphabet)
        self.words = (ASSETS / "words.txt").read_text(encoding="utf-8").split()
        self.phrases = (ASSETS / "phrases.txt").read_text(encoding="utf-8").splitlines()
        self.follow = {}  # of the letters of words: what follows two others
        for word in self.words:
            letters = f"  {word} "
            for i in range(len(letters) - 2):
                self.follow.setdefault(letters[i : i + 2], []).append(letters[i + 2])

    def _word(self):
        """A word, or one that could be."""
        if self.rng.random() < 0.45:
            return self.rng.choice(self.words)
        word = "  "
        while len(word) < 12:
            word += self.rng.choice(self.follow[word[-2:]])
            if word[-1] == " ":
                break
        return word.strip()

    def _field(self, kind):
        rng = self.rng
        if kind == "n":
            return str(int(10 ** rng.uniform(0, 4)))
        if kind == "U":
            return rng.choice(UNITS)
        if kind in "wW":
            return self._word().upper() if kind == "W" else self._word()
        chosen = {"d": DIGITS, "A": CAPITALS, "x": CAPITALS + DIGITS}[kind[0]]
        return "".join(rng.choices(chosen, k=len(kind)))

    def _phrase(self):
        kinds = self.rng.choice(self.phrases)
        parts = kinds.replace("}", "{").split("{")
        text = "".join(self._field(p) if i % 2 else p for i, p in enumerate(parts))
        case = self.rng.random()
        if case < 0.35:
            return text.upper()
        return text.lower() if case < 0.45 else text.title() if case < 0.75 else text

    def draw(self, can):
        """A text of characters that are allowed and in ``can``."""
        rng = self.rng
        can = [c for c in self.alphabet if c in can]
        for _ in range(20):
            kind = rng.random()
            if kind < 0.68:
                text = self._phrase()
            elif kind < 0.78:
                text = "".join(rng.choices(can, k=rng.randint(self.low, self.high)))
            else:  # codes of one case
                letters = rng.choice((CAPITALS + DIGITS, SMALL + DIGITS, DIGITS, CAPITALS, SMALL))
                text = "".join(rng.choices(letters, k=rng.randint(4, 8)))
            text = " ".join("".join(c for c in text if c in can).split())
            if len(text) > self.high:
                text = text[: self.high].strip()
            if text and len(text) >= self.low and self.allowed.issuperset(text):
                return text
        plain = [c for c in can if c != " "]
        return "".join(rng.choices(plain, k=rng.randint(self.low, self.high)))
