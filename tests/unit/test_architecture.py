"""The rules of the design that can be read off the source: who imports whom, who prints."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import diffmergefs
from diffmergefs.core import errors

PACKAGE = Path(diffmergefs.__file__).parent
ROOT = PACKAGE.name

# A folder imports only from folders on lower levels. The package's face, `__init__.py`, is what
# `import diffmergefs` gives.
LEVELS = [
    {"core"},
    {"sidecars", "system"},
    {"stores"},
    {"opening"},
    {"analysis"},
    {"writing"},
    {"checks", "pictures"},
    {"fuse"},
    {"prefetch"},
    {"uffd"},
    {"cli"},
    {ROOT},
]
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}

SEES_FUSE = {
    f"fuse.{name}"
    for name in [
        "lifecycle",
        "looking",
        "marks",
        "mounting",
        "opener",
        "operations",
        "readloop",
        "replies",
        "session",
        "threads",
    ]
}
# cli.picture only tries whether matplotlib is installed.
DRAWS = {
    *(f"pictures.{name}" for name in ("canvas", "extents_picture", "map_picture", "raster")),
    "cli.picture",
}
PRINTERS = {"print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or ROOT


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
MODULES = sorted(SOURCES)


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imported(module: str) -> Iterator[str]:
    """The full names of all modules that a module imports, wherever in it."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import, write the full name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix(f"{ROOT}.") in SOURCES
                yield inner if is_module else str(node.module)


def own_imports(module: str) -> set[str]:
    """What a module imports from this package, by the names of the table."""
    found = {name for name in imported(module) if name.split(".")[0] == ROOT}
    return {name.removeprefix(f"{ROOT}.") for name in found}


def folder_of(module: str) -> str:
    """The folder a module lies in; ROOT for those of the package itself."""
    return module.split(".")[0] if module.split(".")[0] in LEVEL else ROOT


def test_every_folder_has_a_level() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders | {ROOT} == LEVEL.keys()
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("folder", sorted(LEVEL))
def test_a_folder_imports_only_from_lower_levels(folder: str) -> None:
    arrows = {
        (module, name)
        for module in MODULES
        if folder_of(module) == folder
        for name in own_imports(module)
        if folder_of(name) != folder and LEVEL[folder_of(name)] >= LEVEL[folder]
    }
    assert not arrows


def imports_of_a_folder(folder: str) -> dict[str, set[str]]:
    """The modules of a folder, and which of them each imports."""
    inside = {module for module in MODULES if folder_of(module) == folder}
    return {module: own_imports(module) & inside - {module} for module in inside}


@pytest.mark.parametrize("folder", sorted(LEVEL))
def test_the_modules_of_a_folder_import_each_other_in_no_circle(folder: str) -> None:
    tuple(TopologicalSorter(imports_of_a_folder(folder)).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_only_the_adapter_and_the_mount_see_the_runtime(module: str) -> None:
    runtime = {name.split(".")[0] for name in imported(module)} & {"pyfuse3", "trio"}
    assert not runtime or module in SEES_FUSE


@pytest.mark.parametrize("module", MODULES)
def test_only_the_pictures_see_what_draws_them(module: str) -> None:
    drawing = {name.split(".")[0] for name in imported(module)} & {"matplotlib", "numpy", "PIL"}
    assert not drawing or module in DRAWS


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_knows_a_terminal(module: str) -> None:
    tools = {name.split(".")[0] for name in imported(module)} & {"click", "rich"}
    assert not tools or module.split(".")[0] == "cli"


def names_used(module: str) -> set[str]:
    nodes = list(ast.walk(parsed(module)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module: str) -> None:
    calls = [node.func for node in ast.walk(parsed(module)) if isinstance(node, ast.Call)]
    printers = [call for call in calls if ast.unparse(call) in PRINTERS]
    assert not printers or module.split(".")[0] == "cli"


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_asks_for_holes(module: str) -> None:
    text = SOURCES[module].read_text(encoding="utf-8")
    asked = names_used(module) & {"SEEK_DATA", "SEEK_HOLE"}
    assert bool(asked) == (module == "core.sparse")
    assert "0xC020660B" not in text.upper().replace("0X", "0x") or module == "core.sparse"


@pytest.mark.parametrize("module", MODULES)
def test_no_import_hides_in_a_string(module: str) -> None:
    """Except the table of verbs, so that a verb loads only what it needs.

    tests/unit/cli/test_verbs.py checks its targets. They are in cli/, where anything may be
    imported.
    """
    hidden = names_used(module) & {"__import__", "import_module", "exec", "eval"}
    assert hidden == ({"import_module"} if module == "cli.verbs" else set())


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_starts_an_interpreter(module: str) -> None:
    """It says where the new one looks for modules. (A fork goes on with those that are there.)"""
    text = SOURCES[module].read_text(encoding="utf-8")
    starts = names_used(module) & {"executable", "orig_argv", "_base_executable"}
    # system.installation names it in a message.
    assert not starts or module in ("system.children", "system.installation")
    others = {"ProcessPoolExecutor", "posix_spawn", "spawnv", "spawnvp", "spawnl", "execv", "execl"}
    assert not names_used(module) & {*others, "execve", "execvp", "popen", "getoutput"}
    contexts = re.findall(r"get_context\((.*?)\)", text)
    assert set(contexts) <= {'"fork"'}
    if module == "cli.demo":
        return  # there it is the name of a snapshot
    words = [n.value for n in ast.walk(parsed(module)) if isinstance(n, ast.Constant)]
    assert not [w for w in words if isinstance(w, str) and re.fullmatch(r"(/\S*/)?python[\d.]*", w)]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_a_comment_or_docstring_names_exists(module: str) -> None:
    text = SOURCES[module].read_text(encoding="utf-8")
    folders = "|".join(LEVEL.keys() - {ROOT})
    named = set(re.findall(rf"`(?:{ROOT}\.)?((?:{folders})\.\w+)", text))
    # The type of our mounts, and a function of a folder's own module.
    assert named - {"fuse.diffmergefs", "cli.main"} <= SOURCES.keys()


def test_each_error_has_an_exit_code_of_its_own_and_an_errno() -> None:
    family = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.DiffMergeError)
    ]
    codes = [error.exit_code for error in family if error is not errors.DiffMergeError]
    assert len(codes) == len(set(codes)) > 10
    assert min(codes) > 2  # 0 fine, 1 'no', 2 usage
    assert all(error.errno > 0 for error in family)


