"""Repositories of the Hugging Face Hub: found in its cache without a network, or fetched into it."""

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from abba.errors import AbbaError, CheckpointError, DataError, first_line
from abba.storage import in_gb

# Of a model what we read: its weights once, as safetensors (original/ and consolidated* are second copies), its
# configuration and its tokenizer; and what its licence asks to pass on with a merged model (COMPANIONS of
# abba/adapter/model_files.py). With these patterns the library also knows whether a snapshot in the cache is whole.
NEEDED = {
    "model": {
        "allow_patterns": [
            *("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model", "spiece.model"),
            *("LICENSE*", "NOTICE*", "USE_POLICY*"),
        ],
        "ignore_patterns": ["*/*", "consolidated*"],
    },
    "dataset": {},
}
ERRORS: dict[str, type[AbbaError]] = {"model": CheckpointError, "dataset": DataError}


@dataclass(frozen=True)
class HubRepository:
    """A model or dataset by name; revision: a commit, branch or tag, None is `main`."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None

    def find(self) -> Path | None:
        """Its snapshot in the cache, if that is whole. The directory's name is the commit. No network."""
        try:
            return Path(self._snapshot(local_files_only=True))
        except (OSError, ValueError):  # none, an incomplete one, or a name that no repository has
            return None

    def fetch(self) -> Path:
        """Its snapshot, downloaded where the cache lacks it.

        Raises:
            CheckpointError: a model's repository cannot be had; or the cache has no room for it.
            DataError: a dataset's repository cannot be had.
        """
        try:
            missing = sum(file.file_size for file in self._snapshot(dry_run=True) if file.will_download)
            cache = Path(constants.HF_HUB_CACHE)
            cache.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(cache).free
            if missing > free:
                raise CheckpointError(
                    f"{cache}: no space: {self.kind} {self.name} needs {in_gb(missing)}, {in_gb(free)} are free; "
                    "make room, or set HF_HOME to another place"
                )
            return Path(self._snapshot())
        except AbbaError:
            raise
        except Exception as error:  # of the Hub's client, its HTTP library and the disk
            raise ERRORS[self.kind](
                f"{self.kind} {self.name!r} is not in the Hub cache, and {self._why_not(error)}; "
                f"on a machine with access run: {self.command}"
            ) from None

    @property
    def command(self) -> str:
        """What a user can type to fetch it."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        others = " --exclude '*/*' --exclude 'consolidated*' --exclude '*.bin'" if self.kind == "model" else ""
        return f"hf download{kind} {self.name}{revision}{others}"

    def _snapshot(self, **how: bool):
        return snapshot_download(self.name, repo_type=self.kind, revision=self.revision, **NEEDED[self.kind], **how)

    def _why_not(self, error: BaseException) -> str:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"{constants.HF_HUB_CACHE} has no space left"
        page = f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.name}"
        causes = [error, error.__cause__]
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            return f"its licence has to be accepted at {page}, followed by: hf auth login"
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            return "the Hub has none of this name, or it is private: hf auth login"
        if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            return f"the Hub has no revision {self.revision!r} of it"
        return f"the Hub cannot be reached ({first_line(error.__cause__ or error)})"
