"""The rules of the house, read off the source: imports, environment, length, docstrings.

Each rule is a function from a module to its breaches. `test_every_rule_sees_a_breach` hands each a
few lines that break it, so that a rule which no longer looks at anything fails too.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from house import CALLS_AT_IMPORT, DISTRIBUTED, ENVIRONMENT, MAY_IMPORT, OPTIONAL, TITAN

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "microtron").rglob("*.py"))
SOURCES = sorted(
    p
    for folder in ("microtron", "tests", "benchmarks")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in (".py", ".sh")
)
SOURCES += sorted(ROOT.glob("*.sh"))
MOST_LINES = 400
AT_IMPORT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def name_of(path):
    """``data.loader`` for microtron/data/loader.py."""
    return ".".join(path.relative_to(ROOT / "microtron").with_suffix("").parts)


def within(name, rooms):
    """Whether a module is one of, or lies in, ``rooms``."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def imports(tree):
    """Every imported module; ``from microtron import x`` counts as microtron.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            packages = ("microtron", "microtron.data", "microtron.model", "torch")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module in packages else [node.module]


def wrong_directions(name, tree):
    """Imports of microtron that the table does not allow."""
    room = name if name in MAY_IMPORT else name.split(".")[0]
    if room not in MAY_IMPORT:
        return [f"{name} is not in MAY_IMPORT"]
    found = [i.removeprefix("microtron.") for i in imports(tree) if i.split(".")[0] == "microtron"]
    return [f"{name} imports {i}" for i in found if not within(i, MAY_IMPORT[room])]


def wrong_libraries(name, tree):
    """Processes, TorchTitan and other libraries where they do not belong."""
    for module in imports(tree):
        if module.startswith("torch.distributed") and not within(name, DISTRIBUTED):
            yield f"{name} imports {module}"
        if module.split(".")[0] == "torchtitan" and not within(name, TITAN):
            yield f"{name} imports {module}"
        here = sys.stdlib_module_names | {"torch", "microtron"}
        if within(name, ["model"]) and module.split(".")[0] not in here:
            yield f"{name} imports {module}: model/ is torch alone"
    if not within(name, DISTRIBUTED) and "torch.distributed" in map(dotted, ast.walk(tree)):
        yield f"{name} uses torch.distributed"


def dotted(node):
    """``a.b`` for that expression."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return ""


def hasty_imports(name, tree):
    """Optional packages imported with the module instead of in the function that needs them."""
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in late:
            for module in imports(ast.Module([node], [])):
                if module.split(".")[0] in OPTIONAL:
                    yield f"{name} imports {module} at module level"


def environment(name, tree):
    """Reads of os.environ."""
    if name in ENVIRONMENT:
        return
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom)
            else [getattr(node, "attr", "")]
        )
        if {"environ", "getenv", "putenv", "environb"} & set(names):
            yield f"{name}:{node.lineno} touches os.environ"


def calls(node):
    """Calls made when the node runs, those in lambdas left out."""
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls(child)


def runs_at_import(statement):
    """The parts of a definition or an assignment that run with it."""
    if isinstance(statement, ast.FunctionDef):
        defaults = statement.args.defaults + statement.args.kw_defaults
        return statement.decorator_list + [d for d in defaults if d is not None]
    if isinstance(statement, ast.ClassDef):
        return statement.decorator_list + [
            part for inner in statement.body for part in runs_at_import(inner)
        ]
    return [statement]


def work_at_import(name, tree):
    """Statements and calls that do something while the module is imported."""
    if name == "accelerator":
        return
    for statement in tree.body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_entry = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
        is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        if is_text or is_entry:
            continue
        if not isinstance(statement, AT_IMPORT) and not is_call:
            yield f"{name}:{statement.lineno} runs {ast.unparse(statement)[:60]!r} at import"
        for part in runs_at_import(statement):
            for call in calls(part):
                if ast.unparse(call.func) not in CALLS_AT_IMPORT:
                    yield f"{name}:{call.lineno} calls {ast.unparse(call.func)} at import"


def bare_functions(name, tree):
    """Public functions without a docstring or with a parameter or result without a type.

    A method may take its docstring over from the class that it overrides.
    """
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    for owner in (tree, *classes):
        overrides = bool(getattr(owner, "bases", []))
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            arguments = [a for a in arguments if a.arg not in ("self", "cls")]
            bare = [a.arg for a in arguments if a.annotation is None]
            if bare or node.returns is None:
                yield f"{name}.{node.name} lacks types: {', '.join(bare) or 'its result'}"
            if ast.get_docstring(node) is None and not overrides:
                yield f"{name}.{node.name} has no docstring"


