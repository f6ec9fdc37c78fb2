"""Pickles that were written to harm whoever converts them: each is refused, says why, and takes no memory."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from multistage_diffusion.official import convert

POINTER = struct.pack("<Q", 0x4141414141414140)
RECONSTRUCT, SCALAR = np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]
STATE_OF_OBJECTS = (3, "|", None, ("f",), {"f": (np.dtype("O"), 0)}, 8, 1, 0)
SINGLE = torch.arange(6.0)


class Call:
    """Unpickles by calling a function, then setting a state."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def refused(tmp_path, content: object, message: str, protocol: int = 4) -> None:
    """Reads a hostile object, or the bytes of a pickle, within little memory."""
    path = tmp_path / "hostile.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    tracemalloc.start()
    try:
        with pytest.raises(convert.CheckpointFileError, match=message):
            convert.read(path)
        assert tracemalloc.get_traced_memory()[1] < 50 * path.stat().st_size + 20_000_000
    finally:
        tracemalloc.stop()


def forged_array(dtype: object) -> Call:
    return Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), dtype, False, POINTER))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Call(np.ndarray, (1,), "O", POINTER), r"calls numpy\.ndarray"),
        (Call(set, Call(np.ndarray, (1,), "O", POINTER)), r"calls numpy\.ndarray"),
        (
            forged_array(Call(np.dtype, "V8", False, True, state=STATE_OF_OBJECTS)),
            "an array's type other than",
        ),
        (forged_array(Call(np.dtype, "O", False, True)), "an array's type other than"),
        (Call(np.dtype, "f8", False, True, state=(3, "!")), "more than its byte order"),
        (Call(SCALAR, np.dtype("O"), POINTER), "an array's type other than"),
        (Call(SCALAR, np.dtype("f8"), POINTER[:4]), "something other than its bytes"),
        (Call(SCALAR, "f8", POINTER), "something other than its bytes"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_array_is_made_of_addresses(content, message, protocol, tmp_path):
    refused(tmp_path, {"ema": content}, message, protocol)


def test_arrays_stay_unread(tmp_path):
    """Even with a type that numpy would refuse."""
    path = tmp_path / "array.pkl"
    module = nn.Sequential()
    module.constants = forged_array(np.dtype("f8"))
    module.register_buffer("taps", SINGLE)
    path.write_bytes(pickle.dumps({"ema": module}, protocol=4))
    assert torch.equal(convert.read(path).tensors["taps"], SINGLE)


def memory_of(tensor: torch.Tensor) -> Call:
    """What a tensor's pickle has in the place of its memory."""
    storage = torch.storage.TypedStorage(
        wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
    )
    function, arguments = storage.__reduce__()
    return Call(function, *arguments)


def rebuilt(offset: object, size: object, stride: object) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, memory_of(SINGLE), offset, size, stride, False, {})


@pytest.mark.parametrize(
    ("offset", "size", "stride", "message"),
    [
        (0, (7,), (1,), "beyond its memory"),
        (1, (6,), (1,), "beyond its memory"),
        (0, (2, 2), (5, 1), "beyond its memory"),
        (0, (1 << 40,), (0,), "beyond its memory"),
        (0, (3, 3), (1, 1), "beyond its memory"),
        (6, (1,), (1,), "beyond its memory"),
        (-1, (1,), (1,), "something other than its memory"),
        (0, (-1,), (1,), "other than whole numbers"),
        (0, (6,), (-1,), "other than whole numbers"),
        (0, (1.5,), (1,), "other than whole numbers"),
        (0, [6], (1,), "other than a few numbers"),
        (0, (1,) * 99, (1,) * 99, "other than a few numbers"),
        (0, (6,), (1, 1), "1 dimensions with 2 strides"),
        (True, (5,), (1,), "something other than its memory"),
    ],
)
def test_tensors_stay_inside_of_their_memory(offset, size, stride, message, tmp_path):
    refused(tmp_path, {"ema": rebuilt(offset, size, stride)}, message)


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (2, 3), (3, 1)), (2, (2, 2), (1, 2)), (5, (), ()), (0, (0, 4), (4, 1))]
)
def test_views_inside_of_the_memory_are_read(offset, size, stride, tmp_path):
    path = tmp_path / "views.pkl"
    path.write_bytes(pickle.dumps({"a": rebuilt(offset, size, stride)}, protocol=4))
    expected = SINGLE.as_strided(size, stride, offset)
    assert torch.equal(convert.read(path).tensors["a"], expected)


def stored(**changes: bytes) -> bytes:
    """A tensor's memory as PyTorch pickles it, with parts replaced."""
    content = memory_of(SINGLE).reduced[1][0]
    for old, new in changes.values():
        assert content.count(old) >= 1
        content = content.replace(old, new)
    return content


