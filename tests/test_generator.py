"""A small set of a diffusion model's samples."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny import MEAN, MODEL, STD, coloured

from dpkit import tree
from dpkit.data import Split
from dpkit.distill.interface import Task

g = importlib.import_module("dpkit.distill.generator")  # the package gives the function of this name

SPEC = g.GeneratorSpec(ipc=2, steps=6, batch=8, lr=2e-3, width=8, levels=2, timesteps=50, sample_steps=5, ema=0.9)
TASK = Task(real=coloured(), mean=MEAN, std=STD, model=MODEL, seed=100)


@pytest.fixture
def every(monkeypatch):
    """A checkpoint after every other step."""
    monkeypatch.setattr(g, "EVERY", 2)


def made_with_states(spec, task):
    states = []
    return g.generator(spec, replace(task, checkpoint=states.append)), states


# --- what comes out ---
def test_the_set_has_its_budget_and_range():
    calls = []
    made = g.generator(SPEC, replace(TASK, progress=lambda step, steps: calls.append((step, steps))))
    assert made.split.images.shape == (6, 3, 8, 8)
    assert made.split.images.dtype == torch.float32
    assert made.split.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert 0 <= float(made.split.images.min()) <= float(made.split.images.max()) <= 1
    assert len(made.history) == 6
    assert calls == [(step, 6) for step in range(1, 7)]


def test_training_teaches_the_colour_of_each_class():
    real = Split(torch.full((30, 3, 8, 8), 0.1), torch.arange(30) % 3)
    real.images[torch.arange(30), real.labels] = 0.9
    spec = SPEC.replace(steps=150, batch=16, lr=5e-3, ipc=4, sample_steps=10)
    made = g.generator(spec, replace(TASK, real=real))
    assert sum(made.history[-20:]) < 0.3 * sum(made.history[:20])
    means = made.split.images.mean((2, 3))
    assert torch.equal(means.argmax(1), made.split.labels)
    untrained = g.generator(spec.replace(steps=1), replace(TASK, real=real)).split.images
    expected = real.images[made.split.labels]
    assert float((made.split.images - expected).abs().mean()) < 0.5 * float((untrained - expected).abs().mean())


def test_pixels_are_scaled_to_the_signed_unit_interval():
    bytes_ = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert g._signed(bytes_).flatten().tolist() == [-1, 1]
    assert g._signed(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1, 0, 1]


def test_sampling_follows_the_predicted_velocity():
    # a network that knows the one clean image x: v = alpha e - sigma x, with e from x_t = alpha x + sigma e
    clean, schedule = torch.full((1, 3, 8, 8), 0.5), g._schedule(g._diffusers(), SPEC)

    class Knows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, noisy, times, class_labels, return_dict):
            alpha = schedule.alphas_cumprod[times].sqrt().view(-1, 1, 1, 1)
            sigma = (1 - schedule.alphas_cumprod[times]).sqrt().view(-1, 1, 1, 1)
            return (alpha * (noisy - alpha * clean) / sigma - sigma * clean,)

    found = g._sample(SPEC, TASK, Knows(), schedule)
    torch.testing.assert_close(found.images, torch.full((6, 3, 8, 8), 0.75), atol=1e-4, rtol=0)


# --- the same run again ---
def test_everything_follows_from_the_seed_and_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = g.generator(SPEC, TASK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = g.generator(SPEC, TASK), g.generator(SPEC, replace(TASK, seed=101))
    assert torch.equal(again.split.images, first.split.images)
    assert again.history == first.history
    assert not torch.equal(other.split.images, first.split.images)


def test_initial_weights_follow_from_the_seed():
    a, b, c = (g.network(SPEC, replace(TASK, seed=s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["conv_in.weight"], c["conv_in.weight"])


def test_a_resumed_run_equals_a_straight_one(every):
    straight, states = made_with_states(SPEC, TASK)
    assert [len(state["history"]) for state in states] == [2, 4, 6]
    for state in states:
        resumed, rest = made_with_states(SPEC, replace(TASK, resume=state))
        assert torch.equal(resumed.split.images, straight.split.images)
        assert resumed.history == straight.history
        for found, expected in zip(rest, states[len(states) - len(rest):], strict=True):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoints_do_not_change_afterwards(every):
    copies = []
    _, states = made_with_states(SPEC, replace(TASK, checkpoint=None))
    g.generator(SPEC, replace(TASK, checkpoint=lambda s: (states.append(s), copies.append(tree.detach(dict(s))))))
    assert all(torch.equal(s[n], c[n]) for s, c in zip(states[-3:], copies, strict=True) for n in c)


def test_less_memory_changes_only_the_rounding():
    whole = g.generator(SPEC, TASK)
    pieces = g.generator(SPEC, replace(TASK, held=3 * g.SHARE))
    torch.testing.assert_close(torch.tensor(pieces.history), torch.tensor(whole.history), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"^generator needs the activations of .* lower width$"):
        g.generator(SPEC, replace(TASK, held=0.5))


def test_bfloat16_gives_nearly_the_same_losses():
    a, b = g.generator(SPEC, TASK), g.generator(SPEC.replace(precision="bf16"), TASK)
    assert b.split.images.dtype == torch.float32
    assert a.history != b.history
    torch.testing.assert_close(torch.tensor(a.history), torch.tensor(b.history), atol=0.05, rtol=0.05)


# --- what is refused ---
@pytest.mark.parametrize("change, line", [
    ({"steps": 0}, "steps must be >= 1, got 0"),
    ({"lr": -1.0}, "lr must be > 0, got -1"),
    ({"width": 12}, "width must be a multiple of 8, got 12"),
    ({"sample_steps": 51}, "sample_steps must be at most timesteps, 50; got 51"),
    ({"ema": 1.0}, r"ema must lie in [0, 1), got 1"),
    ({"precision": "fp16"}, "precision must be one of fp32, bf16; got 'fp16'"),
    ({"ipc": 0}, "ipc must be >= 1, got 0"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_settings_that_make_no_sense_are_refused_in_one_line(change, line):
    with pytest.raises(ValueError) as error:
        SPEC.replace(**change)
    assert str(error.value) == line


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^the images' side must be a multiple of 16 for levels 5, got 8; lower levels$"):
        g.generator(SPEC.replace(levels=5), TASK)


def test_a_class_without_images_is_refused():
    with pytest.raises(ValueError, match=r"^the generator learns from images of every class, class 3 has none$"):
        g.generator(SPEC, replace(TASK, model=MODEL.replace(classes=4)))


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="the weights are not finite after step 6; lower lr"):
        g.generator(SPEC.replace(lr=1e30), TASK)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"^method generator needs the package diffusers; `pip install diffusers`$"):
        g.generator(SPEC, TASK)


def test_the_library_is_imported_late_and_writes_nothing(tmp_path):
    program = ("import sys, importlib; g = importlib.import_module('dpkit.distill.generator');"
               "assert 'diffusers' not in sys.modules; g._diffusers()")
    found = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", program], env={"HOME": str(tmp_path)},
                           capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
