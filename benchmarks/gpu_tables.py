"""What benchmarks.gpu found, for readers: goals beside figures, and the sections of
docs/sampling.md and docs/training.md.
"""

import json
import re

from benchmarks.sides import RESULTS, ROOT
from runtime.disk import write_whole

MODELS = "DiT-XL/2", "DiT-B/2", "DiT-S/2"
NAME = re.compile(r"(\d{4}-\d{2}-\d{2})-gpu(?:-(\d+))?\.json")  # not that of a dry run
BEGIN = "<!-- python -m benchmarks.gpu --tables writes from here -->"
END = "<!-- to here -->"
NOTHING = """\
No run on a GPU is recorded yet: a table is made here from the newest \
`benchmarks/results/DATE-gpu.json`, and there is none."""
NOTHING_OF_SAMPLING = f"""{NOTHING}
Nothing here says how fast CUDA graphs or bf16 are there, and the tests that need a GPU have \
not been run."""
UNKNOWN = "not measured"
KINDS = "collected", "passed", "failed", "skipped"  # of tests
IMAGES, SHARE, MEMORY = "images per second", "share of the limit", "peak memory in GiB"


def newest(folder=None):
    """(path, contents) of the newest result of a GPU in the folder, None without one; what a dry
    run wrote does not count.
    """
    found = []
    for path in (folder or RESULTS).iterdir():
        if match := NAME.fullmatch(path.name):
            result = json.loads(path.read_text(encoding="utf-8"))
            if not result["dry_run"]:
                found.append((match[1], int(match[2] or 1), path, result))
    return max(found, key=lambda one: one[:2])[2:] if found else None


# ---- goals ----


def rows(parts, part, *keys):
    """{side: its figures} that a part has under these keys; nothing where that was not measured."""
    found = parts.get(part, {}).get("found", {})
    for key in keys:
        found = found.get(key, {})
    return found


def best(sides, figure):
    """The largest of a figure over our own sides, None without any."""
    values = [side[figure] for name, side in sides.items() if not name.startswith("diffusers")]
    return max(values, default=None)


def times_diffusers(sides):
    """How often as fast as diffusers the best of ours is, None unless both are known."""
    ours = best(sides, IMAGES)
    theirs = [side[IMAGES] for name, side in sides.items() if name.startswith("diffusers")]
    return round(ours / theirs[0], 2) if ours and theirs else None


def goals(parts):
    """A list of {"goal", "at least", "figure", "met"}; the last two are None where nothing was
    measured.
    """
    training = rows(parts, "training DiT-XL/2", "sides")
    ddim, multistep = (
        rows(parts, "sampling DiT-XL/2", solver) for solver in ("DDIM 50", "dpm++ 20")
    )
    figures = [
        ("training DiT-XL/2, images per second", 500, best(training, IMAGES)),
        ("training DiT-XL/2, share of the limit", 0.45, best(training, SHARE)),
        ("sampling DiT-XL/2, DDIM 50, share of the limit", 0.5, best(ddim, SHARE)),
        ("sampling DiT-XL/2, DDIM 50, times diffusers", 2, times_diffusers(ddim)),
        ("sampling DiT-XL/2, dpm++ 20, share of the limit", 0.5, best(multistep, SHARE)),
        ("sampling DiT-XL/2, dpm++ 20, times diffusers", 2, times_diffusers(multistep)),
    ]
    return [
        {
            "goal": goal,
            "at least": least,
            "figure": figure,
            "met": None if figure is None else figure >= least,
        }
        for goal, least, figure in figures
    ]


def goal_in_words(goal):
    """One line for one of `goals`."""
    told = {None: UNKNOWN, True: f"{goal['figure']}, met", False: f"{goal['figure']}, not met"}[
        goal["met"]
    ]
    return f"{goal['goal']}: {told} (goal: at least {goal['at least']})"


# ---- sections of the documents ----


def table(columns, lines):
    """A table in Markdown."""
    return "\n".join(
        f"| {' | '.join(map(str, line))} |" for line in [columns, ["---"] * len(columns), *lines]
    )


def cells(side, *figures):
    """A side's figures as cells; `not measured` where it has none."""
    return [UNKNOWN if side.get(figure) is None else f"{side[figure]:.4g}" for figure in figures]


