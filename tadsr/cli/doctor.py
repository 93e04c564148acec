"""`tadsr doctor`: what runs here, what does not and why, and whether it is right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from tadsr.cli import options
from tadsr.cli.devices import check_device_name, choose_device
from tadsr.cli.reporting import format_bytes, readable_errors, silence_libraries

if TYPE_CHECKING:
    from tadsr.doctor import Finding, Report

DOCTOR_HELP = """Show what runs on this machine, what does not and why.

\b
Examples:
  tadsr doctor                 versions, device, engine, kernels, the model's files
  tadsr doctor --check         each kernel and engine against its reference
  tadsr doctor --speed         the engines side by side; the fastest is remembered
  tadsr doctor --check --json  for a bug report
"""

_SIGNS = {True: "ok", False: "WRONG", None: "-"}


def doctor(
    model: options.ModelOption = "tadsr-tiny",
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    is_checking: Annotated[
        bool, typer.Option("--check", help="Compare kernels and engines with their references.")
    ] = False,
    is_timing: Annotated[
        bool, typer.Option("--speed", help="Time the engines at 512 x 512 px.")
    ] = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr doctor`; the exit code is 1 if something is wrong."""
    with readable_errors(debug):
        check_device_name(device)
        from tadsr.cli.model import choose_dtype
        from tadsr.doctor import check_all, examine, time_all

        silence_libraries(debug)
        chosen = choose_device(device)
        about = (model, chosen, choose_dtype(dtype, chosen))
        report = examine(*about)

        def follow(finding: Finding) -> Finding:
            if not as_json:
                typer.echo(_line(finding))
            return finding

        if not as_json:
            typer.echo("\n".join(_table(report)))
        if is_checking:
            report = replace(report, checks=tuple(map(follow, check_all(*about))))
        if is_timing:
            report = replace(report, speeds=tuple(map(follow, time_all(*about))))
        if as_json:
            typer.echo(json.dumps(asdict(report), indent=2))
    if not report.is_right:
        raise typer.Exit(1)


def _table(report: Report) -> list[str]:
    machine, device = report.machine, report.device
    memory = {name: format_bytes(int(machine[f"{name}_bytes"])) for name in ("memory", "available")}
    shown = {name: value for name, value in device.items() if not name.endswith("_bytes")}
    if "threads" in shown:
        shown["threads"] = f"threads of torch: {shown['threads']}"
    about = ", ".join(shown.values())
    if "free_bytes" in device:
        free, total = (format_bytes(int(device[f"{name}_bytes"])) for name in ("free", "total"))
        about += f", {free} of {total} free"
    rows = {
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
    width = max(map(len, rows)) + 2
    return [*(f"{name:<{width}}{value}" for name, value in rows.items()), _line(report.model)]


def _line(finding: Finding) -> str:
    return f"{_SIGNS[finding.is_right]:<7}{finding.name}: {finding.detail}"
