"""What `make setup` installs."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commands(folder, *settings):
    """The commands of `make setup` for an environment in `folder`, none of which is run."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "setup", f"VENV={folder}", *settings],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return shown.stdout.splitlines()


def requirements(text):
    """Name -> its line and its hashes."""
    return {block.partition("==")[0]: block for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if block}


def test_all_is_installed_by_hash(tmp_path):
    installed = [line for line in commands(tmp_path) if "uv pip install" in line and "--editable" not in line]
    assert len(installed) == 1
    assert installed[0].endswith("--require-hashes -r requirements.lock")


def test_the_cpu_build_leaves_out_torch_and_cuda_and_nothing_else(tmp_path):
    lines = commands(tmp_path, "TORCH=cpu")
    subprocess.run(next(line for line in lines if line.startswith("awk")), shell=True, cwd=ROOT, check=True)
    locked = requirements((ROOT / "requirements.lock").read_text())
    kept = requirements((tmp_path / "without-torch.lock").read_text())
    assert {name: locked[name] for name in kept} == kept
    left_out = set(locked) - set(kept)
    assert {"torch", "torchvision", "triton"} <= left_out
    assert all(name.startswith(("nvidia-", "cuda-")) for name in left_out - {"torch", "torchvision", "triton"})
    assert "open-clip-torch" in kept
    torch = next(line for line in lines if "--torch-backend cpu" in line)
    pinned = re.search(r"\$\((.*)\)$", torch)[1]
    versions = subprocess.run(pinned, shell=True, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert [locked[v.partition("==")[0]].split()[0] for v in versions] == versions
    assert [v.partition("==")[0] for v in versions] == ["torch", "torchvision"]
