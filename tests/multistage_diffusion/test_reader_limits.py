"""Files that claim more than they hold: every reader refuses them with its own error, in little time and memory."""

from __future__ import annotations

import collections
import io
import json
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from multistage_diffusion import Stages, StagesError, load_network, networks
from multistage_diffusion.data.images import DataError, load_images
from multistage_diffusion.networks.network_limits import TooManyTensorsError, at_most
from multistage_diffusion.official import convert
from multistage_diffusion.official.convert import CheckpointFileError
from multistage_diffusion.training.checkpoints import write_tensors
from stand_ins import SMALL_UNET

SMALL = SMALL_UNET | {"decoder_widths": (8,), "channel_mult": (1,), "attn_resolutions": ()}
NETWORK = networks.build(SMALL)
DEEP = "[" * 5000


def safetensors(header: dict | bytes, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def network_file(config: object, path: Path, tensors: dict | None = None) -> Path:
    """A file of a network as ``save_network`` writes it, with any configuration."""
    text = config if isinstance(config, str) else json.dumps(config)
    metadata = {"format": "multistage_diffusion.network", "config": text}
    write_tensors(path, NETWORK.state_dict() if tensors is None else tensors, metadata)
    return path


# ------------------------------------------------------------------ networks


def wide(**changes) -> dict:
    return {**NETWORK.config, **changes}


FORGED = [
    DEEP,
    "5",
    "[]",
    "null",
    '{"family": "edm", "image_size": ' + "9" * 5000 + "}",
    {},
    {"family": []},
    {"family": {}},
    {"family": "edm"},
    wide(num_blocks=2000),
    wide(num_blocks=10**9),
    wide(num_blocks=1.5),
    wide(decoder_widths=[2400] * 3),
    wide(decoder_widths=[8] * 100_001),
    wide(decoder_widths=[]),
    wide(decoder_widths=["8", "8", "4"]),
    wide(decoder_widths=10**30),
    wide(encoder_widths=[10**30]),
    wide(channel_mult=[1] * 60, image_size=2**60),
    wide(channel_mult=[[1]]),
    wide(label_dim=10**15),
    wide(attn_resolutions=[8]),
    wide(attn_resolutions=5),
    wide(surprise=1),
    {"family": "uvit", "image_size": 10**6, "patch_size": 1, "encoder_widths": [8], "decoder_widths": [8]},
    {"family": "uvit", "image_size": 8, "depth": 10**9, "encoder_widths": [8], "decoder_widths": [8]},
    {"family": "ldm", "image_size": 8, "transformer_depth": 10**9, "context_dim": 8},
    {"family": "ldm", "image_size": 8, "head_channels": 0},
    {"family": "ncsnpp", "image_size": 8, "num_blocks": 10**9},
]


@pytest.mark.parametrize("config", FORGED, ids=range(len(FORGED)))
def test_a_configuration_that_is_not_that_of_the_tensors_is_refused_at_once(config, tmp_path):
    path = network_file(config, tmp_path / "forged.safetensors")
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointFileError, match=r"forged\.safetensors: its "):
        load_network(path)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("name", sorted(NETWORK.config))
@pytest.mark.parametrize("value", [None, "x", [], -1, 10**30, 0.5, [10**30]])
def test_every_argument_may_be_forged(name, value, tmp_path):
    """Some values give the same network, and some another one of the same tensors."""
    path = network_file(wide(**{name: value}), tmp_path / "forged.safetensors")
    try:
        loaded = load_network(path)
    except CheckpointFileError:
        return
    assert loaded.state_dict().keys() == NETWORK.state_dict().keys()


