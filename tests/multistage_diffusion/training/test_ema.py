import pytest
import torch
from torch import nn

from multistage_diffusion.training.ema import EMA


def weight(value):
    network = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(network.weight, value)
    return network


def test_halflife_is_measured_in_images():
    network = weight(0.0)
    ema = EMA(network, halflife_images=1000, rampup_ratio=None)
    nn.init.constant_(network.weight, 1.0)
    for step in range(10):
        ema.update(network, step * 100, 100)
    # 1000 images = one half-life; ten float64 multiplications.
    assert ema.network.weight.item() == pytest.approx(0.5, rel=1e-14)


def test_halflife_does_not_depend_on_the_batch_size():
    values = []
    for batch in (10, 100):
        network = weight(0.0)
        ema = EMA(network, 700, None)
        nn.init.constant_(network.weight, 1.0)
        for step in range(1000 // batch):
            ema.update(network, step * batch, batch)
        values.append(ema.network.weight.item())
    assert values[0] == pytest.approx(values[1], rel=1e-13)


def test_rampup_forgets_the_start():
    network = weight(5.0)
    ema = EMA(network, 500_000, 0.05)
    nn.init.constant_(network.weight, 1.0)
    ema.update(network, 0, 64)
    assert ema.network.weight.item() == 1.0
    assert ema.decay(10_000, 64) == pytest.approx(0.5 ** (64 / 500))
    assert ema.decay(100_000_000, 64) == pytest.approx(0.5 ** (64 / 500_000))


def test_the_copy_is_independent_and_frozen():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    ema = EMA(network)
    assert not ema.network.training
    assert network.training
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert ema.network[0].weight.data_ptr() != network[0].weight.data_ptr()


def test_buffers_are_copied():
    network = nn.BatchNorm1d(2)
    ema = EMA(network)
    network(torch.randn(8, 2) + 3)
    ema.update(network, 0, 8)
    assert torch.equal(ema.network.running_mean, network.running_mean)


def test_rejects():
    with pytest.raises(ValueError, match="halflife_images=-1"):
        EMA(weight(0), -1)
    with pytest.raises(ValueError, match="rampup_ratio=0"):
        EMA(weight(0), 1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_small_steps_of_weights_in_any_dtype_add_up(dtype):
    network = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(network.weight, 1.0)
    ema = EMA(network, 1_000_000, None)
    nn.init.constant_(network.weight, 1.5)
    for step in range(100):
        ema.update(network, step * 100, 100)
    assert ema.network.weight.item() == pytest.approx(1.5 - 0.5 * 0.5**0.01, rel=1e-5)
    assert ema.network.weight.dtype == torch.promote_types(dtype, torch.float32)


def test_the_network_may_change_its_dtype():
    network = weight(1.0)
    ema = EMA(network.float(), 100, None)
    ema.update(network.double(), 0, 100)
    assert ema.network.weight.dtype == torch.float32
