"""Networks that several processes train, save and load together: DDP, FSDP2, distributed checkpoints, accelerate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import forks
from ecosystem_networks import Network, copies, filled

PROGRAM = "import ecosystem_ranks, sys; ecosystem_ranks.main(*sys.argv[1:])"
SCENARIOS = (
    "readme",
    "not_attached",
    "state_dict_on_one_rank",
    "sharded_state_dict",
    "memory_of_a_rank",
    "broadcast_full_state",
    "meta_device",
    "mixed_precision",
    "clipped_norm",
    "dtensors_of_a_batch",
    "fsdp1",
    "save_sharded",
)
# Ways of sharing a network; what FSDP2 shards by itself, in all but the first.
WAYS = {"readme": ["ddp", "root", "level", "layer"], "edm": ["ddp", "root", "level", "block", "layer"]}
# float32, whose sums run in another order; the weights are of the order of 1.
AS_ALONE = 2e-5


def outcomes(size: int, folder: Path, *names: str) -> list[dict]:
    """What the scenarios return in every process."""
    programs = forks.run_ranks(PROGRAM, size, folder, *names, path=[Path(__file__).parent])
    return [json.loads(program.stdout.splitlines()[-1]) for program in programs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    return outcomes(2, folder, *SCENARIOS)


@pytest.fixture(scope="module")
def two_of_edm(folder) -> list[dict]:
    return outcomes(2, folder, "edm")


def assert_as_alone(ranks: list[dict], name: str) -> None:
    for outcome in ranks:
        assert isinstance(outcome[name], float), outcome[name]
        assert outcome[name] < AS_ALONE


@pytest.mark.parametrize("way", WAYS["readme"])
def test_several_processes_train_what_one_does(two, way):
    assert_as_alone(two, f"readme {way}")


@pytest.mark.ecosystem
@pytest.mark.parametrize("way", WAYS["edm"])
def test_several_processes_train_edms_network_as_one_does(two_of_edm, way):
    assert_as_alone(two_of_edm, f"edm {way}")


def test_an_optimizer_that_nothing_is_attached_to_moves_absent_decoders(two):
    assert all(outcome["not_attached"] > 100 * AS_ALONE for outcome in two)


def test_state_dict_of_one_rank_waits_for_nobody(two):
    assert isinstance(two[0]["state_dict_on_one_rank"], float), two[0]["state_dict_on_one_rank"]
    assert two[0]["state_dict_on_one_rank"] < 5
    assert two[1]["state_dict_on_one_rank"] is True


@pytest.mark.parametrize(
    "name",
    ["sharded_state_dict", "broadcast_full_state", "meta_device", "fsdp1", "save_sharded"],
)
def test_what_was_saved_arrives(two, name):
    assert [outcome[name] for outcome in two] == [None, None]


def test_a_rank_holds_its_share(two):
    for parameters, state_dict, all_of_them in (outcome["memory_of_a_rank"] for outcome in two):
        assert parameters == state_dict
        assert 0.4 * all_of_them < parameters < 0.6 * all_of_them  # odd first sizes are padded


def test_mixed_precision_reduces_in_float32(two):
    for outcome in two:
        kinds, error = outcome["mixed_precision"]
        assert kinds == ["torch.float32"]
        assert 0 < error < 0.1  # bfloat16 rounds to 2^-8, through five layers forward and backward


def test_clipping_sees_all_shards(two):
    assert all(outcome["clipped_norm"] < 1e-5 for outcome in two)


def test_a_batch_of_dtensors_stays_sharded(two):
    for outcome in two:
        theirs, ours = outcome["dtensors_of_a_batch"]
        assert ours == theirs == "(Shard(dim=0),)"


@pytest.mark.parametrize("size", [1, 4])
def test_another_number_of_processes_loads_what_two_saved(two, folder, size):
    assert [outcome["save_sharded"] for outcome in two] == [None, None]
    saved = load_file(folder / "expected.safetensors")
    assert saved.keys() == copies(filled(Network()).state_dict()).keys()
    assert [outcome["load_sharded"] for outcome in outcomes(size, folder, "load_sharded")] == [None] * size


@pytest.mark.ecosystem
def test_a_compiled_sharded_network_has_the_gradients_of_an_eager_one(folder):
    assert_as_alone(outcomes(2, folder, "compiled"), "compiled")


@pytest.mark.ecosystem
def test_accelerate_trains_what_one_process_does(folder):
    pytest.importorskip("accelerate", reason="needs accelerate: make test-ecosystem installs it")
    assert_as_alone(outcomes(2, folder, "readme", "accelerated"), "accelerated")
