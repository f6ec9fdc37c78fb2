import errno
import hashlib
import json
import os
import shutil
import signal
import textwrap
from pathlib import Path

import pytest
import torch

import forks
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.checkpoint_schema import kinds
from multistage_diffusion.training.checkpoints import CheckpointError, CheckpointWarning
from multistage_diffusion.training.config import differing_keys
from stand_ins import TinyNetwork, build, one_thread  # noqa: F401


def save(directory, step, value=None, keep=None):
    tensors = {"network": {"w": torch.full((100,), float(step if value is None else value))}}
    return checkpoints.save_checkpoint(directory, step, tensors, {"images": 10 * step}, keep)


def names(directory):
    return sorted(p.name for p in Path(directory).iterdir())


def test_save_and_read(tmp_path):
    path = save(tmp_path, 3)
    assert path.name == "step-00000003"
    assert checkpoints.damage(path) is None
    assert checkpoints.read_metadata(path)["images"] == 30
    assert torch.equal(checkpoints.read_tensors(path, "network")["w"], torch.full((100,), 3.0))
    assert checkpoints.latest_checkpoint(tmp_path) == path


def test_tensors_that_share_memory_are_saved(tmp_path):
    flat = torch.arange(6.0)
    tensors = {"network": {"a": flat[:2], "b": flat[2:].view(2, 2).t(), "all": flat}}
    path = checkpoints.save_checkpoint(tmp_path, 1, tensors, {})
    loaded = checkpoints.read_tensors(path, "network")
    assert loaded["b"].tolist() == [[2, 4], [3, 5]]
    assert loaded["all"].tolist() == [0, 1, 2, 3, 4, 5]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == dict.fromkeys(
        names(path), "0o640"
    )


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000010"]


