"""Jobs over thousands of prompts on an attached model: P2S vectors, and activations of any sites and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from steer_plugin.adapters._collect import Collection, Kept
from steer_plugin.adapters._extract import Extraction
from steer_plugin.adapters._plan import SAMPLED_TOKENS, Pair, Plan, Prompted, parse_batch_size, parse_target
from steer_plugin.adapters._prefix import PrefixedModel
from steer_plugin.errors import InputError
from steer_plugin.positions import Positions
from steer_plugin.processes import Processes
from steer_plugin.shifts import Shifts
from steer_plugin.sites import Site
from steer_plugin.store import ShardStore


class BulkModel(PrefixedModel):
    """A steered model that works into stores."""

    def extract(
        self,
        pairs: Sequence[Pair],
        write: Site | str,
        read: Site | str | None = None,
        out: Path | str | None = None,
        *,
        context: Positions | str = "last_prompt",
        target: str = "average_forced",
        batch_size: int | str = 16,
        seed: int = 0,
        sampled_tokens: int = SAMPLED_TOKENS,
        progress: bool = True,
    ) -> Shifts:
        """Make P2S vectors and contexts of contrastive pairs, resumable in the folder `out` (in memory without one).

        `batch_size` is a number of pairs, or "auto": what fits into memory. Under `accelerate launch` every process
        calls this with the same `out`, takes its share, and gets all shifts.

        Raises:
            InputError: no processor, no pairs, unknown target, several processes without a folder.
            JobError: `out` holds another job.
        """
        if self.processor is None:
            raise InputError("vlm.extract needs the model's processor: sp.attach(model, processor=processor).")
        where = self.parts.resolve(Site.parse(write))
        source = where if read is None else self.parts.resolve(Site.parse(read))
        rows = parse_batch_size(batch_size)
        plan = Plan(where, source, Positions.parse(context), parse_target(target), rows, seed, sampled_tokens)
        extraction = Extraction(self.parts, self.processor, self.ends, plan)
        among = Processes.current()
        among.need_folder(out, "extraction")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()) if out is None else out)
            extraction.run(pairs, folder, progress=progress)
            among.wait()
            return Shifts.load(folder)

    def collect(
        self,
        prompts: Sequence[Prompted],
        sites: Site | str | Sequence[Site | str],
        positions: Positions | str = "last_prompt",
        *,
        out: Path | str,
        reduce: str = "mean",
        dtype: torch.dtype = torch.float32,
        batch_size: int | str = "auto",
        progress: bool = True,
    ) -> ShardStore:
        """Keep activations of many unsteered prompts in the folder `out`, resumable; one tensor for each site.

        "mean" keeps (d_model) for each prompt and site, over the tokens that `positions` select; "none" keeps each
        token. Several processes work as in `extract`.

        Raises:
            InputError: no processor, no prompts, no sites, unknown reduction.
            SiteError, PositionError: what this model has not, or prompts without such tokens.
            JobError: `out` holds another job.
        """
        if self.processor is None:
            raise InputError("vlm.collect needs the model's processor: sp.attach(model, processor=processor).")
        asked = [sites] if isinstance(sites, (Site, str)) else sites
        found = tuple(self.parts.resolve(Site.parse(site)) for site in asked)
        kept = Kept(found, Positions.parse(positions), reduce, dtype)
        rows = parse_batch_size(batch_size)
        Collection(self.parts, self.processor, self.ends, kept, rows).run(prompts, Path(out), progress=progress)
        Processes.current().wait()
        return ShardStore.open(Path(out))
