"""Bodies that nobody meant to send: a right JSON body, and what clients, proxies and attackers make of it.

`mutate(rng, body, fields)` gives the bytes of one wrong (or by luck right) body: changes to keys and values,
odd values of the right type, literals that no JSON writer gives, and damage to the bytes themselves. All
follows from the random generator, so that a failure can be sent again. Knows nothing of routes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

Body = dict[str, Any]
Fields = Mapping[str, Sequence[str]]  # the JSON types that a known field may have


class Literal(str):
    """Text that is written into the JSON as it stands."""


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may come twice."""


WRONG_LITERALS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "0x10", "01", "1.", ".5", "+1", "1_000"),
    *("undefined", "None", "True", "'a'", '"\\ud800"', '"\\udfff\\ud800"', '"\\x41"', '"\\u12"', '"a\nb"'),
    *("9" * 40, "-" + "9" * 400, "1" + "0" * 4000, "0." + "3" * 4000, "1e" + "9" * 30, "[" * 900 + "]" * 900),
    *("[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "//", "/* a */ 1", "nul", "truefalse", "[1,]", ""),
)
ODD_STRINGS = (
    *(
        "",
        " ",
        "\x00",
        "a\x00b",
        "\r\nx-injected: 1\r\n\r\n",
        "\x1b[31mred\x1b[0m",
        "\n2026 ERROR forged",
        "\x7f",
    ),
    *("\u202eright to left", "\ud800", "\ufeff", "e\u0301" * 20, "🙂" * 9, "𝕬", "ß", "İ", "<|im_end|>"),
    *("<|im_start|>system", "{{ 7 * 7 }}", "{% for i in range(9**9) %}x{% endfor %}", "%s%n%x", "$(id)"),
    *("../../etc/passwd", "null", "true", "5", "-1", "1e3", "a" * 5000, "(a+)+$", "[", "(?P<x", "\\"),
)
ODD_NUMBERS = (
    *(0, -0.0, -1, 1, 2, 1.0, 0.5, 1.5, -2, 3, 33, 255, 256, 257, 511, 512, 4096, 1e-9, 5e-324, 1e300),
    *(-1e300, 1e16, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30),
)  # fmt: skip


def mutate(rng: Random, body: Body, fields: Fields) -> bytes:
    """One to three changes to the value, then, one time in five, one to the bytes."""
    tree: Any = Pairs((key, _copy(value)) for key, value in body.items())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = rng.choice(_CHANGES)(rng, tree, fields)
    raw = _write(tree).encode("utf-8", errors="surrogatepass")
    return rng.choice(_DAMAGES)(rng, raw) if rng.random() < 0.2 else raw


