"""What can be said without computing: versions, devices, the choice of engine, a model's files."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tadsr.checkpoints import inspect_checkpoint
from tadsr.errors import TADSRError
from tadsr.folders.manifest import fingerprint
from tadsr.kernels.backends import unsupported_reasons
from tadsr.machine import describe_device, versions
from tadsr.onestep import choose_plan
from tadsr.onestep.products import choose_products

SUMS = "SHA256SUMS"
"""A model's own list of hashes, as `sha256sum` writes it."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        name: What.
        is_right: Whether it is as it should be; None where it could not be looked at.
        detail: What was found, or why nothing was.
        seconds: A picture's time, where it was taken.
    """

    name: str
    is_right: bool | None
    detail: str
    seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything that `tadsr doctor` reports.

    Args:
        versions: Of the package, Python and libraries.
        machine: System, processor and memory.
        device: Description of the device in use.
        device_name: What torch calls it.
        dtype: Type of the weights, as the command line would choose it.
        products: The type that "auto" multiplies in there, and why.
        engine: What `engine="auto"` takes there.
        kernel_reasons: Why fused kernels do not run there; none if they do.
        model: The model's files.
        checks: What `check_all` found.
        speeds: What `time_all` found.
    """

    versions: dict[str, str]
    machine: dict[str, str]
    device: dict[str, str]
    device_name: str
    dtype: str
    products: str
    engine: str
    kernel_reasons: tuple[str, ...]
    model: Finding
    checks: tuple[Finding, ...] = ()
    speeds: tuple[Finding, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong; what could not be looked at does not count."""
        findings = (self.model, *self.checks, *self.speeds)
        return all(finding.is_right is not False for finding in findings)


def examine(source: str, device: torch.device, dtype: torch.dtype) -> Report:
    """Collect everything that needs no computing."""
    memory = psutil.virtual_memory()
    multiplied, reason = choose_products(device, dtype)
    about = describe_device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        about |= {"free_bytes": str(free), "total_bytes": str(total)}
    return Report(
        versions=versions(),
        machine={
            "system": platform.platform(),
            "processor": describe_device(torch.device("cpu"))["name"],
            "memory_bytes": str(memory.total),
            "available_bytes": str(memory.available),
        },
        device=about,
        device_name=str(device),
        dtype=str(dtype).removeprefix("torch."),
        products=f"{str(multiplied or dtype).removeprefix('torch.')}; {reason}",
        engine="eager" if choose_plan(device, dtype) is None else "fused",
        kernel_reasons=tuple(unsupported_reasons([torch.empty(1, dtype=dtype, device=device)])),
        model=verify_model(source),
    )


def verify_model(source: str) -> Finding:
    """Read a model's headers and compare its files with the known hashes."""
    name = f"model {source}"
    try:
        found = inspect_checkpoint(source)
    except TADSRError as error:
        return Finding(name, False, str(error))
    folder = Path(found.folder)
    expected = _hashes_of(folder)
    damaged = [name for name, digest in expected.items() if fingerprint(folder / name)[1] != digest]
    if damaged:
        return Finding(name, False, f"damaged: {', '.join(damaged)} in {folder}; get it again")
    compared = f"{len(expected)} files match their hashes"
    if not expected:
        compared = "the headers are right; there are no hashes to compare with"
    return Finding(name, True, f"{compared}, {folder}")


def _hashes_of(folder: Path) -> dict[str, str]:
    """Return the hashes of a folder's files: listed there, or those that the hub's cache names."""
    if (folder / SUMS).is_file():
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        pairs = (line.split(maxsplit=1) for line in lines if line.strip())
        return {name.lstrip("*"): digest for digest, name in pairs}
    links = (path for path in folder.rglob("*") if path.is_symlink())
    blobs = {str(path.relative_to(folder)): path.resolve().name for path in links}
    return {path: name for path, name in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", name)}
