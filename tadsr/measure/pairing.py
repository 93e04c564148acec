"""Find the files of several folders that show the same picture: paths only, no pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tadsr.errors import TADSRError
from tadsr.image_files import IMAGE_SUFFIXES, find_images

_SCALE_TAG = re.compile(r"_?x\d+(\.\d+)?$")  # photo_x4 as tadsr names it, 0801x4 as DIV2K does
_NUM_SHOWN = 10


def match_images(
    folders: Mapping[str, Path], *, allow_missing: bool = False, strip_suffix: str = ""
) -> dict[str, dict[str, Path]]:
    """Match the images of folders by their place and name, whatever their format.

    A scale at a name's end, as in photo_x4.png, is ignored where names do not match with it.

    Args:
        folders: What each folder holds ("HQ", "outputs", ...) and where it is; the first names
            the pictures.
        allow_missing: Whether pictures that a folder lacks are left out, rather than an error.
        strip_suffix: What names end with in some folders, such as "_out", and in others do not.

    Returns:
        Picture (path in its folder without suffix, "/" between parts) → folder's key → file, for
        the pictures that every folder has, sorted.

    Raises:
        TADSRError: A folder does not exist or holds no image, two files of one folder have the
            same name, pictures are missing, or nothing matches.
    """
    (first, first_folder), *others = folders.items()
    pictures = {key: {first: path} for key, path in _find_images(first_folder).items()}
    unmatched = []
    for label, folder in others:
        found = _find_images(folder)
        partners = {key: key for key in pictures if key in found}
        loose = _by_untagged(found.keys() - partners.keys(), folder, strip_suffix)
        for key in sorted(pictures.keys() - partners.keys()):
            if partner := loose.pop(_untagged(key, strip_suffix), None):
                partners[key] = partner
        for key, partner in partners.items():
            pictures[key][label] = found[partner]
        lacking = sorted(pictures.keys() - partners.keys())
        unmatched += [f"{key}: in {first} but not in {label}" for key in lacking]
        extra = sorted(found.keys() - set(partners.values()))
        unmatched += [f"{key}: in {label} but not in {first}" for key in extra]
    if unmatched and not allow_missing:
        shown = "\n  ".join(unmatched[:_NUM_SHOWN])
        more = f"\n  and {len(unmatched) - _NUM_SHOWN} more" if len(unmatched) > _NUM_SHOWN else ""
        raise TADSRError(
            f"every image must have a partner of its name, but {len(unmatched)} have none:"
            f"\n  {shown}{more}\nto compare the rest only, allow it (--allow-missing)"
        )
    complete = {k: v for k, v in sorted(pictures.items()) if len(v) == len(folders)}
    if not complete:
        places = ", ".join(map(str, folders.values()))
        raise TADSRError(f"{places} must hold images of the same names, found no common one")
    return complete


def _find_images(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise TADSRError(f"{folder} must be a folder of images, but is none; check the path")
    found: dict[str, Path] = {}
    for path in filter(Path.is_file, find_images(folder)):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise TADSRError(
                f"the images of a folder must differ in name, got {found[key]} and {path}; "
                "move one away"
            )
        found[key] = path
    if not found:
        raise TADSRError(
            f"{folder} must hold images ({' '.join(sorted(IMAGE_SUFFIXES))}), found none"
        )
    return found


def _untagged(key: str, suffix: str) -> str:
    return _SCALE_TAG.sub("", _SCALE_TAG.sub("", key).removesuffix(suffix))


def _by_untagged(keys: set[str], folder: Path, suffix: str) -> dict[str, str]:
    loose: dict[str, str] = {}
    for key in sorted(keys):
        other = loose.setdefault(_untagged(key, suffix), key)
        if other != key:
            raise TADSRError(
                f"the images of {folder} must differ in more than their scale, got {other} and "
                f"{key}; move one away"
            )
    return loose
