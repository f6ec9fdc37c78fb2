"""Conversion of checkpoint files: nothing runs, averaged weights come first, and messages say what to do."""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from edm_snapshots import persistence, snapshot
from torch import nn

from fixtures import config, group
from multistage_diffusion import networks, official
from multistage_diffusion.cli import main
from multistage_diffusion.official import convert

EDM = config("edm", "a/")

__all__ = ["persistence"]  # a fixture


@pytest.fixture
def edm_pickle(persistence, tmp_path):
    path = tmp_path / "network-snapshot.pkl"
    state = group("edm", "a/sd/")
    path.write_bytes(
        pickle.dumps({"ema": snapshot(persistence, state), "loss_fn": None, "dataset_kwargs": {"a": 1}}, 4)
    )
    return path


def test_edm_pickle_gives_its_tensors_and_arguments_and_runs_nothing(edm_pickle, persistence):
    checkpoint = convert.read(edm_pickle)
    expected = group("edm", "a/sd/")
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in expected.items())
    network = convert.network_of(checkpoint, "edm", None)
    assert network.config["decoder_widths"] == EDM["de_model_channels"]
    assert not persistence.ran.exists()


def test_converted_file_gives_the_same_network(edm_pickle, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    assert main(["convert", str(edm_pickle), "--family", "edm", "--out", str(out)]) == 0
    assert "3 stage(s)" in capsys.readouterr().out
    loaded = convert.load_network(out)
    assert loaded.config == official.build("edm", EDM).config
    exported = official.export(loaded)
    assert all(torch.equal(exported[name], tensor) for name, tensor in group("edm", "a/sd/").items())


class Attack:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (lambda path: Attack(os.system, f"touch {path}"), r"(posix|nt)\.system"),
        (lambda path: Attack(exec, f"open({path!r}, 'w')"), r"(builtins\.)?exec"),
        (lambda path: Attack(eval, f"open({path!r}, 'w')"), r"(builtins\.)?eval"),
        (lambda path: Attack(getattr, nn.Module, "__init__"), r"(builtins\.)?getattr"),
        (lambda path: Attack(np.fromfile, path), r"numpy.*\.fromfile"),
        (lambda path: Attack(torch.load, path), r"torch\.serialization\.load"),
        (lambda path: Attack(copyreg._reconstructor, dict, object, None), r"copyreg\._reconstructor"),
    ],
    ids=["system", "exec", "eval", "getattr", "fromfile", "torch.load", "copyreg"],
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_file_that_tries_to_run_code_is_refused_by_name(attack, name, suffix, tmp_path):
    ran, path = tmp_path / "ran", tmp_path / f"attack{suffix}"
    content = {"ema": attack(str(ran))}
    path.write_bytes(pickle.dumps(content)) if suffix == ".pkl" else torch.save(content, path)
    with pytest.raises(convert.CheckpointFileError, match=rf"refused.* asks for {name}"):
        convert.read(path)
    assert not ran.exists()


def test_a_storage_inside_of_a_pickle_cannot_run_code_either(tmp_path):
    inner, ran, path = tmp_path / "inner", tmp_path / "ran", tmp_path / "attack.pkl"
    torch.save(Attack(os.system, f"touch {ran}"), inner, _use_new_zipfile_serialization=False)
    path.write_bytes(pickle.dumps({"ema": Attack(torch.storage._load_from_bytes, inner.read_bytes())}))
    with pytest.raises(convert.CheckpointFileError):
        convert.read(path)
    assert not ran.exists()


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_truncated_file_is_reported_as_such(suffix, edm_pickle, tmp_path):
    path = tmp_path / f"short{suffix}"
    if suffix == ".pth":
        torch.save(group("uvit", "sd/"), path)
        path.write_bytes(path.read_bytes()[:-500])
    else:
        path.write_bytes(edm_pickle.read_bytes()[:-500])
    with pytest.raises(convert.CheckpointFileError, match=r"truncated.*copy it again"):
        convert.read(path)


