"""Count which letters follow each other in the words of a list, into assets/letters.txt.

    sudo apt install wamerican
    python benchmarks/count_letters.py   # writes the file that is there already

What `keys.word_weight` looks up, a line for each two of 27 characters (the edge of a word and
a to z), on it a character for each of the 27 that may follow: `chr(ZERO + round(STEPS * x))`,
where x is the logarithm of how much more probable the letter is than one in 26, and for the
edge that of its probability. Pairs that are rare go by their second letter, then by none
(interpolation as of Jelinek and Mercer, 1980).
"""

import argparse
import math
from collections import Counter
from pathlib import Path

from common import ROOT

from image import write_atomically
from keys import STEPS, ZERO, command

EDGE, RARE = "`", 10  # what comes before "a"; a context that was seen so often counts half
LETTERS = [chr(ord(EDGE) + i) for i in range(27)]


def probability(counts, context, letter):
    """Of a letter behind up to two others, by ``counts`` of strings of one to three letters."""
    total = sum(counts[context + c] for c in LETTERS)
    if not context:
        return (counts[letter] + 1) / (total + len(LETTERS))
    share = total / (total + RARE)
    own = counts[context + letter] / max(1, total)
    return share * own + (1 - share) * probability(counts, context[1:], letter)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--words",
        type=Path,
        default=Path("/usr/share/dict/american-english"),
        help="a word a line, UTF-8 (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "assets" / "letters.txt", help="default: %(default)s"
    )
    args = parser.parse_args()
    try:
        lines = args.words.read_text(encoding="utf-8").split()
    except OSError as error:
        raise ValueError(f"{args.words}: cannot be read ({error.strerror})") from None
    words = {word.lower() for word in lines if word.isascii() and word.isalpha() and len(word) > 1}
    counts = Counter()
    for word in words:
        text = EDGE * 2 + word + EDGE
        for end in range(3, len(text) + 1):
            counts.update(text[end - size : end] for size in (1, 2, 3))
    rows = []
    for before in (a + b for a in LETTERS for b in LETTERS):
        shares = [probability(counts, before, c) * (26 if c != EDGE else 1) for c in LETTERS]
        steps = [max(-63, round(STEPS * math.log(share))) for share in shares]
        rows.append("".join(chr(ZERO + step) for step in steps))
    write_atomically(args.out, "".join(f"{row}\n" for row in rows).encode("ascii"))
    print(f"{args.out}: of {len(words):,} words in {args.words}")


if __name__ == "__main__":
    command(main)
