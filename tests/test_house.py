"""How the house is built, read from its source: what lies where, who imports whom, size of
functions, names that others rely on.

The lists called ..._LEFT hold what does not follow a rule yet. They only shrink.
"""
import ast
from functools import cache
import json
from pathlib import Path
import re
import subprocess
import sys
import tomllib

import pytest

from conftest import ROOT

DOORS = {
    "train", "sample", "sample_ddp", "download", "extract_latents", "evaluate", "count", "export",
    "app",
}  # fmt: skip
# Wing, or module at the root → what of ours it may import. Arrows point down: each is above all
# that it may import.
MAY_IMPORT = {
    "runtime": set(),
    "diffusion": set(),
    "flow": set(),
    "layers": set(),
    "models": {"layers"},
    "variants": {"layers", "models"},  # a DynamicDiT is a DiT
    "vae": {"runtime"},
    "processes": {"runtime", "diffusion", "flow"},
    "conditions": {"runtime", "layers"},
    "checkpoints": {
        "runtime", "diffusion", "layers", "models", "variants", "vae", "processes", "conditions",
    },
    "data": {"runtime", "layers", "vae", "conditions"},
    "evaluation": {
        "runtime", "flow", "models", "vae", "processes", "conditions", "checkpoints", "data",
    },
    "sampling": {
        "runtime", "diffusion", "flow", "layers", "models", "vae", "processes", "conditions",
        "checkpoints",
    },
    "training": {
        "runtime", "diffusion", "flow", "layers", "models", "vae", "processes", "conditions",
        "checkpoints", "data", "evaluation", "sampling",
    },
    "page": {"runtime", "models", "processes", "conditions", "checkpoints", "sampling"},
}  # fmt: skip
MOST_FLOORS = 6

ROOT_FILES = sorted(ROOT.glob("*.py"))
WINGS = [wing for wing in MAY_IMPORT if (ROOT / wing).is_dir()]
WING_FILES = sorted(path for wing in WINGS for path in (ROOT / wing).glob("*.py"))
PRODUCT_FILES = ROOT_FILES + WING_FILES
ROOMS = {path.stem for path in ROOT_FILES} | set(WINGS)
AT_THE_ROOT = {"models", "vae", "hubconf", *DOORS}
BESIDE_THE_WINGS = {"tests", "examples", "benchmarks", "docs"}

# Outside libraries with few homes.
HOMES = {
    "diffusers": {
        "vae.py", "processes/gaussian.py", "checkpoints/publish.py",
    },
    "torch_fidelity": {"evaluation/features.py"},
    "accelerate": {
        "runtime/team.py", "training/assembly.py", "training/records.py",
        "evaluation/report.py",
    },
    "timm": {
        "models.py", "layers/parts.py", "layers/positions.py", "variants/text_network.py",
        "variants/mmdit.py", "variants/space_time.py", "conditions/labels.py",
        "evaluation/features.py",
    },
    "torchvision": {"conditions/labels.py", "data/listing.py", "training/records.py"},
    "huggingface_hub": {
        "checkpoints/names.py", "runtime/offline.py", "conditions/pretrained.py",
    },
    "transformers": {"conditions/pretrained.py"},
    "torchode": {"flow/adaptive.py"},
    "gradio": {"page/layout.py"},
    "starlette": {"app.py", "page/layout.py"},
    "av": {"runtime/clip_files.py"},
    "fcntl": {"runtime/presence.py", "checkpoints/released.py"},
}
# Libraries that an extra brings, and under which name one is installed if not under its own.
OPTIONAL = {"torch_fidelity", "transformers", "gradio", "starlette", "av"}
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
# What only Unix has
UNIX = {"fcntl", "pwd", "grp", "resource", "termios"}

# Argparse belongs in doors, in modules called flags, and in one room of runtime/. The last two find
# a Namespace in files of other projects.
ARGPARSE_ROOMS = {
    "runtime/command_line.py", "sampling/flags.py", "training/flags.py",
    "checkpoints/plain_pickle.py", "checkpoints/process_marks.py",
}  # fmt: skip
MOST_COLUMNS, MOST_LINES = 100, 500

