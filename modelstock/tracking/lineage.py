"""What leads from a comparison back to its inputs: the git commit, and DVC's hashes."""

import subprocess
from pathlib import Path

from ruamel.yaml import YAML


def git_commit(root: Path) -> str | None:
    """The commit of a git checkout; None where this is none."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else None


def dvc_hashes(root: Path) -> dict[str, str]:
    """Output path -> its hash, from dvc.lock."""
    lock = root / "dvc.lock"
    stages = (YAML(typ="safe").load(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
