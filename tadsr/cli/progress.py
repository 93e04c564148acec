"""What a terminal shows while a command loads, and while an image takes a while."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tadsr.progress import Progress

if TYPE_CHECKING:
    from tqdm import tqdm


class ImageProgress:
    """A progress bar for the current image, shown only if it takes a while."""

    def __init__(self, quiet: bool = False) -> None:
        self._hidden = True if quiet else None
        self._bar: tqdm | None = None
        self._waits = False

    def of(self, image: object) -> Progress:
        """Begin an image and return its progress callback."""
        self.close()
        return self._advance

    def wait_for(self, what: str) -> None:
        """Show on a terminal what is being waited for, until the next image or `close`."""
        if self._hidden is None and sys.stderr.isatty():
            self._waits = True
            sys.stderr.write(f"{what} …")
            sys.stderr.flush()

    def close(self) -> None:
        """Remove the bar or the waiting line."""
        if self._waits:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._waits = False
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _advance(self, share: float) -> None:
        from tqdm import tqdm

        bar = self._bar  # of two images at once either may take it away
        if bar is None and share < 1:
            form = "{l_bar}{bar}| {elapsed}<{remaining}"
            bar = tqdm(total=1.0, delay=2, leave=False, disable=self._hidden, bar_format=form)
            self._bar = bar
        if bar is not None:
            bar.update(share - bar.n)

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