_WITHOUT_RUNTIME = """
import importlib, sys
sys.modules["pyfuse3"] = sys.modules["trio"] = None
for name in sys.argv[2].split(","):
    importlib.import_module(name)
import diffmergefs
from tests.support.images import PAGE, signed, write_layer
from pathlib import Path
directory = Path(sys.argv[1])
base = write_layer(directory / "base", 4 * PAGE, [(0, signed(0, 0, 4 * PAGE))])
diff = write_layer(directory / "diff", 4 * PAGE, [(PAGE, signed(1, PAGE, PAGE))])
expected = signed(0, 0, PAGE) + signed(1, PAGE, PAGE) + signed(0, 2 * PAGE, 2 * PAGE)
with diffmergefs.open_chain(base, [diff]).view as view:
    assert view.read(0, view.size) == expected
    diffmergefs.flatten(view, directory / "whole")
assert (directory / "whole").read_bytes() == expected
print("done")
"""


def test_all_but_the_mount_works_without_pyfuse3_and_trio(tmp_path: Path) -> None:
    names = [f"{ROOT}.{name}" for name in MODULES if name not in {*SEES_FUSE, ROOT, "__main__"}]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WITHOUT_RUNTIME, str(tmp_path), ",".join(names)],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


# The tests

TESTS = Path(__file__).parents[1]
#: What a test asks for that needs root, loop devices or FUSE.
NEED_MORE = {"filesystem", "real_fs", "overlay_fs", "loopfs", "mounted", "diffmergefs_as_nobody"}
NEED_MORE |= {"run_as", "require_root", "require_mounts", "require_loop", "require_fuse"}
_OF_NAMEDTUPLES = {"_replace", "_asdict", "_fields", "_make"}


@cache
def own_test(module: str) -> Path:
    """The unit test of a module, by its place in the package; commands are run in tests/cli."""
    *folders, name = module.split(".")
    unit = TESTS.joinpath("unit", *folders, f"test_{name}.py")
    command = TESTS / "cli" / unit.name
    return command if folders == ["cli"] and command.exists() else unit


def test_every_module_has_a_unit_test_of_its_name() -> None:
    modules = [m for m in MODULES if SOURCES[m].name != "__init__.py" and m != "__main__"]
    assert not [m for m in modules if not own_test(m).exists()]


@pytest.mark.parametrize("path", sorted((TESTS / "unit").rglob("test_*.py")), ids=lambda p: p.stem)
def test_a_unit_test_needs_neither_root_nor_a_mount(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    used = {node.arg for node in nodes if isinstance(node, ast.arg)}
    used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not used & NEED_MORE


def is_private(name: object) -> bool:
    """Whether it names something private of a module, a class or an object."""
    last = name.rpartition(".")[2] if isinstance(name, str) else ""
    return last.startswith("_") and not last.startswith("__") and last not in _OF_NAMEDTUPLES


def private_names(path: Path) -> list[str]:
    """The imports, patches and reads of private names in a file, each as `line: code`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == ROOT:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix(f"{ROOT}.")
                module = inner if inner in SOURCES else str(node.module).removeprefix(f"{ROOT}.")
                modules[alias.asname or alias.name] = module
                if is_private(alias.name) and own_test(module) != path:
                    found.append(f"{node.lineno}: {alias.name}")
    is_of_a_module = any(own_test(module) == path for module in MODULES)

    def counts(of: ast.expr) -> bool:
        base = ast.unparse(of).split(".")[0]
        if base in modules:
            return own_test(modules[base]) != path
        return base not in {"self", "cls", "os"} and not is_of_a_module

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            target, *rest = node.args
            name = target if isinstance(target, ast.Constant) else rest[0]
            of = str(getattr(target, "value", "")).rpartition(".")[0].removeprefix(f"{ROOT}.")
            elsewhere = counts(target) if name is not target else own_test(of) != path
            if isinstance(name, ast.Constant) and is_private(name.value) and elsewhere:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and counts(node.value):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_only_a_modules_own_unit_test_uses_its_private_names() -> None:
    found = {path: private_names(path) for path in TESTS.rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}