def score_sde_file(path, *, wrapped: bool = True):
    """A score-SDE checkpoint whose averaged weights are the fixture, its raw ones zeros."""
    state = group("uvit", "sd/")
    final = {"weight": nn.Parameter(torch.zeros(3, 3, 3, 3)), "bias": nn.Parameter(torch.zeros(3))}
    raw = OrderedDict()
    for name, tensor in state.items():
        shared = (
            final[name.rpartition(".")[2]].data
            if name.startswith("final_layer")
            else torch.zeros_like(tensor)
        )
        raw[f"module.{name}" if wrapped else name] = shared
    averaged = [t for name, t in state.items() if not name.startswith(("final_layer.1", "final_layer.2"))]
    torch.save(
        {"model": raw, "ema": {"decay": 0.9999, "num_updates": 3, "shadow_params": averaged}, "step": 3}, path
    )
    return state


def test_score_sde_checkpoint_gives_averaged_weights_by_default(tmp_path):
    state = score_sde_file(tmp_path / "checkpoint.pth")
    averaged, raw = (convert.read(tmp_path / "checkpoint.pth", weights) for weights in ("ema", "raw"))
    exported = official.export(convert.network_of(averaged, "uvit", config("uvit")))
    assert all(torch.equal(exported[name], tensor) for name, tensor in state.items())
    assert not any(tensor.any() for tensor in raw.tensors.values())


