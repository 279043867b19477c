"""Windows has no fcntl: networks and samplers do without it."""
import subprocess
import sys

from PIL import Image
import pytest

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


@pytest.mark.parametrize("door, flags, output", [
    ("sample", ["--output", "out.png", "--class-labels", "3"], "out.png"),
    ("sample_ddp", ["--sample-dir", "samples", "--num-fid-samples", "1"], "samples/*/000000.png"),
])  # fmt: skip
def test_sampling_needs_no_fcntl(tmp_path, door, flags, output):
    flags += ["--ckpt", str(DIGITS / "dit.safetensors"), "--vae", str(DIGITS / "vae")]
    flags += ["--num-sampling-steps", "1", "--device", "cpu"]
    code = f"{WITHOUT}\nimport {door}\n{door}.main({flags!r})\nassert 'fcntl' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [picture] = tmp_path.glob(output)
    assert Image.open(picture).size > (0, 0)
