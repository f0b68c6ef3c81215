"""The house rules as data: who may import whom, what is forbidden, how large things grow, what must be documented.

Sources are parsed, never run. Every rule that finds nothing today is shown to find something in a made-up source.
"""

import ast
import graphlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ecdit_ds"

LAYERS = (
    ("errors", "seeding"),
    ("files",),
    ("config",),
    ("model", "flow", "data"),
    ("parallel",),
    ("checkpoint", "planner"),
    ("runtime", "slurm"),
    ("inference",),
    ("evaluation",),
    ("interpret", "pipeline"),
    ("training",),
    ("train",),
)
"""Low to high, folders and the modules beside them. A module imports from lower rows, and from its own folder; never
from a neighbour in its row."""

USES_ONLY = {
    "model": ("config", "seeding"),
    "flow": ("config", "seeding"),
    "data": ("config", "errors", "seeding", "files"),
    "parallel": ("config", "errors", "model"),
    "checkpoint": ("config", "errors", "files"),
    # What a recipe's model holds is asked of the model, by the converter alone.
    "checkpoint.convert.open": ("config", "errors", "model", "parallel"),
    "planner": ("config", "errors", "files", "parallel"),
}
"""Folders and modules that know less than their row would allow; the longest name counts."""

IMPORTED_ONLY_BY = {
    # A pickle is a program. One module reads such files as data, and writes them for others.
    "torch.load": ("checkpoint.convert.pt_file",),
    "torch.save": ("checkpoint.convert.pt_file",),
    "torch.serialization": ("checkpoint.convert.pt_file",),
    "deepspeed": ("training.engine", "parallel.setup", "parallel.deepspeed_moe", "tools/benchmarks/layers.py"),
    "megatron": ("parallel",),
    # Seconds to import, and of no use to training.
    "torchmetrics": ("evaluation",),
    "datasets": ("data.latents.shard_writer", "data.sources.dataset_rows", "inference.prompts", "tools/benchmarks"),
    "matplotlib": ("inference.figures", "interpret"),
}
"""The benchmarks may, since they measure others' layers and loaders beside ours."""
NEVER_IN = {
    "torch": (
        "errors",
        "config",
        "files.durable",
        "parallel.topology",
        "parallel.partition_rules",
        "checkpoint.naming",
        "planner",
        *(
            f"slurm.{name}"
            for name in (
                "array_task",
                "completion",
                "controller",
                "job_history",
                "rank",
                "rank_logs",
                "ranks",
                "run_task",
                "signals",
                "supervise",
            )
        ),
    ),
    "torch.distributed": ("model", "flow", "data", "checkpoint"),
}
NEVER_ANYWHERE = (
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.Loader",
    "yaml.UnsafeLoader",
)
BESIDE_PEERS = {"tools/benchmarks/checkpoint.py": ("torch.load", "torch.save")}
"""The benchmark may, since it measures torch's formats beside ours; what it reads it wrote itself."""
NEVER_SET = {"shell": True, "allow_pickle": True, "weights_only": False}
MAX_FILE_STATEMENTS = 300
MAX_FUNCTION_STATEMENTS = 40
"""Statements, not lines: nothing is won by writing densely."""
MAX_LINES_WITHOUT_DOCSTRING = 8

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, kw_only=True)
class Source:
    """One Python file."""

    name: str
    """Dotted, within the package (`parallel.topology`), or a path for what is outside."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def names(self) -> list[tuple[str, int]]:
        """Every dotted name that is imported or spoken, with its line."""
        return list(names_used(self.tree))


def package_sources() -> list[Source]:
    """Return every file of the package; `__init__` has its folder's name."""
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found.append(Source(name=name, text=path.read_text(encoding="utf-8")))
    return found


def tool_sources() -> list[Source]:
    """Return the command-line tools."""
    paths = sorted((ROOT / "tools").rglob("*.py"))
    return [Source(name=path.relative_to(ROOT).as_posix(), text=path.read_text(encoding="utf-8")) for path in paths]


