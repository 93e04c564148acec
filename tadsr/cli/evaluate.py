"""`tadsr evaluate`: figures for folders of results, or for a model at several timesteps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import typer

from tadsr.cli import options
from tadsr.cli.model import DtypeName, ModelRequest, choose_device
from tadsr.cli.reporting import UsageError, as_usage_errors
from tadsr.cli.targets import check_place
from tadsr.config import ColorFix, UpscaleSettings

_DEFAULT_TIMESTEPS = (1, 500, 900)


def evaluate(
    outputs: list[str] | None = options.argument(
        "OUTPUTS", "Folders of results, optionally NAME=FOLDER.", None
    ),
    hq: Path | None = options.option(None, "--hq FOLDER", "The originals."),
    lq: Path | None = options.option(None, "--lq FOLDER", "Small images to run the model on."),
    timestep: list[int] | None = options.option(
        None,
        "--timestep -t 0..999",
        "Timestep for --lq; repeatable.  [default: 1, 500, 900]",
        callback=options.within(0, 999, "small is faithful, large is vivid"),
    ),
    metric: list[str] | None = options.option(
        None,
        "--metric NAME",
        "Repeatable: psnr_y, ssim_y, psnr_rgb, ssim_rgb, detail, or pyiqa's such as "
        "lpips, musiq, clipiqa; all of the first kind if left out.",
    ),
    perceptual: Path | None = options.option(
        None, "--perceptual FILE", "SqueezeNet weights; adds its distance."
    ),
    border: int = options.BORDER,
    scale: float = options.option(
        4, "--scale -s X", "Scale for --lq without --hq.", parser=options.parse_scale
    ),
    color_fix: ColorFix = options.COLOR_FIX,
    process_size: int | None = options.PROCESS_SIZE,
    model: str = options.MODEL,
    adapter: str | None = options.ADAPTER,
    device: str = options.DEVICE,
    dtype: DtypeName = options.DTYPE,
    csv: Path | None = options.option(None, "--csv FILE", "Write all figures as CSV."),
    json: Path | None = options.option(None, "--json FILE", "Write all figures as JSON."),
    plot: Path | None = options.option(
        None, "--plot FILE", "Plot realism over fidelity, as png, svg or pdf."
    ),
    save: Path | None = options.option(None, "--save FOLDER", "Keep the model's results."),
    strip_suffix: str = options.option(
        "", "--strip-suffix TEXT", "Ignore this at the end of names, such as _out."
    ),
    allow_missing: bool = options.option(
        False, "--allow-missing", "Skip images that a folder lacks."
    ),
    quiet: bool = options.QUIET,
    debug: bool = options.DEBUG,
) -> None:
    """Measure results against originals.

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
    with as_usage_errors():
        UpscaleSettings(scale, color_fix, process_size)
    named = _name_outputs(outputs or [])
    wanted = ModelRequest(model, adapter, dtype)
    if not named and lq is None:
        raise UsageError("name folders of results to measure, or --lq to run a model on")
    if lq is None and (timestep or save):
        option = "--timestep" if timestep else "--save"
        raise UsageError(f"{option} needs --lq, the images that the model is to run on")
    for path in filter(None, (csv, json, plot, save)):
        check_place(path)
    if lq is not None:
        wanted.check()
    place = choose_device(device)

    from tadsr.measure.evaluation import evaluate_model, evaluate_pairs, make_perceptual_metric
    from tadsr.measure.metrics import default_metrics, make_metric
    from tadsr.measure.plot import check_plot
    from tadsr.measure.plot import plot as draw_plot
    from tadsr.measure.report import format_table, write_csv, write_json

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
    for path, write in ((csv, write_csv), (json, write_json), (plot, draw_plot)):
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
