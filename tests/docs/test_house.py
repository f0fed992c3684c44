"""The order of the house, read from the source: imports point down and never in a circle, each tool has one place."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import ROOT

PACKAGES = ("diffclip", "mllm", "stages")  # a floor each, from the bottom; diffclip.base lies below
MOST_INNER_IMPORTS = 60  # for optional packages, and for what a command imports once it knows what is asked
BACKBONES = ("diffclip.base.backbones", "diffclip.base.timm_vit")  # of the second copies are saved with models
CHANGES = ("setdefault", "update", "pop", "popitem", "clear")
TOOLS = {  # what diffclip.base does for all: call -> (the one to take instead, modules that need it raw)
    "json.load": ("files.read_json", ()),
    "yaml.safe_load": ("files.read_yaml", ()),
    "yaml.load": ("files.read_yaml", ()),
    "os.replace": ("files.write_whole or whole", ("diffclip.scenes.export", "stages.contrastive")),  # whole folders
    "csv.writer": ("lines.csv_text", ()),
    "tarfile.open": ("diffclip.base.archives", ("diffclip.scenes.parts",)),  # writes one
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_bytes()) for p in PACKAGES for path in (ROOT / p).rglob("*.py")}
NODES = {module: [*ast.walk(tree)] for module, tree in MODULES.items()}


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names; of a package of ours, the module in it where there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in inner]
    return []


def imports(module: str) -> Iterator[tuple[int, str]]:
    """(line, module) of all imports, also those inside functions and for type checking."""
    for node in NODES[module]:
        yield from ((node.lineno, name) for name in imported(node))


def dotted(node: ast.AST) -> str:
    """`sys.argv` of a name with one dot, "" of anything else."""
    return (
        f"{node.value.id}.{node.attr}" if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
    )


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: all but the bodies of functions and what is below `__main__`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def floor(module: str) -> int:
    return 0 if module.startswith("diffclip.base") else 1 + PACKAGES.index(module.split(".")[0])


def test_imports_are_absolute():
    assert not [m for m in MODULES for node in NODES[m] if getattr(node, "level", 0)]


def test_imports_never_run_in_a_circle():
    graph = {module: {name for _, name in imports(module) if name in MODULES and name != module} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports in a circle: " + " <- ".join(error.args[1]))


def test_imports_never_climb_a_floor():
    climbing = [
        f"{module}:{line} imports {name}"
        for module in MODULES
        for line, name in imports(module)
        if name in MODULES and floor(name) > floor(module)
    ]
    assert not climbing


def test_imports_stand_at_the_top():
    inner = {
        (module, node.lineno)
        for module, tree in MODULES.items()
        for function in functions(tree)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert len(inner) <= MOST_INNER_IMPORTS, sorted(inner)


def test_no_import_looks_at_the_command_line():
    reading = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in at_import(tree)
        if dotted(node) in ("sys.argv", "sys.orig_argv")
    ]
    assert not reading


def test_nothing_is_put_into_sys_modules():
    def writes(node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript):
            return dotted(node.value) == "sys.modules" and not isinstance(node.ctx, ast.Load)
        return isinstance(node, ast.Attribute) and dotted(node.value) == "sys.modules" and node.attr in CHANGES

    writing = [
        f"{module}:{node.lineno}"
        for module in MODULES
        if module not in BACKBONES
        for node in NODES[module]
        if writes(node)
    ]
    assert not writing


def test_open_clip_and_timm_are_imported_in_one_place_each():
    importing = [
        f"{module}:{line}"
        for module in MODULES
        if module not in BACKBONES
        for line, name in imports(module)
        if name.split(".")[0] in ("open_clip", "timm")
    ]
    assert not importing


@pytest.mark.parametrize("call", TOOLS)
def test_a_tool_of_the_ground_floor_is_not_written_again(call):
    instead, allowed = TOOLS[call]
    raw = [
        f"{module}:{node.lineno}"
        for module in MODULES
        if not module.startswith("diffclip.base") and module not in allowed
        for node in NODES[module]
        if isinstance(node, ast.Call) and dotted(node.func) == call
    ]
    assert not raw, f"take {instead}"


def test_lines_are_printed_by_the_ground_floor():
    """`print_line` shows what a stranger's name holds; `print` would have the terminal obey it."""
    raw = [
        f"{module}:{node.lineno}"
        for module in MODULES
        if module != "diffclip.base.lines"
        for node in NODES[module]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not raw, "take lines.print_line"