def names_used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield every dotted name that is imported or spoken, aliases resolved, with its line."""
    alias: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                alias[item.asname or item.name.split(".")[0]] = item.name if item.asname else item.name.split(".")[0]
                yield item.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            for item in node.names:
                name = f"{'.' * node.level}{node.module or ''}.{item.name}"
                alias[item.asname or item.name] = name
                yield name, node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            root, _, rest = ast.unparse(node).partition(".")
            yield ".".join(filter(None, (alias.get(root, root), rest))), node.lineno


def is_within(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a dotted name is one of `prefixes` or inside one."""
    return any(name == prefix or name.startswith((f"{prefix}.", f"{prefix}/")) for prefix in prefixes)


def own_imports(source: Source, modules: set[str]) -> dict[str, int]:
    """Return which of our modules a file uses, with a line; imports inside functions count."""
    found: dict[str, int] = {}
    for name, line in source.names:
        parts = name.removeprefix(f"{PACKAGE}.").split(".") if is_within(name, [PACKAGE]) else []
        while parts and ".".join(parts) not in modules:
            parts.pop()
        if parts and ".".join(parts) != source.name:
            found[".".join(parts)] = line
    return found


def row_of(module: str) -> tuple[int, str] | None:
    """Return the row of LAYERS that a module stands in, and under which entry; the package itself is below all."""
    if not module:
        return -1, module
    for row, entries in enumerate(LAYERS):
        for entry in entries:
            if is_within(module, [entry]):
                return row, entry
    return None


def law_faults(sources: list[Source]) -> list[str]:
    """Return every import that LAYERS, USES_ONLY or absolute naming forbids, and every module without a row."""
    modules = {source.name for source in sources}
    faults = []
    for source in (source for source in sources if source.text.strip()):
        here = row_of(source.name)
        if here is None:
            faults.append(f"{source.name}: has no row in LAYERS")
            continue
        for target, line in own_imports(source, modules).items():
            there = row_of(target)
            is_downward = there is not None and (there[0] < here[0] or there[1] == here[1])
            limits = max((name for name in USES_ONLY if is_within(source.name, [name])), key=len, default="")
            is_known = is_within(target, (*USES_ONLY.get(limits, (target,)), here[1]))
            if not (is_downward and is_known):
                faults.append(f"{source.name}:{line} imports {target}")
        faults += [f"{source.name}:{line} imports {name}" for name, line in source.names if name.startswith(".")]
    return faults


