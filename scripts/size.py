"""Print the size and the structure of the package: lines, modules, layers, imports between packages, function bodies.

Exits with 1 if a function body has more than 60 lines or a module more than 500. A folder other than this checkout's
can be named: `python scripts/size.py FOLDER`, for example one of an earlier version.
"""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BODY = 60
MAX_MODULE = 500
NAME = "lbr"


def main() -> int:
    """Print the figures; return 1 if a limit is passed."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    files = sorted((root / NAME).rglob("*.py"))
    modules = {_module_name(root, path): path for path in files}
    trees = {name: ast.parse(path.read_text()) for name, path in modules.items()}
    lines = {name: path.read_text().count("\n") for name, path in modules.items()}
    arrows = {
        (top, other)
        for name, tree in trees.items()
        for target in _imports(tree, modules)
        if (top := _top(name)) != (other := _top(target)) and NAME not in {top, other}
    }
    bodies = sorted((size, f"{name}.{function}") for name in trees for function, size in _bodies(trees[name]))
    sizes = [size for size, _ in bodies]
    by_length = sorted(lines.values())
    tops = {_top(name) for name in modules} - {NAME}
    print(f"lines {sum(by_length)}, modules {len(by_length)}")
    print(f"packages {len(tops)}, layers {_layers(tops, arrows)}, imports between them {len(arrows)}")
    print(f"module lines: median {statistics.median(by_length):.0f}, max {by_length[-1]}")
    p90 = sizes[int(len(sizes) * 0.9)]
    print(f"function bodies: {len(sizes)}, median {statistics.median(sizes):.0f}, p90 {p90}, max {bodies[-1][0]}")
    too_long = [f"{name}: a body of {size} lines" for size, name in bodies if size > MAX_BODY]
    too_long += [f"{name}: {size} lines" for name, size in lines.items() if size > MAX_MODULE]
    print("".join(f"too long: {one}\n" for one in too_long), end="")
    return int(bool(too_long))


def _module_name(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _top(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def _imports(tree: ast.Module, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for one in node.names:
                inner = f"{node.module}.{one.name}"
                yield inner if inner in modules else node.module


def _bodies(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            body = node.body[1:] if has_docstring and len(node.body) > 1 else node.body
            yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


def _layers(tops: set[str], arrows: set[tuple[str, str]]) -> int:
    """Return how many layers the packages form if each imports from lower ones only, cycles counted once."""

    def depth(top: str, seen: tuple[str, ...]) -> int:
        below = [other for one, other in arrows if one == top and other not in seen]
        return 1 + max((depth(other, (*seen, other)) for other in below), default=0)

    return max(depth(top, (top,)) for top in tops)


if __name__ == "__main__":
    sys.exit(main())
