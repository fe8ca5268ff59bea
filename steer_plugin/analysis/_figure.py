"""A figure of the package: no pyplot, one layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer_plugin.errors import FrameworkError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = object  # imported when needed; run-time type checkers look the name up


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches: pyplot would keep it, and show it twice in a notebook.

    Raises:
        FrameworkError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Made
    except ImportError as error:
        raise FrameworkError("figures need matplotlib: pip install 'steer-plugin[analysis]'.") from error
    return Made(figsize=(width, height), layout="constrained")
