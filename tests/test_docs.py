"""README and docs: generated parts are current, every command parses, every link leads somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from ruamel.yaml import YAML

from modelstock.cli.app import app
from modelstock.merging.methods.table import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
COMMAND = typer.main.get_command(app)
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def commands() -> list[tuple[str, str]]:
    """Every line of every block of shell commands, continuation lines joined and comments dropped, with its page."""
    lines = []
    for page in PAGES:
        for language, text in FENCED.findall(page.read_text(encoding="utf-8")):
            if language == "":
                joined = text.replace("\\\n", " ")
                lines += [(page.name, line.strip()) for line in joined.splitlines() if line.strip()]
    return lines


def test_the_pages_have_commands_of_every_kind():
    programs = {shlex.split(line, comments=True)[0].rpartition("/")[2] for _, line in commands()}
    assert programs >= {"make", "dvc", "modelstock", "python"}


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_parses(page, line):
    program, *words = shlex.split(line, comments=True)
    program = program.rpartition("/")[2]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "modelstock":
        subcommand = COMMAND.commands[words[0]]
        subcommand.make_context(words[0], words[1:])  # refuses unknown and missing arguments; runs nothing
    elif program == "dvc":
        for preset in re.findall(r"preset=([\w-]+)", line):
            assert (ROOT / f"conf/preset/{preset}.yaml").is_file()
        for stage in [word for word in words if "@" in word]:
            assert stage.partition("@")[0] in STAGES
        assert words[0] in ("repro", "status", "metrics", "exp", "plots")
    elif program == "python":
        module = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        assert (ROOT / module).is_file() or words[1] in ("pytest",)
        text = (ROOT / module).read_text()
        for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
            # As argparse and typer are told of an option, and as typer makes one of a parameter.
            parameter = option.removeprefix("--").replace("-", "_")
            assert f'"{option}"' in text or re.search(rf"^    {parameter}: ", text, re.MULTILINE), f"{page}: {line}"
    else:
        assert program in ("pip", "uv"), f"{page}: {line}"


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_generated_parts_are_current():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_counts_the_methods_that_there_are():
    counted = re.findall(r"(\d+) methods, each with its formula", (ROOT / "README.md").read_text())
    assert counted == [str(len(METHODS))]
