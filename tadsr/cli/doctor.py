"""`tadsr doctor`: what runs here, what does not and why, and whether it is right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import typer

from tadsr.cli import options
from tadsr.cli.model import DtypeName, choose_device, choose_dtype
from tadsr.cli.reporting import align, format_bytes

if TYPE_CHECKING:
    from tadsr.doctor import Finding, Report

_SIGNS = {True: "ok", False: "WRONG", None: "-"}


def doctor(
    model: str = options.MODEL,
    device: str = options.DEVICE,
    dtype: DtypeName = options.DTYPE,
    is_checking: bool = options.option(
        False, "--check", "Compare kernels and engines with their references."
    ),
    is_timing: bool = options.option(False, "--speed", "Time the engines at 512 x 512 px."),
    as_json: bool = options.JSON,
    debug: bool = options.DEBUG,
) -> None:
    """Show what runs on this machine, what does not and why.

    \b
    Examples:
      tadsr doctor                 versions, device, engine, kernels, the model's files
      tadsr doctor --check         each kernel and engine against its reference
      tadsr doctor --speed         the engines side by side; the fastest is remembered
      tadsr doctor --check --json  for a bug report
    """
    chosen = choose_device(device)
    from tadsr.doctor import check_all, examine, time_all

    about = (model, chosen, choose_dtype(dtype, chosen))
    report = examine(*about)

    def follow(finding: Finding) -> Finding:
        if not as_json:
            typer.echo(_line(finding))
        return finding

    if not as_json:
        typer.echo(align(_facts(report).items()))
        follow(report.model)
    if is_checking:
        report = replace(report, checks=tuple(map(follow, check_all(*about))))
    if is_timing:
        report = replace(report, speeds=tuple(map(follow, time_all(*about))))
    if as_json:
        typer.echo(json.dumps({**asdict(report), "is_right": report.is_right}, indent=2))
    if not report.is_right:
        raise typer.Exit(1)


def _facts(report: Report) -> dict[str, str]:
    machine, device = report.machine, report.device
    memory = {name: format_bytes(int(machine[f"{name}_bytes"])) for name in ("memory", "available")}
    shown = {name: value for name, value in device.items() if not name.endswith("_bytes")}
    if "threads" in shown:
        shown["threads"] = f"threads of torch: {shown['threads']}"
    about = ", ".join(shown.values())
    if "free_bytes" in device:
        free, total = (format_bytes(int(device[f"{name}_bytes"])) for name in ("free", "total"))
        about += f", {free} of {total} free"
    return {
        **report.versions,
        "system": machine["system"],
        "processor": machine["processor"],
        "memory": f"{memory['memory']}, {memory['available']} available",
        "device": f"{report.device_name}: {about}",
        "dtype": report.dtype,
        "products": report.products,
        "engine": f"auto takes {report.engine}",
        "kernels": "not used: " + "; ".join(report.kernel_reasons)
        if report.kernel_reasons
        else "used",
    }


def _line(finding: Finding) -> str:
    return f"{_SIGNS[finding.is_right]:<7}{finding.name}: {finding.detail}"
