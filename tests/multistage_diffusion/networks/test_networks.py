"""The networks on mixed batches: order, equality with each sample's own decoder, configurations, errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_networks import (
    BATCH,
    STAGES,
    TINY,
    each_configuration,
    float64_is_served_by_the_library,  # noqa: F401 (a fixture)
    inputs,
    labels_for,
    tiny,
)

from msd_kernels import grouped_linear
from multistage_diffusion.networks import blocks, build
from multistage_diffusion.networks.layers import StageModule
from multistage_diffusion.networks.stage_network import StageNetwork
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.preconditioning import EDMPreconditioner
from multistage_diffusion.noise.stages import Stages


@each_configuration
def test_mixed_batch_equals_the_samples_one_by_one(family, changes):
    network = tiny(family, **changes)
    x, noise = inputs()
    stages = STAGES if network.num_stages == 3 else [0] * BATCH
    labels = labels_for(network)
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


@each_configuration
def test_build_inverts_config(family, changes):
    network = tiny(family, **changes)
    twin = build(json.loads(json.dumps(network.config)))
    assert twin.config == network.config
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == shapes


@each_configuration
def test_state_dict_restores_every_parameter(family, changes):
    network = tiny(family, **changes)
    twin = tiny(family, **changes)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict({name: tensor.clone() for name, tensor in network.state_dict().items()})
    x, noise = inputs(2)
    labels = labels_for(network, 2)
    assert torch.equal(twin(x, noise, [0, 0], **labels), network(x, noise, [0, 0], **labels))


@pytest.mark.parametrize("family", TINY)
def test_shared_layers_run_once_for_all_stages(family):
    """The encoder of a mixed batch sees all samples in one call, not one call per stage."""
    network = tiny(family)
    first = network.embed_patches if family == "uvit" else network.conv
    seen = []
    first.register_forward_hook(lambda module, args, out: seen.append(args[0].counts))
    network(*inputs(), STAGES)
    assert seen == [(BATCH,)]


@pytest.mark.parametrize("family", ["edm", "ncsnpp", "ldm"])
def test_one_call_projects_the_embedding_for_all_blocks_and_stages(family, monkeypatch):
    """One in the encoder and one in the decoder. Their values are those of the blocks' own layers, the fixtures say."""
    calls = []

    def counted(x, weight, bias):
        calls.append(weight)
        return grouped_linear(x, weight, bias)

    monkeypatch.setattr(blocks, "grouped_linear", counted)
    network = tiny(family)
    network(*inputs(), STAGES)
    layers = [m.affine for m in network.modules() if isinstance(m, blocks.ResidualBlock)]
    encoder, decoder = calls
    assert len(encoder) == sum(layer.num_stages == 1 for layer in layers)
    assert len(decoder) == 3 * sum(layer.num_stages == 3 for layer in layers)


def test_reduced_attention_leaves_the_later_decoders_without():
    full, reduced = (tiny("ldm", attn_resolutions=(4, 8), reduced_attention=flag) for flag in (False, True))
    assert attention_blocks(full) == [4, 4, 4]
    assert attention_blocks(reduced) == [4, 2, 0]


def attention_blocks(network: StageNetwork) -> list[int]:
    """Decoder blocks with attention, per stage."""
    found = [block.attention for level in network.dec.values() for block in level.blocks]
    return [
        sum(stage in getattr(attention, "stages", range(3)) for attention in found if attention is not None)
        for stage in range(3)
    ]


def test_class_labels_are_dropped_per_sample_in_training_only():
    network = tiny("edm", label_dim=3, label_dropout=0.5)
    x, noise = inputs(1)
    x, noise = x.expand(64, -1, -1, -1), noise.expand(64)
    labels = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(64, 3)
    kept = network.eval()(x[:1], noise[:1], [0], class_labels=labels[:1])
    dropped = network(x[:1], noise[:1], [0])
    torch.manual_seed(5)
    out = network.train()(x, noise, [0] * 64, class_labels=labels)
    is_kept = torch.isclose(out, kept, rtol=1e-9, atol=1e-9).flatten(1).all(dim=1)
    is_dropped = torch.isclose(out, dropped, rtol=1e-9, atol=1e-9).flatten(1).all(dim=1)
    assert (is_kept ^ is_dropped).all()
    assert 16 <= is_dropped.sum() <= 48  # 32 expected, standard deviation 4


