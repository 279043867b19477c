"""Windows has no fcntl: networks and samplers do without it."""
import subprocess
import sys

from PIL import Image

from conftest import ROOT

DIGITS = ROOT / "examples/digits"
WITHOUT = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "fcntl":
            raise ImportError("there is no fcntl here")

sys.modules.pop("fcntl", None)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {str(ROOT)!r})
"""


def test_sampling_needs_no_fcntl(tmp_path):
    """Each door, one after the other in one process without it."""
    network = [
        "--ckpt", str(DIGITS / "dit.safetensors"), "--vae", str(DIGITS / "vae"),
        "--num-sampling-steps", "1", "--device", "cpu",
    ]  # fmt: skip
    code = WITHOUT
    for door, flags in {
        "sample": ["--output", "out.png", "--class-labels", "3"],
        "sample_ddp": ["--sample-dir", "samples", "--num-fid-samples", "1"],
    }.items():
        code += f"import {door}\n{door}.main({[*network, *flags]!r})\n"
        code += "assert 'fcntl' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for output in ("out.png", "samples/*/000000.png"):
        [picture] = tmp_path.glob(output)
        assert Image.open(picture).size > (0, 0)
