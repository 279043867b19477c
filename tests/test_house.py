"""How the house is built, read from its source: who imports whom, size of functions, names that
others rely on.
"""
import ast
import json
from pathlib import Path
import subprocess
import sys

import pytest

from conftest import ROOT

ROOT_FILES = sorted(ROOT.glob("*.py"))
WINGS = [
    "checkpoints", "conditions", "data", "diffusion", "evaluation", "page", "processes", "runtime",
    "sampling", "training",
]  # fmt: skip
WING_FILES = sorted(path for wing in WINGS for path in (ROOT / wing).glob("*.py"))
PRODUCT_FILES = ROOT_FILES + WING_FILES
ROOMS = {path.stem for path in ROOT_FILES} | set(WINGS)
DOORS = {
    "train", "sample", "sample_ddp", "download", "extract_latents", "evaluate", "count", "export",
    "app",
} & ROOMS  # fmt: skip
IMPORTABLE_DOORS = {"download"}  # also the room that turns a checkpoint's name into a path

# Outside libraries with few homes.
HOMES = {
    "diffusers": {"vae.py", "processes/gaussian.py", "checkpoints/publish.py"},
    "torch_fidelity": {"evaluation/features.py"},
    "accelerate": {
        "runtime/team.py", "training/assembly.py", "training/records.py", "evaluation/report.py",
    },
    "gradio": {"page/layout.py"},
}

# Names that other people's code imports.
FACTORIES = [f"DiT_{size}_{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)]
PUBLIC_NAMES = {
    "models": [
        "DiT", "DiTBlock", "FinalLayer", "TimestepEmbedder", "LabelEmbedder", "modulate", "get_2d_sincos_pos_embed",
        "DiT_models", *FACTORIES,
    ],
    "diffusion": ["create_diffusion"],
    "diffusion.gaussian_diffusion": [
        "GaussianDiffusion", "ModelMeanType", "ModelVarType", "LossType", "get_named_beta_schedule",
        "betas_for_alpha_bar",
    ],
    "diffusion.respace": ["SpacedDiffusion", "space_timesteps"],
    "diffusion.timestep_sampler": ["create_named_schedule_sampler", "UniformSampler", "LossSecondMomentResampler"],
    "download": ["find_model", "download_model", "pretrained_models"],
    "train": ["center_crop_arr", "update_ema", "requires_grad"],
}  # fmt: skip


def named(path):
    return path.relative_to(ROOT).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree, top_level_only=False):
    """The modules that a file imports, as written; relative imports of its own package are left
    out.
    """
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def packages(path, **options):
    """First parts of what a file imports."""
    return {name.partition(".")[0] for name in imports(parse(path), **options)}


def source(module):
    """The file of one of our modules; None for others."""
    path = ROOT / module.replace(".", "/")
    found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return found[0] if found else None