def test_tensors_of_other_names_shapes_and_types_are_named(tmp_path):
    state, name = NETWORK.state_dict(), next(iter(NETWORK.state_dict()))
    cases = {
        "missing": {key: value for key, value in state.items() if key != name},
        "unexpected": state | {"more": torch.zeros(1)},
        "of another shape": state | {name: torch.zeros(3)},
        "of another type": state | {name: torch.zeros(state[name].shape, dtype=torch.int64)},
    }
    for kind, tensors in cases.items():
        path = network_file(NETWORK.config, tmp_path / "other.safetensors", tensors)
        with pytest.raises(
            CheckpointFileError, match=f"1 {kind}: {'more' if kind == 'unexpected' else name}|builds"
        ):
            load_network(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        safetensors(DEEP.encode()),
        safetensors(b"{}"),
        safetensors(b"[]"),
        safetensors({"__metadata__": {"format": 5}}),
        safetensors({"__metadata__": {"format": "multistage_diffusion.network"}}),
        safetensors(
            {"__metadata__": [], "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
        ),
        safetensors({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        struct.pack("<Q", 1 << 40) + b"{}",
    ],
)
def test_a_forged_header_is_refused(content, tmp_path):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointFileError, match=r"forged\.safetensors"):
        load_network(path)


def test_a_file_that_is_cut_or_changed_anywhere_is_refused_or_read(tmp_path):
    whole = network_file(NETWORK.config, tmp_path / "whole.safetensors").read_bytes()
    path, generator = tmp_path / "damaged.safetensors", np.random.default_rng(0)
    header = struct.unpack("<Q", whole[:8])[0] + 8
    for cut in generator.integers(0, len(whole), 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointFileError):
            load_network(path)
    refused = 0
    for place, value in zip(generator.integers(0, header, 40), generator.integers(0, 256, 40), strict=True):
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            load_network(path)
        except CheckpointFileError:
            refused += 1
    assert refused > 10


def test_the_bound_holds_for_its_own_thread_and_ends_with_it():
    count = len(NETWORK.state_dict())
    with at_most(count):
        assert networks.build(SMALL).config == NETWORK.config
    with pytest.raises(TooManyTensorsError, match=f"more than {count - 1} tensors"), at_most(count - 1):
        networks.build(SMALL)
    with at_most(0):
        nn.Linear(2, 2)  # no layer of a network
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(networks.build, SMALL).result().config == NETWORK.config
    networks.build(SMALL)


# ------------------------------------------------------------------ checkpoints of the reference


def rewritten(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of PyTorch whose pickle is another one."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", compression) as target:
        for record in source.infolist():
            is_pickle = record.filename.endswith("data.pkl")
            target.writestr(record.filename, program if is_pickle and program else source.read(record))
    return path


class Call:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def called(function, *arguments) -> bytes:
    return pickle.dumps({"a": Call(function, *arguments)}, 2)


LONG = "x" * 10_000
ENCODE = (
    b"c_codecs\nencode\nq\x00X"
    + struct.pack("<I", len(LONG))
    + LONG.encode()
    + b"q\x01X\x06\x00\x00\x00latin1q\x02"
)
COPIES = b"\x80\x02](" + ENCODE + b"\x86R" + b"h\x00h\x01h\x02\x86R" * 10_000 + b"e."


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (called(bytearray, 1 << 33), "builds bytes of a number"),
        (called(torch.FloatStorage, 1 << 33), r"calls torch\.FloatStorage, which it may only name"),
        (
            called(torch.UntypedStorage, 1 << 33),
            r"calls torch\.storage\.UntypedStorage, which it may only name",
        ),
        (called(torch.FloatTensor, 1 << 33), r"calls torch\.FloatTensor, which it may only name"),
        (COPIES, "builds more than it holds"),
    ],
    ids=["bytearray", "storage", "untyped storage", "tensor", "copies"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_pytorch_would_build_far_larger_than_its_file_is_refused_before(
    program, message, legacy, tmp_path
):
    path = tmp_path / "forged.pth"
    if legacy:
        parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts) + program + pickle.dumps([], 2))
    else:
        rewritten(path, program)
    with pytest.raises(CheckpointFileError, match=rf"forged\.pth: refused: .*{message}; nothing was run"):
        convert.read(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_checkpoints_usually_hold_is_no_reason_to_refuse_them(legacy, tmp_path):
    content = {
        "state_dict": {"model.diffusion_model.a": torch.zeros(2, dtype=torch.bfloat16)},
        "other": [
            {1, 2},
            collections.Counter([3, 3]),
            (torch.float16, torch.device("cpu")),
            1 << 40,
            b"bytes",
            0.5,
        ],
        ("a", 1): {torch.float32: nn.Parameter(torch.zeros(1)), None: torch.Size([1, 2])},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(0)}},
            "lr": complex(1, 2),
        },
    }
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(convert.read(tmp_path / "last.ckpt", "raw").tensors["a"], torch.zeros(2).bfloat16())


def test_records_of_a_checkpoint_are_as_large_as_they_say(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as source:
        names = {record.filename: source.read(record) for record in source.infolist()}
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in names.items():
            target.writestr(name, content)
    assert (tmp_path / "packed.pth").stat().st_size < 20_000
    with pytest.raises(CheckpointFileError, match=r"packed\.pth: its record .* is compressed"):
        convert.read(tmp_path / "packed.pth")
    # All entries of the list at the end lead to the same bytes.
    content = bytearray((tmp_path / "whole.pth").read_bytes())
    (tmp_path / "whole.pth").write_bytes(content)
    assert convert.read(tmp_path / "whole.pth").tensors["a"].shape == (1 << 20,)
    start = content.index(b"PK\x01\x02")
    entry = next(
        i
        for i in range(start, len(content))
        if content[i : i + 4] == b"PK\x01\x02" and b"data/0" in content[i : i + 80]
    )
    content[entry + 24 : entry + 28] = struct.pack("<I", 1 << 31)
    (tmp_path / "claims.pth").write_bytes(content)
    with pytest.raises(
        CheckpointFileError, match=r"claims\.pth: its records claim [\d,]+ bytes, but the file has"
    ):
        convert.read(tmp_path / "claims.pth")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_file_whose_names_share_their_values_is_refused(suffix, tmp_path):
    """A network of 40 layers of the same weights is 40 times as large as its file."""
    path, shared = tmp_path / f"shared{suffix}", nn.Linear(400, 400)
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"ema": layers(shared, 40)}, 4))
    else:
        torch.save({f"layer{i}": shared.weight.detach() for i in range(40)}, path)
    with pytest.raises(
        CheckpointFileError, match=r"would take [\d,]+ bytes, the file has [\d,]+: many names share"
    ):
        convert.read(path)


