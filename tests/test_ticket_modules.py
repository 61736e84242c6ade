"""Tickets on modules that are not ours: they compute and train as the functions do, and what does not fit is refused whole."""
from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from test_ticket_files import MODEL, line, ticket
from torch import nn
from torch.nn.utils import prune as torch_prune

from dpkit import models, prune, tree
from dpkit.prune import Ticket, files
from dpkit.prune.modules import attach, revived, strip

torch.set_num_threads(1)

BATCH = MODEL.replace(norm="batch")
X = torch.randn(12, 3, 8, 8, generator=tree.generator_for(0, "images"))
Y = torch.arange(12) % 3


class Plain(nn.Module):
    """ConvNet-3 of width 4 as a plain module with the names of dpkit.models."""

    def __init__(self, batch: bool = False):
        super().__init__()
        for i, into in enumerate((3, 4, 4)):
            self.add_module(f"conv{i}", nn.Conv2d(into, 4, 3, padding=1))
            self.add_module(f"norm{i}", nn.BatchNorm2d(4) if batch else nn.GroupNorm(4, 4))
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        for i in range(3):
            x = F.avg_pool2d(F.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))), 2)
        return self.classifier(x.flatten(1))


def sequential() -> nn.Sequential:
    """The same network with other names: 0.weight, 1.weight, 4.weight, ..."""
    layers = [layer for into in (3, 4, 4) for layer in (nn.Conv2d(into, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(),
                                                        nn.AvgPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))


RENAMED = {"conv0": "0", "norm0": "1", "conv1": "4", "norm1": "5", "conv2": "8", "norm2": "9", "classifier": "13"}


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def logits(found: Ticket, model=MODEL) -> torch.Tensor:
    return models.forward(model, prune.apply(found.params, found.mask), found.buffers, X)[0]


def steps(module: nn.Module, optimiser: torch.optim.Optimizer, count: int = 4) -> None:
    for _ in range(count):
        optimiser.zero_grad()
        F.cross_entropy(module(X), Y).backward()
        optimiser.step()


# --- what it computes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["prune", "bake"])
@pytest.mark.parametrize("model", [MODEL, BATCH], ids=["instance", "batch"])
def test_a_module_computes_what_the_ticket_does(tmp_path, model, how):
    found = ticket(model)
    if model == BATCH:
        found.buffers["norm1.running_mean"] += 0.3
    for source in (found, files.load(files.save(tmp_path / "t", found, model)[0]), tmp_path / "t.safetensors"):
        module = Plain(batch=model == BATCH).eval()
        assert set(attach(module, source, how)) == set(models.prunable(model))
        torch.testing.assert_close(module(X), logits(found, model))
        assert revived(module, source) == 0
        assert torch_prune.is_pruned(module) == (how == "prune")
        assert strip(module) == (tuple(models.prunable(model)) if how == "prune" else ())
        torch.testing.assert_close(module(X), logits(found, model))
        assert state(module).keys() == Plain(batch=model == BATCH).state_dict().keys()
        assert sum(int((p == 0).sum()) for n, p in module.named_parameters() if n in found.mask) == (
            prune.size(found.mask) - prune.surviving(found.mask))


@pytest.mark.parametrize("names", [
    RENAMED, {f"{a}.{end}": f"{b}.{end}" for a, b in RENAMED.items() for end in ("weight", "bias")},
    lambda name: f"{RENAMED[name.split('.')[0]]}.{name.split('.')[1]}"], ids=["layers", "tensors", "function"])
def test_names_may_differ(names):
    found, module = ticket(), sequential()
    assert attach(module, found, names=names)[:2] == ("0.weight", "4.weight")
    torch.testing.assert_close(module(X), logits(found))
    assert revived(module, found, names) == revived(module, found.mask, names) == 0
    other = sequential()
    assert len(attach(other, found.mask, weights=False, names=names)) == 4
    assert revived(other, found, names) == 0


def test_a_layer_may_be_left_out():
    """A ticket on a network with another head: the head keeps its own weights, dense."""
    found, module = ticket(), Plain()
    module.classifier = nn.Linear(4, 7)
    before = module.classifier.weight.detach().clone()
    assert "classifier.weight" not in attach(module, found, names={"classifier": None})
    assert torch.equal(module.classifier.weight, before)
    module.head = nn.Linear(7, 2)
    strip(module)
    with pytest.raises(ValueError, match=r"the module has 'head.weight', 'head.bias', the ticket has not") as error:
        attach(module, found, names={"classifier": None})
    line(error)
    with pytest.raises(ValueError, match=r"the module has 'head.weight', the ticket has not"):
        attach(module, found, names={"classifier": None}, weights=False)
    attach(module, found, names={"classifier": None}, strict=False)


@pytest.mark.parametrize("how", ["prune", "bake"])
def test_the_modules_own_weights_may_stay(how):
    found, module = ticket(), Plain()
    before = state(module)
    for source in (found, Ticket({}, {}, found.mask, 1), found.mask):
        module.load_state_dict(before)
        attach(module, source, how, weights=False)
        strip(module)
        for name, value in state(module).items():
            expected = torch.where(found.mask[name], before[name], 0) if name in found.mask else before[name]
            assert torch.equal(value, expected), name


# --- training ---------------------------------------------------------------------------------------------------------------
def test_training_is_that_of_the_masked_network():
    """Against SGD written out on the functions, with momentum and weight decay; the optimiser may be older than the mask."""
    found, module = ticket(), Plain()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    attach(module, found)
    steps(module, optimiser)
    params = prune.apply(found.params, found.mask)
    momentum = {n: torch.zeros_like(t) for n, t in params.items()}

    def loss(params):
        return F.cross_entropy(models.forward(MODEL, params, {}, X, train=True)[0], Y)

    for _ in range(4):
        for name, g in torch.func.grad(loss)(params).items():
            g = torch.where(found.mask[name], g, 0) if name in found.mask else g
            momentum[name] = 0.9 * momentum[name] + g + 0.01 * params[name]
        params = {n: t - 0.1 * momentum[n] for n, t in params.items()}
    assert revived(module, found) == 0
    strip(module)
    for name, value in module.named_parameters():
        torch.testing.assert_close(value.detach(), params[name], atol=1e-6, rtol=1e-4)
        if name in found.mask:
            assert not value[~found.mask[name]].any()


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)],
                         ids=["adam", "sgd"])
