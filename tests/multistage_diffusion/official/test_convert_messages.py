"""What ``msd convert`` says to files and arguments that are not what they should be: one line, exit code 2."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile

import pytest
import torch

from fixtures import config, group
from multistage_diffusion import official
from multistage_diffusion.cli import main
from multistage_diffusion.official import convert

NAME = "enc.8x8_conv.weight"
WEIGHT = group("edm", "a/sd/")[NAME]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Converts some content, with changes to the constructor's arguments; returns exit code and what was said."""
    monkeypatch.chdir(tmp_path)

    def convert_file(
        content: object, *options: str, suffix: str = ".pth", **changes: object
    ) -> tuple[int, str]:
        path = tmp_path / f"checkpoint{suffix}"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        (tmp_path / "config.json").write_text(json.dumps(config("edm", "a/") | changes))
        options = options or ("--out", "out.safetensors")
        code = main(["convert", str(path), "--family", "edm", "--config", "config.json", *options])
        said = capsys.readouterr().err
        assert said.count("\n") == (code != 0)
        assert (tmp_path / "out.safetensors").exists() == (code == 0)
        return code, said

    return convert_file


def changed(tensor: object, name: object = NAME) -> dict:
    return group("edm", "a/sd/") | {name: tensor}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_type_are_taken(dtype, run):
    assert run(changed(WEIGHT.to(dtype))) == (0, "")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (WEIGHT.long(), f"{NAME} in the file is of torch.int64, not floating point"),
        (WEIGHT.bool(), f"{NAME} in the file is of torch.bool, not floating point"),
        (WEIGHT.to(torch.complex64), f"{NAME} in the file is of torch.complex64, not floating point"),
        (WEIGHT.to_sparse(), f"{NAME} in the file is of the layout sparse_coo, not dense"),
        (WEIGHT.to("meta"), f"{NAME} in the file is on the device meta"),
        (3, f"{NAME} in the file is of the type int"),
        (WEIGHT * float("nan"), f"1 tensors with values that are not finite in float32: {NAME}"),
        (WEIGHT.double() * 1e300, f"1 tensors with values that are not finite in float32: {NAME}"),
    ],
    ids=["int64", "bool", "complex", "sparse", "meta", "number", "nan", "too large"],
)
def test_what_is_no_weight_is_named(tensor, message, run):
    code, said = run(changed(tensor))
    assert (code, message in said) == (2, True), said


@pytest.mark.parametrize("tensor", [WEIGHT.long(), WEIGHT * float("inf"), WEIGHT.to_sparse(), "text"])
def test_load_takes_dense_finite_floating_point_only_and_writes_nothing_else(tensor):
    network = official.build("edm", config("edm", "a/"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=rf"official\.load: 1 .*{NAME}"):
        official.fill(network, changed(tensor))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page: download the file itself"),
        (b"<html>\xc3\xa9", "a web page"),
        (b"Not found\n", "text: copy it again"),
        (b"", "empty: copy it again"),
        (b"\x80\x02}\x96.", "is truncated or no PyTorch checkpoint"),
        (bytes(range(256)), "is truncated or no PyTorch checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".pkl"])
def test_a_file_of_another_kind_is_called_what_it_is(content, message, suffix, run):
    code, said = run(content, suffix=suffix)
    assert (code, message.replace(" PyTorch checkpoint", "") in said) == (2, True), said
    assert "weights_only" not in said


def test_pytorchs_advice_to_be_unsafe_is_not_passed_on(run):
    """Files of 2017 were archives, about which PyTorch says to load them with weights_only=False."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name))
    code, said = run(archive.getvalue())
    assert code == 2
    assert "is truncated or no PyTorch checkpoint" in said
    assert "weights_only" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": 3}, "ema": {"shadow_params": []}}, "a in model is of the type int"),
        ({"model": {"a": WEIGHT}, "ema": {"shadow_params": [3]}}, "ema.shadow_params is no list of dense"),
        ({"model": {"a": WEIGHT}, "ema": {"shadow_params": 3}}, "ema.shadow_params is no list of dense"),
        ({"model": {3: WEIGHT}, "ema": {}}, "model has a name of the type int, not text"),
        ({"state_dict": [1, 2]}, "state_dict is of the type list, not tensors by name"),
        ({"state_dict": {3: WEIGHT}}, "state_dict has a name of the type int, not text"),
        (
            {"state_dict": {"model.diffusion_model.x": 3, "model_ema.diffusion_modelx": 3}},
            "x in state_dict is of the type int",
        ),
        (changed(WEIGHT, 3), "the file has a name of the type int, not text"),
        ([WEIGHT], "holds no dictionary of weights, but a list"),
        ({}, "unknown layout; expected tensors by name"),
    ],
)
def test_a_layout_that_is_not_known_is_described(content, message, run):
    code, said = run(content)
    assert (code, message in said) == (2, True), said


@pytest.mark.parametrize("content", [changed(3), changed(WEIGHT.long())])
def test_a_pickled_state_dict_is_checked_too(content, run):
    code, said = run(pickle.dumps(content, protocol=4), suffix=".pkl")
    assert (code, f"{NAME} in the file is of" in said) == (2, True), said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("img_resolution", None),
        ("img_resolution", "large"),
        ("de_model_channels", 3),
        ("channel_mult", None),
        ("channel_mult", 1.5),
        ("num_blocks", "2"),
        ("stage_interval", 7),
    ],
)
def test_an_argument_of_another_type_is_bad_input(name, value, run):
    code, said = run(group("edm", "a/sd/"), **{name: value})
    assert code == 2, said
    assert name in said or "check the types" in said


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder.safetensors", "--out folder.safetensors: is a folder"),
        ("file/x.safetensors", "--out file/x.safetensors: .* is no folder"),
    ],
)
def test_the_place_for_the_output_is_checked_before_anything_is_read(
    out, message, tmp_path, run, monkeypatch
):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(convert, "read", lambda *_: pytest.fail("the file was read"))
    code, said = run(group("edm", "a/sd/"), "--out", out)
    assert code == 2
    assert re.search(message, said), said


@pytest.mark.parametrize(
    "text", ["[" * 5000, "[1]", '{"a": ' * 5000, "\xff", '{"image_size": ' + "9" * 5000 + "}"]
)
def test_arguments_that_are_no_json_object_are_bad_input(text, tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    options = [
        "--family",
        "edm",
        "--config",
        str(tmp_path / "config.json"),
        "--out",
        str(tmp_path / "o.safetensors"),
    ]
    assert main(["convert", str(tmp_path / "weights.pth"), *options]) == 2
    said = capsys.readouterr().err
    assert re.search(r"config\.json: (not JSON|needs a JSON object)", said)
    assert len(said) < 1000