def layers(layer: nn.Module, count: int) -> nn.Module:
    """A sequence that holds one record in many places; pickled as EDM's modules are."""
    module, inner = nn.Sequential(), nn.Sequential()
    for name, parameter in layer.named_parameters():
        inner.register_parameter(name, parameter)
    for index in range(count):
        module._modules[str(index)] = inner
    return module


def test_one_shared_layer_among_others_is_taken(tmp_path):
    weights = {f"layer{i}": torch.randn(300, 300) for i in range(4)}
    torch.save(weights | {"again": weights["layer0"]}, tmp_path / "shared.pth")
    assert len(convert.read(tmp_path / "shared.pth").tensors) == 5


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_checkpoint_that_is_cut_or_changed_anywhere_is_refused_or_read(suffix, tmp_path):
    whole, path = io.BytesIO(), tmp_path / f"damaged{suffix}"
    state = {f"layer{i}.weight": torch.randn(3, 2) for i in range(4)}
    torch.save(state, whole) if suffix == ".pth" else pickle.dump(state, whole, 4)
    content, generator = whole.getvalue(), np.random.default_rng(1)
    changes = [(cut, b"", len(content)) for cut in generator.integers(0, len(content), 20)]
    changes += [
        (place, bytes([value]), place + 1) for place, value in generator.integers(0, 256, (60, 2)) * [4, 1]
    ]
    refused = 0
    for place, middle, rest in changes:
        path.write_bytes(content[:place] + middle + content[rest:])
        try:
            convert.read(path)
        except CheckpointFileError:
            refused += 1
    assert refused > 20


# ------------------------------------------------------------------ stages


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"stages": ' + DEEP,
        "5",
        "[1, 2]",
        '"stages"',
        "{",
        "\xff",
        '{"stages": 5}',
        '{"stages": [[[0, []]]]}',
        '{"stages": [[[0, {}]]]}',
        '{"stages": [[["a", "b"]]]}',
        '{"stages": [[[0, ' + "9" * 5000 + "]]]}",
        '{"stages": [[[0, ' + "9" * 400 + "]]]}",
        '{"stages": [[[NaN, Infinity]]]}',
        '{"boundaries": [0]}',
        '{"boundaries": {"0": 1}}',
        '{"boundaries": [0, "inf"], "variable": []}',
        json.dumps({"boundaries": [*range(1002), "inf"]}),
        json.dumps({"stages": [[[k, k + 1]] for k in range(100_001)]}),
        json.dumps({"stages": [[[k, k + 1] for k in range(10_001)]]}),
    ],
    ids=range(20),
)
def test_forged_stages_are_refused_in_a_short_message(text, tmp_path):
    path = tmp_path / "stages.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StagesError) as error:
        Stages.load(path)
    assert len(str(error.value)) < 1000


def test_a_thousand_stages_are_stages():
    assert len(Stages.from_boundaries(range(1001), "index")) == 1000
    with pytest.raises(StagesError, match="at most 1001 entries"):
        Stages.from_boundaries(range(1002), "index")


# ------------------------------------------------------------------ arrays


def npy(header: str, data: bytes = bytes(64), version: bytes = b"\x01\x00") -> bytes:
    size = "<H" if version == b"\x01\x00" else "<I"
    return b"\x93NUMPY" + version + struct.pack(size, len(header)) + header.encode() + data


def header(descr: object = "|u1", shape: object = (1, 1, 8, 8), **more) -> str:
    return str({"descr": descr, "fortran_order": False, "shape": shape, **more}) + "\n"


