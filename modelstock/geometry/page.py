"""What was measured, as files: JSON, a table of tensors, a page of Markdown, and figures where matplotlib is there."""

import csv
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock import __version__
from modelstock.errors import MergeError, few
from modelstock.files import dump_json, room_for, sealed
from modelstock.geometry.claims import Claim, claims_table
from modelstock.geometry.measure import Geometry
from modelstock.geometry.tables import Cell, distance_rows, length_rows, ratio_rows, step_rows, tensor_rows, unit_rows
from modelstock.geometry.weight_claims import weight_claims
from modelstock.merging.files import standing
from modelstock.notices import notice
from modelstock.provenance import provenance

Pictures = Mapping[str, tuple[str, bytes]]  # file -> what it shows, and the PNG
# What a measurement writes, and what replacing it removes.
PICTURES = ("cosine.png", "norms.png", "ratio.png", "triangle.png", "oracle.png", "steps.png")
FILES = ("geometry.json", "geometry.md", "tensors.csv", *PICTURES)
COLUMNS = {  # of the page's table of types -> the statistic, mean over tensors
    "norm": "norm_mean",
    "CV": "norm_cv",
    "angle": "angle_mean",
    "its sd": "angle_sd",
    "t of 2": "ratio_of_2",
    "oracle t": "oracle_ratio_of_2",
    "bias": "ratio_bias",
    "RMSE": "ratio_rmse",
}


def geometry_json(
    geometry: Geometry, claims: Sequence[Claim], steps: Mapping[int, Geometry] | None = None
) -> dict[str, Any]:
    """Everything that was measured, with the sha256 of what it says."""
    return sealed(
        {
            "version": __version__,
            "provenance": provenance("modelstock.geometry.page"),
            "seeds": list(geometry.seeds),
            "centre": list(geometry.centre),
            "files": list(geometry.files),
            "claims": [claim.as_json() for claim in claims],
            "tensors": tensor_rows(geometry),
            "types": unit_rows(geometry, "type"),
            "blocks": unit_rows(geometry, "block"),
            "model": unit_rows(geometry, "model")[0],
            "lengths": length_rows(geometry),
            "ratios": ratio_rows(geometry),
            "distances": distance_rows(geometry),
            "steps": step_rows(steps) if steps else [],
        }
    )


def tensors_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per tensor; what too few seeds have measured is a text in its place."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{v:.9g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return text.getvalue()


def page(written: Mapping[str, Any], claims: Sequence[Claim], pictures: Pictures) -> str:
    """The page: what was measured, each claim with its number, tables and figures. `written`: as `geometry_json`."""
    model = written["model"]
    seeds, centre = written["seeds"], written["centre"]
    lines = [
        "# Geometry of fine-tuned weights",
        "",
        f"{len(seeds)} seeds ({', '.join(seeds)}), {model['tensors']} tensors that count, "
        f"{model['values']:,} values. Centre: "
        + (f"{len(centre)} checkpoints ({', '.join(centre)})." if centre else "for each subset, the seeds outside it."),
        "",
        "Brackets are 95 % intervals over seeds, by the jackknife: each seed is left out once. A verdict needs the "
        "whole interval on one side of the threshold." + (" The centre is taken as given." if centre else ""),
        "",
        "## Claims",
        claims_table(claims),
        "",
        "## By type of tensor",
        "Means over tensors. Angles in degrees; t of two seeds, bias and RMSE against the t that comes nearest to the "
        "centre.",
        "",
        *_table(
            ["type", "tensors", *COLUMNS, "kurtosis"],
            [_type_cells(row) for row in [*written["types"], model | {"unit": "all"}]],
        ),
        "",
        "## Lengths of means",
        "The whole model as one vector: the mean of n updates over subsets, and sqrt((1 + (n - 1) cos) / n) * l.",
        "",
        *_table(
            ["n", "subsets", "mean length", "smallest", "largest", "formula"],
            [
                [row["n"], row["subsets"], *(row[key] for key in ("length", "smallest", "largest", "formula"))]
                for row in written["lengths"]
            ],
        ),
        "",
        "## Ratio by number of seeds",
        "Means over tensors and subsets: the formula's t, the t that comes nearest to the centre, and how far they are "
        "apart.",
        "",
        *_table(
            ["n", "t", "oracle t", "bias", "RMSE"],
            [[row[key] for key in ("n", "ratio", "oracle", "bias", "rmse")] for row in written["ratios"]],
        ),
        "",
        "## Distance to the centre",
        "Root mean squares over subsets, the whole model; Model Stock with one t per tensor.",
        "",
        *_table(
            ["", "distance", "in units of a single seed's"],
            [[row["what"], row["distance"], row["of a seed's"]] for row in written["distances"]],
        ),
    ]
    if written["steps"]:
        heads = {"step": "step", "norm": "norm_mean", "CV": "norm_cv", "angle": "angle_mean", "its sd": "angle_sd"}
        heads["t of 2"] = "ratio_of_2"
        rows = [[row[key] for key in heads.values()] for row in written["steps"]]
        lines += ["", "## Steps", "Norm, angle and t of the whole model; CV and sd are means over tensors.", ""]
        lines += _table(list(heads), rows)
    flagged = [row for row in written["tensors"] if row["flag"]]
    if flagged:
        lines += ["", "## Negative, clipped, unchanged", *_table(["tensor", "what"], _flags(flagged))]
    if pictures:
        lines += ["", "## Figures"]
        lines += [line for name, (title, _) in pictures.items() for line in (f"![{title}]({name})", "", title, "")]
    return "\n".join(lines).rstrip() + "\n"