def test_separate_networks_share_no_parameter():
    network = tiny("edm", encoder_widths=(12, 8, 4))
    x, noise = inputs(1)
    network(x, noise, [0]).sum().backward()
    for module in network.modules():
        if isinstance(module, StageModule):
            for stage, parameter in module.stage_parameters():
                assert stage == 0 or parameter.grad is None


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
                for stage, parameter in module.stage_parameters():
                    parameter.mul_(1.5 if stage == 0 else 1)
    changed = (network(x, noise, STAGES) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [stage == 0 for stage in STAGES]


def test_an_empty_stage_gets_no_gradient():
    network = tiny()
    x, noise = inputs(2)
    network(x, noise, [0, 2]).sum().backward()
    conv = network.dec["8x8"].blocks[0].conv0
    assert [weight.grad is None for weight in conv.weight] == [False, True, False]
    assert all(conv.weight[stage].grad.any() for stage in (0, 2))


def test_state_dict_names_parameters_per_stage_and_restores_them():
    network = tiny()
    state = network.state_dict()
    assert state["dec.8x8.blocks.0.conv0.weight.2"].shape == (4, 16, 3, 3)
    assert "dec.8x8.blocks.0.conv0.weight" not in state
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
        (lambda s: s.pop("conv.weight.0"), r"Missing key.*conv\.weight\.0"),
        (lambda s: s.update({"conv.weight.7": torch.zeros(1)}), r"Unexpected key.*conv\.weight\.7"),
        (
            lambda s: s.update({"conv.weight.0": torch.zeros(1)}),
            r"size mismatch for conv\.weight\.0",
        ),
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


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("edm", {"decoder_widths": (8, 4), "channel_mult": (1,), "attn_resolutions": ()}),
        pytest.param("uvit", {"decoder_widths": (16, 8), "depth": 2}, marks=pytest.mark.full),
        pytest.param(
            "ldm",
            {"decoder_widths": (64, 32), "context_dim": 6, "channel_mult": (1,), "attn_resolutions": (8,)},
            marks=pytest.mark.full,
        ),
    ],
)
def test_training_compiles_to_one_graph_without_breaks(family, changes):
    network = tiny(family, **changes)
    x, noise = inputs(3)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    labels = labels_for(network, 3)
    expected = network(x, noise, (1, 0, 1), **labels)
    actual = compiled(x, noise, (1, 0, 1), **labels)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("through_denoiser", [False, True], ids=["network", "denoiser"])