@pytest.fixture(scope="module")
def after_import():
    """What importing every module in one fresh process did, and which public names it then lacked.
    """
    modules = [named(path).removesuffix(".py").replace("/", ".") for path in PRODUCT_FILES]
    modules = [module.removesuffix(".__init__") for module in modules]
    wanted = {
        module: names for module, names in PUBLIC_NAMES.items() if module.partition(".")[0] in ROOMS
    }
    code = f"""
import builtins, importlib, json, logging, random, sys
import torch
sys.path.insert(0, {str(ROOT)!r})
printed = []
builtins.print = lambda *args, **kwargs: printed.append(list(map(str, args)))
def state():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return dict(
        tf32=matmul.allow_tf32, cudnn_tf32=cudnn.allow_tf32, benchmark=cudnn.benchmark, grad=torch.is_grad_enabled(),
        precision=torch.get_float32_matmul_precision(), deterministic=torch.are_deterministic_algorithms_enabled(),
        dtype=torch.get_default_dtype(), threads=torch.get_num_threads(), torch_random=torch.get_rng_state().tolist(),
        python_random=random.getstate(), log_handlers=len(logging.getLogger().handlers),
    )
before, changed = state(), {{}}
for name in {modules!r}:
    importlib.import_module(name)
    after = state()
    changed[name] = [key for key in after if after[key] != before[key]]
    before = after
wanted = {wanted!r}
missing = [f"{{m}}.{{n}}" for m, names in wanted.items() for n in names if not hasattr(importlib.import_module(m), n)]
json.dump(dict(printed=printed, changed=changed, missing=missing), sys.stderr)
sys.stderr.write(chr(10))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return {"stdout": done.stdout, **json.loads(done.stderr.strip().splitlines()[-1])}


# ---- arrows ----

@pytest.mark.parametrize("path", ROOT_FILES, ids=named)
def test_no_file_imports_a_door(path):
    assert not packages(path) & (DOORS - IMPORTABLE_DOORS)


@pytest.mark.parametrize("path", sorted((ROOT / "diffusion").glob("*.py")), ids=named)
def test_diffusion_knows_torch_and_numpy_only(path):
    known = {"torch", "numpy", "diffusion"} | sys.stdlib_module_names
    assert packages(path) <= known | {"tqdm"}
    assert packages(path, top_level_only=True) <= known  # tqdm where progress is asked for


def test_models_know_torch_numpy_and_timm_only():
    assert packages(ROOT / "models.py") <= {"torch", "numpy", "timm"} | sys.stdlib_module_names


@pytest.mark.parametrize("library", HOMES)
def test_outside_libraries_have_few_homes(library):
    assert {named(path) for path in PRODUCT_FILES if library in packages(path)} <= HOMES[library]


def test_no_circle():
    arrows = {room: set() for room in ROOMS}
    for path in PRODUCT_FILES:
        room = path.stem if path.parent == ROOT else path.parent.name
        arrows[room] |= packages(path) & ROOMS - {room}
    assert_no_circle(arrows)


def test_no_circle_inside_diffusion():
    arrows = {}
    for path in (ROOT / "diffusion").glob("*.py"):
        nodes = [
            node
            for node in ast.walk(parse(path))
            if isinstance(node, ast.ImportFrom) and node.level
        ]
        arrows[path.stem] = {node.module or "__init__" for node in nodes}
    assert {"gaussian_diffusion", "respace"} <= arrows["__init__"]
    assert_no_circle(arrows)


def assert_no_circle(arrows):
    """Take away, again and again, whatever imports nothing that is left."""
    while arrows:
        free = {room for room, needs in arrows.items() if not needs & arrows.keys()}
        assert free, f"these import one another: {sorted(arrows)}"
        arrows = {room: needs for room, needs in arrows.items() if room not in free}


@pytest.mark.parametrize(
    "door", sorted({"sample", "evaluate", "count", "export", "download"} & ROOMS)
)
def test_what_only_unix_has_is_not_needed_to_begin(door):
    """Windows has no fcntl; who samples there needs no lock."""
    reached, waiting = set(), {door}
    while waiting:
        room = waiting.pop()
        reached.add(room)
        waiting |= {name for name in imports(parse(source(room))) if source(name)} - reached
    assert ("evaluation.metrics" if door == "evaluate" else "models") in reached
    on_import = {room: packages(source(room), top_level_only=True) for room in reached}
    assert not {
        room
        for room, names in on_import.items()
        if names & {"fcntl", "pwd", "grp", "resource", "termios"}
    }


# ---- form ----

@pytest.mark.parametrize("path", PRODUCT_FILES, ids=named)
def test_no_function_over_60_lines(path):
    functions = [
        node
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert not {name: length for name, length in lengths.items() if length > 60}


def test_no_file_is_called_utils():
    folders = [
        path
        for path in ROOT.iterdir()
        if path.is_dir() and path.name[0] != "." and path.name != "build"
    ]
    files = [*ROOT_FILES, *(path for folder in folders for path in folder.rglob("*.py"))]
    assert Path(__file__) in files
    assert not [
        named(path) for path in files if "utils" in path.stem or "utils" in path.parent.name
    ]


@pytest.mark.parametrize("path", ROOT_FILES, ids=named)
def test_doors_have_a_main_that_takes_arguments(path):
    mains = [
        node
        for node in parse(path).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    runs_as_script = any(
        isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        for node in parse(path).body
    )
    assert bool(mains) == runs_as_script == (path.stem in DOORS)
    for main in mains:
        assert [arg.arg for arg in main.args.args] == ["argv"]
        assert [ast.unparse(default) for default in main.args.defaults] == ["None"]


def public_functions(body, prefix=""):
    """(name, node) of each public function in a module's body, and of each public and special
    method of its classes.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef) and (
            node.name[0] != "_" or node.name.startswith("__")
        ):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield from public_functions(node.body, f"{node.name}.")


def without_hints(node):
    """What a function leaves without a type hint: parameters, but for self and cls, and the return
    value.
    """
    args = node.args
    parameters = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    bare = [
        arg.arg
        for arg in parameters
        if arg and arg.annotation is None and arg.arg not in ("self", "cls")
    ]
    return bare + ([] if node.returns else ["return"])


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=named)
def test_public_names_have_type_hints(path):
    bare = {name: without_hints(node) for name, node in public_functions(parse(path).body)}
    assert not {name: what for name, what in bare.items() if what}


@pytest.mark.parametrize(("source", "bare"), [
    ("def f(a: int, *b: int, c: int = 1, **d: int) -> None: ...", {"f": []}),
    ("def f(a, /, b: int, *c, d=1, **e) -> int: ...", {"f": ["a", "d", "c", "e"]}),
    ("class A:\n def __init__(self, a): ...\n def b(self) -> int: ...", {"A.__init__": ["a", "return"], "A.b": []}),
    ("def _f(a): ...\nclass _B:\n def c(self): ...\nclass D:\n def _e(self): ...", {}),
])  # fmt: skip
def test_what_is_without_hints_is_found(source, bare):
    assert {
        name: without_hints(node) for name, node in public_functions(ast.parse(source).body)
    } == bare


# ---- what an import does ----

def test_importing_prints_nothing(after_import):
    assert after_import["stdout"] == "" and after_import["printed"] == []


def test_importing_switches_nothing(after_import):
    assert set(after_import["changed"]) > {"train", "training.step", "diffusion"}
    assert not {name: keys for name, keys in after_import["changed"].items() if keys}


def test_public_names_exist(after_import):
    assert after_import["missing"] == []
