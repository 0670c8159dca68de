"""What a newcomer reads is true: tables, trees, links, commands and quoted errors agree with the code."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import jaxserve
from jaxserve.cli import COMMANDS
from jaxserve.flags import load_config, read_output
from jaxserve.planning.options import read_plan_options
from scripts.gen_docs import find_stale_pages
from tests.source_tree import ROOT, shipped_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
}
CODE_BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
# `models/llama.py`, `tests/goldens/`: lower case, so that ORG/NAME is none; no leading slash, as routes have.
INLINE_PATH = re.compile(r"`([a-z_]\w*(?:/\w+)*(?:/|\.py|/[\w.]+\.\w+))`")
DRAWN_PATH = re.compile(r"\b(\w+/\w+)\b")


def code_blocks(text: str, language: str | None = None) -> list[str]:
    matches = CODE_BLOCK.finditer(text)
    return [match["text"] for match in matches if language in (None, match["language"])]


def block_after(heading: str) -> str:
    """The first code block of a section of the README."""
    return code_blocks(README.partition(f"\n{heading}\n")[2])[0]


def test_generated_tables_are_current():
    stale = [path.name for path in find_stale_pages()]
    assert stale == [], "run python -m scripts.gen_docs"


def test_the_tree_names_what_exists_and_every_package():
    named: list[str] = []
    folder = ""
    for line in block_after("## The tree").splitlines():
        words = re.split(r"\s{2,}", line.strip())
        is_inside = line.startswith("  ")
        names = words if words[-1].endswith("/") else words[:1]
        for name in ", ".join(names).split(", "):
            named.append(folder + name if is_inside else name)
        if not is_inside:
            folder = names[0]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
    packages = [path.parent for path in (ROOT / "jaxserve").glob("*/__init__.py")]
    real = [str(path.resolve().relative_to(ROOT)) + "/" for path in packages]
    assert {"jaxserve/", *real} <= set(named)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str):
    """By their path from the root or from jaxserve/, or by the bare name of a kernel's or a room's file."""
    names = set(INLINE_PATH.findall(PAGES[page]))
    places = [ROOT, ROOT / "jaxserve", *(ROOT / "jaxserve").iterdir(), *(ROOT / "kernels_pallas").iterdir()]
    assert [name for name in sorted(names) if not any((place / name).exists() for place in places)] == []


def test_the_drawn_path_of_a_request_goes_through_nine_files():
    names = set(DRAWN_PATH.findall(block_after("## How a request travels")))
    assert len(names) == 9
    assert [
        name for name in names if not any((ROOT / top / f"{name}.py").exists() for top in ("", "jaxserve"))
    ] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / path).resolve()
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_the_shape_key_is_that_of_models():
    lines = (ROOT / "models" / "__init__.py").read_text(encoding="utf-8").splitlines()
    key = [line.strip() for line in lines if re.match(r"    [A-Z]  ", line)]
    assert len(key) == 5
    assert "\n".join(key) in README


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str):
    """Every `jaxserve ...` and `make ...` line of a code block; a config of one's own is called mine.yaml."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in "\n".join(code_blocks(PAGES[page])).splitlines():
        words = shlex.split(line, comments=True) if re.match(r"(jaxserve|make) \w", line) else []
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        elif words:
            assert words[1] in COMMANDS, line
            read_own = {"plan": read_plan_options, "convert": read_output}.get(words[1])
            flags = words[2:] if read_own is None else read_own(words[2:])[1]
            load_config(["qwen.yaml" if word == "mine.yaml" else word for word in flags])


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page: str):
    for block in code_blocks(PAGES[page], "python"):
        compile(block, page, "exec")


def sentences_of_the_code() -> list[list[str]]:
    """Every text in the package as the literal parts between what is filled in, by f-string or by logging."""
    sentences = []
    for file in shipped_files():
        for node in ast.walk(file.tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "\0" for part in parts]
            sentence = re.sub(r"%[.\d]*[dfrs]", "\0", "".join(str(text) for text in texts))
            if len(sentence.replace("\0", "")) >= 10:
                sentences.append(sentence.split("\0"))
    return sentences


def is_said(line: str, sentence: list[str]) -> bool:
    """Whether the line is the parts of the sentence in order, with anything between them."""
    position = 0
    for part in sentence:
        position = line.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return line.startswith(sentence[0]) and line.endswith(sentence[-1])


def test_quoted_errors_are_sentences_of_the_code():
    sentences = sentences_of_the_code()
    quoted = "".join(code_blocks(PAGES["docs/troubleshooting.md"])).splitlines()
    quoted = [re.sub(r"^\[.*?\] \w+ \w+: |^jaxserve: error: ", "", line) for line in quoted]
    assert len(quoted) > 15
    assert [line for line in quoted if not any(is_said(line, sentence) for sentence in sentences)] == []
    made_up = quoted[0].replace("Choose another", "Take another")
    assert not any(is_said(made_up, sentence) for sentence in sentences)


def test_the_changelog_has_this_version():
    assert f"## [{jaxserve.__version__}]" in PAGES["CHANGELOG.md"]


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        compile("".join(cell["source"]), cell["id"], "exec")
    targets = re.findall(r"\]\((?!https?://)([^)]+)\)", json.dumps(cells))
    assert all((ROOT / "docs" / Path(target)).exists() for target in targets)
