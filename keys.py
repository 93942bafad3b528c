"""The characters MicroOCR can read: alphabets by name or from a text file.

    from keys import load_alphabet
    load_alphabet("alnum59")      # a name from ALPHABETS
    load_alphabet("my_keys.txt")  # or a UTF-8 text file that holds the characters

The CTC blank is not part of an alphabet: it is class 0 of the network, the
characters follow in order, so ``nclass = len(alphabet) + 1``.
"""

import string
from collections import Counter
from pathlib import Path

# GB 2312 keeps its 3,755 most frequent characters, ordered by pronunciation, in rows 16
# to 55 of 94 (GB 2312-1980); the last row has 89. In EUC-CN 0xA0 is added to row and cell.
LEVEL_1 = bytes(
    byte
    for row in range(16, 56)
    for cell in range(1, 90 if row == 55 else 95)
    for byte in (0xA0 + row, 0xA0 + cell)
)

ALPHABETS = {
    "digits": string.digits,
    "digits_upper": string.digits + string.ascii_uppercase,
    # Without I, O and l, which look like other characters. nclass = 60.
    "alnum59": "".join(c for c in string.digits + string.ascii_letters if c not in "IOl"),
    "alnum62": string.digits + string.ascii_letters,
    "gb2312_level1": LEVEL_1.decode("gb2312"),
}


def check_alphabet(alphabet, source="the alphabet"):
    """Return ``alphabet`` (a string, one character a class) if it can be used.

    Raises ValueError, naming ``source``, where it is empty, repeats a character
    or contains a line break (a label is one line of a text file).
    """
    if not alphabet:
        raise ValueError(f"{source}: an alphabet needs at least one character, this one is empty")
    if len(alphabet.splitlines()) > 1 or alphabet != alphabet.splitlines()[0]:
        raise ValueError(f"{source}: an alphabet cannot contain a line break, write it as one line")
    repeated = sorted(c for c, times in Counter(alphabet).items() if times > 1)
    if repeated:
        raise ValueError(
            f"{source}: each character may stand once in an alphabet, "
            f"remove the repeats of {' '.join(map(repr, repeated))}"
        )
    return alphabet


def load_alphabet(name_or_path):
    """Return the alphabet called ``name_or_path``, or the one in that UTF-8 text file.

    A file holds the characters on one line; a byte-order mark and the line break
    at its end are not part of the alphabet.

    Raises ValueError for an unknown name, an unreadable file, or what
    `check_alphabet` refuses.
    """
    if name_or_path in ALPHABETS:
        return ALPHABETS[name_or_path]
    path = Path(name_or_path)
    try:
        # newline="" keeps a lone carriage return visible to check_alphabet.
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        names = ", ".join(ALPHABETS)
        raise ValueError(
            f"{name_or_path}: neither an alphabet's name ({names}) nor an existing text file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a UTF-8 text file ({error})") from None
    return check_alphabet(text.removesuffix("\n").removesuffix("\r"), source=str(path))
