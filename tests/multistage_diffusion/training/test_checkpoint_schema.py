"""Whatever is wrong with a checkpoint whose checksums are right is named before anything of it is loaded."""

import copy
import hashlib
import itertools
import json
import math
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from multistage_diffusion.networks import build as build_network
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.checkpoint_schema import read_kinds
from multistage_diffusion.training.checkpoints import CheckpointError
from multistage_diffusion.training.config import TrainingConfig
from multistage_diffusion.training.trainer import Trainer
from stand_ins import (  # noqa: F401
    SMALL_UNET,
    TinyNetwork,
    build,
    by_earlier_versions,
    config_of,
    no_plots,
    one_thread,
    tiny_images,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::multistage_diffusion.training.checkpoints.CheckpointWarning")
FILES = ("network", "ema", "optimizer")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of two steps: its checkpoint."""
    directory = tmp_path_factory.mktemp("schema") / "run"
    trainer = trainer_of(directory, steps=2, gradient_clip=1.0, weight_decay=0.1)
    trainer._plot = lambda: None
    trainer.run()
    return checkpoints.list_checkpoints(directory / "checkpoints")[0]


def rewrite(folder, content, *changed_files):
    """Writes checkpoint.json with right checksums of it and of the files."""
    files = dict(content["files"])
    for file in changed_files:
        data = file.read_bytes()
        files[file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = {**content, "files": files}
    content["sha256"] = checkpoints._checksum(content)
    (folder / "checkpoint.json").write_text(json.dumps(content))


class Subject:
    """A trainer that is to go on from a copy of the checkpoint."""

    def __init__(self, written, tmp_path):
        self.directory = tmp_path / "run"
        shutil.copytree(written.parent.parent, self.directory)
        self.folder = self.directory / "checkpoints" / written.name
        self.content = json.loads((self.folder / "checkpoint.json").read_text())
        self.trainer = trainer_of(self.directory, steps=3, gradient_clip=1.0, weight_decay=0.1)
        self.state = self._state()

    def _state(self):
        tensors, settings = self.trainer.state.tensors()
        copied = {file: {k: v.clone() for k, v in group.items()} for file, group in tensors.items()}
        return copied, copy.deepcopy(settings), self.trainer.step, self.trainer.seconds

    def refusal(self):
        """What resuming raises; checks that it changed nothing."""
        before = self._files()
        try:
            self.trainer._begin(resume=True)
        except CheckpointError as error:
            message = str(error)
        else:
            return None
        assert self._files() == before, message
        self._assert_nothing_changed()
        return message

    def _files(self):
        found = [entry for folder in (self.directory, self.folder) for entry in os.scandir(folder)]
        return {entry.path: (entry.stat().st_mtime_ns, entry.stat().st_size) for entry in found}

    def _assert_nothing_changed(self):
        (old, *rest), (new, *others) = self.state, self._state()
        assert rest == others
        for file in FILES:
            assert old[file].keys() == new[file].keys()
            assert all(torch.equal(old[file][name], new[file][name]) for name in old[file])


@pytest.fixture
def subject(written, tmp_path):
    return Subject(written, tmp_path)


def places(value, place=()):
    """The place of every value in nested JSON; of lists of names, only the list."""
    yield place
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*place, key))
    elif isinstance(value, list) and not (value and isinstance(value[0], str)):
        for number, inner in enumerate(value):
            yield from places(inner, (*place, number))


OTHER_VALUES = [None, -1, math.nan, math.inf, 2**63, 10**400, True, False, "x", [], 0.5]
# What is allowed of these differs between a run and its continuation.
FREE = {"data", "checkpoint_every", "keep_checkpoints", "log_every", "sample_every", "sample_count", "steps"}
DEFAULTS = TrainingConfig(network={}).to_json()
HUGE = (2**63, 10**400)  # of steps that no run makes
FITTING = {  # values of the free ones, and of seconds, that a run may have
    "data": lambda v: isinstance(v, str),
    "keep_checkpoints": lambda v: v is None or v in HUGE,
    "sample_every": lambda v: v is None or v in HUGE,
    "seconds": lambda v: v in (2**63, 0.5),
}


def is_legitimate(content, place, value):
    """Whether a run may have this value, or lack it, where ``content`` has another."""
    name = str(place[-1])
    if value == "missing" and place == ("optimizer", "state"):
        return True  # earlier versions did not write it
    if (
        value == "missing"
    ):  # a key of the configuration that an earlier version did not write counts as its default
        return (
            len(place) == 2
            and place[0] == "config"
            and (name in FREE or content["config"][name] == DEFAULTS[name])
        )
    if isinstance(value, bool) or place not in (("seconds",), ("config", name)):
        return False
    return FITTING.get(name, lambda v: name in FREE and v in HUGE)(value)


def changed(content, place, value):
    """A copy with another value at a place, or without it."""
    content = copy.deepcopy(content)
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    if value == "missing":
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return content


def value_at(content, place):
    for key in place:
        content = content[key]
    return content


def test_every_field_of_checkpoint_json_is_checked(subject):
    fields = {name: value for name, value in subject.content.items() if name not in ("files", "sha256")}
    unnamed, tried = [], 0
    for place, value in itertools.product(list(places(fields))[1:], [*OTHER_VALUES, "missing"]):
        original = value_at(fields, place)
        is_same = original == value and isinstance(original, bool) == isinstance(value, bool)
        is_item = value == "missing" and isinstance(place[-1], int)
        if is_same or is_item or is_legitimate(fields, place, value):
            continue
        rewrite(subject.folder, changed(subject.content, place, value))
        message = subject.refusal()
        assert message is not None, (place, value)
        tried += 1
        if not any(key in message for key in [key for key in place if isinstance(key, str)][-2:]):
            unnamed.append((place, value, message))
    assert tried > 400
    assert not unnamed


def mutations(tensors):
    """Names of changes of a file's tensors, and the changed tensors."""
    for name, tensor in tensors.items():
        others = {
            "missing": None,
            "shorter": tensor.flatten()[:-1].clone() if tensor.dim() else tensor.new_zeros(2),
            "other shape": tensor[None].clone(),
            "other dtype": tensor.double(),
            "half": tensor.half(),
            "NaN": torch.full_like(tensor, math.nan),
            "Inf": torch.full_like(tensor, math.inf),
        }
        if name.endswith((".step", ".exp_avg_sq")):
            others["negative"] = -1 - tensor
        if name.endswith(".step"):
            others |= {"huge": tensor + 2, "zero": tensor * 0, "broken": tensor - 0.5}
        for what, other in others.items():
            rest = {key: value for key, value in tensors.items() if key != name}
            yield name, what, rest if other is None else {**rest, name: other}
    first = next(iter(tensors.values()))
    for name in ("more", "more.exp_avg", "encoder.weight.more"):
        yield name, "surplus", {**tensors, name: first.clone()}


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_is_checked(subject, file):
    path = subject.folder / f"{file}.safetensors"
    unnoticed, tried = [], 0
    for name, what, tensors in mutations(load_file(path)):
        save_file(tensors, path)
        rewrite(subject.folder, subject.content, path)
        message = subject.refusal()
        assert message is not None, (name, what)
        tried += 1
        if name not in message or path.name not in message:
            unnoticed.append((name, what, message))
    assert tried > 50
    assert not unnoticed


def test_what_was_written_is_taken(subject):
    rewrite(subject.folder, subject.content)
    assert subject.refusal() is None
    assert subject.trainer.step == 2
    assert subject.trainer.run(resume=True).step == 3


def test_state_of_parameters_that_had_one_may_not_be_missing(subject):
    path = subject.folder / "optimizer.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if not k.startswith("encoder.bias.")}, path)
    rewrite(subject.folder, subject.content, path)
    assert "missing from the checkpoint: encoder.bias.step" in subject.refusal()


def test_a_file_that_nothing_vouches_for_is_not_read(subject):
    content = copy.deepcopy(subject.content)
    del content["files"]["ema.safetensors"]
    content["sha256"] = checkpoints._checksum(content)
    (subject.folder / "checkpoint.json").write_text(json.dumps(content))
    assert "says nothing of ema.safetensors" in subject.refusal()


def test_a_checkpoint_that_claims_more_is_refused_before_it_is_read(subject, monkeypatch):
    path = subject.folder / "ema.safetensors"
    save_file({**load_file(path), "more": torch.zeros(1)}, path)
    rewrite(subject.folder, subject.content, path)
    read = []
    original = checkpoints.load_file
    monkeypatch.setattr(checkpoints, "load_file", lambda file: read.append(file.name) or original(file))
    assert "1 unknown to the network: more" in subject.refusal()
    assert read == ["network.safetensors"]


def unet_trainer(directory, steps, **changes):
    torch.manual_seed(1)
    network = build_network(SMALL_UNET)
    config = config_of(network=network.config, steps=steps, **changes)
    return Trainer(config, directory, data=tiny_images(), network=network, quiet=True)


@pytest.mark.parametrize("together", [False, True], ids=["per stage", "all stages"])
def test_optimizers_of_earlier_versions_go_on(tmp_path, together):
    """Their parameters were vectors: each stage's part of a layer's weights, and before that those of all stages."""
    runs = [tmp_path / name for name in ("now", "earlier")]
    path = unet_trainer(runs[0], 2).run().checkpoint
    shutil.copytree(runs[0], runs[1])
    path = runs[1] / path.relative_to(runs[0])
    file, content = path / "optimizer.safetensors", checkpoints.read_metadata(path)
    (group,) = content["optimizer"]["param_groups"]
    tensors, names = by_earlier_versions(load_file(file), group["params"], together=together)
    save_file(tensors, file)
    group["params"] = content["optimizer"]["state"] = names
    rewrite(path, content, file)
    found = []
    for run in runs:
        trainer = unet_trainer(run, 4)
        trainer.run(resume=True)
        found.append((trainer.network.state_dict(), trainer.optimizer.state_dict()["state"]))
    (weights, state), (expected, expected_state) = found
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert state.keys() == expected_state.keys()
    for number, entries in expected_state.items():
        assert all(torch.equal(state[number][entry], value) for entry, value in entries.items())


def test_states_of_two_versions_do_not_mix(tmp_path):
    path = unet_trainer(tmp_path, 1).run().checkpoint
    file = path / "optimizer.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(".weight.0.exp_avg")).removesuffix(".0.exp_avg")
    extra = {f"{name}.{entry}": torch.zeros(9) for entry in ("exp_avg", "exp_avg_sq")}
    save_file({**tensors, **extra, f"{name}.step": torch.ones(())}, file)
    rewrite(path, checkpoints.read_metadata(path), file)
    with pytest.raises(CheckpointError, match=f"3 unknown to the optimizer: {name}.exp_avg"):
        unet_trainer(tmp_path, 2).run(resume=True)


def test_a_decoder_that_was_never_stepped_needs_no_state(tmp_path):
    path = unet_trainer(tmp_path, 1, stage_probabilities=(0.5, 0.5, 0)).run().checkpoint
    stepped = {name.split(".exp")[0] for name in read_kinds(path / "optimizer.safetensors")}
    assert not any(name.endswith(".2") for name in stepped)
    assert unet_trainer(tmp_path, 2, stage_probabilities=(0.5, 0.5, 0)).run(resume=True).step == 2


@pytest.mark.parametrize("averaged_in", [torch.float32, torch.bfloat16])
def test_runs_of_16_bit_weights_go_on(tmp_path, averaged_in):
    def network():
        torch.manual_seed(1)
        return Bf16Network(dropout=0)

    path = trainer_of(tmp_path, network(), steps=2).run().checkpoint
    file = path / "ema.safetensors"
    assert {kind.dtype for kind in read_kinds(file).values()} == {torch.float32}
    save_file(
        {k: v.to(averaged_in) for k, v in load_file(file).items()}, file
    )  # 16 bits: by earlier versions
    rewrite(path, checkpoints.read_metadata(path), file)
    for weights in ("ema", "network"):
        loaded = checkpoints.load_model(tmp_path, weights=weights, build=build).denoiser.network
        saved = load_file(path / f"{weights}.safetensors")
        assert all(torch.equal(v, saved[k].float()) for k, v in loaded.state_dict().items())
    assert trainer_of(tmp_path, network(), steps=3).run(resume=True).step == 3
    with pytest.raises(
        CheckpointError, match=r"of another dtype: encoder.weight is .* bfloat16 in the checkpoint"
    ):
        trainer_of(tmp_path, TinyNetwork(dropout=0), steps=4).run(resume=True)


class Bf16Network(TinyNetwork):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.bfloat16()

    def forward(self, x, noise, stage, **conditioning):
        return super().forward(x.bfloat16(), noise.bfloat16(), stage, **conditioning).float()


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("file", ["network", "ema"])
def test_every_tensor_is_checked_for_sampling(subject, file):
    path = subject.folder / f"{file}.safetensors"
    unnoticed = []
    for name, what, tensors in mutations(load_file(path)):
        save_file(tensors, path)
        rewrite(subject.folder, subject.content, path)
        try:
            checkpoints.load_model(subject.directory, weights=file, build=build)
            unnoticed.append((name, what, None))
        except CheckpointError as error:
            if name not in str(error):
                unnoticed.append((name, what, str(error)))
    assert not unnoticed


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("step",), 2**63),
        (("step",), True),
        (("images",), 17),
        (("images",), -1),
        (("config",), None),
        (("config", "sigma_data"), math.nan),
        (("config", "sigma_data"), "0.5"),
        (("config", "schedule"), "fast"),
        (("config", "network", "spirit"), 1),
        (("config", "network", "width"), -4),
        (("config", "network"), 5),
        (("config", "stages"), {"stages": [5]}),
    ],
    ids=str,
)
def test_fields_are_checked_for_sampling(subject, place, value):
    rewrite(subject.folder, changed(subject.content, place, value))
    shutil.copytree(subject.folder, subject.directory / "best")  # of which the name says no step
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        checkpoints.load_model(subject.directory / "best", build=build)


def test_a_model_that_the_weights_do_not_fit_takes_no_memory(tmp_path):
    network = build_network({**SMALL_UNET, "encoder_widths": (16,), "decoder_widths": (16, 16, 16)})
    config = config_of(network={**network.config, "encoder_widths": [4096]}).to_json()
    tensors = dict.fromkeys(FILES, network.state_dict())
    path = checkpoints.save_checkpoint(tmp_path, 1, tensors, {"images": 8, "config": config})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="made by another network"):
        checkpoints.load_model(path)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    )  # KiB; the weights are over 2 GiB
