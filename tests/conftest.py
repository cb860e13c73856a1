"""Everything runs on CPU, one thread a process, and without a network, whatever the machine has."""

import os

import pytest

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork after its thread pool started would hang

# After the variables, which torch reads when it is imported.
from tests.fault_table import pytest_sessionfinish, pytest_testnodedown, trial  # noqa: F401
from tests.faults.harness import TRIALS

GROUPS = {"faults": "faults", "distributed": "ranks", "launch": "ranks", "slurm": "ranks"}  # by room


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items):
    """Tests that start ranks run two at a time at most, though there may be more workers (make test)."""
    for item in items:
        if (room := item.path.parent.name) in GROUPS:
            # Of a hundred trials each there is little else: two workers share them by file.
            group = item.path.stem if room == "faults" and TRIALS >= 100 else GROUPS[room]
            item.add_marker(pytest.mark.xdist_group(group))
