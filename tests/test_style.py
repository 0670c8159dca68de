"""The house style that a machine can hold: sizes, names, no towers, no hidden state, no loose ends."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.source_tree import ROOT, SourceFile, other_files, shipped_files

MAX_FILE_LINES = 400
MAX_KERNEL_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

BANNED_FILE_NAMES = {"utils.py", "util.py", "common.py", "misc.py", "helpers.py", "base.py", "manager.py"}
# The quickstart imports its four notebook functions from `utils`, so that name is given.
EXEMPT_FILES = {"jaxserve/utils.py"}
BANNED_CLASS_NAME = re.compile(r"^_?Base[A-Z]|(Manager|Helper|Helpers|Util|Utils|Base)$")

# A class is an interface or a leaf. Errors may extend errors: the tree drawn in errors.py.
ALLOWED_BASES = {"Protocol", "Exception", "Enum", "IntEnum", "StrEnum", "NamedTuple", "Struct", "Module"}

MUTABLE_MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTABLE_LITERALS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CONSTANT_NAME = re.compile(r"^_?[A-Z][A-Z0-9_]*$|^__\w+__$")

LOOSE_END = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b(?!\(#\d+\))")

SHIPPED = shipped_files()
ALL_FILES = SHIPPED + other_files()


def functions(file: SourceFile) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def last_name(node: ast.expr) -> str:
    """The last word of a dotted name; of a subscript (`Protocol[T]`) or a call, that of what is before it."""
    if isinstance(node, ast.Subscript):
        return last_name(node.value)
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def oversized(file: SourceFile) -> list[str]:
    limit = MAX_KERNEL_FILE_LINES if file.room == "kernels_pallas" else MAX_FILE_LINES
    num_lines = file.text.count("\n")
    found = [f"{file.where} has {num_lines} lines (at most {limit})"] if num_lines > limit else []
    for node in functions(file):
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            where = f"{file.where}:{node.lineno} {node.name}"
            found.append(f"{where} has {num_lines} lines (at most {MAX_FUNCTION_LINES})")
    return found


def badly_named(file: SourceFile) -> list[str]:
    found = []
    if file.path.name in BANNED_FILE_NAMES and file.where not in EXEMPT_FILES:
        found.append(f"{file.where}: a file is named for what it does")
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ClassDef) and BANNED_CLASS_NAME.search(node.name):
            found.append(f"{file.where}:{node.lineno} class {node.name}: name it for what it is")
    return found


def towers(file: SourceFile) -> list[str]:
    return [
        f"{file.where}:{node.lineno} class {node.name} extends {last_name(base)}"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if last_name(base) not in ALLOWED_BASES
        and not (last_name(base).endswith("Error") and node.name.endswith("Error"))
    ]


def module_state(file: SourceFile) -> list[str]:
    found = [
        f"{file.where}:{node.lineno} global {', '.join(node.names)}"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Global)
    ]
    for node in file.tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        is_call = isinstance(node.value, ast.Call) and last_name(node.value) in MUTABLE_MAKERS
        if is_call or isinstance(node.value, MUTABLE_LITERALS):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found += [f"{file.where}:{node.lineno} {name}" for name in names if not CONSTANT_NAME.match(name)]
    return found


def swallowers(file: SourceFile) -> list[str]:
    """Catch-all handlers that do not raise again, and `**kwargs` that are not passed on by name.

    A name with an underscore says that a library calls us with words we do not want (`**_labels`).
    """
    found = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler):
            is_catch_all = node.type is None or last_name(node.type) in {"Exception", "BaseException"}
            if is_catch_all and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                found.append(f"{file.where}:{node.lineno} catches everything")
    for node in functions(file):
        passed_on = {
            last_name(keyword.value)
            for call in ast.walk(node)
            if isinstance(call, ast.Call)
            for keyword in call.keywords
            if keyword.arg is None
        }
        kwarg = node.args.kwarg.arg if node.args.kwarg is not None else "_"
        if kwarg not in passed_on and not kwarg.startswith("_"):
            found.append(f"{file.where}:{node.lineno} {node.name} swallows **{kwarg}")
    return found


def loose_ends(file: SourceFile) -> list[str]:
    found = [
        f"{file.where}:{number} {line.strip()}"
        for number, line in enumerate(file.text.splitlines(), 1)
        if LOOSE_END.search(line)
    ]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Raise) and node.exc and last_name(node.exc) == "NotImplementedError":
            found.append(f"{file.where}:{node.lineno} is not implemented")
    return found


def without_docstring(file: SourceFile) -> list[str]:
    is_bare = file.tree.body and not ast.get_docstring(file.tree)
    return [f"{file.where} opens without a docstring"] if is_bare else []


@pytest.mark.parametrize("check", [oversized, badly_named, loose_ends, without_docstring])
def test_every_file(check):
    assert [line for file in ALL_FILES for line in check(file)] == []


@pytest.mark.parametrize("check", [towers, module_state, swallowers])
def test_every_shipped_file(check):
    assert [line for file in SHIPPED for line in check(file)] == []


BAD_FILE = """
import collections
seen = []
index: dict = collections.defaultdict(list)
class PageManager: pass
class Fast(Slow): pass
class OddError(ValueError): pass
def ask(**kwargs):
    global seen
    try: pass
    except Exception: pass
def tell(**facts): ask(**facts)
def later(): raise NotImplementedError
"""


def test_the_checks_catch_what_they_should():
    path = ROOT / "tests" / "common.py"
    file = SourceFile(path, "jaxserve.models.bad", BAD_FILE + "\n" * 400, ast.parse(BAD_FILE))
    checks = (oversized, badly_named, loose_ends, without_docstring, towers, module_state, swallowers)
    assert {check.__name__: len(check(file)) for check in checks} == {
        "oversized": 1,
        "badly_named": 2,
        "loose_ends": 1,
        "without_docstring": 1,
        "towers": 1,
        "module_state": 3,
        "swallowers": 2,
    }