ELEMENTS = struct.pack("<q", 6) + SINGLE.numpy().tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stored(size=(ELEMENTS, struct.pack("<q", 7) + ELEMENTS[8:])), "another size than its bytes"),
        (stored(size=(ELEMENTS, struct.pack("<q", -1) + ELEMENTS[8:])), "another size than its bytes"),
        (stored(size=(ELEMENTS, ELEMENTS + bytes(4))), "another size than its bytes"),
        (stored(type=(b"FloatStorage", b"FloatTensor")), r"asks for torch\.FloatTensor"),
        (stored(kind=(b"storage", b"module")), "truncated or no pickle|described in another way"),
        (stored(machine=(b"little_endian", b"little_endiam")), "another format"),
        (stored(magic=(b"\x6c\xfc\x9c\x46", b"\x6d\xfc\x9c\x46")), "another format"),
        ("text", "something other than bytes"),
    ],
)
def test_a_tensors_memory_is_the_files_own_bytes(content, message, tmp_path):
    refused(tmp_path, {"ema": Call(torch.storage._load_from_bytes, content)}, message)


def test_a_tensors_memory_is_named_as_what_follows(tmp_path):
    content = stored()
    listed = content.rindex(pickle.PROTO, 0, content.index(ELEMENTS))
    other = content[:listed] + pickle.dumps(["another"], protocol=2) + ELEMENTS
    refused(tmp_path, {"ema": Call(torch.storage._load_from_bytes, other)}, "memory is in another file")


def test_a_storage_runs_no_code(tmp_path):
    ran = tmp_path / "ran"
    inner = b"".join(
        pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    inner += pickle.dumps(Call(os.system, f"touch {ran}"), protocol=2)
    refused(tmp_path, {"ema": Call(torch.storage._load_from_bytes, inner)}, r"asks for posix\.system")
    assert not ran.exists()


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"}" + text("ema") + pickle.BINBYTES8 + struct.pack("<Q", 1 << 40) + b"s.", "truncated"),
        (b"}" + text("ema") + pickle.BINUNICODE8 + struct.pack("<Q", 1 << 62) + b"s.", "truncated"),
        (b"\x82\x01.", "truncated or no pickle"),
        (b"(iposix\nsystem\n.", r"asks for posix\.system"),
        (b"Pid\n.", "something outside of it"),
        (text("id") + b"Q.", "something outside of it"),
        (PARAMETER + b"N}" + text("function") + text("x") + b"s\x86b.", "truncated or no pickle"),
        (PARAMETER + b"N\x85R.", "other than a tensor"),
        (text("print") + b")R.", "truncated or no pickle"),
        (text("posix") + b"K\x01\x93.", "truncated or no pickle"),
        (b"]}b.", "truncated or no pickle"),
        (b"cbuiltins\nset\n]\x85RN}\x86b.", "holds no network"),
        (b"0.", "truncated or no pickle"),
        (b"N\x87.", "truncated or no pickle"),
        (b"h\x07.", "truncated or no pickle"),
        (b"}" + text("a") + b"aN.", "truncated or no pickle"),
    ],
)
def test_programs_that_no_pickler_writes(program, message, tmp_path):
    refused(tmp_path, b"\x80\x04" + program, message)


@pytest.mark.parametrize(
    "program",
    [
        b"c_codecs\nencode\n" + text("x" * 1_000_000) + b"q\x00" + text("latin1") + b"q\x01\x86R",
        b"cbuiltins\nset\n(" + text("x") * 100_000 + b"tq\x00\x85R",
    ],
    ids=["bytes", "set"],
)
def test_one_long_object_is_not_copied_again_and_again(program, tmp_path):
    name = program[: program.index(b"\n", program.index(b"\n") + 1) + 1]
    again = name + (b"h\x00h\x01\x86R" if b"encode" in name else b"h\x00\x85R")
    refused(tmp_path, b"\x80\x04(" + program + again * 1000 + b"l.", "builds more than it holds")
    refused(tmp_path, b"\x80\x04](" + program + again * 1000 + b"e.", "builds more than it holds")


@pytest.mark.parametrize("again", [b"h\x00h\x01R0", b"h\x02h\x01b"], ids=["calls", "states"])
def test_one_long_tuple_is_not_handed_over_again_and_again(again, tmp_path):
    names = b"cnumpy.core.multiarray\n_reconstruct\nq\x00(" + b"N" * 300 + b"tq\x01h\x00h\x01Rq\x02"
    refused(tmp_path, b"\x80\x04" + names + again * 100_000 + b".", "builds more than it holds")


def test_a_module_does_not_contain_itself(tmp_path):
    module = nn.Sequential()
    module._modules["again"] = module
    refused(tmp_path, {"ema": module}, "a module contains itself")


def test_modules_in_many_places_are_not_walked_for_ever(tmp_path):
    """2^40 names."""
    module = nn.Sequential()
    for _ in range(40):
        outer = nn.Sequential()
        outer._modules.update(a=module, b=module)
        module = outer
    refused(tmp_path, {"ema": module}, "far more modules or longer names")