def fence_faults(source: Source) -> list[str]:
    """Return every name that may not be used in this file."""
    faults = []
    for name, line in source.names:
        fenced = [lib for lib, homes in IMPORTED_ONLY_BY.items() if not is_within(source.name, homes)]
        fenced += [lib for lib, places in NEVER_IN.items() if is_within(source.name, places)]
        if is_within(name, (*fenced, *NEVER_ANYWHERE)) and name not in BESIDE_PEERS.get(source.name, ()):
            faults.append(f"{source.name}:{line} uses {name}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            forbidden = NEVER_SET.get(node.arg or "")
            if forbidden is not None and node.value.value is forbidden:
                faults.append(f"{source.name}:{node.value.lineno} sets {node.arg}={forbidden}")
        if isinstance(node, ast.Global):
            faults.append(f"{source.name}:{node.lineno} has a global statement")
    if source.name.split(".")[-1].removesuffix(".py").split("/")[-1] in ("utils", "util", "helpers", "misc"):
        faults.append(f"{source.name}: says nothing about what it is for")
    return faults + careless_loads(source)


def careless_loads(source: Source) -> list[str]:
    """Return mentions of torch.load other than calls that spell out `weights_only=True`."""
    lines = [line for name, line in source.names if name == "torch.load"]
    careful = [
        node.lineno
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
        for given in node.keywords
        if given.arg == "weights_only" and isinstance(given.value, ast.Constant) and given.value.value is True
    ]
    return [f"{source.name}:{line} loads without weights_only=True" for line in lines if line not in careful]


def size_faults(source: Source) -> list[str]:
    """Return the file and the functions that have grown too long."""
    count = num_statements(source.tree)
    faults = [f"{source.name}: {count} statements"] if count > MAX_FILE_STATEMENTS else []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and num_statements(node) > MAX_FUNCTION_STATEMENTS:
            faults.append(f"{source.name}:{node.lineno} {node.name}: {num_statements(node)} statements")
    return faults


def undocumented(source: Source) -> list[str]:
    """Return public classes, functions and methods that are long and say nothing, nor does the base they override."""
    faults = [] if ast.get_docstring(source.tree) or not source.text.strip() else [f"{source.name}: the module"]
    public = {path: node for node, path in public_definitions(source.tree, "")}
    for path, node in public.items():
        owner, _, name = path.rpartition(".")
        bases = [ast.unparse(base) for base in getattr(public.get(owner), "bases", [])]
        explained = [node, *(public[f"{base}.{name}"] for base in bases if f"{base}.{name}" in public)]
        if num_lines(node) > MAX_LINES_WITHOUT_DOCSTRING and not any(map(ast.get_docstring, explained)):
            faults.append(f"{source.name}:{node.lineno} {path}")
    return faults


def public_definitions(parent: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[Definition, str]]:
    """Yield public functions, classes and methods. A model's `forward` is what its class says, as `__init__` is."""
    for node in parent.body:
        if isinstance(node, Definition) and not node.name.startswith("_") and node.name != "forward":
            yield node, f"{path}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{path}{node.name}.")


def num_statements(node: ast.AST) -> int:
    """Return how many statements are inside, docstrings among them."""
    return sum(isinstance(inner, ast.stmt) for inner in ast.walk(node) if inner is not node)


