"""Every architecture with every norm it allows: against plain modules, published counts, dense Hessians, and through training."""
from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_hessian import dense_hessian
from test_hessian import problem as hessian_problem
from test_models import NEW, generator, images, network
from torch import nn

from dpkit import hessian, models, training, tree
from dpkit.data import AugmentSpec, Split
from dpkit.data._torchvision import load
from dpkit.hessian import operator, product, program
from dpkit.models import ARCHITECTURES, ModelSpec, vit
from dpkit.models.layers import Embedding, Norm, Weight, groups
from dpkit.models.network import family
from dpkit.models.spec import RULES
from dpkit.stages.features import sizes

OLD = {"convnet3": {"width": 4, "image_size": 16}, "resnet10": {"width": 4, "image_size": 16},
       "resnet18": {"width": 4, "image_size": 16}}
SPECS = [ModelSpec(arch=arch, norm=norm, channels=2, classes=4, **size)
         for arch, size in {**OLD, **NEW}.items() for norm in RULES[arch].norms]
every = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.arch}-{s.norm}")
STACKS = [s for s in SPECS if not s.is_resnet and s.arch != "vit"]


# --- plain modules ----------------------------------------------------------------------------------------------------------
def plain_norm(kind: str, channels: int, flat: bool = False) -> nn.Module:
    """PyTorch's module for a norm."""
    if kind == "batch":
        return nn.BatchNorm1d(channels) if flat else nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm({4: 1, 6: 1, 8: 2, 12: 3, 16: 4, 32: 8, 64: 16, 128: 32, 256: 32, 512: 32}[channels], channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


def plain_stack(spec: ModelSpec) -> nn.Module:
    """ConvNets, AlexNet, VGG-16 and the MLP out of nn layers, with our names."""
    w, shape, kind = spec.width, torch.Size((1, spec.channels, spec.image_size, spec.image_size)), spec.norm_kind
    vgg = [w, w, "M", 2 * w, 2 * w, "M", *[4 * w] * 3, "M", *[8 * w] * 3, "M", *[8 * w] * 3]
    plans = {"convnet3": [w, "A"] * 3, "convnet4": [w, "A"] * 4, "vgg16": vgg, "mlp": [3 * w, w],
             "alexnet": [w, "M", 3 * w // 2, "M", 2 * w, 3 * w // 2, 3 * w // 2, "M"]}
    module, i, flat = nn.Sequential(), 0, spec.arch == "mlp"
    into = spec.channels
    if flat:
        module.add_module("flatten", nn.Flatten())
        into *= spec.image_size**2
    for word in plans[spec.arch]:
        if isinstance(word, str):
            module.append(nn.MaxPool2d(2, 2) if word == "M" else nn.AvgPool2d(2, 2))
            continue
        size = 5 if spec.arch == "alexnet" and i < 2 else 3
        layer = nn.Linear(into, word) if flat else nn.Conv2d(into, word, size, stride=1, padding="same")
        module.add_module("linear" * flat + "conv" * (not flat) + str(i), layer)
        module.add_module(f"norm{i}", plain_norm(kind, word, flat))
        module.append(nn.ReLU())
        into, i = word, i + 1
    if spec.arch == "vgg16":
        module.append(nn.AdaptiveAvgPool2d(1))
    module.append(nn.Flatten())
    module.eval()
    into = module(torch.zeros(shape)).shape[1]
    module.add_module("classifier", nn.Linear(into, spec.classes))
    return module


def plain_resnet_of(spec: ModelSpec) -> nn.Module:
    """torchvision's ResNet with a CIFAR stem and the norm asked for; ResNet-20 without its last stage."""
    load()
    from torchvision.models.resnet import BasicBlock, ResNet
    depths = {"resnet10": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet20": [3, 3, 3, 1]}[spec.arch]
    module = ResNet(BasicBlock, depths, norm_layer=functools.partial(plain_norm, spec.norm_kind))
    module.conv1, module.maxpool = nn.Conv2d(spec.channels, 64, 3, padding=1, bias=False), nn.Identity()
    if spec.arch == "resnet20":
        module.layer4 = nn.Identity()
    module.fc = nn.Linear(256 if spec.arch == "resnet20" else 512, spec.classes)
    return module


class PlainViT(nn.Module):
    """PyTorch's own encoder layers on patches, tokens averaged."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        patch = spec.image_size // 8
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(spec.channels, spec.width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, 64, spec.width))
        # an activation that it does not know keeps the layer from its fused form
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(
            spec.width, vit.heads(spec.width), 4 * spec.width, dropout=0.0, activation=lambda x: F.gelu(x), batch_first=True,
            norm_first=True) for _ in range(6)])
        self.norm, self.head = nn.LayerNorm(spec.width), nn.Linear(spec.width, spec.classes)
        if spec.norm_kind == "none":
            self.norm = nn.Identity()
            for block in self.blocks:
                block.norm1, block.norm2 = nn.Identity(), nn.Identity()

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


THEIRS = {"attn.qkv.weight": "self_attn.in_proj_weight", "attn.qkv.bias": "self_attn.in_proj_bias",
          "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}


def their_name(name: str) -> str:
    for ours, theirs in THEIRS.items():
        name = name.replace(ours, theirs)
    return name


def plain(spec: ModelSpec) -> nn.Module:
    return plain_resnet_of(spec) if spec.is_resnet else PlainViT(spec) if spec.arch == "vit" else plain_stack(spec)


@every
def test_equals_a_plain_module(spec):
    if spec.is_resnet:
        spec = spec.replace(width=64, image_size=8 if spec.arch == "resnet20" else 16)  # torchvision's width is fixed
    if spec.arch == "vit":
        spec = spec.replace(width=96)  # three heads
    module = plain(spec)
    params, buffers = network(spec)
    missing, unexpected = module.load_state_dict({their_name(n): t for n, t in (params | buffers).items()}, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    x = images(spec, 5)
    with torch.no_grad():
        for train in (False, True, False):
            logits, buffers = models.forward(spec, params, buffers, x, train=train)
            torch.testing.assert_close(logits, module.train(train)(x), rtol=2e-4, atol=2e-4)
            state = module.state_dict()
            for name, tensor in buffers.items():
                torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-4)
        # statistics of these images alone, as a plain module finds them
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = 1.0
        module.train()(x)
        found = models.reestimate(spec, params, buffers, x, chunk=5)
        assert set(found) == set(models.statistics(spec))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_groups_and_heads():
    expected = {1: 1, 3: 1, 4: 1, 6: 1, 7: 1, 8: 2, 10: 2, 16: 4, 32: 8, 64: 16, 100: 25, 128: 32, 256: 32, 300: 30, 131: 1}
    assert {channels: groups(channels) for channels in expected} == expected
    expected = {1: 1, 8: 1, 48: 1, 64: 2, 96: 3, 100: 2, 192: 6, 256: 8}
    assert {width: vit.heads(width) for width in expected} == expected


# --- counts -----------------------------------------------------------------------------------------------------------------
USUAL = [  # by hand, layer by layer
    ("convnet3", 128, {}, 3 * 1152 + 2 * 128 * 1152 + 20480, 318_848),
    ("convnet4", 128, {}, 3 * 1152 + 3 * 128 * 1152 + 128 * 4 * 10, 450_944),
    ("resnet10", 32, {}, None, 1_226_080),
    ("resnet18", 32, {}, None, 2_792_800),
    ("resnet20", 16, {}, 432 + 6 * 2304 + 4608 + 5 * 9216 + 512 + 18432 + 5 * 36864 + 2048 + 640, 270_896),
    ("alexnet", 128, {}, 9600 + 614400 + 442368 + 442368 + 331776 + 30720, 1_871_232),
    ("vgg16", 64, {}, 9 * (192 + 4096 + 8192 + 16384 + 32768 + 2 * 65536 + 131072 + 5 * 262144) + 5120, 14_715_584),
    ("mlp", 100, {"channels": 1, "image_size": 28}, 784 * 300 + 300 * 100 + 100 * 10, 266_200),
    ("vit", 192, {}, 48 * 192 + 6 * 12 * 192**2 + 1920, 2_665_344),
]


@pytest.mark.parametrize("arch, width, more, by_hand, count", USUAL, ids=[u[0] for u in USUAL])
def test_prunable_counts_at_the_usual_size(arch, width, more, by_hand, count):
    assert models.count_prunable(ModelSpec(arch=arch, width=width, **more)) == (by_hand or count) == count


def test_option_a_shortcuts_would_save_what_the_docstring_says():
    layers = models.layer_work(ModelSpec(arch="resnet20", width=16))
    assert sum(layer.weights for layer in layers if "downsample" in layer.name) == 2560


def test_the_page_lists_every_architecture_with_its_counts():
    page = (Path(__file__).resolve().parents[1] / "book" / "networks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(ARCHITECTURES)
    for (name, row), (width, more) in zip(rows, [next(u[1:3] for u in USUAL if u[0] == a) for a in ARCHITECTURES], strict=True):
        cells = [cell.strip() for cell in row.split("|")]
        assert f"{models.count_prunable(ModelSpec(arch=name, width=width, **more)):,}" == cells[-1]
        assert cells[1].startswith(f"{width}")
        assert re.findall(r"`(\w+)`", cells[2]) == list(RULES[name].norms)


@every
def test_tables_and_sizes_describe_the_tensors(spec):
    params, buffers = models.init(spec, generator())
    table = family(spec).table(spec)
    assert {n: s for layer in table for n, s in layer.shapes().items()} == {n: tuple(t.shape) for n, t in params.items()}
    assert all(isinstance(layer, (Weight, Norm, Embedding)) for layer in table)
    assert sum(isinstance(layer, Embedding) for layer in table) == (spec.arch == "vit")
    net = sizes(spec)
    assert net.parameters == sum(t.numel() for t in params.values())
    assert net.buffers == sum(t.numel() for t in buffers.values())
    assert (net.prunable, net.tensors) == (models.count_prunable(spec), len(params) + len(buffers))
    assert net.activations > 0
    assert [layer.weights for layer in models.layer_work(spec)] == [params[n].numel() for n in models.prunable(spec)]


def test_positions_start_small():
    params, _ = models.init(ModelSpec(arch="vit", width=64), generator())
    assert params["pos_embed"].std() == pytest.approx(0.02, rel=0.05)
    assert params["pos_embed"].abs().max() > 0.04
    assert "pos_embed" not in models.prunable(ModelSpec(arch="vit"))


# --- training and curvature -------------------------------------------------------------------------------------------------
@every
def test_training_steps_move_the_weights_and_keep_masks(spec):
    g = generator(3)
    pixels = torch.randint(0, 256, (12, spec.channels, spec.image_size, spec.image_size), generator=g, dtype=torch.uint8)
    split = Split(pixels, torch.arange(12) % 4)
    plan = training.TrainSpec(epochs=1, batch_size=6, lr=0.01, augment=AugmentSpec(operations=""), cutmix=0)
    starts = [models.init(spec, generator(seed)) for seed in range(2)]
    params, buffers = (tree.stack(list(trees)) for trees in zip(*starts, strict=True))
    masks = {n: torch.rand(params[n].shape, generator=g) > 0.5 for n in models.prunable(spec)}
    half = torch.full((spec.channels,), 0.5)
    together = {form: training.fit(plan, spec, split, half, half / 2, params, buffers, [1, 2], masks=masks, form=form)
                for form in ("solo", "vmap")}
    found = together["solo"]
    assert not found.diverged
    for name, mask in masks.items():
        moved = found.params[name] != params[name]
        assert not found.params[name][~mask].any(), name
        assert bool((moved & mask).any()), name
    for name, tensor in found.params.items():
        torch.testing.assert_close(together["vmap"].params[name], tensor, rtol=1e-3, atol=1e-4)
    error, loss = training.evaluate(spec, *found.network(0), images(spec, 6), torch.arange(6) % 4)
    assert 0 <= error <= 1
    assert 0 < loss < 100


@pytest.mark.parametrize("norm", ["auto", "group"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_training_pass_compiles_as_one_graph(arch, norm):
    if arch == "vit" and norm == "group":
        norm = "none"
    spec = ModelSpec(arch=arch, norm=norm, channels=2, classes=4, **{**OLD, **NEW}[arch])
    torch._dynamo.reset()  # programs of other networks, of which it keeps a few
    params, buffers = network(spec)
    x, targets = images(spec, 4), torch.eye(4)
    function = functools.partial(training.gradient.loss, spec)
    traced = torch.compile(function, backend="eager", fullgraph=True, dynamic=False)  # traces, and generates no code
    torch.testing.assert_close(traced(params, buffers, x, targets)[0], function(params, buffers, x, targets)[0])


PARTS = {  # a few hundred weights of deep networks, from their ends and their middle
    "resnet20": ("conv1.weight", "layer1.2.conv2.weight", "layer2.0.downsample.0.weight", "layer3.0.conv1.weight", "fc.weight"),
    "vgg16": ("conv0.weight", "conv1.weight", "conv3.weight", "conv7.bias", "classifier.weight"),
    "vit": ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.3.attn.proj.weight", "blocks.4.norm2.weight",
            "blocks.5.mlp.fc1.weight", "head.weight")}
TINY = {"convnet4": (3, 16), "resnet20": (2, 8), "alexnet": (2, 8), "vgg16": (2, 16), "mlp": (4, 6), "vit": (4, 8)}


def tiny(arch: str, norm: str) -> ModelSpec:
    width, side = TINY[arch]
    return ModelSpec(arch=arch, norm=norm, width=width, image_size=side, channels=1, classes=4)


problem = functools.partial(hessian_problem, count=6)


@pytest.mark.parametrize("arch, norm", [
    ("convnet4", "instance"), ("convnet4", "group"), ("resnet20", "batch"), ("alexnet", "none"), ("alexnet", "layer"),
    ("vgg16", "batch"), ("mlp", "none"), ("mlp", "batch"), ("vit", "layer")])
def test_hessian_products_equal_the_dense_hessian_and_differences_of_gradients(arch, norm):
    spec, names = tiny(arch, norm), PARTS.get(arch)
    params, buffers, x, y, mask = problem(spec, 0.0 if names else 0.4)
    op = hessian.Operator(spec, params, buffers, x, y, mask, names)
    assert 50 < op.size < 520
    dense = dense_hessian(spec, params, buffers, x, y, mask, op.names)
    for block in dense.diagonal().split(list(op._counts)):
        assert block.abs().max() > 0  # no layer that the loss does not depend on
    vector = torch.randn(op.size, generator=generator(4), dtype=torch.float64)
    expected = dense @ vector
    assert (op.matvec(vector) - expected).norm() <= 1e-9 * expected.norm()

    def gradient(step: float) -> torch.Tensor:
        moved = {n: (params[n] + step * t).requires_grad_() for n, t in op.unflatten(vector).items()}
        logits, _ = models.forward(spec, {**params, **moved}, buffers, x)
        return op.flatten(dict(zip(moved, torch.autograd.grad(F.cross_entropy(logits, y), list(moved.values())), strict=True)))

    difference = (gradient(1e-6) - gradient(-1e-6)) / 2e-6
    assert (difference - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("arch, norm", [("convnet4", "group"), ("alexnet", "none"), ("mlp", "batch"), ("vit", "layer")])
def test_the_traced_program_is_the_product(arch, norm, monkeypatch):
    monkeypatch.setattr(operator, "CompiledProduct", functools.partial(product.CompiledProduct, compiled=False))
    monkeypatch.setattr(operator, "can_compile", lambda: True)
    monkeypatch.setattr(program, "_PROGRAMS", {})
    monkeypatch.setattr(vit, "DEPTH", 2)  # every operation occurs, and tracing takes a third of the time
    given = problem(tiny(arch, norm), 0.4)
    eager = hessian.Operator(tiny(arch, norm), *given)
    traced = hessian.Operator(tiny(arch, norm), *given, chunk=4, compile=True)
    vector = torch.randn(eager.size, generator=generator(4), dtype=torch.float64)
    expected = eager.matvec(vector)
    assert (traced.matvec(vector) - expected).norm() <= 1e-10 * expected.norm()
    assert traced._compiled is not None
