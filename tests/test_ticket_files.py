"""Tickets as files: what is written comes back, what was changed is found, and the counts are those of the arithmetic."""
from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dpkit import models, prune, tree
from dpkit.data import _torchvision
from dpkit.models import ModelSpec
from dpkit.prune import Ticket, compact, files, savings

torch.set_num_threads(1)

MODEL = ModelSpec(width=4, image_size=8, classes=3)


def smallest(arch: str) -> ModelSpec:
    """The smallest network of an architecture that its specification takes, of a few sizes."""
    for width in (2, 4, 32):
        for size in (8, 16, 32):
            try:
                return ModelSpec(arch=arch, width=width, image_size=size, classes=3)
            except ValueError:
                continue
    raise AssertionError(f"no small {arch} is allowed")


def ticket(model: ModelSpec = MODEL, share: float = 0.5, seed: int = 0) -> Ticket:
    """A random ticket; removed weights are not yet zero, as nobody has to know that they should be."""
    params, buffers = models.init(model, tree.generator_for(seed, "init"))
    params = {n: t if n in models.prunable(model) else t + 0.1 for n, t in params.items()}
    mask = prune.full(model, params)
    mask = prune.keep_highest(prune.random_scores(mask, tree.generator_for(seed, "mask")), mask,
                              max(1, int(share * prune.size(mask))))
    return Ticket(params, buffers, mask, 7)


