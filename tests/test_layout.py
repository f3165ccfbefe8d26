"""The shape of the package: imports only point down, files and functions stay small."""

import ast
import builtins
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_fn

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlhf_fn"
KERNELS = ROOT / "kernels" / "rlhf_kernels"
FLOORS = (  # a new module is a new word here: the floor it stands on
    "checks tree random scan weights distributions logprobs linear kl returns rewards groups policy"
    " offpolicy sequence selection mismatch turns mpo batch_advantages value"
    " preference direct pairs reference_free unpaired listwise moments shaping"
    " verifiable distillation references optim fused",
    "folders products skeletons models prefix heads projection decoding lora adapters precision"
    " recompute packing",
    "steps compiled losses batches pair_losses pair_methods pair_recipes rollout engine external"
    " methods recipes ppo grpo ranks sharding",
    "data readers sources checkpoint manifest storage errors config train run stages updates"
    " toy report judge pipeline laws cli commands frame reward_functions online offline"
    " command_grpo command_dpo trainable loading"
    " strategies trials kinds law_numerics law_losses law_returns law_preferences law_command"
    " sharded named budget"
    " imported sampler reading collate room allocator",
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules.split()}
GROUND = {"torch", "jaxtyping", "einops", "rlhf_fn"} | sys.stdlib_module_names
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
TESTS = sorted((ROOT / "tests").glob("*.py"))


def parse(path):
    return ast.parse(path.read_text())


def imports(path):
    """Every module that a file imports, anywhere in it, by its full dotted name."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write the import in full"
            inside = node.module == "rlhf_fn"
            yield from (f"{node.module}.{a.name}" if inside else node.module for a in node.names)


def neighbours(path):
    """The modules of this package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("rlhf_fn.")}


def functions(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(function, source):
    """The lines of a function that hold code: neither blank, nor comment, nor its docstring."""
    body = function.body
    first = body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    doc = range(first.lineno, first.end_lineno + 1) if documented else ()
    lines = range(function.lineno, function.end_lineno + 1)
    text = [source[n - 1].strip() for n in lines if n not in doc]
    return sum(bool(line) and not line.startswith("#") for line in text)


def public(path):
    """The public functions at the top of a file."""
    body = parse(path).body
    return [f for f in body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]


def ids(path):
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", FILES, ids=ids)


def test_every_module_stands_on_a_floor():
    assert {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"} <= FLOOR.keys()


@pytest.mark.parametrize("path", [p for p in FILES if p.stem in FLOOR], ids=ids)
def test_imports_only_point_down(path):
    if path.parent == PACKAGE:
        for name in neighbours(path):
            assert FLOOR[name] <= FLOOR[path.stem], f"{path.name} imports {name}, a floor above it"


def test_no_module_imports_itself_by_way_of_others():
    graph = {p.stem: neighbours(p) for p in PACKAGE.glob("*.py")}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", [p for p in FILES if FLOOR.get(p.stem) == 0], ids=ids)
def test_the_ground_floor_needs_only_torch_jaxtyping_and_einops(path):
    if path.parent == PACKAGE:
        assert {name.split(".")[0] for name in imports(path)} <= GROUND


def test_the_package_itself_offers_the_ground_floor_and_nothing_else():
    assert {FLOOR[name] for name in neighbours(PACKAGE / "__init__.py")} == {0}


def test_every_public_function_of_the_ground_floor_is_exported():
    """`random` and `tree` are exported as modules; `checks` is for the inside."""
    ground = set(FLOORS[0].split()) - {"checks", "random", "tree"}
    exported = set(rlhf_fn.__all__)
    for module in ground:
        assert {f.name for f in public(PACKAGE / f"{module}.py")} <= exported, module


def test_kernels_are_a_leaf():
    for path in KERNELS.rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "rlhf_fn"]
    assert not (
        ROOT / "kernels" / "__init__.py"
    ).exists()  # `kernels` is Hugging Face's own package


@pytest.mark.parametrize("path", FILES + TESTS, ids=ids)
def test_no_file_is_longer_than_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@each_file
def test_no_function_is_longer_than_40_lines_of_code(path):
    source = path.read_text().splitlines()
    long = {f.name: n for f in functions(path) if (n := code_lines(f, source)) > 40}
    assert not long


@each_file
def test_every_public_function_has_a_docstring(path):
    assert not [f.name for f in public(path) if not ast.get_docstring(f)]


@each_file
def test_every_name_is_bound(path):
    """Which ruff and pyright are kept from saying, as shapes in annotations are no names."""
    nodes = [*ast.walk(parse(path))]
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    bound |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}
    bound |= {*dir(builtins), "__file__", "__name__"}
    assert not {n.id for n in nodes if isinstance(n, ast.Name)} - bound


@each_file
def test_annotations_are_evaluated(path):
    assert "__future__" not in imports(path)  # postponed annotations hide shapes from the checker


def test_importing_the_package_does_not_import_transformers():
    heavy = "'transformers', 'tokenizers', 'safetensors'"
    code = f"import sys, rlhf_fn; print([m for m in ({heavy}) if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
