"""The networks on mixed batches: order, equality with each sample's own decoder, configurations, errors."""

from __future__ import annotations

import copy

import pytest
import torch

from multistage_diffusion.layers import StageModule
from multistage_diffusion.networks import EDMUNet, build
from multistage_diffusion.networks.mixed_batch import StageOrder

TINY = {
    "image_size": 8,
    "encoder_widths": (8,),
    "decoder_widths": (12, 8, 4),
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.0,
}
STAGES = [2, 0, 1, 0, 2, 0]


def tiny(**changes) -> EDMUNet:
    """A tiny network in float64 whose every path is open: no weight is near zero."""
    torch.manual_seed(0)
    network = EDMUNet(**(TINY | changes)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network


def inputs(batch: int = len(STAGES)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, generator=generator, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _float64_is_served_by_the_library():
    """The compiled CPU kernels take no float64."""
    from msd_kernels import backends

    with backends.use("library"):
        yield


@pytest.mark.parametrize(
    "changes",
    [{}, {"encoder_widths": (12, 8, 4)}, {"decoder_widths": (8,)}, {"label_dim": 3, "augment_dim": 2}],
    ids=["shared encoder", "separate networks", "unified", "labels"],
)
def test_mixed_batch_equals_the_samples_one_by_one(changes):
    network = tiny(**changes)
    x, noise = inputs()
    stages = STAGES if network.num_stages == 3 else [0] * len(STAGES)
    labels = {}
    if "label_dim" in changes:
        labels = {"class_labels": torch.rand(6, 3).double(), "augment_labels": torch.rand(6, 2).double()}
    cotangent = torch.randn(x.shape, dtype=torch.float64)

    mixed = network(x, noise, stages, **labels)
    (mixed * cotangent).sum().backward()
    from_mixed = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    for i, stage in enumerate(stages):
        one = slice(i, i + 1)
        alone = network(x[one], noise[one], [stage], **{k: v[one] for k, v in labels.items()})
        # The same float64 sums in another order: 1e-10 is the bound that the library promises.
        torch.testing.assert_close(mixed[one], alone, rtol=1e-10, atol=1e-10)
        (alone * cotangent[one]).sum().backward()

    for (name, parameter), gradient in zip(network.named_parameters(), from_mixed, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_permuting_the_samples_permutes_the_outputs():
    network = tiny()
    x, noise = inputs()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    expected = network(x, noise, STAGES)[order]
    actual = network(x[order], noise[order], [STAGES[i] for i in order])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_sample_sees_only_its_own_stages_weights():
    network = tiny()
    x, noise = inputs()
    before = network(x, noise, STAGES)
    with torch.no_grad():
        for module in network.dec.modules():
            if isinstance(module, StageModule):
                for name in module.stage_parameter_names():
                    module.stage_tensors(name)[0].mul_(1.5)
    changed = (network(x, noise, STAGES) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [stage == 0 for stage in STAGES]


def test_an_empty_stage_gets_a_gradient_of_zero():
    network = tiny()
    x, noise = inputs(2)
    network(x, noise, [0, 2]).sum().backward()
    conv = network.dec["8x8_block0"].conv0
    norms = [g.norm().item() for g in conv.stage_tensors("weight", conv.weight.grad)]
    assert norms[0] > 0
    assert norms[1] == 0
    assert norms[2] > 0


def test_state_dict_names_parameters_per_stage_and_restores_them():
    network = tiny()
    state = network.state_dict()
    assert state["dec.8x8_block0.conv0.weight.2"].shape == (4, 16, 3, 3)
    assert "dec.8x8_block0.conv0.weight" not in state
    other = tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("enc.8x8_conv.weight.0"), r"Missing key.*enc\.8x8_conv\.weight\.0"),
        (lambda s: s.update({"enc.8x8_conv.weight.7": torch.zeros(1)}), r"Unexpected key.*enc\.8x8_conv\.weight\.7"),
        (lambda s: s.update({"enc.8x8_conv.weight.0": torch.zeros(1)}), r"weight\.0 has shape \[1\], the network needs"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_load_state_dict_is_strict_per_stage(change, message):
    network = tiny()
    state = dict(network.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        network.load_state_dict(state)


def test_networks_copy_and_pickle_with_their_parameters():
    network = tiny()
    twin = copy.deepcopy(network)
    x, noise = inputs()
    assert torch.equal(network(x, noise, STAGES), twin(x, noise, STAGES))


def test_build_inverts_config():
    network = tiny()
    twin = build(network.config)
    assert twin.config == network.config
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == shapes


def test_published_cifar10_parameter_counts():
    with torch.device("meta"):
        network = EDMUNet(32, augment_dim=9)
    decoders = [0.0, 0.0, 0.0]
    for module in network.dec.modules():
        if isinstance(module, StageModule):
            for name in module.stage_parameter_names():
                for stage, tensor in enumerate(module.stage_tensors(name)):
                    decoders[stage] += tensor.numel() / 1e6
    encoder, total = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (network.enc, network))
    # Table of the reference implementation: millions of parameters, three decimals.
    assert [round(d, 3) for d in decoders] == [68.285, 36.101, 4.775]
    assert round(encoder, 3) == 19.303
    assert round(total, 3) == 128.793


def test_training_compiles_to_one_graph_without_breaks():
    network = tiny(decoder_widths=(8, 4), attn_resolutions=())
    x, noise = inputs(3)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    expected = network(x, noise, (1, 0, 1))
    actual = compiled(x, noise, (1, 0, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", [torch.bfloat16])
def test_autocast_runs_in_low_precision_and_returns_the_callers_dtype(precision):
    network = tiny().float()
    x, noise = inputs()
    exact = network(x.float(), noise.float(), STAGES)
    with torch.autocast("cpu", precision):
        low = network(x.float(), noise.float(), STAGES)
    assert low.dtype == torch.float32
    error = ((low - exact).norm() / exact.norm()).item()
    # About forty layers round to bfloat16 (2**-9 relative) in sequence; without low precision it would be under 1e-5.
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_widths": (8, 8)}, r"encoder_widths must hold one width \(shared\) or one per decoder"),
        ({"decoder_widths": ()}, r"encoder_widths must hold one width"),
        ({"image_size": 9}, r"image_size must be a multiple of 2 for 2 levels, got 9"),
        ({"decoder_widths": (12, 8, 75)}, r"16 groups do not divide the \d+ channels of stage 2"),
        ({"num_blocks": 0}, r"num_blocks must be >= 1"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EDMUNet(**(TINY | arguments))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x, s: n(x[:, :2], s, STAGES), ValueError, r"x must be \[B, 3, 8, 8\], got \[6, 2, 8, 8\]"),
        (lambda n, x, s: n(x, s[:3], STAGES), ValueError, r"noise must be \[6\], one value per sample, got \[3\]"),
        (lambda n, x, s: n(x, s, STAGES[:3]), ValueError, r"got 3 ids for 6 samples"),
        (lambda n, x, s: n(x, s, [3] * 6), ValueError, r"ids must lie in 0\.\.2, got 3"),
        (lambda n, x, s: n(x, s, torch.zeros(6)), TypeError, r"ids must be integers"),
        (lambda n, x, s: n(x, s, STAGES, class_labels=x), ValueError, r"built without class_labels"),
    ],
)
def test_bad_batches_are_refused(call, error, message):
    x, noise = inputs()
    with pytest.raises(error, match=message):
        call(tiny(), x, noise)


def test_build_names_an_unknown_family_and_argument():
    with pytest.raises(ValueError, match=r"family must be one of edm, got 'gan'"):
        build({"family": "gan"})
    with pytest.raises(ValueError, match=r"edm does not take these arguments.*colour"):
        build({"family": "edm", "image_size": 8, "colour": 1})


def test_stage_order_sorts_stably_and_restores():
    order = StageOrder.of(torch.tensor([1, 0, 1, 0]), 3, 4)
    assert order.counts == (2, 2, 0)
    x = torch.arange(4.0)
    assert order.sort(x).tolist() == [1, 3, 0, 2]
    assert torch.equal(order.restore(order.sort(x)), x)
