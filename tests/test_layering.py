"""Who may import whom. The picture is in docs; these tables are the rule."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

from tests.source_tree import SourceFile, shipped_files

# Plain modules that every room may use: data, errors, settings, logging; and the package for its version.
PLAIN = {"__version__", "types", "images", "errors", "config", "log", "metrics", "progress"}

# Room -> what else of ours it may import. A dotted name allows that module only.
ALLOWED: dict[str, set[str]] = {
    "kernels_pallas": set(),
    "models": {"kernels_pallas"},
    "scheduler": PLAIN,
    "text": PLAIN,
    "vision": PLAIN,
    "weights": PLAIN | {"models"},
    "runner": PLAIN | {"models", "kernels_pallas", "weights", "scheduler.plan", "vision"},
    "engine": PLAIN | {"scheduler", "runner"},
    "hosts": PLAIN | {"scheduler.plan", "runner", "weights.resolve", "engine.transport"},
    "server": PLAIN | {"engine.client", "text", "vision"},
    "blueprint": PLAIN
    | {"models", "kernels_pallas", "weights", "runner", "scheduler.features", "vision.limits"},
    "planning": PLAIN | {"blueprint", "models", "kernels_pallas", "weights", "runner"},
    "utils": set(),
    "types": {"errors"},
    "errors": set(),
    "images": set(),
    "config": {"errors"},
    "cuda_flags": set(),
    "engine_process": set(),
    "flags": {"errors", "config", "cuda_flags"},
    "log": set(),
    "metrics": {"types", "errors"},
    "progress": set(),
    "configs": set(),
}
# The composition roots put the rooms together and may import everything.
ROOTS = {
    *("__init__", "__main__", "build", "cli", "convert", "engine_main", "follow", "follower_main"),
    *("launch", "launch_server", "llm", "supervise", "tuning"),
}

# One edge is allowed inside functions only: a tokenizer may lie in a .gguf file.
LAZY = {("text", "weights.gguf")}

ARRAY_LIBRARIES = {"jax", "jaxlib", "flax", "numpy"}
# Room -> array libraries it may import; rooms that are not named may import none.
ARRAYS: dict[str, set[str]] = {
    "kernels_pallas": {"jax", "jaxlib", "numpy"},
    "models": ARRAY_LIBRARIES,
    "weights": ARRAY_LIBRARIES,
    "runner": ARRAY_LIBRARIES,
    "engine": ARRAY_LIBRARIES,
    "hosts": ARRAY_LIBRARIES,
    "scheduler": {"numpy"},
    "text": {"numpy"},
    "vision": {"numpy"},
    "blueprint": ARRAY_LIBRARIES,
    "planning": ARRAY_LIBRARIES,
    "build": ARRAY_LIBRARIES,
    "engine_main": ARRAY_LIBRARIES,
    "follower_main": ARRAY_LIBRARIES,
    "llm": ARRAY_LIBRARIES,
    "tuning": ARRAY_LIBRARIES,
}

SHIPPED = shipped_files()


def imports(file: SourceFile) -> Iterator[tuple[str, int, bool]]:
    """(imported module, line, whether at the top level) of every import; `from a import b` gives a.b."""
    top_level = set(map(id, file.tree.body))
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top_level
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.where}:{node.lineno}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, id(node) in top_level


def is_within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def is_allowed(room: str, target: str, is_top_level: bool) -> bool:
    """`target` is the imported name without "jaxserve."; "" is the package itself."""
    if room in ROOTS or is_within(target, room):
        return True
    lazy = [name for lazy_room, name in LAZY if lazy_room == room and not is_top_level]
    return any(is_within(target, name) for name in [*ALLOWED.get(room, set()), *lazy])


def test_every_room_has_its_rule():
    assert {file.room for file in SHIPPED} - set(ALLOWED) - ROOTS == set()


def test_rooms_import_only_what_they_may_know():
    wrong = [
        f"{file.where}:{line} imports {name}"
        for file in SHIPPED
        for name, line, is_top_level in imports(file)
        if is_within(name, "jaxserve")
        and not is_allowed(file.room, name.removeprefix("jaxserve").removeprefix("."), is_top_level)
    ]
    assert wrong == []


def test_array_libraries_stay_where_arrays_are():
    wrong = [
        f"{file.where}:{line} imports {name}"
        for file in SHIPPED
        for name, line, _ in imports(file)
        if name.split(".")[0] in ARRAY_LIBRARIES - ARRAYS.get(file.room, set())
    ]
    assert wrong == []


def test_no_torch_at_run_time():
    wrong = [
        f"{file.where}:{line}"
        for file in SHIPPED
        for name, line, _ in imports(file)
        if name.split(".")[0] in {"torch", "torchvision", "tensorflow"}
    ]
    assert wrong == []


def test_the_http_side_loads_no_jax_at_all():
    """Not even through what it imports: a worker process must start at once and hold no device."""
    rooms = {"server", "text", "scheduler", "vision"}
    modules = sorted(file.module for file in SHIPPED if file.room in rooms)
    modules += [file.module for file in SHIPPED if file.module == "jaxserve.engine.client"]
    script = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}];"
        "print([name for name in ('jax', 'flax', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_rules_catch_what_they_should():
    assert not is_allowed("server", "engine.loop", True)
    assert is_allowed("server", "engine.client", True)
    assert not is_allowed("models", "errors", True)
    assert not is_allowed("runner", "scheduler.schedule", True)
    assert not is_allowed("text", "weights.gguf", True)
    assert is_allowed("text", "weights.gguf.open_gguf", False)
    assert not is_allowed("text", "weights.gguf_names", False)
