"""Late reads done beforehand: f(h) with h known fits into one pass, hence into a block that the user wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from steer_plugin.adapters._call import Forward, Tap, mean_over
from steer_plugin.context import Context, Delta, Read
from steer_plugin.intervention import Intervention, Write, expand_rows


class Taken:
    """Takes the values of some reads in the next forward."""

    def __init__(self, reads: Sequence[Read]) -> None:
        self.reads = tuple(reads)
        self._got: dict[Read, Tensor] = {}

    @property
    def taps(self) -> list[Tap]:
        """What to give to a run."""
        return [Tap(read.site, read.positions, self._taking(read)) for read in self.reads]

    @property
    def values(self) -> tuple[Float[Tensor, "row d_model"], ...]:
        """One (row, d_model) tensor per read."""
        return tuple(self._got[read] for read in self.reads)

    def _taking(self, read: Read) -> Callable[[Tensor, Forward], None]:
        def take(hidden: Tensor, forward: Forward) -> None:
            mask = forward.mask(read.positions)
            if isinstance(mask, Tensor):
                self._got[read] = mean_over(hidden, mask, read)

        return take


def prepared(
    writes: Sequence[Write], values: Callable[[Intervention, Sequence[Read]], tuple[Tensor, ...]]
) -> Intervention:
    """Resolve late writes site by site; each context pass leaves out its own site's and those not yet known."""
    known: dict[int, Write] = {}
    resolved: dict[int, Write] = {}
    for site in sorted({write.site for write in writes if write.late}, key=lambda site: site.order):
        group = [i for i, write in enumerate(writes) if write.late and write.site == site]
        others = [known.get(i, other) for i, other in enumerate(writes) if i in known or not other.late]
        for index in group:
            got = values(Intervention(tuple(others)), writes[index].reads)
            resolved[index] = replace(writes[index], delta=_Known(writes[index].delta, got), reads=())
        known.update(resolved)
    return Intervention(tuple(known.get(i, write) for i, write in enumerate(writes)))


class _Known:
    """A delta whose reads were done beforehand."""

    def __init__(self, delta: Delta, values: tuple[Tensor, ...]) -> None:
        self.delta, self.values = delta, values

    def __call__(self, hidden: Tensor, context: Context) -> Tensor:
        reads = tuple(expand_rows(value, context.rows, "contexts") for value in self.values)
        return self.delta(hidden, replace(context, reads=reads))
