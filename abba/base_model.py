"""A base model: where it lies, its tokenizer, its architecture, and loading it whole in one process."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal
from transformers.utils.logging import disable_progress_bar

from abba.base_config import check_config, check_tokenizer_config
from abba.base_files import BaseFiles
from abba.errors import AbbaError, ArgumentError, CheckpointError, RecipeError, first_line
from abba.hub import HubRepository
from abba.storage import is_file, is_there

# Deprecations inside libraries that their next release settles; a user can do nothing about them.
for _module in ("transformers", "torch.distributed"):
    warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{_module}\b")
disable_progress_bar()

# On an H100 torch takes cuDNN's attention first, which spends tens of milliseconds on a plan for every length that it
# has not met; packed rows and generations hardly repeat one. Flash attention, torch's second choice, needs no plan.
torch.backends.cuda.enable_cudnn_sdp(False)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CAPPING_FLASH_ATTENTION = "2.6.0"  # the first that caps attention logits
DTYPE_CHOICES = ("auto", *DTYPES)


def hub_model(name_or_path: str, revision: str | None, setting: str = "model.name_or_path") -> HubRepository | None:
    """The repository that a user means, or None for a directory. `setting`: what the user calls it.

    Raises:
        CheckpointError: it is a directory without a model, a path of none, or may not be looked at.
        RecipeError: a directory with a revision.
    """
    directory = Path(name_or_path)
    if is_there(directory):
        if revision is not None:
            typed = setting.startswith("--")
            error, key = (ArgumentError, "--revision") if typed else (RecipeError, "model.revision")
            raise error(f"{key}: {revision!r} has no meaning for the directory {directory}; leave it out")
        if not is_file(directory / "config.json"):
            raise CheckpointError(f"{setting}: {directory} is no model directory: it has no config.json")
        return None
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise CheckpointError(
            f"{setting}: {name_or_path!r} is no directory (seen from {Path.cwd()}); give one, or a Hub name"
        )
    return HubRepository("model", name_or_path, revision)


def find_base(name_or_path: str, revision: str | None, setting: str = "model.name_or_path") -> Path:
    """The directory of a base model: as given, or its snapshot in the Hub cache.

    Training never downloads: on a cluster that would be every node at once, or none for lack of a network.

    Raises:
        CheckpointError: it is neither a directory nor in the Hub cache; says how to fetch it.
    """
    repository = hub_model(name_or_path, revision, setting)
    if repository is None:
        return Path(name_or_path)
    found = repository.find()
    if found is None:
        raise CheckpointError(
            f"{setting}: {name_or_path!r} is neither a directory (seen from {Path.cwd()}) "
            f"nor whole in the Hub cache; fetch it first: {repository.command}"
        )
    return found


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer. Its chat template, which is a program, is loaded as text; abba/text/chat.py says when it is run.

    Raises:
        CheckpointError: there is none, its class is not one of transformers', or its files are damaged.
    """
    if not any(is_file(directory / name) for name in TOKENIZER_FILES):
        # transformers would make up an empty tokenizer, which turns every text into nothing.
        raise CheckpointError(f"{directory}: has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")
    config, own = check_config(directory), check_tokenizer_config(directory)
    with _named(directory, "its tokenizer cannot be loaded"):
        for name in filter(None, (own.get("tokenizer_class"), config.get("tokenizer_class"))):
            found = tokenizer_class_from_name(name)
            if not isinstance(found, type) or not issubclass(found, PreTrainedTokenizerBase):
                raise CheckpointError(f"{directory}: its tokenizer_class {str(name)[:100]!r} is none of transformers'")
        # Mistral's tokenizers of this kind were published with a wrong splitting, which transformers mends when asked;
        # asked, it also keeps to tokenizer.json where mistral_common is installed.
        mended = {"fix_mistral_regex": True} if is_file(directory / "tekken.json") else {}
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **mended)


