"""Changes valid files into broken ones: bytes, lines, trees of JSON and YAML, tensors' headers, members of archives.

An input is a folder as a dict: file name -> bytes. All that is random comes from the given generator.
"""

import io
import json
import random
import re
import string
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import yaml

Input: TypeAlias = dict[str, bytes]
Mutation: TypeAlias = Callable[[random.Random, bytes], bytes]

MAX_BYTES = 1 << 16  # of a file: more makes inputs slow, not stranger
NUMBERS = (
    *("0", "-0", "-1", "1", "2", "127", "256", "65536", "2147483647", "2147483648", "4294967296"),
    *(
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775809",
        "18446744073709551616",
        "9" * 25,
        "9" * 5000,
    ),
    *("0.5", "-0.5", "1e308", "1e-320", "1e999", "-1e999", "nan", "NaN", "inf", "Infinity", "-Infinity", "0x10", "1_0"),
    *("٣", "²", "१२", "1e3", ".5", "5.", "00"),
)
WORDS = (
    *(
        "",
        " ",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\x00",
        "\x1f",
        "\x85",
        "\u2028",
        "\ufeff",
        "\ud7ff",
        "é",
        "🙂",
        "../x",
        "/etc/passwd",
    ),
    *(
        "null",
        "~",
        "true",
        "False",
        "on",
        "{}",
        "[]",
        "[[]]",
        "{a: b}",
        "&a [*a]",
        "*a",
        "<<: 1",
        "!!python/object:os.system",
    ),
    *(
        "!!timestamp x",
        "2001-99-99",
        "2001-01-01",
        "!!binary x",
        "!!set {a}",
        "0b",
        "0o9",
        "1:60",
        "---",
        "...",
        "? [a]",
        "'",
        '"',
    ),
    *(
        "<script>",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "%s",
        "__class__",
        "head",
        "entity",
        "values",
        "train",
        "NaN",
        "e0",
        "r0",
    ),
)
DEEP = (b"[" * 3000, b"{'a':" * 1500, b'{"a":' * 1500, b"- " * 3000, b"(" * 3000)


def change(generator: random.Random, given: Input, others: Sequence[Input]) -> Input:
    """Break an input in one to four places; `others` lend parts."""
    changed = dict(given)
    for _ in range(generator.choice((1, 1, 1, 2, 2, 4))):
        name = generator.choice(sorted(changed))
        action = generator.random()
        if action < 0.02 and len(changed) > 1:
            del changed[name]
        elif action < 0.04:
            changed[name] = changed[generator.choice(sorted(changed))]
        elif action < 0.12:
            lent = generator.choice(others).get(name, b"")
            changed[name] = _splice(generator, changed[name], lent)
        else:
            changed[name] = _change_file(generator, name, changed[name])[:MAX_BYTES]
    return changed


def _change_file(generator: random.Random, name: str, content: bytes) -> bytes:
    """Break one file, mostly in the way that its kind calls for."""
    suffix = name.rpartition(".")[2]
    kinds: dict[str, tuple[Mutation, ...]] = {
        "json": (_change_json, _change_json, _change_text),
        "jsonl": (_change_json_line, _change_json_line, _change_text),
        "yaml": (_change_yaml, _change_yaml, _change_text),
        "tsv": (_change_text,),
        "txt": (_change_text,),
        "csv": (_change_text,),
        "args": (_change_text,),
        "safetensors": (_change_header, _change_header),
        "npz": (_change_archive,),
        "zip": (_change_archive,),
        "pth": (_change_archive,),
        "npy": (_change_text,),
        "pkl": (_change_text,),
    }
    return generator.choice((*kinds.get(suffix, ()), _change_bytes))(generator, content)


