"""What a step sees, and how it is shared out among micro-batches and processes."""

from __future__ import annotations

import pytest
import torch

from multistage_diffusion.networks import build
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.training.batches import DataOrder, TrainingBatches, deal, derive_seed
from multistage_diffusion.training.config import TrainingConfig
from stand_ins import SMALL_UNET, TinyNetwork, one_thread, tiny_images  # noqa: F401

UNET = {**SMALL_UNET, "channel_mult": (1,), "attn_resolutions": (), "augment_dim": 9, "label_dim": 3}


def batches(rank=0, size=1, network=None, data=None, **changes) -> TrainingBatches:
    network = build(UNET) if network is None else network
    config = TrainingConfig(**{"network": UNET, "batch_size": 24, "augment": 0.5, "seed": 3, **changes})
    data = tiny_images(classes=3) if data is None else data
    return TrainingBatches(config, data, config.denoiser(network), torch.device("cpu"), rank, size)


def test_derived_seeds_are_fixed_and_distinct():
    assert derive_seed(0, "noise", 0) == 9144587515262914129
    seeds = {derive_seed(s, p, n) for s in range(5) for p in ("noise", "sigma") for n in range(50)}
    assert len(seeds) == 500
    assert all(0 <= s < 2**63 for s in seeds)


def test_data_order_visits_every_image_once_per_epoch():
    order = DataOrder(10, seed=0)
    whole = order.indices(0, 30)
    assert all(sorted(whole[e : e + 10].tolist()) == list(range(10)) for e in (0, 10, 20))
    assert whole[:10].tolist() != whole[10:20].tolist()


def test_data_order_depends_on_the_position_only():
    whole = DataOrder(10, seed=3).indices(0, 60)
    other = DataOrder(10, seed=3)
    for first, count in ((37, 8), (5, 25), (0, 4)):
        assert torch.equal(other.indices(first, count), whole[first : first + count])
    assert not torch.equal(DataOrder(10, seed=4).indices(0, 60), whole)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_part_gets_its_share_of_every_stage(parts):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        stage = torch.multinomial(torch.tensor([0.9, 0.08, 0.02]), 48, replacement=True, generator=generator)
        dealt = deal(stage, parts)
        assert sorted(dealt.flatten().tolist()) == list(range(48))
        counts = torch.stack([torch.bincount(stage[part], minlength=3) for part in dealt])
        assert int((counts.amax(0) - counts.amin(0)).max()) <= 1
        assert all(torch.equal(stage[part], stage[part].sort().values) for part in dealt)


@pytest.mark.parametrize(("accumulate", "size"), [(1, 1), (4, 1), (1, 3), (2, 4)])
def test_however_a_batch_is_shared_out_each_sample_is_the_same(accumulate, size):
    levels, (whole,) = batches().draw(5)
    by_position = whole.positions.argsort()
    seen = []
    for rank in range(size):
        same, parts = batches(rank, size, accumulate=accumulate).draw(5)
        assert torch.equal(same.sigma, levels.sigma)
        assert len(parts) == accumulate
        for part in parts:
            seen += part.positions.tolist()
            assert part.stage.counts == tuple(
                torch.bincount(levels.stage[part.positions], minlength=3).tolist()
            )
            assert part.tensors.keys() == {
                "y",
                "noise",
                "scalars",
                "share",
                "augment_labels",
                "class_labels",
            }
            for name, values in part.tensors.items():
                own = by_position[part.positions]
                expected = whole.tensors[name][..., own] if name == "scalars" else whole.tensors[name][own]
                assert torch.equal(values, expected), name
    assert sorted(seen) == list(range(24))


def test_the_tensors_are_those_of_the_samples_at_their_positions():
    data = tiny_images(classes=3)
    drawn = batches(data=data, augment=None, importance_weights=True, stage_sampling="stratified")
    levels, (part,) = drawn.draw(2)
    at = part.positions
    indices = DataOrder(data.num_images, 3).indices(48, 24)[at]
    torch.testing.assert_close(part.tensors["y"], data.sample(indices).float())
    assert torch.equal(part.tensors["class_labels"].argmax(1), data.labels[indices])
    torch.testing.assert_close(part.tensors["scalars"][4], levels.sigma[at].float())
    torch.testing.assert_close(part.tensors["share"], (levels.weight[at] / 24).float())
    assert "augment_labels" not in part.tensors
    assert isinstance(part.stage, StageOrder)
    assert part.stage.counts == levels.counts
    assert not torch.equal(drawn.draw(3)[1][0].tensors["noise"], part.tensors["noise"])


def test_a_network_without_stage_orders_gets_ids():
    network = TinyNetwork()
    levels, parts = batches(network=network, augment=None, accumulate=2).draw(0)
    for part in parts:
        assert torch.equal(part.stage, levels.stage[part.positions])


def test_a_batch_must_be_shared_out_evenly():
    with pytest.raises(ValueError, match="5 processes with accumulate=2 do not divide batch_size=24"):
        batches(0, 5, accumulate=2)
