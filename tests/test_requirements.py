"""What setup.cfg asks for: read as pip reads it."""

import configparser

import pytest
from packaging.requirements import Requirement

from tests.warm import ROOT


def requirements(extra=None):
    """The lines of `install_requires`, or of an extra, without comments."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.extras_require"][extra] if extra else setup["options"]["install_requires"]
    return [line.partition(" #")[0].strip() for line in lines.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "version, enough",
    [
        ("2.10.0a0+b4e4ee81d3.nv25.12", True),  # what a vendor builds before the release, and brings along
        ("2.10.0", True),
        ("2.13.0+cpu", True),
        ("2.9.1", False),
        ("2.9.0a0+145a3a7bda.nv25.10", False),
        ("3.0.0", False),
        ("3.0.0a0+nv", False),
    ],
)
def test_a_clusters_own_build_of_torch_is_enough_or_is_not(version, enough):
    torch = next(Requirement(line) for line in requirements() if line.startswith("torch"))
    assert torch.specifier.contains(version, prereleases=True) == enough


def test_what_is_pinned_lies_within_what_is_asked_for():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    asked = [Requirement(line) for extra in (None, "export", "eval", "dev") for line in requirements(extra)]
    pins = {name.lower(): version for name, version in pins.items()}
    assert len(asked) > 20
    for wanted in asked:
        pinned = pins.get(wanted.name.lower())
        assert pinned is None or wanted.specifier.contains(pinned), f"{wanted}, but {pinned}"