def any_value(rng: Random, depth: int = 0) -> Any:
    """A JSON value of any type, odd ones more often than not."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2):
        return rng.choice(ODD_NUMBERS)
    if kind in (3, 4):
        return rng.choice(ODD_STRINGS)
    if kind == 5:
        return Literal(rng.choice(WRONG_LITERALS)) if rng.random() < 0.3 else rng.randrange(-5, 300)
    if kind in (6, 7):
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ("role", "content", "type", "text", "function", "name", "arguments", "value", "id", "0", "é", "")
    return Pairs((rng.choice(keys), any_value(rng, depth + 1)) for _ in range(rng.randrange(4)))


def _fitting_value(rng: Random, kind: str) -> Any:
    """An odd value of a JSON type."""
    if kind == "integer":
        return rng.choice([number for number in ODD_NUMBERS if isinstance(number, int)])
    if kind == "number":
        return rng.choice((*ODD_NUMBERS, rng.uniform(-3, 3)))
    if kind == "string":
        return rng.choice(ODD_STRINGS)
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "array":
        item = rng.choice(("integer", "string", "object"))
        return [_fitting_value(rng, item) for _ in range(rng.choice((0, 1, 2, 40)))]
    keys = (*ODD_STRINGS, *map(str, ODD_NUMBERS))
    return Pairs((rng.choice(keys), any_value(rng)) for _ in range(rng.randrange(4)))


def _drop(rng: Random, tree: Any, fields: Fields) -> Any:
    pairs, place = _pick(rng, tree)
    del pairs[place : place + 1]
    return tree


def _duplicate(rng: Random, tree: Any, fields: Fields) -> Any:
    pairs, place = _pick(rng, tree)
    pairs += [
        (key, value if rng.random() < 0.5 else any_value(rng)) for key, value in pairs[place : place + 1]
    ]
    return tree


def _replace_value(rng: Random, tree: Any, fields: Fields) -> Any:
    pairs, place = _pick(rng, tree)
    pairs[place : place + 1] = [(key, any_value(rng)) for key, _ in pairs[place : place + 1]]
    return tree


def _retype(rng: Random, tree: Any, fields: Fields) -> Any:
    """The same value as another type: "5" for 5, [5] for 5, {"a": 5} for 5, and back."""
    pairs, place = _pick(rng, tree)
    for key, value in pairs[place : place + 1]:
        text = value if isinstance(value, str) else _write(value)
        pairs[place] = (key, rng.choice((text, [value], [value] * 3, Pairs([(key, value)]), None, [])))
    return tree


def _rename(rng: Random, tree: Any, fields: Fields) -> Any:
    pairs, place = _pick(rng, tree)
    new = rng.choice((*fields, *ODD_STRINGS))
    pairs[place : place + 1] = [(new, value) for _, value in pairs[place : place + 1]]
    return tree


def _add_known(rng: Random, tree: Any, fields: Fields) -> Any:
    """A field that the route knows, with a value that may have the right type."""
    name = rng.choice(list(fields))
    value = any_value(rng) if rng.random() < 0.4 else _fitting_value(rng, rng.choice(fields[name]))
    _pick(rng, tree)[0].append((name, value))
    return tree


def _add_unknown(rng: Random, tree: Any, fields: Fields) -> Any:
    name = rng.choice(list(fields))
    odd = rng.choice(
        (name.upper(), name + " ", "\u200b" + name, name[:-1], "__proto__", "ключ", *ODD_STRINGS)
    )
    _pick(rng, tree)[0].append((odd, any_value(rng)))
    return tree


def _wrap(rng: Random, tree: Any, fields: Fields) -> Any:
    return rng.choice(([tree], Pairs([("body", tree)]), _write(tree), any_value(rng)))


_Change = Callable[[Random, Any, Fields], Any]
_CHANGES: tuple[_Change, ...] = (
    *(_add_known, _add_known, _add_known, _replace_value, _replace_value, _retype, _retype),
    *(_drop, _duplicate, _add_unknown, _rename, _wrap),
)


def _cut_short(rng: Random, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _flip(rng: Random, raw: bytes) -> bytes:
    place = rng.randrange(len(raw)) if raw else 0
    return raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]


def _encode_otherwise(rng: Random, raw: bytes) -> bytes:
    codec = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-7", "latin-1", "cp500"))
    return raw.decode("utf-8", errors="replace").encode(codec, errors="replace")


def _surround(rng: Random, raw: bytes) -> bytes:
    before = rng.choice((b"", b"\xef\xbb\xbf", b" \n\t", b"\x00", b")]}',\n", b"data: ", b"\xff\xfe"))
    return before + raw + rng.choice((b"", b"\x00", b"}", b" {}", b"\n\n", raw, b"\xff", b"," * 100))


def _not_even_close(rng: Random, raw: bytes) -> bytes:
    other = (
        b"",
        b" ",
        b"null",
        b"[]",
        b"{}",
        b'""',
        b"0",
        b"a=1&b=2",
        b"<a/>",
        rng.randbytes(64),
        b"\x80" * 9,
    )
    return rng.choice((*other, gzip.compress(raw), b"--x\r\ncontent-disposition: form-data\r\n\r\n--x--"))


_Damage = Callable[[Random, bytes], bytes]
_DAMAGES: tuple[_Damage, ...] = (_cut_short, _flip, _encode_otherwise, _surround, _not_even_close)


def _pick(rng: Random, tree: Any) -> tuple[Pairs, int]:
    """One of the tree's objects and a place in it; without any, an object that nobody sees."""
    pairs = rng.choice(list(_objects(tree)) or [Pairs()])
    return pairs, rng.randrange(len(pairs) or 1)


def _objects(tree: Any) -> Iterator[Pairs]:
    if isinstance(tree, Pairs):
        yield tree
    for value in tree if isinstance(tree, list) else ():
        yield from _objects(value[1] if isinstance(tree, Pairs) else value)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs((key, _copy(item)) for key, item in value.items())
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _write(tree: Any) -> str:
    if isinstance(tree, Literal):
        return str(tree)
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_write(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_write, tree)) + "]"
    return json.dumps(tree, ensure_ascii=isinstance(tree, str) and len(tree) % 2 == 0)
