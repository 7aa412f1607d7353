"""The house, held: imports go down, functions and files stay small, nothing draws from global random state."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "utils": {"utils"},
    "data": {"data", "utils"},
    "optimizer": {"optimizer", "utils"},
    "plugins": {"plugins", "utils"},
}
SOURCES = [ROOT / "train.py", *sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]
OWNERS = {
    "accelerate": {"utils/device.py"},
    "diffusers": {"utils/models.py", "utils/convert.py", "utils/sampling.py"},
    "transformers": {"utils/models.py", "utils/convert.py", "utils/sampling.py"},
}
# Tables of names, one entry a line, may be longer than a file of code.
TABLES = {"utils/config.py"}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node, node.module or ""


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_down_only(name: str) -> None:
    room = name.split("/")[0]
    if room not in ROOMS:
        return
    for _, module in imports(tree_of(ROOT / name)):
        top = module.split(".")[0]
        assert top not in {"train", "starter", "tests"}, f"{name} imports {module}"
        assert top not in ROOMS or top in ROOMS[room], f"{name} imports {module}, sideways or up"


@pytest.mark.parametrize("name", NAMES)
def test_libraries_stay_with_their_owners(name: str) -> None:
    tree = tree_of(ROOT / name)
    at_top = {id(node) for node in tree.body}
    for node, module in imports(tree):
        top = module.split(".")[0]
        if top in OWNERS and not _for_types_only(tree, node):
            assert name.replace("\\", "/") in OWNERS[top], f"{name} imports {module}"
            assert id(node) not in at_top, f"{name} imports {module} when it is imported itself"
    if name != str(Path("utils/device.py")):
        for node in ast.walk(tree):
            named = isinstance(node, ast.Attribute) and node.attr == "cuda" and getattr(node.value, "id", "") == "torch"
            assert not named, f"{name} names torch.cuda"


def _for_types_only(tree: ast.Module, node: ast.AST) -> bool:
    guards = [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    return any(node is inner for guard in guards for inner in ast.walk(guard))


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_small(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.replace("\\", "/") not in TABLES:
        assert len(text.splitlines()) <= 300, name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, f"{name}: {node.name}"


@pytest.mark.parametrize("name", NAMES)
def test_files_are_nouns_that_say_what_lives_there(name: str) -> None:
    assert not re.search(r"(^|/)(misc|common|helpers|\w*_utils)\.py$", name.replace("\\", "/"))
    text = (ROOT / name).read_text(encoding="utf-8")
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{name} does not open with a sentence"


GLOBAL_DRAWS = {
    "random": {
        "random", "randint", "randrange", "choice", "choices", "shuffle", "sample", "uniform", "gauss", "normalvariate",
        "seed", "setstate", "expovariate", "triangular", "betavariate",
    },
    "torch": {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like"},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_nothing_draws_from_global_random_state(name: str) -> None:
    for node in ast.walk(tree_of(ROOT / name)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module, drawn = getattr(node.func.value, "id", ""), node.func.attr
        if drawn in GLOBAL_DRAWS.get(module, ()):
            seeded = module == "torch" and any(keyword.arg == "generator" for keyword in node.keywords)
            assert seeded, f"{name}:{node.lineno} draws with {module}.{drawn} from global state"
        assert not (module in {"np", "numpy"} and drawn == "random"), f"{name}:{node.lineno}"
        if isinstance(node.func.value, ast.Attribute) and node.func.value.attr == "random":
            assert drawn in {"default_rng", "fork_rng", "Generator"}, f"{name}:{node.lineno} numpy.random.{drawn}"


def test_rooms_have_no_cycles() -> None:
    graph = {}
    for name in NAMES:
        module = name.replace("\\", "/").removesuffix(".py").replace("/", ".")
        graph[module] = {imported for _, imported in imports(tree_of(ROOT / name))}
    graph = {module: {to for to in targets if to in graph} for module, targets in graph.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