def test_a_compiled_network_serves_every_order_of_the_same_counts(through_denoiser):
    network = tiny("uvit", decoder_widths=(16, 8), depth=2)
    x, noise = inputs(3)
    stages = Stages.from_boundaries((0, 1, float("inf")))
    sigma = torch.tensor([0.5, 2.0])

    def call(model, ids):
        if through_denoiser:
            return EDMPreconditioner(model, stages)(x, sigma[list(ids)])
        return model(x, noise, StageOrder.of(ids, 2, 3, explicit=True))

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        call(compiled, (1, 0, 1))
        for ids in ((1, 1, 0), (0, 1, 1))[
            : 1 if through_denoiser else 2
        ]:  # a denoiser's sorted batch has no order
            with torch.compiler.set_stance("fail_on_recompile"):
                actual = call(compiled, ids)
            torch.testing.assert_close(actual, call(network, ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", TINY)
def test_autocast_runs_in_low_precision_and_returns_the_callers_dtype(family):
    network = tiny(family).float()
    x, noise = inputs()
    exact = network(x.float(), noise.float(), STAGES)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x.float(), noise.float(), STAGES)
    assert low.dtype == torch.float32
    error = ((low - exact).norm() / exact.norm()).item()
    # About forty layers round to bfloat16 (2**-9 relative) in sequence; without low precision it would be under 1e-5.
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (
            "edm",
            {"encoder_widths": (8, 8)},
            r"encoder_widths must hold one width \(shared\) or one per decoder",
        ),
        ("edm", {"decoder_widths": ()}, r"encoder_widths must hold one width"),
        ("edm", {"decoder_widths": (8, 0, 4)}, r"decoder_widths must be >= 1, got \[8, 0, 4\]"),
        ("edm", {"image_size": 9}, r"image_size must be a multiple of 2 for 2 levels, got 9"),
        ("edm", {"decoder_widths": (12, 8, 75)}, r"16 groups do not divide the \d+ channels of stage 2"),
        ("edm", {"num_blocks": 0}, r"num_blocks must be >= 1"),
        (
            "edm",
            {"encoder_type": "none"},
            r"encoder_type must be one of standard, skip, residual, got 'none'",
        ),
        (
            "edm",
            {"embedding_type": "sines"},
            r"embedding_type must be one of positional, fourier, got 'sines'",
        ),
        ("edm", {"decoder_type": "residual"}, r"decoder_type must be one of standard, skip, got 'residual'"),
        ("ncsnpp", {"resample_filter": (1, 2, 1)}, r"a filter must have an even number of taps"),
        ("ldm", {"decoder_widths": (64, 48, 32)}, r"32 groups do not divide the \d+ channels of stage 1"),
        ("ldm", {"num_heads": 5}, r"64 channels are no multiple of head_channels=32 or num_heads=5"),
        ("uvit", {"patch_size": 3}, r"patch_size must divide image_size=8, got 3"),
        ("uvit", {"num_heads": 5}, r"num_heads=5 must divide every width, got width 16"),
    ],
)
def test_impossible_sizes_are_refused(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(family, **arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x, s: n(x[:, :2], s, STAGES), ValueError, r"x must be \[B, 3, 8, 8\], got \[6, 2, 8, 8\]"),
        (
            lambda n, x, s: n(x, s[:3], STAGES),
            ValueError,
            r"noise must be \[6\], one value per sample, got \[3\]",
        ),
        (lambda n, x, s: n(x, s, STAGES[:3]), ValueError, r"got 3 ids for 6 samples"),
        (lambda n, x, s: n(x, s, [3] * 6), ValueError, r"ids must lie in 0\.\.2, got 3"),
        (lambda n, x, s: n(x, s, torch.zeros(6)), TypeError, r"ids must be integers"),
        (lambda n, x, s: n(x, s, STAGES, class_labels=x), ValueError, r"built without class_labels"),
        (
            lambda n, x, s: n(x.long(), s, STAGES),
            TypeError,
            r"x must be of a floating dtype, got torch\.int64",
        ),
        (lambda n, x, s: n(x + 1j, s, STAGES), TypeError, r"x must be real, got torch\.complex128"),
        (lambda n, x, s: n(x, s + 1j, STAGES), TypeError, r"noise must be real, got torch\.complex128"),
        (lambda n, x, s: n(None, s, STAGES), TypeError, r"x must be a tensor, got NoneType"),
        (lambda n, x, s: n(x, 0.5, STAGES), TypeError, r"noise must be a tensor, got float"),
        (lambda n, x, s: n(x, None, STAGES), TypeError, r"noise must be a tensor, got NoneType"),
        (lambda n, x, s: n(x.to("meta"), s, STAGES), ValueError, r"noise is on cpu, but x is on meta"),
        (lambda n, x, s: n(x, s.to("meta"), STAGES), ValueError, r"noise is on meta, but x is on cpu"),
        (
            lambda n, x, s: n(x.to("meta"), s.to("meta"), STAGES),
            ValueError,
            r"weight of stage 0 is on cpu, but x is on meta",
        ),
        (
            lambda n, x, s: n(x, s, StageOrder.of(STAGES, 3, BATCH, "meta")),
            ValueError,
            r"an order on the meta device has no values to copy to cpu",
        ),
    ],
)
def test_bad_batches_are_refused(call, error, message):
    x, noise = inputs()
    with pytest.raises(error, match=message):
        call(tiny(), x, noise)