def test_only_the_prune_form_keeps_zeros_in_training(make):
    found, module = ticket(), Plain()
    attach(module, found, "bake")
    steps(module, make(module.parameters()))
    removed = prune.size(found.mask) - prune.surviving(found.mask)
    assert removed >= revived(module, found) > removed // 2
    attach(module, found)  # over what was baked
    steps(module, make(module.parameters()))
    assert revived(module, found) == 0


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)],
                         ids=["adam", "sgd"])
def test_zeroing_after_every_step_trains_the_same_network(make):
    found = ticket()
    held, baked = Plain(), Plain()
    attach(held, found)
    attach(baked, found, "bake")
    first, second = make(held.parameters()), make(baked.parameters())
    for _ in range(5):
        steps(held, first, 1)
        steps(baked, second, 1)
        with torch.no_grad():
            for name, keep in found.mask.items():
                baked.get_parameter(name).masked_fill_(~keep, 0)
    strip(held)
    for name, value in held.named_parameters():
        torch.testing.assert_close(value, baked.get_parameter(name), atol=1e-6, rtol=1e-4)


def test_zeros_are_zeros_even_where_a_product_is_not():
    """Removed weights that are NaN or negative: torch multiplies them with zero, which gives NaN and -0.0."""
    found, module = ticket(), Plain()
    attach(module, found, weights=False)
    removed = ~found.mask["conv1.weight"]
    with torch.no_grad():
        module.conv1.weight_orig[removed] = float("nan")
        module.conv0.weight_orig[~found.mask["conv0.weight"]] = -1.0
    assert revived(module, found) == int(removed.sum())
    strip(module)
    assert revived(module, found) == 0
    assert not torch.signbit(module.conv0.weight[~found.mask["conv0.weight"]]).any()


def test_copies_are_made_before_or_after():
    found, module = ticket(), Plain()
    attach(module, found)
    module(X)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(module)  # as the page says
    strip(module)
    assert same(state(copy.deepcopy(module)), state(module))


def test_strip_leaves_what_is_not_pruned_and_takes_nested_masks():
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    before = state(module)
    assert strip(module) == ()
    assert same(state(module), before)
    torch_prune.l1_unstructured(module[1][0], "weight", 0.5)
    torch_prune.l1_unstructured(module[1][0], "weight", 0.5)  # a second one makes a container of both
    torch_prune.random_unstructured(module[0], "bias", 1)
    assert strip(module) == ("0.bias", "1.0.weight")
    assert int((module[1][0].weight == 0).sum()) == 12
    assert not torch_prune.is_pruned(module)