def where(path, result):
    """Sentences that say where the figures are from, and what that device can do at most."""
    about = result["machine"]
    limits = rows(result["parts"], "limits", "teraflops_per_second")
    products = ", ".join(f"{rate:.0f} TFLOP/s in {kind}" for kind, rate in limits.items())
    copied = rows(result["parts"], "limits", "copy_terabytes_per_second") or UNKNOWN
    return f"""\
{about["gpu"]}, PyTorch {about["torch"]} ([result](../benchmarks/results/{path.name})). Its limits:
matrix products {products or UNKNOWN}; copying {copied} TB/s, bytes read and written. Shares are of
the product in the same precision and the same rounds."""


def training_section(found):
    """The section of docs/training.md from `newest`."""
    if found is None:
        return NOTHING
    path, result = found
    parts, lines = result["parts"], []
    for model in MODELS:
        sides = rows(parts, f"training {model}", "sides")
        for name in sides or [UNKNOWN]:
            lines.append([model, name, *cells(sides.get(name, {}), "batch", IMAGES, SHARE, MEMORY)])
    columns = ["network", "bf16, from latents", "batch", "images/s", "of the limit", "GiB at most"]
    loader = listed(rows(parts, "loader", "images_per_second"))
    wrapped = listed(rows(parts, "one process", "images_per_second"))
    counts = counted(rows(parts, "exactness", "counted_per_step"), "training")
    return "\n\n".join([
        where(path, result), table(columns, lines), goal_lines(result, "training"),
        f"From cached latents, images per second: {loader}.",
        f"In one process, bare and wrapped for several, images per second: {wrapped}.",
        f"Copies and waits in a step: {counts}.",
    ])  # fmt: skip


def sampling_section(found):
    """The section of docs/sampling.md from `newest`."""
    if found is None:
        return NOTHING_OF_SAMPLING
    path, result = found
    parts, lines = result["parts"], []
    for solver in ("DDIM 50", "dpm++ 20"):
        sides = rows(parts, "sampling DiT-XL/2", solver)
        for name in sides or [UNKNOWN]:
            lines.append([solver, name, *cells(sides.get(name, {}), IMAGES, SHARE)])
    apart = rows(parts, "exactness", "differences")
    far = [[name, *cells(side, "mean, of 255", "largest")] for name, side in apart.items()]
    counts = counted(rows(parts, "exactness", "counted_per_step"), "sampling")
    tests = rows(parts, "tests")
    ran = ", ".join(f"{tests[kind]} {kind}" for kind in KINDS) if tests else UNKNOWN
    coder = listed(rows(parts, "autoencoder", "images_per_second"))
    return "\n\n".join([
        where(path, result),
        "DiT-XL/2, guided, from labels to images through the digits' small autoencoder:",
        table(["solver", "how", "images/s", "of the limit"], lines), goal_lines(result, "sampling"),
        "Digits from the same noise, and how far they are from float32's in grey levels:",
        table(["how", "mean, of 255", "largest"], far or [[UNKNOWN] * 3]),
        f"Copies and waits in a step: {counts}.",
        f"Stable Diffusion's autoencoder, images per second: {coder}.",
        f"Tests that need a GPU: {ran}.",
    ])  # fmt: skip


def goal_lines(result, about):
    """The goals of training or sampling as a list."""
    return "\n".join(
        f"- {goal_in_words(goal)}" for goal in result["goals"] if goal["goal"].startswith(about)
    )


def listed(figures):
    """Figures with their names, in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items()) or UNKNOWN


def counted(counts, about):
    """What was counted in steps of training or sampling, in one line."""
    told = []
    for name, events in counts.items():
        if name.startswith(about):
            each = ", ".join(f"{count:g} {event}" for event, count in events.items())
            told.append(f"{name.partition(', ')[2]}: {each or 'none'}")
    return "; ".join(told) or UNKNOWN


SECTIONS = {"docs/training.md": training_section, "docs/sampling.md": sampling_section}


def with_section(text, section):
    """A document's text with this between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def update_documents():
    """Write the newest result's sections into the documents."""
    found = newest()
    for name, section in SECTIONS.items():
        path = ROOT / name
        text = with_section(path.read_text(encoding="utf-8"), section(found))
        write_whole(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        print(f"wrote {path}, from {found[0] if found else 'no result'}")