@pytest.mark.parametrize(
    ("family", "changes", "given", "message"),
    [
        ("ldm", {}, {"context": torch.zeros(6, 1, 6)}, r"built without context"),
        ("ldm", {"context_dim": 6}, {}, r"context must be \[6, tokens, 6\], got none"),
        ("ldm", {"context_dim": 6}, {"context": torch.zeros(6, 1, 5)}, r"context must be .* got \[6, 1, 5\]"),
        ("ldm", {"label_dim": 3}, {}, r"class_labels must be \[6, 3\], got none"),
        ("uvit", {"label_dim": 3}, {}, r"class_labels must be \[6, 3\], got none"),
        ("uvit", {}, {"class_labels": torch.zeros(6, 3)}, r"built without class_labels"),
        (
            "edm",
            {"label_dim": 3},
            {"class_labels": torch.zeros(6, 4)},
            r"class_labels must be \[6, 3\], got \[6, 4\]",
        ),
        (
            "edm",
            {"label_dim": 3},
            {"class_labels": torch.zeros(5, 3)},
            r"one entry per sample \(6\), got \[5, 3\]",
        ),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(family, changes, given, message):
    network = tiny(family, **changes)
    with pytest.raises(ValueError, match=message):
        network(*inputs(), STAGES, **given)


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("edm", {"label_dim": 3, "label_dropout": 0.5}, "class_labels"),
        ("edm", {"augment_dim": 2}, "augment_labels"),
        ("ldm", {"label_dim": 3}, "class_labels"),
        ("ldm", {"context_dim": 6}, "context"),
        ("uvit", {"label_dim": 3}, "class_labels"),
    ],
)
def test_conditioning_that_is_no_real_tensor_where_the_images_are_is_refused(family, changes, key):
    network = tiny(family, **changes).train()
    given = labels_for(network)[key]
    for value, error, message in (
        (given.tolist(), TypeError, "must be a tensor, got list"),
        (given + 1j, TypeError, r"must be real, got torch\.complex128"),
        (given.to("meta"), ValueError, "is on meta, but x is on cpu"),
    ):
        with pytest.raises(error, match=f"{key} {message}"):
            network(*inputs(), STAGES, **{key: value})


@pytest.mark.parametrize("family", TINY)
def test_every_family_names_inputs_that_are_no_tensors(family):
    network, (x, noise) = tiny(family), inputs()
    name = type(network).__name__
    with pytest.raises(TypeError, match=f"{name}: x must be a tensor, got ndarray"):
        network(x.numpy(), noise, STAGES)
    with pytest.raises(TypeError, match=f"{name}: x must be of a floating dtype, got torch.int64"):
        network(x.long(), noise, STAGES)


def test_build_names_an_unknown_family_and_argument():
    with pytest.raises(ValueError, match=r"family must be one of edm, ncsnpp, ldm, uvit, got 'gan'"):
        build({"family": "gan"})
    with pytest.raises(ValueError, match=r"edm does not take these arguments.*colour"):
        build({"family": "edm", "image_size": 8, "colour": 1})


def test_a_network_takes_an_order_in_place_of_the_stages():
    network = tiny()
    x, noise = inputs()
    expected = network(x, noise, STAGES)
    assert torch.equal(network(x, noise, StageOrder.of(STAGES, 3, BATCH)), expected)
    with pytest.raises(
        ValueError, match="got the order of 2 samples in 3 stages, needed is one of 6 samples"
    ):
        network(x, noise, StageOrder.of([0, 1], 3, 2))


@pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
@pytest.mark.parametrize("family", TINY)
def test_tangents_and_torch_func_go_through_a_network(family):
    """What consistency and mean-flow training need: d/dx along a direction, and the gradients of that."""
    network = tiny(family)
    x, noise = inputs()
    v, step = torch.randn_like(x), 1e-6

    def run(x: torch.Tensor) -> torch.Tensor:
        return network(x, noise, STAGES)

    _, tangent = torch.func.jvp(run, (x,), (v,))
    differences = (run(x + step * v) - run(x - step * v)) / (2 * step)
    assert (tangent - differences).abs().max() <= 1e-7 * tangent.abs().max()
    tangent.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())

    parameters = dict(network.named_parameters())
    network.zero_grad()
    run(x).square().mean().backward()
    found = torch.func.grad(
        lambda given: torch.func.functional_call(network, given, (x, noise, STAGES)).square().mean()
    )({name: p.detach() for name, p in parameters.items()})
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