RULES = (
    wrong_directions,
    wrong_libraries,
    hasty_imports,
    environment,
    work_at_import,
    bare_functions,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package(rule):
    found = []
    for path in PACKAGE:
        found += rule(name_of(path), ast.parse(path.read_text()))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "rule, name, source, breach",
    [
        (wrong_directions, "model.moe", "from microtron.parallel import apply", "imports parallel"),
        (
            wrong_directions,
            "model.moe",
            "def f():\n    import microtron.flavors",
            "imports flavors",
        ),
        (
            wrong_directions,
            "data.loader",
            "from microtron.model.args import A",
            "imports model.args",
        ),
        (wrong_directions, "spec", "from microtron import train", "imports train"),
        (wrong_directions, "flavors", "from microtron.model.model import T", "imports model.model"),
        (wrong_directions, "brand.new", "", "not in MAY_IMPORT"),
        (wrong_libraries, "model.moe", "import torch.distributed as dist", "torch.distributed"),
        (wrong_libraries, "model.moe", "from torch import distributed", "torch.distributed"),
        (
            wrong_libraries,
            "model.moe",
            "import torch\ntorch.distributed.get_rank()",
            "uses torch.dist",
        ),
        (wrong_libraries, "data.loader", "from torchtitan.config import JobConfig", "torchtitan"),
        (wrong_libraries, "model.moe", "import numpy as np", "torch alone"),
        (hasty_imports, "data.sources", "import pyarrow.parquet as pq", "pyarrow.parquet"),
        (hasty_imports, "loss", "try:\n    import wandb\nexcept ImportError:\n    pass", "wandb"),
        (environment, "data.loader", "import os\nx = os.environ['A']", "touches"),
        (environment, "data.loader", "from os import environ", "touches"),
        (environment, "data.loader", "import os\nx = os.getenv('A')", "touches"),
        (work_at_import, "loss", "x = open('a')", "calls open"),
        (work_at_import, "loss", "print('hello')", "calls print"),
        (work_at_import, "loss", "for i in (1, 2):\n    pass", "runs"),
        (work_at_import, "loss", "def f(x: int = len('a')):\n    pass", "calls len"),
        (work_at_import, "loss", "class A:\n    x = sorted([1])", "calls sorted"),
        (bare_functions, "loss", "def f(x) -> int:\n    '''Doc.'''", "lacks types: x"),
        (bare_functions, "loss", "def f(x: int):\n    '''Doc.'''", "its result"),
        (
            bare_functions,
            "loss",
            "class A:\n    def f(self) -> int:\n        return 1",
            "no docstring",
        ),
    ],
)
def test_every_rule_sees_a_breach(rule, name, source, breach):
    assert breach in " ".join(rule(name, ast.parse(source)))


def test_rules_let_good_code_pass():
    good = (
        "'''Doc.'''\nimport re\nfrom torch import nn\n_X = re.compile('a')\n"
        "F = {1: lambda v: len(v)}\n"
        "def f(x: int = 3) -> int:\n    '''Doc.'''\n    import os\n    return len('a')\n"
        "def _g(x): return print(x)\nif __name__ == '__main__':\n    f()\n"
    )
    for rule in RULES:
        assert not list(rule("model.moe", ast.parse(good))), rule


def test_the_tables_name_what_is_there():
    names = {name_of(path) for path in PACKAGE}
    rooms = names | {name.split(".")[0] for name in names}
    assert not (MAY_IMPORT.keys() | DISTRIBUTED | TITAN | ENVIRONMENT) - rooms


def test_no_file_is_long():
    long = {
        str(p.relative_to(ROOT)): n
        for p in SOURCES
        if (n := p.read_text().count("\n")) > MOST_LINES
    }
    assert not long
    assert len(SOURCES) > 60  # and there was something to count


def test_every_file_says_what_it_is():
    def says(path, text):
        if path.suffix == ".py":
            return ast.get_docstring(ast.parse(text))
        return text.splitlines()[1].startswith("# ")

    assert not [path for path in SOURCES if not says(path, path.read_text())]


@pytest.mark.parametrize(
    "code, absent",
    [
        ("import microtron", ["torch", "numpy"]),
        (
            "import sys; from microtron.cli import main; sys.exit(main(['--help']))",
            ["torch", "numpy"],
        ),
        ("import microtron.model.model", ["torchtitan"]),
        ("import microtron.infer.generate", ["torchtitan", "transformers"]),
    ],
    ids=["import", "--help", "model", "generate"],
)
def test_light_imports(code, absent):
    found = f"sorted({set(absent)} & sys.modules.keys())"
    code = f"import atexit, sys\natexit.register(lambda: print({found}))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
