"""Artefacts on the Hugging Face Hub, by the Hub's own mixin: save_pretrained, push_to_hub, from_pretrained.

    repository/artefact.json, tensors.safetensors    what `save` writes and `load` reads: nothing that can run
    repository/config.json                           says that this is a steering; the Hub counts downloads by it
    repository/README.md                             model card: method, family, site, positions, alpha, versions

A folder that `save` wrote can be read by `from_pretrained`, and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from steer_plugin.artefact import DESCRIPTION, FORMAT, TENSORS, versions
from steer_plugin.atomic import JSON, atomic_write_json
from steer_plugin.errors import ArtefactError, InputError

# In every card that nobody has edited: such a card is written anew when the artefact is.
_OURS = "<!-- Written by steer_plugin; without this line the card is left as it is. -->"
_LEFT_OUT = ("report", "config")
H = TypeVar("H", bound="HubArtefact")


class HubArtefact(ModelHubMixin, library_name="steer-plugin", tags=["activation-steering"]):
    """What a method needs to live on the Hub: `kind`, `meta`, `save` and `load`."""

    kind: ClassVar[str]

    def __new__(cls: type[H], *args: Any, **kwargs: Any) -> H:
        """Make the object and nothing else: the mixin would keep a copy of the arguments for its own config.json."""
        return object.__new__(cls)

    def meta(self) -> dict[str, JSON]:
        """What artefact.json says beside the tensors."""
        raise NotImplementedError

    def save(self, folder: Path | str) -> None:
        """Write the artefact into a folder."""
        raise NotImplementedError

    @classmethod
    def load(cls: type[H], folder: Path | str) -> H:
        """Read the artefact of a folder."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[H],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: object,
    ) -> H:
        """Read an artefact from a folder, or from "user/repository" on the Hub, of which only two files are read.

        Raises:
            ArtefactError: no such folder or repository, no access to it, or no artefact of this kind in it.
            InputError: other keywords; what an artefact says is changed after loading.
        """
        where = str(pretrained_model_name_or_path)
        if model_kwargs:
            raise InputError(
                f"from_pretrained got {', '.join(sorted(model_kwargs))}: an artefact carries its own settings. Load it "
                "and change the copy, as in steering * 1.5."
            )
        if Path(where).is_dir():
            return cls.load(where)
        try:
            return super().from_pretrained(
                where,
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        except HFValidationError as error:
            raise ArtefactError(f"{where!r} is neither a folder here nor a repository's name: {error}") from error
        # All of the Hub's other errors are one of the two: no repository, no access, no network, no such revision.
        except (OSError, EntryNotFoundError) as error:
            raise ArtefactError(f"{where!r} is no folder here, and the Hub did not give it: {error}") from error

    @classmethod
    def _from_pretrained(
        cls: type[H],
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: object,
    ) -> H:
        """Download the artefact's two files; what config.json says is not looked at."""
        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=[DESCRIPTION, TENSORS],
        )
        if not (Path(folder) / DESCRIPTION).is_file():
            raise ArtefactError(f"{model_id!r} on the Hub has no {DESCRIPTION}: expected what push_to_hub writes.")
        return cls.load(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)
        atomic_write_json(save_directory / "config.json", {"steer_plugin": {"kind": self.kind, "format": FORMAT}})
        card = save_directory / "README.md"
        if card.is_file() and _OURS in card.read_text(encoding="utf-8"):
            card.unlink()  # the mixin then writes it anew

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """Say what the artefact is and how it is used; keywords (model_card_kwargs) become rows of its table."""
        meta = self.meta()
        shown = {name: value for name, value in meta.items() if name not in (*_LEFT_OUT, "model") and value is not None}
        model = meta["model"]
        rows: dict[str, object] = {
            "method": self.kind,
            **(dict(model) if isinstance(model, Mapping) else {"model": "not recorded"}),
            **shown,
            **{f"version of {name}": version for name, version in versions().items()},
            **kwargs,
        }
        data = ModelCardData(
            library_name=self._hub_mixin_info.model_card_data.library_name,
            tags=[*(self._hub_mixin_info.model_card_data.tags or []), self.kind],
        )
        name = type(self).__name__
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{_OURS}\n\n# {name}\n\n{_table(rows)}\n{_usage(name)}")


def _table(rows: Mapping[str, object]) -> str:
    cells = {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in rows.items()}
    lines = [f"| {name} | `{value.replace('|', '&#124;')}` |" for name, value in cells.items()]
    return "\n".join(["| what | value |", "| --- | --- |", *lines, ""])


def _usage(name: str) -> str:
    return f"""```python
import steer_plugin as sp

steering = sp.{name}.from_pretrained("user/repository")  # this repository's name, or a folder
ids = sp.attach(model, processor).generate(**inputs, steering=steering, max_new_tokens=32)
```
"""