@pytest.mark.parametrize("kind", ["_modules", "_buffers"])
def test_one_long_name_is_not_copied_for_every_module(kind, tmp_path):
    name = "x" * 100_000
    modules = [nn.Sequential() for _ in range(1000)]
    for module in modules:
        getattr(module, kind)[name] = torch.zeros(1) if kind == "_buffers" else nn.Sequential()
    refused(tmp_path, {"ema": nn.Sequential(*modules)}, "longer names than a network has")


def test_arguments_are_never_shown_where_they_would_fill_the_memory(tmp_path):
    """A list of 2^40 elements in a few lines."""
    laughs: list = ["ha"] * 2
    for _ in range(40):
        laughs = [laughs, laughs]
    for value in (laughs, "ha" * 1000, nn.Sequential(), list(range(1000)), {"a": 1}):
        module = nn.Sequential()
        module._init_kwargs = {"dropout": value}
        refused(tmp_path, {"ema": module}, "argument dropout is neither a number nor short text")
    module._init_kwargs = dict.fromkeys(map(str, range(1000)), 0)
    refused(tmp_path, {"ema": module}, "argument 500 is neither")
    module._init_kwargs = {"a": ["x" * 1000] * 400, "b": [1 << 64]}
    refused(tmp_path, {"ema": module}, "argument b is neither")


def test_a_network_far_larger_than_its_file_is_not_allocated():
    """A width of 2^20 asks for terabytes."""
    from multistage_diffusion import official

    config = {"img_resolution": 8, "model_channels": 1 << 20, "channel_mult": [1], "num_blocks": 1}
    state = official.export(official.build("edm", config | {"model_channels": 8}))
    with pytest.raises(ValueError, match="wrong shapes"):
        official.load(state, "edm", config)


@pytest.mark.parametrize(
    ("family", "name"),
    [("edm", "num_blocks"), ("ncsnpp", "num_res_blocks"), ("ldm", "transformer_depth"), ("uvit", "depth")],
)
def test_a_network_of_far_more_layers_than_the_file_has_tensors_is_not_built(family, name):
    from multistage_diffusion import official

    with pytest.raises(ValueError, match=rf"{name}=1000000000 is more than the checkpoint's 1 tensors"):
        official.load({"a": torch.zeros(1)}, family, {name: 10**9})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(128, 10**9), "repeats its values"),
        (torch.zeros(3), "unexpected|missing"),
    ],
)
@pytest.mark.parametrize(
    ("preset", "name"),
    [("edm-cifar10", "map_augment.weight"), ("ldm-imagenet256", "cond_stage_model.embedding.weight")],
)
def test_a_preset_takes_no_sizes_from_what_is_no_matrix(preset, name, tensor, message, tmp_path):
    path = tmp_path / "weights.pth"
    state = {"model.diffusion_model.a": torch.zeros(1), name: tensor}
    torch.save({"state_dict": state} if preset.startswith("ldm") else {name: tensor}, path)
    with pytest.raises(ValueError, match=message):
        convert.network_of(convert.read(path, "raw"), preset.partition("-")[0], None, preset)


def test_names_of_a_file_do_not_reach_the_terminal_as_they_are():
    from multistage_diffusion import official

    assert official.shown("dec.\x1b[2J") == r"'dec.\x1b[2J'"
    assert len(official.shown("x" * 100_000)) < 110


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_large_tensors_arrays_and_sets_of_every_protocol_are_read(protocol, tmp_path):
    path = tmp_path / "large.pkl"
    module = nn.Sequential()
    module.array, module.numbers = np.arange(1000.0), {1, 2}
    module.register_buffer("large", torch.randn(1 << 20))
    path.write_bytes(pickle.dumps({"ema": module}, protocol=protocol))
    assert torch.equal(convert.read(path).tensors["large"], module.large)


def test_state_given_to_a_dictionary_has_no_effect(tmp_path):
    """A pickled state dict has its versions as an attribute."""
    path = tmp_path / "state.pkl"
    state = nn.Linear(2, 2).state_dict()
    path.write_bytes(pickle.dumps(state, protocol=2))
    read = convert.read(path).tensors
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_tensors_of_other_types_and_protocols(dtype, protocol, tmp_path):
    path = tmp_path / "state.pkl"
    tensors = {
        "a": SINGLE.to(dtype).view(2, 3).t(),
        "b": nn.Parameter(SINGLE.to(dtype)),
        "c": SINGLE[:0].to(dtype),
    }
    path.write_bytes(pickle.dumps(tensors, protocol=protocol))
    read = convert.read(path).tensors
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


def test_copyreg_makes_no_objects(tmp_path):
    refused(tmp_path, {"ema": Call(copyreg._reconstructor, dict, object, None)}, r"asks for copyreg\._recons")
