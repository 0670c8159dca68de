"""The repository's Python files as syntax trees, for the layering, packaging and style tests."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FOLDERS = {
    "jaxserve": "jaxserve",
    "models": "jaxserve.models",
    "kernels_pallas": "jaxserve.kernels_pallas",
}
CONFIGS_PACKAGE = "jaxserve.configs"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """`module` is the import name ("jaxserve.models.qwen2"), or the path for tests and scripts."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def room(self) -> str:
        """The part of jaxserve it belongs to: "server", "models", or its own name at the top ("cli")."""
        return [*self.module.split("."), "__init__"][1]


def shipped_files() -> list[SourceFile]:
    """Every module of the package, once: the links inside jaxserve/ are not followed."""
    files = []
    for folder, package in PACKAGE_FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if not is_behind_link(path):
                files.append(read_file(path, ".".join((package, *parts)).removesuffix(".__init__")))
    return files


def other_files() -> list[SourceFile]:
    """Tests and scripts."""
    paths = [path for folder in ("tests", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [read_file(path, str(path.relative_to(ROOT))) for path in paths]


def read_file(path: Path, module: str) -> SourceFile:
    text = path.read_text(encoding="utf-8")
    return SourceFile(path, module, text, ast.parse(text, filename=str(path)))


def is_behind_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent != ROOT and ROOT in parent.parents)
