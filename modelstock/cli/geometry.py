"""`modelstock geometry`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstock.cli.options import AsJson, OutFolder, Overwrite
from modelstock.cli.output import progress_of, show
from modelstock.errors import ParamsError
from modelstock.notices import so_far


def geometry(
    weights: Annotated[list[Path], typer.Argument(help="Fine-tuned checkpoints, two or more seeds.")],
    anchor: Annotated[Path, typer.Option(help="The pre-trained checkpoint w0.")],
    out: OutFolder,
    centre: Annotated[
        list[Path] | None,
        typer.Option(help="A seed that is not under test; the mean of these is the centre. Without: the other seeds'."),
    ] = None,
    over: Annotated[
        str | None, typer.Option(help="steps: the checkpoints are snapshots, such as SEED/epoch-3.safetensors.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Glob of tensors to measure.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of tensors to leave out.")] = None,
    projections: Annotated[
        int, typer.Option(min=0, help="Random directions per tensor, for the kurtosis; 0: none.")
    ] = 64,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Where fine-tuned weights lie: norms, angles, the centre, and whether Model Stock's claims hold for them."""
    if over is not None:
        if over != "steps":
            raise ParamsError("--over", got=repr(over), expected="steps", cure="write --over steps, or leave it out")
        if centre:
            raise ParamsError("--centre", got="with --over steps", expected="one of them", cure="leave one out")
    from modelstock.geometry.measure import measure_files
    from modelstock.geometry.page import check_folder, write_geometry
    from modelstock.geometry.steps import measure_steps

    check_folder(out, overwrite)
    options: dict[str, Any] = {"include": include or [], "exclude": exclude or [], "directions": projections}
    with progress_of("geometry") as progress:
        if over == "steps":
            steps = measure_steps(anchor, weights, progress=progress, **options)
            measured = steps[max(steps)]
        else:
            steps = None
            measured = measure_files(anchor, weights, centre=centre or [], progress=progress, **options)
    claims = write_geometry(out, measured, steps=steps, overwrite=overwrite)
    if as_json:
        facts = {"out": str(out), "claims": [claim.as_json() for claim in claims], "notices": so_far()}
        print(json.dumps(facts, indent=1))
        return
    rows = [
        {"claim": claim.title, "verdict": claim.verdict, "measured": claim.quantities[0].shown()} for claim in claims
    ]
    show(f"{len(measured.seeds)} seeds: {out / 'geometry.md'}", rows, False)
