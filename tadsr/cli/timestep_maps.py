"""Timestep maps on the command line: a mask with a range, or regions in a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tadsr.cli.reporting import UsageError, as_usage_errors
from tadsr.named_files import parse_json, read_text

if TYPE_CHECKING:
    from tadsr.conditioning import TimestepMap

_WHITE = 255
"""Of 8 bits; a mask that was meant to be spread over a range, most likely."""

TimestepMapOption = Annotated[
    Path | None,
    typer.Option(
        "--timestep-map",
        metavar="FILE",
        help="Instead of -t: a grey image of timesteps, resized to each photo, or regions in JSON.",
    ),
]
TimestepRangeOption = Annotated[
    str | None,
    typer.Option(
        "--timestep-range",
        metavar="LO:HI",
        help="Timesteps that black and white stand for in such an image.",
    ),
]


def parse_timestep_range(
    timestep_map: Path | None, timestep_range: str | None
) -> tuple[int, int] | None:
    """Check the two options against each other.

    Returns:
        The timesteps of black and of white, or None.
    """
    if timestep_range is None:
        return None
    if timestep_map is None or timestep_map.suffix.lower() == ".json":
        raise UsageError("--timestep-range needs --timestep-map with an image")
    ends = timestep_range.split(":")
    if len(ends) != 2 or not all(end.isdecimal() for end in ends):
        raise UsageError(f"--timestep-range must be like 50:800, got {timestep_range!r}")
    return int(ends[0]), int(ends[1])


def read_timestep_map(
    path: Path, timestep_range: tuple[int, int] | None
) -> tuple[TimestepMap | dict[str, Any], int]:
    """Read a map from its file.

    Args:
        timestep_range: Timesteps of black and white of an image; None for its own values.

    Raises:
        OSError: It cannot be read.
    """
    from tadsr.conditioning import TimestepMap, largest_timestep
    from tadsr.images import read_image

    with as_usage_errors():
        try:
            if path.suffix.lower() == ".json":
                found = parse_json(read_text(path))
            else:
                found = TimestepMap.from_image(read_image(path), timestep_range)
                if timestep_range is None and found.values.max() == _WHITE:
                    typer.echo(
                        f"{path}: white is taken as timestep {_WHITE}, as it is written; "
                        "--timestep-range 50:800 spreads black to white over timesteps",
                        err=True,
                    )
            return found, round(largest_timestep(found))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
