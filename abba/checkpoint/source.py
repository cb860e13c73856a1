"""Where the factors of an adapter come from: our checkpoints, DeepSpeed's own or an adapter, read the same way."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from abba.adapter.config import AdapterConfig, MethodConfig
from abba.adapter.directory import ABBA_CONFIG
from abba.adapter.files import read_factors
from abba.adapter.initialize import Factors
from abba.checkpoint.deepspeed_files import DeepSpeedCheckpoint, is_deepspeed_checkpoint
from abba.checkpoint.format import MANIFEST, MASTER, ShardReader, newest_valid, read_state, verify
from abba.errors import ArgumentError, CheckpointError
from abba.layout import CHECKPOINTS, EVALUATION, SCORES
from abba.storage import is_there, read_json


@dataclass(frozen=True)
class FactorSource:
    """An opened checkpoint or adapter: what its adapter is, and the fp32 factors of one module at a time.

    provenance: JSON values that say what made it: step, world_size, and for ours recipe and fingerprint.
    """

    directory: Path
    config: MethodConfig
    modules: dict[str, tuple[int, int]]  # name -> (out, in)
    base_model: str | None
    provenance: dict[str, Any]
    read: Callable[[str], Tensor]  # a full fp32 tensor by its name
    tensors: Mapping[str, tuple[int, ...]]  # every trained tensor by its name

    def factors(self, module: str) -> Sequence[Tensor]:
        """Of an adapter; ABBA's are Factors."""
        read = (self.read(f"{module}.{factor}") for factor in self.config.factor_shapes(*self.modules[module]))
        return Factors(*read) if isinstance(self.config, AdapterConfig) else tuple(read)

    def all_factors(self) -> dict[str, Sequence[Tensor]]:
        return {module: self.factors(module) for module in self.modules}

    @property
    def run(self) -> Path | None:
        """The run directory that a checkpoint of ours lies in."""
        parent = self.directory.resolve().parent
        return parent.parent if parent.name == CHECKPOINTS else None

    def scores(self) -> dict[str, Any] | None:
        """What the run has scored, if it was the adapter of this step."""
        path = self.run / EVALUATION / SCORES if self.run else None
        if path is None or not path.is_file():
            return None
        scores = read_json(path)
        if not isinstance(scores, dict):
            raise CheckpointError(f"{path}: holds no scores; delete it, or score the run again")
        step = self.provenance.get("step")
        return scores if step is not None and scores.get("step") == step else None


def find_checkpoint(source: Path, report: Callable[[str], None], strict: bool = False) -> Path:
    """A checkpoint directory itself, or the newest valid checkpoint of a run directory; verified by hash.

    Args:
        report: is told of every newer checkpoint that is damaged.
        strict: refuse a damaged one instead of using the one before.

    Raises:
        CheckpointError: `source` is neither, or holds no valid checkpoint.
    """
    refuse_missing(source)
    if (source / MANIFEST).is_file():
        verify(source)
        return source
    for root in (source / CHECKPOINTS, source):
        if root.is_dir() and (found := newest_valid(root, _refuse if strict else report)) is not None:
            return found
    raise CheckpointError(f"{source}: holds no valid checkpoint; give a checkpoint directory or the run that has it")


def refuse_missing(source: Path) -> None:
    """Raises CheckpointError when `source` is no directory."""
    if not is_there(source) or not source.is_dir():
        what = "is a file" if is_there(source) else "does not exist"
        raise CheckpointError(f"{source}: {what}; give a checkpoint (runs/NAME/checkpoints/step-N) or a run")


def _refuse(skipped: str) -> None:
    raise CheckpointError(f"{skipped}; without --strict the checkpoint before it is used")