def line(error) -> str:
    """The message, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# --- round trip -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_what_is_written_comes_back(tmp_path, arch):
    model, about = smallest(arch), {"arm": "distilled", "seed": 3, "made": {"parents": ["ab", "cd"], "seconds": 0.5}}
    written = ticket(model)
    file, beside = files.save(tmp_path / "deep" / "one", written, model, about)
    assert sorted((tmp_path / "deep").iterdir()) == sorted([file, beside])
    assert (file.name, beside.name) == ("one.safetensors", "one.json")
    found = files.load(file)
    assert (found.model, found.what, found.about, found.ticket.round) == (model, "ticket", about, 7)
    assert list(found.ticket.params) == list(written.params)
    for name, value in written.params.items():
        expected = torch.where(written.mask[name], value, 0) if name in written.mask else value
        assert torch.equal(found.ticket.params[name], expected), name
    assert all(torch.equal(found.ticket.buffers[n], t) for n, t in written.buffers.items())
    assert found.ticket.buffers.keys() == written.buffers.keys()
    assert list(found.mask) == list(models.prunable(model))
    assert all(torch.equal(found.mask[n], m) for n, m in written.mask.items())
    # what comes back can be written again, to the same bytes
    again, _ = files.save(tmp_path / "again.safetensors", found.ticket, found.model, found.about)
    assert again.read_bytes() == file.read_bytes()


def test_others_can_read_it_without_this_library(tmp_path):
    written = ticket()
    file, beside = files.save(tmp_path / "t", written, MODEL, {"note": "für alle"})
    tensors = load_file(file)
    assert {n.split("/")[0] for n in tensors} == {"params", "mask"}  # instance norm keeps no statistics
    assert all((t.dtype == torch.bool) == n.startswith("mask/") for n, t in tensors.items())
    with safe_open(file, framework="pt") as opened:
        inside = opened.metadata()
    said = json.loads(beside.read_text(encoding="utf-8"))
    assert json.loads(inside["ticket"]) == said
    kept = {n: int(m.sum()) for n, m in written.mask.items()}
    assert said["about"] == {"note": "für alle"}
    assert said["model"] == MODEL.to_dict()
    assert (said["kind"], said["format"], said["round"]) == ("dpkit ticket", 1, 7)
    assert (said["surviving"], said["weights"]) == (sum(kept.values()), sum(m.numel() for m in written.mask.values()))
    assert said["sparsity"] == pytest.approx(1 - said["surviving"] / said["weights"])
    assert {at["name"]: at["surviving"] for at in said["layers"]} == kept
    assert [at["shape"] for at in said["layers"]] == [list(m.shape) for m in written.mask.values()]


def test_masks_alone(tmp_path):
    written = ticket(MODEL.replace(norm="batch"))
    file, _ = files.save(tmp_path / "m.safetensors", Ticket({}, {}, written.mask, 2), MODEL.replace(norm="batch"), what="mask")
    assert all(n.startswith("mask/") for n in load_file(file))
    found = files.load(file)
    assert (found.what, found.ticket.params, found.ticket.buffers, found.ticket.round) == ("mask", {}, {}, 2)
    assert all(torch.equal(found.mask[n], m) for n, m in written.mask.items())


def test_a_layer_without_weights_is_said(tmp_path):
    written = ticket()
    written.mask["conv1.weight"][:] = False
    _, beside = files.save(tmp_path / "t", written, MODEL)
    assert json.loads(beside.read_text())["collapsed"] == ["conv1.weight"]


def test_nothing_is_replaced_unasked_and_nothing_half_is_left(tmp_path, monkeypatch):
    file, beside = files.save(tmp_path / "t", ticket(), MODEL)
    before = file.read_bytes(), beside.read_bytes()
    with pytest.raises(ValueError, match=r"t.safetensors exists; choose another path") as error:
        files.save(file, ticket(seed=1), MODEL)
    line(error)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dpkit.files.os.fsync", full)
        with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)") as error:
            files.save(file, ticket(seed=1), MODEL, overwrite=True)
    line(error)
    assert (file.read_bytes(), beside.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == sorted([file, beside])
    with pytest.raises(ValueError, match="path must be a file, got the folder"):
        files.save(tmp_path, ticket(), MODEL, overwrite=True)
    files.save(file, ticket(seed=1), MODEL, overwrite=True)
    assert torch.equal(files.load(file).mask["conv0.weight"], ticket(seed=1).mask["conv0.weight"])


# --- what may not be written -----------------------------------------------------------------------------------------------
def without(ticket_: Ticket, **changes) -> Ticket:
    """A ticket in which tensors are changed (value) or left out (None), by group and name."""
    groups = {"params": dict(ticket_.params), "buffers": dict(ticket_.buffers), "mask": dict(ticket_.mask)}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        name = name.replace("__", ".")
        if value is None:
            del groups[group][name]
        else:
            groups[group][name] = value
    return Ticket(**groups, round=ticket_.round)


@pytest.mark.parametrize("changes, words", [
    ({"mask__conv1__weight": None}, r"mask of this convnet3 must have .*lacks 'conv1.weight'"),
    ({"params__norm0__bias": None, "params__bn0__bias": torch.zeros(4)}, r"params of .*lacks 'norm0.bias' and has 'bn0.bias'"),
    ({"buffers__norm0__running_mean": torch.zeros(4)}, r"buffers of .*has 'norm0.running_mean', which the network has not"),
    ({"mask__conv0__weight": torch.ones(4, 3, 5, 5).bool()}, r"conv0.weight must be \(4, 3, 3, 3\).* got \(4, 3, 5, 5\)"),
    ({"mask__conv0__weight": torch.ones(4, 3, 3, 3)}, "conv0.weight must be bool, got float32"),
    ({"params__conv0__bias": torch.ones(4).bool()}, "conv0.bias must be numbers, got bool"),
    ({"params__conv0__bias": torch.full((4,), float("nan"))}, "conv0.bias must be finite"),
], ids=range(7))
def test_what_is_not_this_network_is_not_written(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        files.save(tmp_path / "t", without(ticket(), **changes), MODEL)
    line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, words", [
    ({"what": "params"}, "what must be one of ticket, mask; got 'params'"),
    ({"about": {"when": {1, 2}}}, "about must hold plain finite values"),
    ({"about": {"loss": float("nan")}}, "about must hold plain finite values"),
], ids=range(3))
def test_options_that_make_no_sense(tmp_path, options, words):
    with pytest.raises(ValueError, match=words) as error:
        files.save(tmp_path / "t", ticket(), MODEL, **options)
    line(error)
    assert not list(tmp_path.iterdir())


# --- what is not read -------------------------------------------------------------------------------------------------------
def edited(file, change):
    """Write the file again with its tensors and its description changed by ``change(tensors, description)``."""
    with safe_open(file, framework="pt") as opened:
        text = json.loads(opened.metadata()["ticket"])
    tensors = load_file(file)
    change(tensors, text)
    save_file(tensors, file, {"ticket": json.dumps(text)})


def flip(tensors, text):
    kept = tensors["mask/conv1.weight"].view(-1)
    on, off = int(kept.nonzero()[0]), int((~kept).nonzero()[0])  # as many as before
    kept[on], kept[off] = False, True
    tensors["params/conv1.weight"].view(-1)[on] = 0


DAMAGE = {
    "a newer format": (lambda t, d: d.update(format=2), "is of format 2, this dpkit reads formats up to 1"),
    "something else": (lambda t, d: d.update(kind="adapter"), "is no ticket"),
    "no format": (lambda t, d: d.pop("format"), "is no ticket"),
    "no round": (lambda t, d: d.pop("round"), "has no valid 'round' \\(got null\\)"),
    "another content": (lambda t, d: d.update(what="weights"), "has no valid 'what'"),
    "a later network": (lambda t, d: d["model"].update(depth=9), "network that this version cannot build .*depth"),
    "an unknown network": (lambda t, d: d["model"].update(arch="lenet9"), "network that this version cannot build .*lenet9"),
    "another width": (lambda t, d: d["model"].update(width=5), r"must be \(5, 3, 3, 3\) as in the network, got \(4, 3, 3, 3\)"),
    "a tensor less": (lambda t, d: t.pop("params/norm2.weight"), "lacks 'norm2.weight'"),
    "a tensor more": (lambda t, d: t.update({"mask/conv9.weight": torch.ones(2).bool()}), "has 'conv9.weight', which"),
    "a strange tensor": (lambda t, d: t.update(momentum=torch.ones(2)), "must hold mask/NAME, params/NAME, buffers/NAME"),
    "a mask of numbers": (lambda t, d: t.update({"mask/conv0.weight": t["mask/conv0.weight"] + 0.0}), "must be bool"),
    "not finite": (lambda t, d: t["params/conv0.bias"].fill_(float("inf")), "conv0.bias must be finite"),
    "another mask": (lambda t, d: t["mask/conv0.weight"].fill_(True), "surviving of conv0.weight is .* in its masks"),
    "another count": (lambda t, d: d.update(surviving=5), "surviving is 5 in its description, but"),
    "another sparsity": (lambda t, d: d.update(sparsity=0.25), "sparsity is 0.25 in its description, but"),
    "removed weights": (lambda t, d: t["params/conv2.weight"].fill_(0.5), "removed weights must be zero, but conv2.weight has"),
    "a moved weight": (flip, "its values are not those that were written"),
    "another weight": (lambda t, d: t["params/conv0.bias"].add_(1e-6), "its values are not those that were written"),
    "masks alone": (lambda t, d: d.update(what="mask"), "must hold mask/NAME as a mask, got 'params/"),
}


@pytest.mark.parametrize("change, words", DAMAGE.values(), ids=DAMAGE)
def test_what_was_changed_is_found(tmp_path, change, words):
    file, _ = files.save(tmp_path / "t", ticket(), MODEL)
    edited(file, lambda t, d: None)
    files.load(file)  # writing it again alone is no change
    edited(file, change)
    with pytest.raises(ValueError, match=words) as error:
        files.load(file)
    assert str(file) in line(error)


def test_what_is_no_ticket_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.safetensors does not exist; `dpkit ticket export` writes one") as error:
        files.load(tmp_path / "nowhere.safetensors")
    line(error)
    (tmp_path / "text").write_text("no tensors here")
    file, beside = files.save(tmp_path / "t", ticket(), MODEL)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-50])
    for path in (tmp_path / "text", cut, beside):
        with pytest.raises(ValueError, match="cannot be read as safetensors") as error:
            files.load(path)
        line(error)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors is no ticket \(its metadata has no entry 'ticket'\)") as error:
        files.load(tmp_path / "other.safetensors")
    line(error)


# --- counts ------------------------------------------------------------------------------------------------------------------
def products(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """How many multiply-adds with a weight that is not zero a layer does on one image, by doing them with ones."""
    ones = torch.ones_like(inputs[:1]).double()
    kept = (layer.weight != 0).double()
    if isinstance(layer, nn.Linear):
        return F.linear(ones, kept).sum()
    around = [layer.padding[1]] * 2 + [layer.padding[0]] * 2
    return F.conv2d(F.pad(ones, around, value=1.0), kept, stride=layer.stride).sum()


@pytest.mark.parametrize("stem, size", [("imagenet", 40), ("cifar", 16)])
def test_multiply_adds_are_those_that_a_module_does(stem, size):
    _torchvision.load()
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ModelSpec(arch="resnet18", width=64, stem=stem, image_size=size, classes=3)
    module = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=3)
    if stem == "cifar":
        module.conv1, module.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    mask = {name: torch.rand(module.get_parameter(name).shape, generator=tree.generator_for(1, name)) < 0.3
            for name in models.prunable(model)}
    found = savings.counts(model, mask)
    done = {}
    for name, m in mask.items():
        layer = module.get_submodule(name.removesuffix(".weight"))
        layer.weight.data.copy_(m)
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: done.update({name: int(products(layer, inputs[0]))}))
    with torch.no_grad():
        module.eval()(torch.zeros(1, 3, size, size))
    assert {at.name: at.kept_multiply_adds for at in found.layers} == done
    assert [at.name for at in found.layers] == list(mask)
    full = savings.counts(model, {n: torch.ones_like(m) for n, m in mask.items()})
    assert {at.name: at.multiply_adds for at in found.layers} == {at.name: at.kept_multiply_adds for at in full.layers}
    assert full.kept_flops == full.flops == found.flops == models.forward_work(model).flops
    assert found.kept_flops == 2 * sum(done.values())
    assert (found.weights, found.kept) == (prune.size(mask), prune.surviving(mask))


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_counts_add_up_for_every_architecture(arch):
    model = smallest(arch)
    params, _ = models.init(model, tree.generator_for(0, "init"))
    full = savings.counts(model, prune.full(model, params))
    assert [at.name for at in full.layers] == list(models.prunable(model))
    assert full.weights == full.kept == models.count_prunable(model)
    assert full.kept_flops == full.flops == models.forward_work(model).flops
    assert full.rest >= 0
    assert full.remnant == 1.0 or (full.remnant is None and full.why)


def test_the_remnant_is_what_is_left_without_idle_channels():
    """Channel 0 of conv1 is never read and channels 0 and 1 of conv0 only by it, so 2 of 4 and 3 of 4 channels stay."""
    start = ticket(share=1.0)
    mask = {n: m.clone() for n, m in start.mask.items()}
    mask["conv2.weight"][:, 0] = False
    mask["conv1.weight"][1:, :2] = False
    by_hand = {"conv0.weight": 2 * 3 * 9 * 64, "conv1.weight": 2 * 3 * 9 * 16, "conv2.weight": 3 * 4 * 9 * 4,
               "classifier.weight": 4 * 3}
    dense = {"conv0.weight": 4 * 3 * 9 * 64, "conv1.weight": 4 * 4 * 9 * 16, "conv2.weight": 4 * 4 * 9 * 4,
             "classifier.weight": 4 * 3}
    found = savings.counts(MODEL, mask, start.params, start.buffers)
    assert {at.name: at.multiply_adds for at in found.layers} == dense
    assert found.remnant == pytest.approx(sum(by_hand.values()) / sum(dense.values()))
    assert savings.counts(MODEL, mask).remnant == found.remnant  # nobody reads them, whatever their values are
    # a channel that nothing writes needs to be known as zero: its norm's shift is
    mask["conv2.weight"][2] = False
    zero = {n: torch.zeros_like(t) if n == "norm2.bias" else t for n, t in start.params.items()}
    assert savings.counts(MODEL, mask).remnant == savings.counts(MODEL, mask, start.params, {}).remnant == found.remnant
    assert savings.counts(MODEL, mask, zero, {}).remnant < found.remnant


def test_where_no_channel_can_go_the_reason_is_said(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("the norm mixes channels")

    monkeypatch.setattr(compact, "remnant", refuse)
    found = savings.counts(MODEL, ticket().mask)
    assert (found.remnant, found.why) == (None, "the norm mixes channels")


def test_a_mask_of_another_network_has_no_counts():
    with pytest.raises(ValueError, match=re.escape("mask of this convnet3: conv0.weight must be (8, 3, 3, 3)")) as error:
        savings.counts(MODEL.replace(width=8), ticket().mask)
    line(error)
