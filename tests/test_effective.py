"""Weights on a path from input to output, against reachability that is spread by hand through every architecture."""
from __future__ import annotations

import itertools

import pytest
import torch
from prune_networks import drawn, flat, random_mask, same, small

from dpkit import models, prune, tree
from dpkit.models import ModelSpec, convnet, resnet, vit


class Graph:
    """Reachability over explicit nodes: every number of every activation. Layers add edges; nothing is differentiated."""

    def __init__(self, mask):
        self.mask = mask
        self.edges: list[tuple[str | None, tuple | None, torch.Tensor, torch.Tensor]] = []
        self.count = 0

    def nodes(self, *shape):
        """New nodes, numbered, in this shape."""
        found = torch.arange(self.count, self.count + torch.Size(shape).numel()).reshape(shape)
        self.count += found.numel()
        return found

    def connect(self, source, target, name=None, index=None):
        """Edges from each of ``source`` to each of ``target`` (equal shapes), through one weight, or free ones."""
        self.edges.append((name, index, source.reshape(-1), target.reshape(-1)))

    def convolution(self, name, x, stride, padding):
        kept = self.mask[name]
        kernel = kept.shape[2]
        _, height, width = x.shape
        out = self.nodes(len(kept), *((side + 2 * padding - kernel) // stride + 1 for side in (height, width)))
        for o, i, u, v in kept.nonzero().tolist():
            places = [(y, z, y * stride + u - padding, z * stride + v - padding)
                      for y, z in itertools.product(range(out.shape[1]), range(out.shape[2]))]
            places = [p for p in places if 0 <= p[2] < height and 0 <= p[3] < width]
            source = torch.tensor([int(x[i, a, b]) for _, _, a, b in places], dtype=torch.long)
            target = torch.tensor([int(out[o, y, z]) for y, z, _, _ in places], dtype=torch.long)
            self.connect(source, target, name, (o, i, u, v))
        return out

    def linear(self, name, x):
        """x: (..., features), the same weights for each of the leading places."""
        out = self.nodes(*x.shape[:-1], len(self.mask[name]))
        for o, i in self.mask[name].nonzero().tolist():
            self.connect(x[..., i], out[..., o], name, (o, i))
        return out

    def pool(self, x, kernel, stride, padding=0):
        channels, height, width = x.shape
        out = self.nodes(channels, *((side + 2 * padding - kernel) // stride + 1 for side in (height, width)))
        for y, z, u, v in itertools.product(range(out.shape[1]), range(out.shape[2]), range(kernel), range(kernel)):
            a, b = y * stride + u - padding, z * stride + v - padding
            if 0 <= a < height and 0 <= b < width:
                self.connect(x[:, a, b], out[:, y, z])
        return out

    def add(self, *sources):
        out = self.nodes(*sources[0].shape)
        for source in sources:
            self.connect(source, out)
        return out

    def mean(self, x, kept):
        """Nodes (kept, ) that read all of x (kept, n)."""
        out = self.nodes(kept)
        self.connect(x.reshape(kept, -1), out[:, None].expand(-1, x.numel() // kept))
        return out

    def reached(self, start, pairs=None):
        """The nodes that can be reached from ``start``: edges were added in the order of the computation."""
        found = torch.zeros(self.count, dtype=torch.bool)
        found[start.reshape(-1)] = True
        for source, target in pairs or [(s, t) for _, _, s, t in self.edges]:
            found[target[found[source]]] = True
        return found

    def on_a_path(self, inputs, outputs):
        """The mask of weights with an edge from a node that an input reaches to one that reaches an output."""
        forward = self.reached(inputs)
        backward = self.reached(outputs, [(t, s) for _, _, s, t in reversed(self.edges)])
        found = {n: torch.zeros_like(m) for n, m in self.mask.items()}
        for name, index, source, target in self.edges:
            if name is not None:
                found[name][index] = bool((forward[source] & backward[target]).any())
        return found


def by_hand(model, mask):
    """The effective mask of any architecture, by edges."""
    graph = Graph(mask)
    image = graph.nodes(model.channels, model.image_size, model.image_size)
    if model.arch == "mlp":
        x = image.reshape(-1)
        for name in ("linear0", "linear1"):
            x = graph.linear(f"{name}.weight", x)
    elif model.arch == "vit":
        x = transformer(graph, model, image)
    elif model.is_resnet:
        x = residual(graph, model, image)
    else:
        x = image
        for i, block in enumerate(convnet.plan(model)):
            x = graph.convolution(f"conv{i}.weight", x, 1, block.kernel // 2)
            x = graph.pool(x, 2, 2) if block.pool else x
        x = graph.mean(x, len(x)) if model.arch == "vgg16" else x.reshape(-1)
    logits = graph.linear(f"{models.classifier_name(model)}.weight", x)
    return graph.on_a_path(image, logits)


def residual(graph, model, x):
    if model.stem == "imagenet":
        x = graph.pool(graph.convolution("conv1.weight", x, 2, 3), 3, 2, 1)
    else:
        x = graph.convolution("conv1.weight", x, 1, 1)
    for name, _, _, stride in resnet.blocks(model):
        y = graph.convolution(f"{name}.conv1.weight", x, stride, 1)
        y = graph.convolution(f"{name}.conv2.weight", y, 1, 1)
        shortcut = f"{name}.downsample.0.weight"
        x = graph.add(graph.convolution(shortcut, x, stride, 0) if shortcut in graph.mask else x, y)
    return graph.mean(x, len(x))


def transformer(graph, model, image):
    """Values go everywhere; a query's or key's dimension matters together with its partner and with the values of its head."""
    count, width = vit.heads(model.width), model.width
    x = graph.convolution("patch_embed.proj.weight", image, model.image_size // vit.GRID, 0).reshape(width, -1).T
    for block in (f"blocks.{i}" for i in range(vit.DEPTH)):
        qkv = graph.linear(f"{block}.attn.qkv.weight", x)
        q, k, v = (part.reshape(len(x), count, -1) for part in qkv.split(width, 1))
        stream = graph.reached(image)[x].any(0)
        live_q, live_k, live_v = (graph.mask[f"{block}.attn.qkv.weight"] & stream).any(1).reshape(3, count, -1)
        mixed = graph.nodes(len(x), count, v.shape[2])
        for head in range(count):
            for i in range(v.shape[2]):
                graph.connect(v[:, head, i][:, None].expand(-1, len(x)), mixed[:, head, i][None].expand(len(x), -1))
            met, values = ((live_q & live_k)[head].nonzero().flatten(), live_v[head].nonzero().flatten())
            for i, j in itertools.product(met.tolist(), values.tolist()):
                graph.connect(q[:, head, i], mixed[:, head, j])
                graph.connect(k[:, head, i], mixed[:, head, j])
        x = graph.add(x, graph.linear(f"{block}.attn.proj.weight", mixed.flatten(1)))
        inner = graph.linear(f"{block}.mlp.fc1.weight", x)
        x = graph.add(x, graph.linear(f"{block}.mlp.fc2.weight", inner))
    return graph.mean(x.T, width)


SHARES = {"vit": (0.02, 0.1), "mlp": (0.004, 0.05), "vgg16": (0.01, 0.03)}
CASES = [(small(a), share) for a in models.ARCHITECTURES for share in SHARES.get(a, (0.03, 0.15))]
CASES += [(ModelSpec(arch="resnet10", width=2, image_size=32, stem="imagenet", classes=3), 0.1),
          (ModelSpec(arch="resnet10", width=2, image_size=8, classes=3), 0.2),
          (ModelSpec(arch="vit", width=64, image_size=8, classes=3), 0.008),  # two heads
          (ModelSpec(width=3, image_size=8, classes=3, norm="none"), 0.1)]


@pytest.mark.parametrize("model, share", CASES, ids=lambda v: f"{v.arch}-{v.image_size}" if isinstance(v, ModelSpec) else str(v))
def test_effective_weights_are_those_on_a_path(model, share):
    partial = 0
    for seed in range(2):
        mask = random_mask(model, share, seed)
        found = prune.effective(model, mask)
        assert same(found, by_hand(model, mask))
        assert not (flat(found) & ~flat(mask)).any()
        partial += 0 < prune.surviving(found) < prune.surviving(mask)
    assert partial or share == min(SHARES.get(model.arch, (0.03,)))  # the sparser case may be cut through


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_a_dense_network_loses_taps_that_read_padding_alone(arch):
    model = small(arch)
    full = prune.full(model, drawn(model)[0])
    lost = {n: m for n, m in prune.effective(model, full).items() if not bool(m.all())}
    for m in lost.values():  # at 16 pixels the last maps of some networks are 1 x 1: the centre tap is all they read
        assert m.shape[2:] == (3, 3)
        assert bool(m[:, :, 1, 1].all())
        assert not bool(m[:, :, 0, 0].any())
    assert bool(lost) == (arch == "vgg16")


def test_a_missing_layer_leaves_nothing_but_the_shortcut():
    chain = small("convnet3")
    mask = prune.full(chain, drawn(chain)[0])
    mask["conv1.weight"] = torch.zeros_like(mask["conv1.weight"])
    assert prune.surviving(prune.effective(chain, mask)) == 0
    model = small("resnet18")
    mask = prune.full(model, drawn(model)[0])
    mask["layer1.0.conv2.weight"] = torch.zeros_like(mask["layer1.0.conv2.weight"])
    found = prune.effective(model, mask)
    assert prune.collapsed(found) == ["layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    assert all(torch.equal(found[n], mask[n]) for n in mask if not n.startswith("layer1.0.conv"))


@pytest.mark.parametrize("arch", ["alexnet", "resnet10"])
def test_removing_what_is_on_no_path_changes_only_constants(arch):
    model = small(arch, norm="none")
    params, buffers = drawn(model)
    params = {n: torch.zeros_like(t) if n.endswith("bias") else t for n, t in params.items()}
    mask = random_mask(model, 0.05)
    found = prune.effective(model, mask)
    assert prune.surviving(found) < prune.surviving(mask)
    images = torch.randn(4, 3, 16, 16, generator=tree.generator_for(0, "x"))
    with_all, without = (models.forward(model, prune.apply(params, m), buffers, images)[0] for m in (mask, found))
    assert with_all.abs().max() > 0
    torch.testing.assert_close(with_all, without, rtol=1e-5, atol=1e-12)


def test_masks_of_other_networks_are_refused():
    model = small("convnet3")
    mask = random_mask(model, 0.5)
    with pytest.raises(ValueError, match=r"mask must cover the prunable weights of convnet3, but it lacks 'conv2.weight'; use a"):
        prune.effective(model, {n: m for n, m in mask.items() if n != "conv2.weight"})