def num_lines(node: Definition) -> int:
    """Return how many lines a definition takes, without decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def closure(module: str, graph: dict[str, set[str]]) -> set[str]:
    """Return a module and all of ours that importing it imports."""
    reached, waiting = set[str](), {module}
    while waiting:
        reached |= waiting
        waiting = set().union(*(graph[name] for name in waiting)) - reached
    return reached


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    """Return the package, parsed once."""
    return package_sources()


def test_the_sources_that_the_rules_are_checked_on_are_all_there(sources: list[Source]) -> None:
    assert len(sources) >= 40
    assert sum(len(own_imports(s, {other.name for other in sources})) for s in sources) >= 100
    assert len(tool_sources()) >= 1
    assert sum(len(list(public_definitions(s.tree, ""))) for s in sources) >= 150


def test_modules_import_only_from_rows_below(sources: list[Source]) -> None:
    assert law_faults(sources) == []


def test_every_row_of_the_law_names_something_that_exists(sources: list[Source]) -> None:
    names = {source.name for source in sources}
    assert [entry for row in LAYERS for entry in row if entry not in names] == []


@pytest.mark.parametrize(
    ("module", "text", "fault"),
    [
        ("model.moe", "from ecdit_ds.flow.rectified import interpolate", "model.moe:1 imports flow.rectified"),
        ("flow.guidance", "from ecdit_ds.parallel import topology", "flow.guidance:1 imports parallel.topology"),
        ("checkpoint.boxes", "def f():\n    import ecdit_ds.seeding", "checkpoint.boxes:2 imports seeding"),
        ("config.recipe", "import ecdit_ds.training.trainer as t", "config.recipe:1 imports training.trainer"),
        ("evaluation.fid", "from ecdit_ds.training import ema", "evaluation.fid:1 imports training.ema"),
        ("model.experts", "from .layers import LayerFactory", "model.experts:1 imports .layers"),
        ("checkpoint.reader", "from ecdit_ds.model import ecdit", "checkpoint.reader:1 imports model.ecdit"),
        ("checkpoint.convert.open", "import ecdit_ds.files.durable", "checkpoint.convert.open:1 imports files.durable"),
        ("novelty", "x = 1", "novelty: has no row"),
        ("", "from ecdit_ds.errors import EcditError", ":1 imports errors"),
    ],
)
def test_a_forbidden_import_is_found(sources: list[Source], module: str, text: str, fault: str) -> None:
    others = [source for source in sources if source.name != module]
    (found,) = law_faults([*others, Source(name=module, text=text)])
    assert found.startswith(fault)


def test_no_module_reaches_itself_through_its_imports(sources: list[Source]) -> None:
    modules = {source.name for source in sources}
    graph = {source.name: set(own_imports(source, modules)) for source in sources}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(modules)
    assert order.index("errors") < order.index("config.recipe") < order.index("training.setup") < order.index("train")


def test_recipes_and_layouts_are_checked_without_torch(sources: list[Source]) -> None:
    by_name = {source.name: source for source in sources}
    graph = {source.name: set(own_imports(source, set(by_name))) for source in sources}
    for module in (name for name in graph if is_within(name, NEVER_IN["torch"])):
        reached = closure(module, graph)
        reached |= {"", *(part.rpartition(".")[0] for part in reached)}  # importing a module runs its folder's __init__
        used = {name for part in reached for name, _ in by_name[part].names}
        assert not any(is_within(name, ["torch"]) for name in used), module
    assert "checkpoint.boxes" in closure("pipeline", graph)


def imported_at_once(source: Source) -> set[str]:
    """Return the modules that importing a file imports, and not only calling what it defines."""
    found = set[str]()
    waiting: list[ast.AST] = [source.tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{item.name}" for item in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def test_training_does_not_wait_for_the_libraries_that_judge_and_encode_pictures(sources: list[Source]) -> None:
    by_name = {source.name: source for source in sources}
    graph = {source.name: set(own_imports(source, set(by_name))) for source in sources}
    used = {
        module: set().union(*(imported_at_once(by_name[part]) for part in closure(module, graph))) for module in graph
    }
    for library in ("torchmetrics", "transformers", "diffusers", "huggingface_hub", "sklearn"):
        assert not any(is_within(name, [library]) for name in used["train"]), library
    assert "data.encoders.pretrained" in closure("train", graph)
    assert any(is_within(name, ["diffusers"]) for name, _ in by_name["data.encoders.pretrained"].names)
    assert any(is_within(name, ["torchmetrics"]) for name in used["evaluation.fid"])


def test_an_import_inside_a_function_waits_for_its_call() -> None:
    text = "import a\nif a:\n    from b import c\nclass D:\n    import e\n    def f(self):\n        import g\n"
    assert imported_at_once(Source(name="ema", text=text)) == {"a", "b.c", "e"}


@pytest.mark.parametrize("source", [*package_sources(), *tool_sources()], ids=lambda source: source.name or PACKAGE)
def test_a_file_stays_behind_its_fences_and_within_its_size_and_says_what_it_is_for(source: Source) -> None:
    assert fence_faults(source) + size_faults(source) + undocumented(source) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("training.trainer", "import deepspeed"),
        ("training.setup", "def f():\n    from deepspeed.moe import layer"),
        ("training.engine", "from megatron.core import parallel_state"),
        ("config.recipe", "import torch.nn as nn"),
        ("model.moe", "import torch\ntorch.distributed.barrier()"),
        ("data.loader", "from torch import distributed as d"),
        ("training.metrics", "import pickle"),
        ("training.train_state", "import torch as t\nt.load('x')"),
        ("checkpoint.convert.convert", "import torch\ntorch.save(1, 'x')"),
        ("checkpoint.convert.universal", "from torch.serialization import add_safe_globals"),
        ("checkpoint.convert.pt_file", "import torch\ntorch.load('x')"),
        ("checkpoint.convert.pt_file", "import torch\ntorch.load('x', weights_only=not False)"),
        ("checkpoint.convert.pt_file", "import torch\ntorch.load('x', weights_only=1)"),
        ("checkpoint.convert.pt_file", "from torch import load\nload('x', weights_only=True)"),
        ("checkpoint.convert.pt_file", "import torch\nf = torch.load\nf('x', weights_only=True)"),
        ("config.yaml_loader", "from yaml import load"),
        ("training.optimizer", "eval('1')"),
        ("tools/plan.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
        ("data.latents.index", "import numpy\nnumpy.load('x', allow_pickle=True)"),
        ("training.ema", "def f():\n    global x"),
        ("data.utils", ""),
    ],
)
def test_a_name_beyond_a_fence_is_found(name: str, text: str) -> None:
    assert fence_faults(Source(name=name, text=text))


def test_one_module_reads_and_writes_torch_files_and_only_as_data() -> None:
    text = "import torch\ntorch.save(1, 'x')\ntorch.load('x', map_location='meta', weights_only=True)"
    assert fence_faults(Source(name="checkpoint.convert.pt_file", text=text)) == []
    assert len(fence_faults(Source(name="checkpoint.reader", text=text))) == 2


def test_a_method_called_eval_is_no_call_of_the_builtin() -> None:
    assert fence_faults(Source(name="training.trainer", text="model.eval()")) == []


def test_long_and_silent_code_is_found() -> None:
    body = "\n".join(["    x = 1"] * (MAX_FUNCTION_STATEMENTS + 1))
    long_function = Source(name="ema", text=f'"""Doc."""\ndef f():\n{body}\n')
    assert size_faults(long_function) == ["ema:2 f: 41 statements"]
    assert undocumented(long_function) == ["ema:2 f"]
    assert size_faults(Source(name="ema", text="x = 1\n" * (MAX_FILE_STATEMENTS + 1))) == ["ema: 301 statements"]
    method = "class A:\n    def f(self):\n" + "        x = 1\n" * MAX_LINES_WITHOUT_DOCSTRING
    assert undocumented(Source(name="ema", text=method)) == ["ema: the module", "ema:1 A", "ema:2 A.f"]


def test_a_method_is_explained_by_the_one_it_overrides() -> None:
    body = "        x = 1\n" * MAX_LINES_WITHOUT_DOCSTRING
    base = '"""Doc."""\nclass A:\n    def f(self):\n        """Doc."""\n'
    child = f'class B(A):\n    """Doc."""\n    def f(self):\n{body}    def g(self):\n{body}'
    assert undocumented(Source(name="ema", text=base + child)) == ["ema:16 B.g"]


def test_no_code_is_kept_from_the_formatter() -> None:
    mark = "fmt" + ": "  # not in one piece, or this file would be found
    paths = [path for folder in (PACKAGE, "tools", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 300
    kept = [str(path) for path in paths for word in ("skip", "off") if f"{mark}{word}" in path.read_text("utf-8")]
    assert kept == []


ENTRY_POINTS = {"main", "parse_arguments"}


def repeated_names(sources: list[Source]) -> dict[str, list[str]]:
    """Return public classes and functions that several modules define, with the modules."""
    homes: dict[str, list[str]] = {}
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, Definition) and not node.name.startswith("_") and node.name not in ENTRY_POINTS:
                homes.setdefault(node.name, []).append(source.name)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_a_public_name_means_one_thing_in_the_package(sources: list[Source]) -> None:
    assert repeated_names(sources) == {}
    twins = [Source(name=name, text="class Job:\n    pass\ndef main(): pass") for name in ("slurm.a", "data.b")]
    assert repeated_names(twins) == {"Job": ["slurm.a", "data.b"]}


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every string that stands alone: docstrings of modules, classes, functions and of what is above one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_a_docstring_says_what_a_thing_is_and_does_not_go_on_from_its_name(sources: list[Source]) -> None:
    def that_go_on(given: list[Source]) -> list[str]:
        return [f"{one.name}:{line}" for one in given for line, text in docstrings(one.tree) if text.startswith("Of ")]

    assert that_go_on([*sources, *tool_sources()]) == []
    assert that_go_on([Source(name="model.a", text='rate = 1\n"""Of steps."""')]) == ["model.a:2"]
