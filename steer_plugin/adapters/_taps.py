"""Reading sites of a forward that is stopped behind the last one of them: no layer runs of which nothing is read.

forward -> layer 0 -> ... -> last site | stop          embeddings and vision tower whole, lm_head never
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer_plugin.adapters._hooks import hook_site
from steer_plugin.sites import Site

Ends = Callable[[Site], tuple[nn.Module, str]]
Taps = Sequence[tuple[Site, Callable[[Tensor], None]]]


class _Stop(BaseException):
    """Ends a forward after the last layer that is read; never leaves this module."""


@contextmanager
def reading(ends: Ends, taps: Taps, last: Site) -> Generator[None, None, None]:
    """Hook the taps and stop the forward once `last` is through; `ends` says where a site's tensor passes."""
    handles: list[RemovableHandle] = []

    def act(site: Site) -> Callable[[Tensor], Tensor]:
        def see(hidden: Tensor) -> Tensor:
            for where, take in taps:
                if where == site:
                    take(hidden)
            if site == last:
                raise _Stop
            return hidden

        return see

    try:
        for site in {*(site for site, _ in taps), last}:
            handles.append(hook_site(*ends(site), act(site)))
        yield
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
