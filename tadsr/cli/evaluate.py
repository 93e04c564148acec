"""`tadsr evaluate`: figures for folders of results, or for a model at several timesteps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tadsr.cli import options
from tadsr.cli.devices import check_device_name, choose_device
from tadsr.cli.model_request import ModelRequest
from tadsr.cli.reporting import (
    UsageError,
    as_usage_errors,
    check_range,
    readable_errors,
    silence_libraries,
)
from tadsr.cli.targets import check_place
from tadsr.config import UpscaleSettings

EVALUATE_HELP = """Measure results against originals.

\b
OUTPUTS are folders of results, each a row of the table; NAME=FOLDER names it.
With --lq a model runs on a folder of small images at every --timestep, and
bicubic is measured beside it. Images of the folders belong together if their
names do, whatever their format; photo_x4.png belongs to photo.jpg.

\b
Examples:
  tadsr evaluate sharp/ --hq originals/    one folder of results
  tadsr evaluate ours=a/ theirs=b/ --hq originals/
  tadsr evaluate --lq small/ --hq originals/ -t 1 -t 500 -t 900
  tadsr evaluate --lq small/ --hq originals/ theirs=b/ --plot curve.png
  tadsr evaluate sharp/ --metric musiq     no originals; needs pyiqa

PSNR and SSIM (Y of BT.601, and RGB) leave out a border; detail is the mean magnitude of the
Laplacian, which noise raises too: compare it with that of the originals.
"""

_DEFAULT_TIMESTEPS = (1, 500, 900)


def evaluate(
    outputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="OUTPUTS", help="Folders of results, optionally NAME=FOLDER."),
    ] = None,
    hq: Annotated[
        Path | None, typer.Option("--hq", metavar="FOLDER", help="The originals.")
    ] = None,
    lq: Annotated[
        Path | None,
        typer.Option("--lq", metavar="FOLDER", help="Small images to run the model on."),
    ] = None,
    timestep: Annotated[
        list[int] | None,
        typer.Option(
            "--timestep",
            "-t",
            metavar="0..999",
            help="Timestep for --lq; repeatable.  [default: 1, 500, 900]",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Repeatable: psnr_y, ssim_y, psnr_rgb, ssim_rgb, detail, or pyiqa's such as "
            "lpips, musiq, clipiqa; all of the first kind if left out.",
        ),
    ] = None,
    perceptual: Annotated[
        Path | None,
        typer.Option("--perceptual", metavar="FILE", help="SqueezeNet weights; adds its distance."),
    ] = None,
    border: options.BorderOption = 4,
    scale: Annotated[
        float,
        typer.Option(
            "--scale",
            "-s",
            parser=options.parse_scale,
            metavar="X",
            help="Scale for --lq without --hq.",
        ),
    ] = 4,
    color_fix: options.ColorFixOption = "adain",
    process_size: options.ProcessSizeOption = None,
    model: options.ModelOption = "tadsr-tiny",
    adapter: options.AdapterOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write all figures as CSV.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Plot realism over fidelity, as png, svg or pdf."
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FOLDER", help="Keep the model's results.")
    ] = None,
    strip_suffix: Annotated[
        str,
        typer.Option(
            "--strip-suffix", metavar="TEXT", help="Ignore this at the end of names, such as _out."
        ),
    ] = "",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Skip images that a folder lacks.")
    ] = False,
    quiet: options.QuietOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr evaluate`."""
    with as_usage_errors():
        UpscaleSettings(scale, color_fix, process_size)
    check_range("--border", border, 0, 10_000, "papers leave out as many px as the scale")
    for value in timestep or ():
        check_range("--timestep", value, 0, 999, "small is faithful, large is vivid")
    named = _name_outputs(outputs or [])
    wanted = ModelRequest(model, adapter, dtype)
    _check_use(has_outputs=bool(named), has_lq=lq is not None, timestep=timestep, save=save)
    with readable_errors(debug):
        for path in filter(None, (csv, json, plot, save)):
            check_place(path)
        check_device_name(device)
        if lq is not None:
            wanted.check()
        place = choose_device(device)

        from tadsr.measure.evaluation import evaluate_model, evaluate_pairs, make_perceptual_metric
        from tadsr.measure.metrics import default_metrics, make_metric
        from tadsr.measure.plot import check_plot
        from tadsr.measure.plot import plot as draw_plot
        from tadsr.measure.report import format_table, write_csv, write_json

        silence_libraries(debug)
        names = metric or default_metrics(hq is not None)
        with as_usage_errors():
            metrics = [make_metric(n, border_px=border, device=place) for n in dict.fromkeys(names)]
            if perceptual is not None:
                metrics.append(make_perceptual_metric(perceptual, device=place))
            if plot is not None:
                check_plot(metrics, plot)
        common = {"metrics": metrics, "allow_missing": allow_missing, "show_progress": not quiet}
        common["strip_suffix"] = strip_suffix
        if lq is None:
            with as_usage_errors():
                result = evaluate_pairs(named, hq, **common)
        else:
            timesteps = list(dict.fromkeys(timestep or _DEFAULT_TIMESTEPS))
            pipe = replace(wanted, timestep=max(timesteps)).load(place)
            with as_usage_errors():
                result = evaluate_model(
                    pipe,
                    lq,
                    hq,
                    timesteps=timesteps,
                    outputs=named,
                    scale=scale,
                    color_fix=color_fix,
                    process_size=process_size,
                    save=save,
                    model_name=wanted.name,
                    **common,
                )
        typer.echo(format_table(result))
        writers = ((csv, write_csv), (json, write_json), (plot, draw_plot))
        for path, write in writers:
            if path is not None:
                write(result, path)


def _name_outputs(outputs: list[str]) -> dict[str, Path]:
    """Turn FOLDER and NAME=FOLDER into folders by name."""
    named: dict[str, Path] = {}
    for text in outputs:
        name, equals, folder = text.partition("=")
        if not equals or os.path.isdir(text):
            name, folder = Path(text).resolve().name, text
        if not name or not folder:
            raise UsageError(f"outputs must be FOLDER or NAME=FOLDER, got {text!r}")
        if name in named:
            raise UsageError(
                f"outputs must differ in name, got {name!r} twice; name them with NAME=FOLDER"
            )
        named[name] = Path(folder)
    return named


def _check_use(
    *, has_outputs: bool, has_lq: bool, timestep: list[int] | None, save: Path | None
) -> None:
    if not has_outputs and not has_lq:
        raise UsageError("name folders of results to measure, or --lq to run a model on")
    if not has_lq and (timestep or save):
        option = "--timestep" if timestep else "--save"
        raise UsageError(f"{option} needs --lq, the images that the model is to run on")
