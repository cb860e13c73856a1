"""The safetensors files of a base model, and where each tensor lies in them."""

from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from abba.errors import CheckpointError
from abba.names import safe_name
from abba.storage import SafetensorsFile, StoredTensor, read_json

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class BaseFiles:
    """One file or several with an index; opened, their headers checked, nothing read yet.

    Raises:
        CheckpointError: no safetensors (a pickle-only base is refused), a file of the index is missing or damaged, or
            the index names anything but safetensors files beside it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with ExitStack() as stack:
            self.files = {name: stack.enter_context(SafetensorsFile(directory / name)) for name in self._file_names()}
            self._place: dict[str, SafetensorsFile] = {}
            for file in self.files.values():
                for tensor in file.tensors:
                    other = self._place.setdefault(tensor, file)
                    if other is not file:
                        raise CheckpointError(f"{file.path}: holds {tensor}, which {other.path.name} holds too")
            self._stack = stack.pop_all()

    def __enter__(self) -> "BaseFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return set(self._place)

    def stored(self, name: str) -> StoredTensor:
        return self._place[name].tensors[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor `name`."""
        return self._place[name].read(name, start, stop)

    def _file_names(self) -> list[str]:
        if (self.directory / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        if (self.directory / INDEX).is_file():
            index = read_json(self.directory / INDEX)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{self.directory / INDEX}: does not map tensors to safetensors files beside it")
            names = sorted({safe_name(name, str(self.directory / INDEX)) for name in weight_map.values()})
            others = [name for name in names if not name.endswith(".safetensors")]
            if others:
                raise CheckpointError(f"{self.directory / INDEX}: names {others[0]}; only safetensors files are opened")
            return names
        pickles = sorted(path.name for path in self.directory.glob("*.bin"))
        if pickles:
            raise CheckpointError(
                f"{self.directory}: has only {pickles[0]}, a pickle, which can run code when opened; "
                "fetch the safetensors of this model, or convert it on a machine you can lose"
            )
        raise CheckpointError(f"{self.directory}: holds neither {SINGLE_FILE} nor {INDEX}")
