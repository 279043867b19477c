"""examples/dit_from_scratch.ipynb: committed with its outputs, and does from a fresh start what
they show.
"""

import base64
import io
import re
import shutil

import numpy as np
from PIL import Image
import pytest

from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="the notebook needs it: pip install .[notebook]")

NOTEBOOK = ROOT / "examples" / "dit_from_scratch.ipynb"
MOST_BYTES = 500_000
LEAST_AGREEMENT = 0.9  # of 200 samples with the class asked for, as an SVM sees them
COLOURED = 60  # of 255, from which the difference of a pixel's channels is a colour
# All of the repository that it needs, and that its last part does
NEEDED = [
    "models.py", "layers", "diffusion",
    "vae.py", "variants", "conditions", "processes", "flow", "runtime", "checkpoints", "sampling",
    "examples/emoji/vae", "examples/emoji/text.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """All text that the cells print."""
    return "".join(
        out.text
        for cell in code_cells(notebook)
        for out in cell.outputs
        if out.output_type == "stream"
    )


def check_figures(notebook):
    """The equality with models.DiT and the agreement, as printed."""
    text = printed(notebook)
    (difference,) = re.findall(r"largest difference (\S+)", text)
    assert 0 <= float(difference) < 1e-5
    (output,) = re.findall(r"largest output ([\d.]+)", text)
    assert float(output) > 0.1  # zeros would agree as well
    (share,) = re.findall(r"sees the class asked for in ([\d.]+)%", text)
    assert float(share) / 100 >= LEAST_AGREEMENT


def test_notebook_is_valid_small_and_was_run_from_top_to_bottom(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [out.output_type for cell in cells for out in cell.outputs]
    assert "error" not in kinds and kinds.count("display_data") >= 8
    assert not [out for cell in cells for out in cell.outputs if out.get("name") == "stderr"]


def test_notebook_shows_the_equality_and_the_agreement(notebook):
    check_figures(notebook)


def coloured(notebook):
    """The shares of pixels that have a colour, of each picture that the cells show."""
    shares = []
    for cell in code_cells(notebook):
        for out in cell.outputs:
            if "image/png" in out.get("data", {}):
                content = io.BytesIO(base64.b64decode(out.data["image/png"]))
                pixels = np.asarray(Image.open(content).convert("RGB"), int)  # (H, W, 3)
                shares.append((np.ptp(pixels, axis=-1) > COLOURED).mean())
    return shares


def check_colours(notebook):
    """Digits are grey, and what the last cell shows is in colour, on white."""
    first, *_, last = coloured(notebook)
    assert first < 0.01 and 0.1 < last < 0.7


def test_notebook_ends_in_colour(notebook):
    check_colours(notebook)


def test_notebook_names_no_path_of_a_machine(notebook):
    texts = [printed(notebook), *(cell.source for cell in notebook.cells), str(notebook.metadata)]
    texts += [
        out.data.get("text/plain", "")
        for cell in code_cells(notebook)
        for out in cell.outputs
        if "data" in out
    ]
    absolute = re.compile(r"(?<![\w.:/<)])/\w[\w.-]*/|[A-Z]:\\")
    assert absolute.search(f"saved in {ROOT}/x") and not absolute.search(
        "docs/a.md, https://arxiv.org/abs/1, H/P, a/b/c"
    )
    assert not [found.group() for text in texts for found in absolute.finditer(text)]


def test_links_of_the_notebook_lead_to_files(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    targets = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if not link.startswith("http")]
    assert len(targets) > 5 and all((NOTEBOOK.parent / target).exists() for target in targets)


@pytest.mark.long
def test_notebook_runs_whole_in_a_copy(tmp_path):
    nbclient = pytest.importorskip(
        "nbclient", reason="the notebook is run with it: pip install .[notebook]"
    )
    (tmp_path / "examples" / "emoji").mkdir(parents=True)
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path / "examples")}}
    client = nbclient.NotebookClient(fresh, timeout=900, kernel_name="python3", resources=where)
    client.execute()  # raises if a cell does
    check_figures(fresh)
    check_colours(fresh)
    print(printed(fresh))