def _change_bytes(generator: random.Random, content: bytes) -> bytes:
    """Flip, cut, insert or repeat bytes."""
    if not content:
        return generator.randbytes(generator.randrange(9))
    start = generator.randrange(len(content))
    end = min(len(content), start + generator.choice((1, 1, 2, 4, 8, 32, len(content))))
    action = generator.randrange(7)
    if action == 0:
        return content[:start] + bytes([content[start] ^ (1 << generator.randrange(8))]) + content[start + 1 :]
    if action == 1:
        return content[:start]
    if action == 2:
        return content[:start] + content[end:]
    if action == 3:
        return content[:end] + content[start:]
    if action == 4:
        return content[:start] + generator.randbytes(end - start) + content[end:]
    if action == 5:
        special = generator.choice((b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f"))
        return content[:start] + special + content[start + len(special) :]
    return content[:start] + generator.choice((generator.randbytes(3), generator.choice(DEEP))) + content[start:]


def _change_text(generator: random.Random, content: bytes) -> bytes:
    """Change a number, a word or a line."""
    action = generator.randrange(4)
    if action == 0:
        return _replace_one(generator, rb"-?\d+(\.\d+)?", content, generator.choice(NUMBERS).encode())
    if action == 1:
        return _replace_one(generator, rb"\w+", content, generator.choice((*WORDS, *NUMBERS)).encode())
    if action == 2:
        return _replace_one(
            generator, rb"[\t,:\n ]", content, generator.choice((b"", b"\t\t", b"\n", b" ", b",", b"\r\n"))
        )
    lines = content.split(b"\n")
    first, second = generator.randrange(len(lines)), generator.randrange(len(lines))
    way = generator.randrange(3)
    if way == 0:
        del lines[first]
    elif way == 1:
        lines.insert(first, lines[second])
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


def _replace_one(generator: random.Random, pattern: bytes, content: bytes, new: bytes) -> bytes:
    found = list(re.finditer(pattern, content))
    if not found:
        return content + new
    match = generator.choice(found)
    return content[: match.start()] + new + content[match.end() :]


def _change_json(generator: random.Random, content: bytes) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _change_bytes(generator, content)
    return json.dumps(change_tree(generator, tree)).encode("utf-8", "surrogatepass")


def _change_json_line(generator: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    place = generator.randrange(len(lines))
    lines[place] = _change_json(generator, lines[place])
    return b"\n".join(lines)


def _change_yaml(generator: random.Random, content: bytes) -> bytes:
    try:
        tree = yaml.safe_load(content)
        return yaml.safe_dump(change_tree(generator, tree)).encode("utf-8", "surrogatepass")
    except Exception:  # noqa: BLE001 (broken already, in whatever way)
        return _change_bytes(generator, content)


def change_tree(generator: random.Random, tree: Any) -> Any:
    """Replace, drop or add something anywhere in a tree of dicts and lists."""
    if isinstance(tree, dict) and tree and generator.random() < 0.85:
        changed = dict(tree)
        key = generator.choice(list(changed))
        action = generator.random()
        if action < 0.1:
            del changed[key]
        elif action < 0.15:
            changed[generator.choice((*WORDS, *NUMBERS))] = changed[key]
        else:
            changed[key] = change_tree(generator, changed[key])
        return changed
    if isinstance(tree, list) and tree and generator.random() < 0.85:
        items = list(tree)
        place = generator.randrange(len(items))
        action = generator.random()
        if action < 0.1:
            del items[place]
        elif action < 0.2:
            items.append(items[place])
        else:
            items[place] = change_tree(generator, items[place])
        return items
    return any_value(generator)


def any_value(generator: random.Random, depth: int = 0) -> Any:
    """Make a plain value of any kind."""
    kind = generator.randrange(10 if depth < 3 else 7)
    if kind == 0:
        return None
    if kind == 1:
        return generator.choice((True, False))
    if kind == 2:
        return generator.choice(
            (0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, generator.randrange(1000))
        )
    if kind == 3:
        return generator.choice((0.0, -0.0, 0.5, -1.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 1e22))
    if kind < 7:
        return generator.choice((*WORDS, *NUMBERS, "".join(generator.choices(string.printable, k=5))))
    if kind == 7:
        return [any_value(generator, depth + 1) for _ in range(generator.randrange(4))]
    return {generator.choice(WORDS): any_value(generator, depth + 1) for _ in range(generator.randrange(4))}


def _change_header(generator: random.Random, content: bytes) -> bytes:
    """Change the JSON header of a safetensors file, its length with it or not."""
    if len(content) < 8:
        return _change_bytes(generator, content)
    (size,) = struct.unpack("<Q", content[:8])
    if size > len(content):
        return _change_bytes(generator, content)
    change_it = generator.choice((_change_json, _change_json, _change_text))
    header = change_it(generator, content[8 : 8 + size])
    told = generator.choice((len(header), len(header), len(header), size, 2**63, len(header) + 1))
    return struct.pack("<Q", told) + header + content[8 + size :]


def _change_archive(generator: random.Random, content: bytes) -> bytes:
    """Change a member of a zip file, or its name; the archive itself stays whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # noqa: BLE001 (broken already, in whatever way)
        return _change_bytes(generator, content)
    if not members:
        return _change_bytes(generator, content)
    place = generator.randrange(len(members))
    name, member = members[place]
    if generator.random() < 0.15:
        name = generator.choice((*WORDS, "values.npy", "entity.npy", "a/../../b.npy", "train.npy"))
    else:
        member = generator.choice((_change_bytes, _change_text))(generator, member)
    members[place] = (name, member)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", generator.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for item, data in dict(members).items():
            archive.writestr(item.replace("\x00", "") or "x", data)  # zipfile writes no other names
    return written.getvalue()


def _splice(generator: random.Random, content: bytes, lent: bytes) -> bytes:
    """Put the end of one file behind the beginning of another."""
    cut = generator.randrange(len(content) + 1)
    return (content[:cut] + lent[generator.randrange(len(lent) + 1) :])[:MAX_BYTES]
