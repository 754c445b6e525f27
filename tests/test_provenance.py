"""Which code counts: what a module imports, however it does, and nothing that cannot change a result."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelstock import provenance
from modelstock.provenance import NOT_COMPUTING, files_of, key_of, modules_of

ROOT = Path(__file__).parent.parent
LIBRARY = {
    "modelstock/__init__.py": "",
    "modelstock/errors.py": "import modelstock.leaf",
    "modelstock/leaf.py": "value = 1",
    "modelstock/cli/__init__.py": "",
    "modelstock/cli/show.py": "import modelstock.leaf",
    "modelstock/maths/__init__.py": "from modelstock.maths.table import TABLE",
    "modelstock/maths/table.py": "TABLE = {}",
    "modelstock/maths/table.yaml": "rows: 1",
    "modelstock/maths/other.py": "",
    "modelstock/late.py": "def f():\n    from modelstock.leaf import value\n    return value",
    "modelstock/relative.py": "from . import leaf\nfrom .maths import other",
    "modelstock/maths/upward.py": "from ..leaf import value\nfrom .other import nothing",
    "modelstock/face.py": "from modelstock.maths import TABLE",
    "modelstock/plain.py": "import numpy\nimport modelstock.maths.table as table\nfrom modelstock import errors, leaf",
    "modelstock/circle.py": "import modelstock.round",
    "modelstock/round.py": "import modelstock.circle",
    "stages/__init__.py": "import modelstock.leaf",
    "stages/first.py": "from modelstock.late import f\nfrom stages import run\nfrom modelstock.cli import show",
    "stages/second.py": "from stages.first import main",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library in the place of ours."""
    for name, text in LIBRARY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    provenance._read.cache_clear()
    provenance.modules_of.cache_clear()


@pytest.mark.parametrize(
    ("module", "reached"),
    [
        ("modelstock.leaf", []),
        ("modelstock.late", ["leaf"]),  # an import in a function
        ("modelstock.relative", ["leaf", "maths.other"]),
        ("modelstock.maths.upward", ["leaf", "maths.other"]),
        ("modelstock.face", ["maths.table"]),  # through the package's face
        ("modelstock.plain", ["leaf", "maths.table"]),  # errors report, and what they import does not count either
        ("modelstock.circle", ["round"]),
        ("stages.first", ["late", "leaf"]),
    ],
)
def test_all_imports_are_followed_to_their_end(library, module, reached):
    assert set(modules_of(module)) == {module, *(f"modelstock.{name}" for name in reached)}


def test_a_stage_that_imports_a_stage_has_its_code(library):
    assert set(modules_of("stages.second")) == {"stages.first", "stages.second", "modelstock.late", "modelstock.leaf"}


def test_data_beside_a_module_belong_to_it(library):
    assert [file.name for file in files_of("modelstock.face")] == ["face.py", "table.py", "table.yaml"]


@pytest.mark.parametrize(
    ("file", "differs"),
    [
        ("modelstock/leaf.py", True),
        ("modelstock/maths/table.yaml", True),
        ("modelstock/plain.py", True),
        ("modelstock/errors.py", False),
        ("modelstock/cli/show.py", False),
        ("modelstock/maths/__init__.py", False),
        ("modelstock/maths/other.py", False),
    ],
)
def test_a_changed_byte_of_code_that_is_reached_is_another_key(library, file, differs):
    before = key_of("modelstock.plain", {"seed": 1})
    (library / file).write_text(LIBRARY[file] + " # a word")
    forget()
    assert (key_of("modelstock.plain", {"seed": 1}) != before) is differs


@pytest.mark.parametrize("library", ["pillow", "torch", "open_clip_torch", "timm", "numpy", "torchvision"])
def test_another_version_of_a_library_is_another_key(monkeypatch, library):
    before, versions = key_of("modelstock.data.images"), provenance._version
    monkeypatch.setattr(provenance, "_version", lambda name: "0.0" if name == library else versions(name))
    assert key_of("modelstock.data.images") != before


def test_other_facts_and_other_modules_are_other_keys():
    keys = [key_of("modelstock.data.images", *facts) for facts in ([], [{"a": 1}], [{"a": 2}], [{"a": 1}, {"b": 1}])]
    keys.append(key_of("modelstock.data.shards", {"a": 1}))
    assert len(set(keys)) == len(keys)
    assert key_of("modelstock.data.images", {"a": 1, "b": 2}) == key_of("modelstock.data.images", {"b": 2, "a": 1})
    assert {len(key) for key in keys} == {24}


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(provenance, "LIBRARIES", ("numpy", "no-such-library"))
    assert provenance.provenance("modelstock.data.images")["no-such-library"] == "not installed"


def test_an_installed_library_gives_the_keys_of_its_checkout(tmp_path):
    shutil.copytree(ROOT / "modelstock", tmp_path / "installed/modelstock")
    program = "from modelstock.provenance import key_of; print(key_of('modelstock.data.images'))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == key_of("modelstock.data.images")


def test_what_does_not_compute_exists():
    assert [n for n in NOT_COMPUTING if not list((ROOT / "modelstock").glob(f"{n}*"))] == []


@pytest.mark.parametrize("face", sorted(str(f.relative_to(ROOT)) for f in (ROOT / "modelstock").rglob("__init__.py")))
def test_a_face_only_passes_names_on(face):
    """A docstring, imports, names of its own, and how names are imported late; so neither keys nor DVC read faces."""
    for node in ast.parse((ROOT / face).read_text()).body:
        late = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        assert late or isinstance(node, ast.Expr | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.If)