@contextmanager
def open_source(
    source: Path,
    report: Callable[[str], None],
    strict: bool = False,
    alpha: float | None = None,
    base_model: str | None = None,
) -> Iterator[FactorSource]:
    """Whatever a user gives: a checkpoint of ours, a run, an adapter, or a checkpoint that DeepSpeed wrote itself.

    Args:
        report, strict: see `find_checkpoint`.
        alpha, base_model: what DeepSpeed's do not know; alpha is refused for ours.

    Raises:
        ArgumentError: alpha is missing, or given twice.
        CheckpointError: `source` is none of them, or damaged.
    """
    if is_deepspeed_checkpoint(source) or (source / "latest").is_file():
        if alpha is None:
            raise ArgumentError(f"{source}: is a checkpoint of DeepSpeed's, which knows no alpha; add --alpha")
        opened = open_deepspeed(source, alpha, base_model)
    else:
        is_adapter = (source / ABBA_CONFIG).is_file()
        directory = source if is_adapter else find_checkpoint(source, report, strict)
        if alpha is not None:
            raise ArgumentError(f"--alpha {alpha:g}: {directory} knows its own; leave it out")
        opened = open_adapter(directory) if is_adapter else open_checkpoint(directory)
    with opened as factors:
        yield factors


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[FactorSource]:
    """A verified checkpoint of ours: its fp32 masters."""
    state = read_state(directory)
    provenance = {key: getattr(state, key) for key in ("step", "world_size", "recipe", "fingerprint")}
    with ShardReader(directory, state) as reader:
        read = partial(reader.read, MASTER)
        yield FactorSource(directory, state.adapter, state.modules, state.base_model, provenance, read, state.tensors)


@contextmanager
def open_adapter(directory: Path) -> Iterator[FactorSource]:
    """A verified ABBA adapter in LoHa form: its factors, as they are stored."""
    description, factors = read_factors(directory)
    tensors = {
        f"{module}.{name}": tensor for module, four in factors.items() for name, tensor in four._asdict().items()
    }
    yield FactorSource(
        directory,
        description.config,
        description.modules,
        description.base_model,
        description.provenance or {},
        lambda name: tensors[name].float(),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )


@contextmanager
def open_deepspeed(directory: Path, alpha: float, base_model: str | None) -> Iterator[FactorSource]:
    """A checkpoint that DeepSpeed wrote itself. Ranks and modules follow from its tensors; alpha is not in it."""
    with DeepSpeedCheckpoint(directory) as checkpoint:
        r1, r2, modules = adapter_of(checkpoint.tensors, checkpoint.directory)
        for module, shape in modules.items():
            frozen = tuple(checkpoint.frozen.get(f"{module}.weight", shape))
            if frozen != shape:
                raise CheckpointError(
                    f"{checkpoint.directory}: the factors of {module} are for {shape}, its weight is {frozen}"
                )
        config = AdapterConfig(r1, r2, alpha, tuple(modules))
        provenance = {"step": checkpoint.step, "world_size": checkpoint.world_size}
        yield FactorSource(
            checkpoint.directory, config, modules, base_model, provenance, checkpoint.read, checkpoint.tensors
        )


def adapter_of(shapes: Mapping[str, tuple[int, ...]], directory: Path) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """(r1, r2, modules with their (out, in)) of an adapter that is known by its tensors alone.

    Raises:
        CheckpointError: names the first tensor that is no factor, is missing, or does not fit the others.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, factor = name.rpartition(".")
        if not module or factor not in Factors._fields or len(shape) != 2:
            raise CheckpointError(
                f"{directory}: {name} {tuple(shape)} was trained and is no factor of an ABBA adapter (A1, B1, A2, B2)"
            )
        found.setdefault(module, {})[factor] = tuple(shape)
    if not found:
        raise CheckpointError(f"{directory}: holds no trained tensors")
    ranks, modules = None, {}
    for module, factors in found.items():
        for factor in Factors._fields:
            if factor not in factors:
                raise CheckpointError(f"{directory}: {module}.{factor} is missing")
        (r1, into), (r2, _), (out, _) = factors["A1"], factors["A2"], factors["B1"]
        ranks = ranks or (r1, r2)
        needed = {"A1": (ranks[0], into), "B1": (out, ranks[0]), "A2": (ranks[1], into), "B2": (out, ranks[1])}
        for factor, shape in needed.items():
            if factors[factor] != shape:
                raise CheckpointError(
                    f"{directory}: {module}.{factor} is {factors[factor]}; with ranks {ranks} it should be {shape}"
                )
        modules[module] = (out, into)
    return *ranks, modules