# Names that other people's code imports.
FACTORIES = [f"DiT_{size}_{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)]
PUBLIC_NAMES = {
    "models": [
        "DiT", "DiTBlock", "FinalLayer", "TimestepEmbedder", "LabelEmbedder", "modulate",
        "get_2d_sincos_pos_embed", "DiT_models", *FACTORIES,
    ],
    "diffusion": ["create_diffusion"],
    "diffusion.gaussian_diffusion": [
        "GaussianDiffusion", "ModelMeanType", "ModelVarType", "LossType", "get_named_beta_schedule",
        "betas_for_alpha_bar",
    ],
    "diffusion.respace": ["SpacedDiffusion", "space_timesteps"],
    "diffusion.timestep_sampler": [
        "create_named_schedule_sampler", "UniformSampler", "LossSecondMomentResampler",
    ],
    "download": ["find_model", "download_model", "pretrained_models"],
    "train": ["center_crop_arr", "update_ema", "requires_grad"],
    "hubconf": [*FACTORIES, "digits_sampler", "dependencies"],
}  # fmt: skip


def named(path):
    return path.relative_to(ROOT).as_posix()


@cache
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


def handed_on(wing):
    """The names that a wing's __init__.py hands on from its rooms."""
    for node in ast.walk(parse(ROOT / wing / "__init__.py")):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "handed_on":
            rooms = ast.literal_eval(node.args[1])  # room: names, separated by spaces
            return " ".join(rooms.values()).split()
    return []


@pytest.fixture(scope="module")
def after_import():
    """What importing every module in one fresh process did, and which public names it then lacked.
    """
    modules = [named(path).removesuffix(".py").replace("/", ".") for path in PRODUCT_FILES]
    modules = [module.removesuffix(".__init__") for module in modules]
    wanted = PUBLIC_NAMES | {wing: handed_on(wing) for wing in WINGS if handed_on(wing)}
    code = f"""
import builtins, importlib, json, logging, random, sys
import torch
sys.path.insert(0, {str(ROOT)!r})
printed = []
builtins.print = lambda *args, **kwargs: printed.append(list(map(str, args)))
def state():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return dict(
        tf32=matmul.allow_tf32, cudnn_tf32=cudnn.allow_tf32, benchmark=cudnn.benchmark,
        precision=torch.get_float32_matmul_precision(), grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dtype=torch.get_default_dtype(), threads=torch.get_num_threads(),
        torch_random=torch.get_rng_state().tolist(), python_random=random.getstate(),
        log_handlers=len(logging.getLogger().handlers), path=list(sys.path),
    )
before, changed = state(), {{}}
for name in {modules!r}:
    importlib.import_module(name)
    after = state()
    changed[name] = [key for key in after if after[key] != before[key]]
    before = after
wanted = {wanted!r}
missing = []
for name, names in wanted.items():
    module = importlib.import_module(name)
    missing += [f"{{name}}.{{inside}}" for inside in names if not hasattr(module, inside)]
json.dump(dict(printed=printed, changed=changed, missing=missing), sys.stderr)
sys.stderr.write(chr(10))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120
    )
    assert done.returncode == 0, done.stderr
    return {"stdout": done.stdout, **json.loads(done.stderr.strip().splitlines()[-1])}


# ---- what lies where ----


def test_the_root_holds_doors_networks_and_wings():
    folders = {path.parent.name for path in ROOT.glob("[!._]*/*.py")} - {"build"}
    assert {path.stem for path in ROOT_FILES} == AT_THE_ROOT
    assert folders == {*WINGS, *BESIDE_THE_WINGS}


def test_tests_lie_as_what_they_test_does():
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in all_tests()}
    assert folders <= {".", *WINGS} and len(folders) > 5


def all_tests():
    return sorted((ROOT / "tests").rglob("test_*.py"))


def test_every_wing_says_what_it_is():
    for wing in WINGS:
        assert ast.get_docstring(parse(ROOT / wing / "__init__.py")), wing


# ---- arrows ----


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=named)
def test_no_file_imports_a_door(path):
    assert not packages(path) & {*DOORS, "hubconf"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down(room):
    paths = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).glob("*.py")
    arrows = set().union(*(packages(path) & MAY_IMPORT.keys() - {room} for path in paths))
    assert not arrows - MAY_IMPORT[room]


def test_floors():
    """The table itself has no circle, and few floors."""
    assert_no_circle(MAY_IMPORT)
    floors, above = 0, dict(MAY_IMPORT)
    while above:
        floors += 1
        above = {room: needs for room, needs in above.items() if needs & above.keys()}
    assert floors <= MOST_FLOORS


@pytest.mark.parametrize("path", sorted((ROOT / "diffusion").glob("*.py")), ids=named)
def test_diffusion_knows_torch_and_numpy_only(path):
    known = {"torch", "numpy", "diffusion"} | sys.stdlib_module_names
    assert packages(path) <= known | {"tqdm"}
    assert packages(path, top_level_only=True) <= known  # tqdm where progress is asked for


def test_models_know_torch_numpy_timm_and_layers_only():
    known = {"torch", "numpy", "timm", "layers"} | sys.stdlib_module_names
    assert packages(ROOT / "models.py") <= known


@pytest.mark.parametrize("library", HOMES)
def test_outside_libraries_have_few_homes(library):
    assert {named(path) for path in PRODUCT_FILES if library in packages(path)} <= HOMES[library]


def module_of(path):
    return named(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_circle():
    """Of files, whatever the depth at which one imports another."""
    arrows = {}
    for path in PRODUCT_FILES:
        here = module_of(path)
        arrows[here] = {module_of(source(name)) for name in imports(parse(path)) if source(name)}
        arrows[here] -= {here}
    assert sum(map(len, arrows.values())) > 100
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


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=named)
def test_what_only_unix_has_is_not_needed_to_begin(path):
    """Windows has no fcntl; who samples there needs no lock."""
    assert not packages(path, top_level_only=True) & UNIX


def test_argparse_stays_where_command_lines_are_read():
    doors = {f"{door}.py" for door in DOORS}
    found = {named(path) for path in PRODUCT_FILES if "argparse" in packages(path)}
    assert found <= doors | ARGPARSE_ROOMS


def test_dependencies_are_what_runs():
    """Each outside library that is imported is named in pyproject.toml, and no other is."""
    used = set().union(*map(packages, PRODUCT_FILES)) - ROOMS - sys.stdlib_module_names - OPTIONAL
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.match(r"[\w-]+", line)[0] for line in declared} == {
        DISTRIBUTIONS.get(name, name) for name in used
    }


@pytest.mark.parametrize("module", ["models", "diffusion"])
def test_the_network_and_the_process_alone_load_little(module, tmp_path):
    """With this repository's folder on sys.path, from another one."""
    code = f"""
import sys
sys.path[0] = {str(ROOT)!r}
import {module}
print(sorted({{"diffusers", "accelerate", "gradio"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.stdout == "[]\n", done.stderr


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


def test_files_of_the_product_are_short():
    found = {named(path): len(path.read_text().splitlines()) for path in PRODUCT_FILES}
    assert {name for name, lines in found.items() if lines > MOST_LINES} == set()


def test_lines_are_short():
    """Code, comments and docstrings, wherever they are."""
    paths = [path for folder in BESIDE_THE_WINGS for path in (ROOT / folder).rglob("*.py")]
    wide = {
        named(path).partition("/")[0]
        for path in [*PRODUCT_FILES, *paths]
        if any(len(line) > MOST_COLUMNS for line in path.read_text().splitlines())
    }
    assert wide == set()


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
    (
        "class A:\n def __init__(self, a): ...\n def b(self) -> int: ...",
        {"A.__init__": ["a", "return"], "A.b": []},
    ),
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
