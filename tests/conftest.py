"""Everything runs on CPU, one thread a process, and without a network, whatever the machine has."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork after its thread pool started would hang

# After the variables, which torch reads when it is imported.
from tests.fault_table import pytest_sessionfinish, trial  # noqa: F401