def load_config(directory: Path) -> PretrainedConfig:
    """The architecture. Code that a model directory may bring along is never run.

    Raises:
        CheckpointError: config.json is missing, cannot be used, or says what `check_config` refuses.
    """
    check_config(directory)
    with _named(directory, "its config.json cannot be used"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def build_empty(directory: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The architecture without weights: parameters are what the surrounding contexts make of them.

    Raises:
        CheckpointError: config.json describes no causal LM.
        RecipeError: the attention implementation is not installed.
    """
    config = load_config(directory)
    require_attention(attention)
    with _named(directory, "its config.json does not make a causal LM"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
        model.tie_weights()  # left to the weight initialisation, which may be skipped
        return model


def load_whole(directory: Path, dtype: torch.dtype, attention: str, **placement: Any) -> PreTrainedModel:
    """The model with its weights in this one process, in eval mode; for generation and checks, not for training.

    Raises:
        CheckpointError: config.json is refused, there are no safetensors, or they are damaged or do not fit.
        RecipeError: the attention implementation is not installed.
    """
    check_config(directory)
    require_attention(attention)
    with BaseFiles(directory):  # every header is checked before the library, which checks less, opens the files
        pass
    with _named(directory, "cannot be loaded"):
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
        )
    missing = sorted(report["missing_keys"])
    if missing:  # filled with random values
        raise CheckpointError(f"{directory}: {len(missing)} tensors of the model are missing, such as {missing[0]}")
    return model.eval()


def choose_dtype(wanted: str) -> tuple[str, str]:
    """(name in DTYPES, what the user has to know, or "") for `wanted`, which may be "auto": what is fast here."""
    slow = not _has_fast_bfloat16()
    if wanted == "auto" and slow:
        return (
            "float32",
            "float32, because this CPU has no instructions for bfloat16 and multiplies it far more slowly",
        )
    if wanted == "bfloat16" and slow:
        return wanted, (
            "WARNING: this CPU has no instructions for bfloat16 and multiplies it far more slowly than float32; "
            "set the dtype to auto"
        )
    return ("bfloat16" if wanted == "auto" else wanted), ""


def _has_fast_bfloat16() -> bool:
    mkldnn = torch.backends.mkldnn.is_available()
    return torch.cuda.is_available() or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_attention(config: PretrainedConfig, wanted: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """(implementation, why) for `wanted`, which may be "auto".

    Raises:
        RecipeError: `wanted` would leave out the cap that this architecture puts on attention logits.
    """
    cap = getattr(config, "attn_logit_softcapping", None)
    flash_caps = not cap or is_flash_attn_greater_or_equal(CAPPING_FLASH_ATTENTION)
    old_flash = wanted.startswith("flash") and is_flash_attn_2_available() and not flash_caps
    if cap and (wanted == "sdpa" or old_flash):
        name = f"flash-attn before {CAPPING_FLASH_ATTENTION}" if old_flash else wanted
        raise RecipeError(
            f"model.attn_implementation: {name} cannot cap attention logits at {cap:g}, as {config.model_type} does; "
            "write auto or eager"
        )
    if wanted != "auto":
        return wanted, "the recipe says so"
    flash = is_flash_attn_2_available() and flash_caps
    if device_type == "cuda" and flash and dtype != torch.float32:
        return "flash_attention_2", "flash-attn is installed"
    if cap:
        return "eager", "this architecture caps attention logits, which sdpa would leave out"
    return "sdpa", "there is no GPU" if device_type != "cuda" else "flash-attn is not installed or does not do fp32"


def require_attention(attention: str) -> None:
    """Raises RecipeError when a flash-attn is wanted that is not installed.

    transformers would fetch a kernel, code of the Hub, in its place.
    """
    if attention.startswith("flash") and not is_flash_attn_2_available():
        raise RecipeError(
            f"model.attn_implementation: {attention} needs a GPU and flash-attn 2.3.3 or newer, which is not there; "
            "write auto"
        )


@contextmanager
def _named(directory: Path, what: str) -> Iterator[None]:
    """Errors of half a dozen libraries, raised over what a model's files say, as one line that names the directory."""
    try:
        yield
    except AbbaError:
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: {what}: {first_line(error)}") from None
