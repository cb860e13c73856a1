"""Everything runs on CPU, one thread a process, and without a network, whatever the machine has."""

import os

import pytest

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork after its thread pool started would hang

# After the variables, which torch reads when it is imported.
from tests.fault_table import pytest_sessionfinish, trial  # noqa: F401

START_RANKS = ("distributed", "faults", "launch", "slurm")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items):
    """Tests that start ranks run on one worker, one after the other, and the other rooms beside them (make test)."""
    for item in items:
        if item.path.parent.name in START_RANKS:
            item.add_marker(pytest.mark.xdist_group("ranks"))
