"""The two halves of a network: what the encoder makes serves the decoders of other stages and levels."""

from __future__ import annotations

import pytest
import torch
from tiny_networks import (
    BATCH,
    STAGES,
    each_configuration,
    float64_is_served_by_the_library,  # noqa: F401 (a fixture)
    inputs,
    labels_for,
    tiny,
)

from multistage_diffusion.networks.stage_network import Takes
from multistage_diffusion.networks.stage_order import StageOrder

OTHER_STAGES = [0, 0, 2, 1, 1, 2]


@each_configuration
def test_decoding_what_was_encoded_is_a_call(family, changes):
    network = tiny(family, **changes)
    x, noise = inputs()
    stages = STAGES if network.num_stages == 3 else [0] * BATCH
    labels = labels_for(network)
    assert torch.equal(
        network.decode(network.encode(x, noise, stages, **labels)), network(x, noise, stages, **labels)
    )


@each_configuration
def test_the_same_features_serve_the_decoders_of_other_stages(family, changes):
    network = tiny(family, **changes)
    x, noise = inputs()
    labels = labels_for(network)
    stages, others = (ids if network.num_stages == 3 else [0] * BATCH for ids in (STAGES, OTHER_STAGES))
    features = network.encode(x, noise, stages, **labels)
    if not network.shared_encoder:
        with pytest.raises(ValueError, match="every stage has an encoder of its own"):
            network.decode(features, stage=others)
        return
    # A shared encoder is told of no stage, so these are the features of the other stages as well; the float64 sums of
    # the encoder go over the samples in another order.
    torch.testing.assert_close(
        network.decode(features, stage=others), network(x, noise, others, **labels), rtol=1e-10, atol=1e-10
    )
    order = StageOrder.of(others, network.num_stages, BATCH)
    assert torch.equal(network.decode(features, stage=order), network.decode(features, stage=others))
    again = network.decode(features, stage=stages)
    assert torch.equal(again, network.decode(features))


@each_configuration
def test_decoders_may_be_told_of_other_noise(family, changes):
    network = tiny(family, **changes)
    x, noise = inputs()
    labels = labels_for(network)
    stages, others = (ids if network.num_stages == 3 else [0] * BATCH for ids in (STAGES, OTHER_STAGES))
    features = network.encode(x, noise, stages, **labels)
    if family == "uvit":
        with pytest.raises(ValueError, match="told of the noise by the encoder alone"):
            network.decode(features, noise=noise + 1)
        return
    assert torch.equal(network.decode(features, noise), network.decode(features))
    if not network.shared_encoder:
        others = stages
    told = network.decode(features, noise + 1, None if others is stages else others)
    # The features of the one noise, and what the encoder says of the other noise and stages.
    other = network.encode(x, noise + 1, others, **labels)
    moved = network.encode(x, noise, others, **labels)
    expected = network.decode(moved._replace(emb=other.emb))
    torch.testing.assert_close(told, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(told, network.decode(moved))


def test_gradients_of_all_decodings_reach_the_encoder():
    network = tiny()
    x, noise = inputs()
    cotangent = torch.randn_like(x)
    features = network.encode(x, noise, STAGES)
    both = network.decode(features) + network.decode(features, stage=OTHER_STAGES)
    (both * cotangent).sum().backward()
    shared = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    apart = network(x, noise, STAGES) + network(x, noise, OTHER_STAGES)
    (apart * cotangent).sum().backward()
    for (name, parameter), gradient in zip(network.named_parameters(), shared, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_features_decode_in_the_dtype_of_their_autocast():
    network = tiny().float()
    x, noise = (t.float() for t in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        features, expected = network.encode(x, noise, STAGES), network(x, noise, STAGES)
    assert features.state.values.dtype == torch.bfloat16
    assert torch.equal(network.decode(features), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": torch.zeros(5)}, r"noise must be \[6\], one value per sample, got \[5\]"),
        ({"stage": [0] * 5}, "got 5 ids for 6 samples"),
        ({"stage": [3] * 6}, r"ids must lie in 0\.\.2, got 3"),
    ],
)
def test_noise_and_stages_that_do_not_fit_the_features_are_refused(given, message):
    network = tiny()
    features = network.encode(*inputs(), STAGES)
    with pytest.raises(ValueError, match=message):
        network.decode(features, **given)


@pytest.mark.parametrize(
    ("family", "changes", "takes"),
    [
        ("edm", {"label_dim": 3, "augment_dim": 2}, (3, 2, 0)),
        ("ncsnpp", {}, (0, 0, 0)),
        ("ldm", {"context_dim": 6}, (0, 0, 6)),
        ("ldm", {"context_dim": 6, "label_dim": 3}, (3, 0, 0)),
        ("uvit", {"label_dim": 3}, (3, 0, 0)),
    ],
)
def test_a_network_declares_what_it_takes(family, changes, takes):
    assert tiny(family, **changes).takes == (*takes, True)
    assert Takes.of(torch.nn.Linear(1, 1)) == (0, 0, 0, False)