HEADERS = [
    npy(header(shape=(1 << 40, 1, 8, 8))),
    npy(header(shape=(1 << 32, 1, 1 << 32, 1 << 32))),
    npy(header(shape=(1 << 63, 1, 8, 8))),
    npy(header(shape=(-1, 1, 8, 8))),
    npy(header(shape=(10**30, 1, 8, 8))),
    npy(header(shape=(1.5, 1, 8, 8))),
    npy(header(shape=1)),
    npy(header(shape="many")),
    npy(header(descr="|O")),
    npy(header(descr="|V1000000000")),
    npy(header(descr="nonsense")),
    npy(header(descr=[("a", "<f4")])),
    npy(header(descr=5)),
    npy(header(descr="|u1", surprise=1)),
    npy("{" * 200),
    npy("(" * 9000),
    npy("[" * 300_000, version=b"\x02\x00"),
    npy("5"),
    npy("\0"),
    npy(header(), bytes(63)),
    npy(header(), version=b"\x09\x00"),
    b"\x93NUMPY",
]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("content", HEADERS, ids=range(len(HEADERS)))
def test_forged_arrays_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"images{suffix}"
    if suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"images{suffix}|images"):
        load_images(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_an_archive_that_is_cut_or_changed_anywhere_is_refused_or_read(compression, tmp_path):
    path, generator = tmp_path / "images.npz", np.random.default_rng(2)
    arrays = {"images": generator.integers(0, 255, (2, 1, 8, 8), np.uint8), "labels": np.array([0, 1])}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    content = buffer.getvalue()
    refused = 0
    for place, value in zip(
        generator.integers(0, len(content), 60), generator.integers(0, 256, 60), strict=True
    ):
        path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        try:
            load_images(path)
        except DataError:
            refused += 1
    assert refused > 10


def test_a_deflated_array_of_gigabytes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "images.npz"
    np.savez_compressed(path, images=np.zeros((1000, 1, 64, 64), np.uint8))
    assert load_images(path).num_images == 1000
    monkeypatch.setattr("multistage_diffusion.data.images._LARGE_ARRAY", 1 << 20)
    with pytest.raises(
        DataError, match=r"the array images of .* is of 4,096,128 bytes, deflated to .*, as no images are"
    ):
        load_images(path)
    monkeypatch.setattr("multistage_diffusion.data.image_files.physical_memory", lambda: 1 << 20)
    with pytest.raises(DataError, match=r"would take 0\.0 GiB, this machine has 0\.0 GiB; take fewer"):
        load_images(path)


# ------------------------------------------------------------------ image files


def test_huge_images_are_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match=r"a\.png .* cannot be read: 64x64 pixels are more than 4095"),
    ):
        load_images(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a\.png .* cannot be read"):
        load_images(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_images(tmp_path).image_size == 64


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_and_sets_beyond_the_memory_are_refused(kind, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / name)
    source = tmp_path / "images"
    if kind == "zip":
        source = tmp_path / "images.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("a.png", "b.png"):
                archive.write(tmp_path / "images" / name, name)
    monkeypatch.setattr("multistage_diffusion.data.image_files.physical_memory", lambda: 2 * 3 * 64 * 64 - 1)
    with pytest.raises(DataError, match=r"2 images of 64x64 in .* would take"):
        load_images(source)
    assert load_images(source, image_size=32).num_images == 2
    monkeypatch.setattr("multistage_diffusion.data.image_files.LARGEST_FILE", 50)
    with pytest.raises(DataError, match=r"a\.png in .* cannot be read: it has \d+ bytes, more than 50"):
        load_images(source)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_an_image_that_is_changed_anywhere_is_refused_or_read(suffix, tmp_path):
    generator, buffer = np.random.default_rng(3), io.BytesIO()
    Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(
        buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper())
    )
    content, refused = buffer.getvalue(), 0
    for place, value in zip(generator.integers(0, 60, 60), generator.integers(0, 256, 60), strict=True):
        (tmp_path / f"a.{suffix}").write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        try:
            load_images(tmp_path)
        except DataError:
            refused += 1
    assert refused > 5


def test_a_file_of_another_format_under_an_images_name_starts_no_other_reader(tmp_path):
    """Pillow would hand PostScript to another program."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(DataError, match=r"a\.png .* is corrupt or no image"):
        load_images(tmp_path)


# ------------------------------------------------------------------ under a limit of memory

LIMITED = """
import resource, sys
from pathlib import Path
from multistage_diffusion import CheckpointFileError, load_network
from multistage_diffusion.official import convert
size = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
read = {".safetensors": load_network, ".pth": convert.read}
for path in map(Path, sys.argv[1:]):
    try:
        read[path.suffix](path)
    except CheckpointFileError:
        print(path.name)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_hostile_files_are_refused_within_half_a_gigabyte(tmp_path):
    paths = [
        network_file(wide(decoder_widths=[2400] * 3), tmp_path / "wide.safetensors"),
        network_file(wide(num_blocks=2000), tmp_path / "deep.safetensors"),
        rewritten(tmp_path / "bytes.pth", called(bytearray, 1 << 33)),
    ]
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, paths)], capture_output=True, text=True, timeout=300
    )
    assert found.stdout.splitlines() == [path.name for path in paths], found.stderr