def test_ldm_checkpoint_gives_averaged_weights_by_default(tmp_path):
    state = group("ldm", "u/sd/")
    content = {f"model.diffusion_model.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    content |= {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in state.items()}
    content |= {
        "model_ema.decay": torch.tensor(0.99),
        "first_stage_model.x": torch.zeros(3),
        "betas": torch.zeros(9),
    }
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": content, "epoch": 1}, path)
    averaged, raw = (convert.read(path, weights) for weights in ("ema", "raw"))
    exported = official.export(convert.network_of(averaged, "ldm", config("ldm", "u/")))
    assert all(torch.equal(exported[name], tensor.float()) for name, tensor in state.items())
    assert raw.tensors.keys() == averaged.tensors.keys()
    assert not any(tensor.any() for tensor in raw.tensors.values())


@pytest.mark.parametrize(
    ("family", "preset", "ours", "theirs"),
    [
        ("edm", "edm-cifar10", "decs.0.", "dec."),
        ("ncsnpp", "ncsnpp-cifar10", "en_modules.", "all_modules."),
    ],
)
def test_a_preset_knows_the_original_networks_by_their_names(family, preset, ours, theirs):
    """They are unified and have up to 32 groups; the fork's have 16."""
    for names, groups in ((ours, 16), (theirs, 32)):
        tensors = {f"{names}0.weight": torch.zeros(1)}
        config = convert._preset_config(preset, family, tensors)
        assert config.get("max_groups", 16) == groups
        assert len(config["decoder_widths"]) == 1


def test_ldm_class_embedder_comes_along(tmp_path):
    """It stands beside the U-Net in the file, and the U-Net's arguments do not mention it."""
    given = config("ldm", "c/") | {"n_classes": 5}
    state = official.export(official.build("ldm", given))
    classes = "cond_stage_model.embedding.weight"
    content = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items() if name != classes}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": content | {classes: state[classes]}}, path)
    network = convert.network_of(convert.read(path, "raw"), "ldm", config("ldm", "c/"))
    assert network.label_dim == 5
    assert torch.equal(official.export(network)[classes], state[classes])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--family", "uvit", "--out", "x.safetensors"],
            "does not say how its network was built; give --config",
        ),
        (["--family", "uvit", "--out", "x.pt"], "must end in .safetensors"),
        (
            ["--family", "uvit", "--preset", "edm-cifar10", "--out", "x.safetensors"],
            "is of the family edm, not uvit",
        ),
        (["--family", "edm", "--config", "CONFIG", "--out", "x.safetensors"], "unknown arguments for edm"),
        (["--family", "uvit", "--preset", "uvit-cifar10", "--out", "x.safetensors"], "missing: .*in_blocks"),
    ],
    ids=["no config", "suffix", "family of the preset", "wrong family", "wrong size"],
)
def test_the_command_says_what_to_do(arguments, message, tmp_path, capsys):
    path, configuration = tmp_path / "checkpoint.pth", tmp_path / "config.json"
    score_sde_file(path)
    configuration.write_text(json.dumps(config("uvit")))
    arguments = [str(configuration) if argument == "CONFIG" else argument for argument in arguments]
    assert main(["convert", str(path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_weights_of_a_kind_are_named(tmp_path, persistence, edm_pickle):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "raw.pth")
    with pytest.raises(ValueError, match=r"no averaged weights.*choose the raw weights"):
        convert.read(tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="has no raw weights; choose the other"):
        convert.read(edm_pickle, "raw")
    torch.save({"weights": 1}, tmp_path / "other.pth")
    with pytest.raises(convert.CheckpointFileError, match=r"unknown layout.*got weights"):
        convert.read(tmp_path / "other.pth")


def test_save_network_makes_folders_and_replaces_a_file_as_a_whole(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    path = tmp_path / "new" / "model.safetensors"
    network = official.build("uvit", config("uvit"))
    convert.save_network(path, network)
    before = path.read_bytes()
    assert convert.load_network(path).config == network.config

    def fill_disk(tensors, path, metadata):
        path.write_bytes(b"the first bytes")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("multistage_diffusion.training.checkpoints.save_file", fill_disk)
    with pytest.raises(OSError, match=r"model\.safetensors: No space left on device"):
        convert.save_network(path, network)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_load_network_refuses_other_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(convert.CheckpointFileError, match="was not written by msd convert"):
        convert.load_network(tmp_path / "other.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with pytest.raises(convert.CheckpointFileError, match="truncated or no safetensors file"):
        convert.load_network(tmp_path / "short.safetensors")


@pytest.mark.parametrize(
    ("family", "arguments", "widths"),
    [
        (
            "edm",
            {"encoder_widths": [8], "decoder_widths": [8], "channel_mult": [1, 2], "num_blocks": 1},
            [12, 8, 4],
        ),
        ("uvit", {"encoder_widths": [16], "decoder_widths": [16], "depth": 3, "num_heads": 2}, [32, 16, 8]),
        (
            "ldm",
            {"encoder_widths": [32], "decoder_widths": [32], "channel_mult": [1, 1], "num_blocks": 1},
            [64, 32, 96],
        ),
    ],
)
def test_unified_weights_start_a_multistage_model(family, arguments, widths):
    torch.manual_seed(0)
    unified = networks.build({"family": family, "image_size": 8, **arguments}).eval()
    network, report = official.start_multistage(unified, widths)
    assert report.copied["shared"] == report.total["shared"]
    assert report.copied["stage 1"] == report.total["stage 1"]
    assert 0 <= report.copied["stage 0"] < report.total["stage 0"]
    assert sum(report.total.values()) == sum(p.numel() for p in network.parameters())
    assert "stage 0:" in str(report)
    assert "fresh layers" in str(report)
    x, noise = torch.randn(2, 3, 8, 8), torch.rand(2)
    # The same layers in the same order: only the packing differs.
    torch.testing.assert_close(
        network.eval()(x, noise, [1, 1]), unified(x, noise, [0, 0]), rtol=1e-5, atol=1e-6
    )


def test_start_multistage_needs_a_unified_network():
    network = networks.build(
        {"family": "uvit", "image_size": 8, "encoder_widths": [16], "decoder_widths": [16, 8]}
    )
    with pytest.raises(ValueError, match="needs a network with one stage, got 2"):
        official.start_multistage(network, [16])