def _flags(rows: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    """The flagged tensors; tensors.csv has them all."""
    most = 50
    cells: list[list[Cell]] = [[f"`{row['tensor']}`", row["flag"]] for row in rows[:most]]
    return cells + ([[f"{len(rows) - most} more", "see tensors.csv"]] if len(rows) > most else [])


def _type_cells(row: Mapping[str, Any]) -> list[Cell]:
    means = row["mean over tensors"]
    return [row["unit"], row["tensors"], *(means[key] for key in COLUMNS.values()), row["kurtosis"]]


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """A Markdown table; numbers to the right, with three digits."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v) for v in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(geometry: Geometry, steps: Mapping[int, Geometry] | None = None) -> Pictures:
    """The figures; none, with a notice, where matplotlib is not installed."""
    try:
        from modelstock.geometry.figures import figures
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        notice("figures", "not drawn, as matplotlib is not installed: pip install 'modelstock[figures]'")
        return {}
    return figures(geometry, steps)


def check_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written, or holds more than an earlier measurement.

    Raises:
        MergeError: it is a file, is not empty and not to be replaced, holds other files, or has nowhere to go.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise MergeError(out, got="a file", expected="a folder", cure="name another output")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if names and not overwrite:
        raise MergeError(
            out, got="a folder that is not empty", expected="a new one", cure="use --overwrite or another name"
        )
    if others := [name for name in names if name not in FILES]:
        raise MergeError(
            out,
            got=f"a folder that holds {few(others)}",
            expected="nothing but an earlier measurement to replace",
            cure="name another output",
        )
    place = standing(out)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise MergeError(out, got=f"{place}, which is no folder to write to", expected="one", cure="name another")


def write_geometry(
    out: Path, geometry: Geometry, *, steps: Mapping[int, Geometry] | None = None, overwrite: bool = False
) -> list[Claim]:
    """Write geometry.json, tensors.csv, geometry.md and the figures to the folder `out`, all or nothing; the claims.

    Raises:
        MergeError: as `check_folder`.
        RoomError: there is no room for it.
    """
    out = Path(out)
    check_folder(out, overwrite)
    claims, pictures = weight_claims(geometry, steps), draw(geometry, steps)
    written = geometry_json(geometry, claims, steps)
    files = {
        "geometry.json": dump_json(written).encode(),
        "tensors.csv": tensors_csv(tensor_rows(geometry)).encode(),
        "geometry.md": page(written, claims, pictures).encode(),
        **{name: png for name, (_, png) in pictures.items()},
    }
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    try:
        with room_for(temporary):
            temporary.mkdir(parents=True)
            for name, content in files.items():
                with open(temporary / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            if out.exists():
                os.replace(out, old)
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return claims