def test_an_old_checkpoint_that_is_half_removed_is_out_of_sight(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill at that moment
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [".old-step-00000001", "step-00000002"]
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert checkpoints.latest_checkpoint(tmp_path).name == "step-100000000"


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def full(path, tensors):
        path.write_bytes(b"half of a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"No space left.*newest checkpoint is still step-00000001"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.damage(tmp_path / "step-00000001") is None


def test_all_is_on_the_disk_before_a_checkpoint_is_under_its_name(tmp_path, monkeypatch):
    """What a power cut leaves under the name of a checkpoint is the checkpoint."""
    events, fsync, rename = [], os.fsync, Path.rename

    def recorded_fsync(handle):
        fsync(handle)
        events.append((os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size))

    def recorded_rename(path, target):
        events.append(("rename", path.name, Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    path = save_all(tmp_path, 1)
    writing = tmp_path / ".writing-step-00000001"
    moved = events.index(("rename", writing.name, path.name))
    files = {(str(writing / file.name), file.stat().st_size) for file in path.iterdir()}
    assert len(files) == 4
    *first, last = events[:moved]
    assert files == set(first)  # whole, each of them
    assert last[0] == str(writing)  # then the names in the folder
    assert [event[0] for event in events[moved + 1 :]] == [str(tmp_path)]  # and last its own name


def test_a_folder_of_checkpoints_is_on_the_disk_with_the_first_one(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda h: synced.append(os.readlink(f"/proc/self/fd/{h}")) or fsync(h))
    save(tmp_path / "run" / "checkpoints", 1)
    assert {str(tmp_path), str(tmp_path / "run")} <= set(synced)
    synced.clear()
    save(tmp_path / "run" / "checkpoints", 2)
    assert str(tmp_path / "run") not in synced


def run_python(code, directory) -> forks.Program:
    return forks.run(f"directory = {str(directory)!r}\n{textwrap.dedent(code)}")


def test_the_real_writer_reports_a_write_that_fails(tmp_path):
    # A limit on the size of files makes the operating system refuse the write, as a full disk does.
    save(tmp_path, 1)
    done = run_python(
        """
        import resource, signal, torch
        from multistage_diffusion.checkpoints import CheckpointError, save_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
        try:
            save_checkpoint(directory, 2, {"network": {"w": torch.zeros(100_000)}}, {})
        except CheckpointError as error:
            print("refused:", error)
        """,
        tmp_path,
    )
    assert "refused: could not save" in done.stdout, done.stderr
    assert "network.safetensors" in done.stdout
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("moment", ["write_tensors", "flush"])
def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path, moment):
    save(tmp_path, 1)
    done = run_python(
        f"""
        import os, signal, torch
        from multistage_diffusion.training import checkpoints
        original = checkpoints.{moment}
        calls = []
        def killed(*arguments):
            original(*arguments)
            calls.append(arguments)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.{moment} = killed
        group = {{"w": torch.zeros(10)}}
        checkpoints.save_checkpoint(directory, 2, {{"network": group, "ema": group}}, {{}}, keep=1)
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    assert checkpoints.latest_checkpoint(tmp_path).name == "step-00000001"
    save(tmp_path, 2)  # the next save clears the remains
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def truncate(path):
    file = path / "network.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip_a_bit(path):
    file = path / "network.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "network.safetensors has"),
        (flip_a_bit, "the content of network.safetensors has changed"),
        (lambda path: (path / "network.safetensors").unlink(), "network.safetensors: No such file"),
        (lambda path: (path / "checkpoint.json").unlink(), "checkpoint.json: No such file"),
        (lambda path: (path / "checkpoint.json").write_text('{"step": 2'), "not a checkpoint description"),
        (lambda path: (path / "checkpoint.json").write_text('{"format": 99}'), "format 99"),
        (lambda path: (path / "checkpoint.json").write_text("[]"), "not a checkpoint description"),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path, harm, message):
    save(tmp_path, 1)
    harm(save(tmp_path, 2))
    with pytest.warns(CheckpointWarning, match=message):
        assert checkpoints.latest_checkpoint(tmp_path).name == "step-00000001"


def test_no_bit_of_the_metadata_changes_unnoticed(tmp_path):
    file = save(tmp_path, 6) / "checkpoint.json"
    written = file.read_bytes()
    content = json.loads(written)
    unnoticed = []
    for bit in range(8 * len(written)):
        changed = bytearray(written)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        if checkpoints.damage(file.parent) is None and json.loads(bytes(changed)) != content:
            unnoticed.append(bytes(changed))
    assert not unnoticed


def test_metadata_of_all_that_json_can_say_is_intact(tmp_path):
    metadata = {
        "betas": (0.9, 0.999),
        "eps": 1e-08,
        "inf": float("inf"),
        10: "ä",
        9: None,
        "nan": float("nan"),
    }
    path = checkpoints.save_checkpoint(tmp_path, 1, {"network": {"w": torch.zeros(1)}}, metadata)
    assert checkpoints.damage(path) is None
    assert checkpoints.read_metadata(path)["betas"] == [0.9, 0.999]


def as_version_before(path, without=None):
    """Makes a checkpoint what was written before checkpoint.json had a checksum of its own, less one entry."""
    file = path / "checkpoint.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    content["format"] = 1
    content.pop(without, None)
    content["files"].pop(without, None)
    file.write_text(json.dumps(content))
    return path


def save_all(directory, step):
    tensors = {name: {"w": torch.zeros(1)} for name in ("network", "ema", "optimizer")}
    metadata = {"images": 10, "seconds": 1.0, "config": {}, "optimizer": {}, "data_fingerprint": "ab"}
    return checkpoints.save_checkpoint(directory, step, tensors, metadata, keep=None)


ENTRIES = ["step", "seconds", "config", "optimizer", "data_fingerprint", "ema.safetensors"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_checkpoints_of_the_version_before_load_where_nothing_is_missing(tmp_path, entry):
    older = as_version_before(save_all(tmp_path, 1))
    assert checkpoints.damage(older) is None
    as_version_before(save_all(tmp_path, 2), without=entry)
    with pytest.warns(CheckpointWarning, match=f"checkpoint.json says nothing of {entry}"):
        assert checkpoints.latest_checkpoint(tmp_path) == older


def described(path, **changes):
    """Writes another checkpoint.json with its right checksum."""
    content = {**json.loads((path / "checkpoint.json").read_text()), **changes}
    content["sha256"] = checkpoints._checksum(content)
    (path / "checkpoint.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("../outside", lambda path: path.write_bytes(b"")),
        ("folder", lambda path: path.mkdir()),
        ("pipe", os.mkfifo),  # reading it would wait for a writer
    ],
)
def test_what_is_no_file_of_the_checkpoint_is_not_read(tmp_path, name, make):
    path = save_all(tmp_path, 1)
    make(path / name)
    nothing = {"bytes": (path / name).stat().st_size, "sha256": hashlib.sha256(b"").hexdigest()}
    described(path, files={name: nothing})
    assert checkpoints.damage(path) == f"{name} is no file of the checkpoint"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": ' + "9" * 5000 + "}",
        '{"format": true}',
        '{"format": 2, "files": 3}',
        "\xff",
    ],
)
def test_whatever_stands_in_checkpoint_json_is_damage(tmp_path, text):
    path = save_all(tmp_path, 1)
    (path / "checkpoint.json").write_bytes(text.encode("latin1"))
    assert checkpoints.damage(path)
    assert checkpoints.latest_config(tmp_path) is None


def test_a_huge_description_is_not_read(tmp_path):
    path = save_all(tmp_path, 1)
    with (path / "checkpoint.json").open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    assert "1099511627776 bytes; at most 67108864 are read" in checkpoints.damage(path)
    with pytest.raises(CheckpointError, match="at most 67108864 are read"):
        checkpoints.read_metadata(path)


def test_the_newest_configuration_is_that_of_an_intact_description(tmp_path):
    assert checkpoints.latest_config(tmp_path / "nowhere") is None
    for step in (1, 2, 3):
        described(save_all(tmp_path, step), config={"of": step})
    assert checkpoints.latest_config(tmp_path) == {"of": 3}
    newest = tmp_path / "step-00000003" / "checkpoint.json"
    newest.write_text(newest.read_text().replace('"of": 3', '"of": 4'))
    (tmp_path / "step-00000002" / "ema.safetensors").unlink()  # of which the configuration needs nothing
    assert checkpoints.latest_config(tmp_path) == {"of": 2}


def test_a_folder_of_another_step_is_no_checkpoint_of_it(tmp_path):
    older = as_version_before(save_all(tmp_path, 1))
    older.rename(tmp_path / "step-00000003")
    problem = checkpoints.damage(tmp_path / "step-00000003")
    assert problem == "checkpoint.json is of step 1, the folder is named after step 3"
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "best")
    assert checkpoints.find_checkpoint(tmp_path / "best") == tmp_path / "best"


def test_the_checkpoint_just_written_is_never_pruned(tmp_path):
    for step in (3, 6):
        save(tmp_path, step)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_checkpoints_after_a_step_are_set_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    aside = [tmp_path / f"damaged-step-0000000{n}" for n in (2, 3)]
    assert checkpoints.set_aside_after(tmp_path, 1) == aside
    assert checkpoints.latest_checkpoint(tmp_path).name == "step-00000001"
    save(tmp_path, 2)
    assert checkpoints.set_aside_after(tmp_path, 1) == [tmp_path / "damaged-step-00000002-2"]
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == [
        "damaged-step-00000002",
        "damaged-step-00000002-2",
        "damaged-step-00000003",
        "step-00000004",
    ]


def test_nothing_intact_is_an_error(tmp_path):
    assert checkpoints.latest_checkpoint(tmp_path) is None
    truncate(save(tmp_path, 1))
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="none of the 1 checkpoint"):
        checkpoints.latest_checkpoint(tmp_path)


def test_saving_a_step_again(tmp_path):
    path = save(tmp_path, 1, value=1)
    save(tmp_path, 1, value=2)  # an intact checkpoint is never overwritten
    assert checkpoints.read_tensors(path, "network")["w"][0] == 1
    truncate(path)
    save(tmp_path, 1, value=3)  # a damaged one is replaced
    assert checkpoints.damage(path) is None
    assert checkpoints.read_tensors(path, "network")["w"][0] == 3
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_find_checkpoint_takes_a_run_or_a_checkpoint(tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    assert checkpoints.find_checkpoint(tmp_path) == path
    assert checkpoints.find_checkpoint(tmp_path / "checkpoints") == path
    assert checkpoints.find_checkpoint(path) == path
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.find_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="there is no folder"):
        checkpoints.find_checkpoint(tmp_path / "nowhere")
    truncate(path)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.find_checkpoint(path)


def test_another_architecture_is_named():
    tensors = TinyNetwork(width=8, num_stages=2).state_dict()
    network = TinyNetwork(width=4, num_stages=3)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.require_weights(kinds(tensors), kinds(network.state_dict()), "the checkpoint")
    message = str(caught.value)
    assert "of 8 parameters and buffers 4 of another shape" in message
    assert "encoder.weight is [8, 2, 3, 3] in the checkpoint and [4, 2, 3, 3] in the network" in message
    assert "2 missing from the checkpoint: decoders.2.weight, decoders.2.bias" in message
    assert "config" in message


def test_a_long_list_of_differences_is_cut():
    with pytest.raises(CheckpointError, match=r"8 missing from the checkpoint: (\S+, ){4}\.\.\."):
        checkpoints.require_weights({}, kinds(TinyNetwork().state_dict()), "x")


def test_optimizer_state_round_trip(tmp_path):
    def trained(steps, network, optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.ones(2, 1, 8, 8)
            network(x, torch.zeros(2), [0, 1]).square().sum().backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        network = TinyNetwork(dropout=0)
        return network, torch.optim.Adam(network.parameters(), lr=0.01)

    network, optimizer = fresh()
    optimizer.param_groups[0]["lr"] = 0.02  # as a warm-up sets it
    trained(3, network, optimizer)
    names = [name for name, _ in network.named_parameters()]
    tensors, scalars = checkpoints.optimizer_tensors(names, optimizer)
    groups = {"optimizer": tensors, "network": network.state_dict()}
    path = checkpoints.save_checkpoint(tmp_path, 3, groups, {})
    scalars = json.loads(json.dumps(scalars))

    other, other_optimizer = fresh()
    other.load_state_dict(checkpoints.read_tensors(path, "network", kinds(other.state_dict())))
    saved = checkpoints.read_tensors(path, "optimizer")
    checkpoints.restore_optimizer(names, other_optimizer, saved, scalars)
    trained(2, network, optimizer)
    trained(2, other, other_optimizer)
    assert "encoder.weight.exp_avg" in tensors
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert other_optimizer.param_groups[0]["lr"] == 0.02


def test_restored_state_does_not_lie_in_the_file(tmp_path):
    network = TinyNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    names = [name for name, _ in network.named_parameters()]
    state = {
        f"{name}.{entry}": torch.ones(() if entry == "step" else parameter.shape)
        for name, parameter in network.named_parameters()
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    path = checkpoints.save_checkpoint(tmp_path, 1, {"optimizer": state}, {})
    _, scalars = checkpoints.optimizer_tensors(names, optimizer)
    checkpoints.restore_optimizer(names, optimizer, checkpoints.read_tensors(path, "optimizer"), scalars)
    with (path / "optimizer.safetensors").open("r+b") as file:
        file.write(bytes((path / "optimizer.safetensors").stat().st_size))
    for parameter in network.parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.ones_like(parameter))


def test_optimizer_state_of_an_unknown_parameter():
    network = TinyNetwork()
    optimizer = torch.optim.Adam(network.parameters())
    with pytest.raises(CheckpointError, match=r"'old\.weight'"):
        checkpoints.restore_optimizer(["weight"], optimizer, {"old.weight.exp_avg": torch.zeros(1)}, {})


def test_differing_keys():
    saved = {"a": 1, "network": {"width": 4, "old": 0}, "same": [1]}
    given = {"a": 1, "network": {"width": 8, "new": 2}, "same": [1]}
    assert differing_keys(saved, given) == [
        "network.new: not in the checkpoint, now 2",
        "network.old: 0 in the checkpoint, now missing",
        "network.width: 4 in the checkpoint, now 8",
    ]


def test_load_model(tmp_path):
    network, average = TinyNetwork(), TinyNetwork()
    config = {"network": network.config, "stages": Stages.edm().to_json(), "sigma_data": 0.7}
    tensors = {"network": network.state_dict(), "ema": average.state_dict()}
    checkpoints.save_checkpoint(tmp_path / "checkpoints", 5, tensors, {"images": 50, "config": config})
    model = checkpoints.load_model(tmp_path, build=build)
    assert (model.step, model.images, model.denoiser.sigma_data) == (5, 50, 0.7)
    assert not model.denoiser.training
    assert torch.equal(model.denoiser.network.encoder.weight, average.encoder.weight)
    raw = checkpoints.load_model(tmp_path, weights="network", build=build)
    assert torch.equal(raw.denoiser.network.encoder.weight, network.encoder.weight)
    with pytest.raises(ValueError, match="weights must be one of ema, network, got 'best'"):
        checkpoints.load_model(tmp_path, weights="best", build=build)
