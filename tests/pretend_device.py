"""Run a script on a device that is pretended: `python tests/pretend_device.py SCRIPT FLAGS`.

Tensors of the device say that they lie there, and lie on the CPU. An operation on tensors of both places fails, as it
does on a CUDA device, and so do numpy() and a generator of the other place. All numbers are those of the CPU. What this
cannot find: a number of the CPU (a tensor without axes) where CUDA takes none, operations that CUDA has not or not
deterministic, and whatever the scripts do for devices of type "cuda" alone.
"""

import runpy
import sys
import tempfile
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
aten = torch.ops.aten
NUMBERS = (aten._local_scalar_dense.default, aten.equal.default)
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
generators = {}  # of the device, by identity


class Away(torch.Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, data):
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        away = torch.Tensor._make_wrapper_subclass(cls, data.size(), **layout, device=DEVICE)
        away.data_here = data
        return away

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):  # torch.save
        return self.detach().data_here.__reduce_ex__(protocol)

    def numpy(self, *args, **kwargs):
        raise TypeError("numpy() of a tensor on the device")

    def tolist(self):
        return self.data_here.tolist()


def run(function, args: tuple, kwargs: dict):
    """An operation on tensors of either place, with its result where it belongs."""
    leaves = tree_leaves((args, kwargs))
    away = [leaf for leaf in leaves if isinstance(leaf, Away)]
    here = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Away) and leaf.dim() > 0]
    if function in INDEXED and isinstance(args[0], Away):  # by indices that may be on the CPU
        here = [leaf for leaf in here if all(leaf is not index for index in args[1])]
    if away and here and function not in COPIES:
        raise RuntimeError(f"tensors on two devices in {function}")
    there = bool(away)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = function(*tree_map(content, args), **tree_map(content, kwargs))
    if function is aten.copy_.default:
        return args[0]
    if function in NUMBERS or not there:
        return result
    changed = {id(tensor.data_here): tensor for tensor in away}  # in place
    return tree_map(lambda x: changed.get(id(x), Away(x)) if isinstance(x, torch.Tensor) else x, result)


def content(x):
    return x.data_here if isinstance(x, Away) else x


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Watch(TorchFunctionMode):
    """Generators, which have lost their identity where operations are dispatched."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            place = kwargs.get("device") or (args[0].device if isinstance(args[0], torch.Tensor) else "cpu")
            if (id(kwargs["generator"]) in generators) != (torch.device(place).type == DEVICE.type):
                raise RuntimeError(f"a generator of another device in {function}")
        return function(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        generator = make_generator("cpu")
        if torch.device(device).type == DEVICE.type:
            generators[id(generator)] = generator
        return generator


def tensor(data, *, device=None, **kwargs):
    made = make_tensor(data, **kwargs)
    return made if device is None else made.to(device)


def new_tensor(self, data, **kwargs):
    return tensor(data, device=self.device, **({"dtype": self.dtype} | kwargs))


def load(*args, map_location=None, **kwargs):
    state = load_here(*args, map_location="cpu", **kwargs)
    return tree_map(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, state)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent.parent))
    script, choice = Path(sys.argv[0]), 'torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")'
    source = script.read_text()
    assert source.count(choice) == 1
    make_generator, make_tensor, load_here = torch.Generator, torch.tensor, torch.load
    torch.Generator, torch.tensor, torch.load, torch.Tensor.new_tensor = Generator, tensor, load, new_tensor
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, script.name)
        copy.write_text(source.replace(choice, f'torch.device("{DEVICE}")'))
        with Watch(), Pretend():
            end = runpy.run_path(str(copy), run_name="__main__")
    for name in ("advantages", "credits"):  # of the last iteration; the evaluation has the networks on the CPU
        assert end[name].device == DEVICE
