"""The rules of the design that can be read off the source: who imports whom, who prints."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffmergefs
from diffmergefs import errors

PACKAGE = Path(diffmergefs.__file__).parent
ROOT = PACKAGE.name

# A module imports from lower levels only. A new module is entered at the level where it
# belongs; the package's own name is what `import diffmergefs` gives.
LEVELS = [
    {
        "background",
        "buffers", "descriptors", "errors", "extents", "filekey", "health", "health.finding",
        "integrity", "isolated", "layouts", "logformat", "logqueue", "mountinfo", "names", "once",
        "permissions", "pictures", "pictures.cells", "pictures.curve", "pictures.legend", "serving",
        "serving.contents", "serving.guard", "serving.holders", "serving.metrics",
        "serving.namespace", "serving.notify", "serving.readalarm", "serving.tuning", "workers",
        "workingsets", "workingsets.advise", "writing",
    },
    {
        "beneath", "foreign", "integrity.bmap", "integrity.state", "integrity.verdict",
        "layouts.bitmap", "layouts.chain", "pictures.canvas", "pictures.raster",
        "serving.asking", "serving.connection", "serving.daemon", "serving.mounttable",
        "serving.nextrequest", "serving.status", "serving.threads", "sparse", "workingsets.touches",
    },
    {
        "filesystems", "integrity.bmapreader", "layer", "layouts.snapshot", "lease",
        "serving.mountpoint", "serving.openmetrics",
    },
    {
        "content", "contentverdicts", "layouts.document", "layouts.presence", "layouts.ranges",
        "layouts.reader", "serving.access", "serving.host", "serving.ownmount", "serving.xattrs",
        "trust", "view", "writing.copying",
    },
    {
        "compare", "contentchecks", "explicit", "health.probe", "integrity.hashqueue",
        "integrity.pins", "integrity.seal", "layouts.cloudhypervisor", "layouts.forkd",
        "layouts.numbered", "layouts.superserve", "serving.dropbehind", "writing.output",
        "writing.outputdir", "writing.writebehind", "zeros",
    },
    {
        "integrity.sealing", "layouts.catalog", "pictures.extents_picture", "pictures.map_picture",
        "pictures.picture", "workingsets.workingset",
    },
    {"images", "layouts.watch", "writing.dependants", "writing.flatten", "writing.newdiff"},
    {
        "health.diagnosis", "info", "integrity.verify", "serving.store", "sides",
        "writing.apply", "writing.companions", "writing.rediff", "writing.squash",
    },
    {"health.doctor", "serving.openwatch", "serving.tree", "writing.newstore", ROOT},
    {
        "cli.optionalvalue", "serving.handles", "workingsets.prefetch", "workingsets.recorder",
        "writing.storediff",
    },
    {
        "cli.inherited", "cli.mountoptions", "cli.progress", "cli.tables", "cli.throwaway",
        "serving.operations",
        "workingsets.adviser", "workingsets.guarded",
    },
    {"cli.common", "cli.logs", "cli.trial", "serving.mount"},
    {
        "cli.completion", "cli.demo", "cli.doctor", "cli.picture", "cli.seal", "cli.sides",
        "cli.start", "cli.squash", "cli.status", "cli.terminal", "cli.umount",
        "cli.verify", "cli.write",
    },
    {"cli.compare", "cli.look", "cli.map", "cli.mount", "cli.prefetch", "cli.rediff"},
    {"cli.verbs"},
    {"cli"},
    {"__main__", "cli.helper"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}

SEES_FUSE = {"serving.operations", "serving.mount", "serving.nextrequest", "serving.threads"}
DRAWS = {
    f"pictures.{name}"
    for name in ("canvas", "curve", "extents_picture", "map_picture", "picture", "raster")
}
PRINTERS = {"print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or ROOT


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
MODULES = sorted(SOURCES)


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


def test_the_table_of_levels_names_every_module_once() -> None:
    entered = [module for modules in LEVELS for module in modules]
    assert sorted(entered) == MODULES, "enter new modules in LEVELS, take old ones out"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_levels(module: str) -> None:
    wrong = {name for name in own_imports(module) if LEVEL[name] >= LEVEL[module]}
    assert not wrong, f"{module} (level {LEVEL[module]}) imports {wrong}"


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
    assert bool(asked) == (module == "sparse")
    assert "0xC020660B" not in text.upper().replace("0X", "0x") or module == "sparse"


@pytest.mark.parametrize("module", MODULES)
def test_no_import_hides_in_a_string(module: str) -> None:
    assert not names_used(module) & {"__import__", "import_module", "exec", "eval"}


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_starts_an_interpreter(module: str) -> None:
    """It says where the new one looks for modules. (A fork goes on with those that are there.)"""
    text = SOURCES[module].read_text(encoding="utf-8")
    starts = names_used(module) & {"executable", "orig_argv", "_base_executable"}
    assert not starts or module == "isolated"
    others = {"ProcessPoolExecutor", "posix_spawn", "spawnv", "spawnvp", "spawnl", "execv", "execl"}
    assert not names_used(module) & {*others, "execve", "execvp", "popen", "getoutput"}
    contexts = re.findall(r"get_context\((.*?)\)", text)
    assert set(contexts) <= {'"fork"'}
    words = [n.value for n in ast.walk(parsed(module)) if isinstance(n, ast.Constant)]
    assert not [w for w in words if isinstance(w, str) and re.fullmatch(r"(/\S*/)?python[\d.]*", w)]


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