# --- what does not fit ------------------------------------------------------------------------------------------------------
def wider() -> nn.Module:
    module = Plain()
    module.conv1 = nn.Conv2d(4, 6, 3, padding=1)
    return module


def pruned() -> nn.Module:
    module = Plain()
    torch_prune.l1_unstructured(module.conv1, "weight", 0.5)
    return module


def tied() -> nn.Module:
    module = Plain()
    module.conv2.weight = module.conv1.weight
    return module


MISFITS = {
    "another shape": (wider, {}, "mask of the ticket: conv1.weight is (4, 4, 3, 3), in the module it is (6, 4, 3, 3)"),
    "other names": (sequential, {}, "mask of the ticket: conv0.weight (4, 3, 3, 3) is not in the module, which has '0.weight'"),
    "wrong names": (sequential, {"names": RENAMED | {"conv1": "3"}}, "conv1.weight (there 3.weight) (4, 4, 3, 3) is not"),
    "idle names": (Plain, {"names": {"cnv0": "conv0"}}, "names has 'cnv0', the ticket has 'conv0.weight'"),
    "names twice": (Plain, {"names": {"conv1": "conv2"}}, "names makes conv2.weight of both conv1.weight and conv2.weight"),
    "nothing left": (Plain, {"names": lambda name: None}, "the mask must speak of at least one weight"),
    "more parameters": (lambda: Plain(batch=True), {}, "the module has 'norm0.running_mean', 'norm0.running_var', "),
    "pruned": (pruned, {}, "the module is pruned already (it has conv1.weight_orig); use dpkit.prune.modules.strip"),
    "shared": (tied, {}, "conv1.weight is shared by several layers, and how='prune'"),
    "how": (Plain, {"how": "zero"}, "how must be one of prune, bake; got 'zero'"),
}


@pytest.mark.parametrize("make, options, words", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_changes_nothing(make, options, words):
    module = make()
    before = state(module)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        attach(module, ticket(), **options)
    line(error)
    assert same(state(module), before)


def test_a_mask_alone_has_no_weights_to_load():
    mask = ticket().mask
    for source in (mask, Ticket({}, {}, mask, 1)):
        with pytest.raises(ValueError, match="this one is a mask alone; pass weights=False") as error:
            attach(Plain(), source)
        line(error)
    with pytest.raises(ValueError, match=r"mask of conv0.weight must be bool, got float32") as error:
        attach(Plain(), {n: m.float() for n, m in mask.items()}, weights=False)
    line(error)
    with pytest.raises(ValueError, match=r"conv0.weight .* is not in the module"):
        revived(sequential(), mask)


@pytest.mark.parametrize("make, name", [(lambda: nn.MultiheadAttention(4, 2), "out_proj.weight"),
                                        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), "0.out_proj.weight"),
                                        (lambda: nn.TransformerEncoderLayer(4, 2, 8), "linear1.weight")], ids=range(3))
def test_layers_that_are_never_called_take_no_hooks(make, name):
    """torch's own pruning takes them and then computes with weights that no longer move."""
    module = make()
    before, mask = state(module), {name: torch.rand(module.get_parameter(name).shape) < 0.5}
    with pytest.raises(ValueError, match=rf"{name} is read by \w+ without calling its layer") as error:
        attach(module, mask, weights=False, strict=False)
    line(error)
    assert same(state(module), before)
    attach(module, mask, "bake", weights=False, strict=False)
    assert revived(module, mask) == 0


def test_the_projections_into_attention_are_held():
    module, x = nn.MultiheadAttention(4, 2), torch.randn(5, 1, 4, generator=tree.generator_for(0, "tokens"))
    mask = {"in_proj_weight": torch.rand(12, 4, generator=tree.generator_for(0, "mask")) < 0.5}
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    attach(module, mask, weights=False, strict=False)
    before = module.in_proj_weight_orig.detach().clone()
    for _ in range(3):
        optimiser.zero_grad()
        module(x, x, x)[0].square().sum().backward()
        optimiser.step()
    assert revived(module, mask) == 0
    strip(module)
    assert (module.in_proj_weight != before)[mask["in_proj_weight"]].all()  # the others moved


def test_shared_weights_may_be_baked():
    found, module = ticket(), tied()
    mask = {n: m for n, m in found.mask.items() if n != "conv2.weight"}
    attach(module, mask, "bake", weights=False)
    assert module.conv2.weight is module.conv1.weight
    assert revived(module, mask) == 0
