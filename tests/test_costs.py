"""The cost model: what is known of a unit before it runs, and the fit to what the store's units took."""
from __future__ import annotations

import math

import pytest
from small_study import CHAPTERS, plan, units

from dpkit.models import ModelSpec, count_prunable, init
from dpkit.stages import Plan, Study, closure, compute, costs, footprint, forecast
from dpkit.stages import features as feats
from dpkit.stages.costs import Model, Timing, non_negative
from dpkit.store import Store, machine
from dpkit.tree import generator_for

IDENTITY = {"kind": "shapes", "train": 2000, "test": 500, "shape": [3, 32, 32], "classes": 10, "sha256": "0" * 64}
SMALL = {"epochs": 2, "rounds": 1, "at_rounds": (1,), "seeds": 1, "evaluation_seeds": 1, "rewind_epochs": 0.5}


def study(**changes):
    return Plan(Study(**(SMALL | changes)), IDENTITY)


def everything(made):
    return closure(e.unit for c in ("data", "distillation", "tickets", "connectivity", "landscape", "hessian")
                   for e in made.chapter(c))


def described(unit):
    return feats.features(unit.stage, unit.spec, {role: p.spec for role, p in unit.parents.items()})


def truth(found):
    """A machine that differs from the table: slower steps, faster arithmetic."""
    shipped = costs.table(found.kind)
    factor = {"step": 3.0, "gflop": 0.5, "gbyte": 1.5}
    return sum(value * factor.get(name, 1.0) * found.amounts.get(name, 0.0) for name, value in shipped.items())


def fill(store, made, seconds=truth, **changes):
    """Artifacts of a plan's units, one of each sort and its ancestors, that say that they took so long, with nothing in them."""
    distinct = {str(described(unit)): unit for unit in everything(made).values()}
    for key, unit in closure(distinct.values()).items():
        took = seconds(described(unit))
        meta = {"device": "cpu", "cpu_seconds": took} | changes
        store.put(key, stage=unit.stage, version=unit.version, spec=unit.spec, tensors={}, result={}, seconds=2 * took,
                  parents={role: p.key for role, p in unit.parents.items()}, extra=meta)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# --- what is known before -----------------------------------------------------------------------------------------------

def test_a_networks_work_is_counted_from_its_specification():
    made = study(width=16, batch_size=64)
    net = feats.sizes(ModelSpec(width=16))
    amounts = described(made.dense(0, "child")).amounts
    assert amounts["step"] == 2 * 32  # 2,000 images in batches of 64
    assert amounts["gflop"] == pytest.approx(3 * net.flops * 4000 / 1e9)
    assert amounts["augmented step"] == amounts["augmented mpixel"] == 0
    twice = described(study(width=16, epochs=4).dense(0, "child")).amounts
    assert twice["gflop"] == 2 * amounts["gflop"]
    rewound = described(made.child("ltr", 0, 1, 0)).amounts
    assert rewound["step"] == amounts["step"] - made.rewind_step
    small = described(made.distillation()[0].unit).amounts  # IDC: 10 images of 10 classes, each decoded into four
    assert small["step"] == made.study.set_epochs * math.ceil(400 / 64)
    assert small["augmented step"] == small["step"]
    assert described(study(width=24).dense(0, "child")).amounts["gflop"] == pytest.approx(
        described(study(width=32).dense(0, "child")).amounts["gflop"])  # channels go sixteen at a time


def test_kinds_tell_apart_what_runs_at_another_speed():
    found = {described(u).kind for u in everything(study(precision="bf16", compile=True, distill_precision="bf16")).values()}
    assert {"network/bf16+compile", "idc/bf16", "choose", "ticket"} <= found
    compiled = described(study(precision="bf16", compile=True, batch_size=64).dense(0, "child")).compiled
    assert len(compiled) == 2  # whole batches, and the last one of 16 images
    assert described(study().dense(0, "child")).compiled == ()
    assert feats.features("number", {}, {}) is None


@pytest.mark.parametrize("arch", ["convnet3", "resnet10", "resnet18"])
def test_sizes_are_those_of_the_network(arch):
    model = ModelSpec(arch=arch, width=8)
    params, buffers = init(model, generator_for(0, "x"))
    net = feats.sizes(model)
    assert net.parameters == sum(t.numel() for t in params.values())
    assert net.buffers == sum(t.numel() for t in buffers.values())
    assert (net.prunable, net.tensors) == (count_prunable(model), len(params) + len(buffers))


def test_disk_is_predicted_to_a_block_or_two(store):
    made = plan()
    wanted = [*units(made, *CHAPTERS)]
    compute(store, wanted, device="cpu")
    for key, unit in closure(wanted).items():
        files = list(store.path(key).iterdir())
        blocks = sum(-(-f.stat().st_size // footprint.BLOCK) for f in files) + 1
        expected = footprint.disk(unit.stage, unit.spec, {r: p.spec for r, p in unit.parents.items()}) / footprint.BLOCK
        assert abs(blocks - expected) <= 2, unit.label


def test_memory_grows_with_batch_width_and_population():
    def of(**changes):
        unit = study(**changes).dense(0, "child")
        return footprint.memory(unit.stage, unit.spec, {})

    assert footprint.BASE_MEMORY < of(width=8) < of(width=64) < of(width=64, batch_size=1024)
    unit = study(width=64).dense(0, "child")
    assert footprint.memory(unit.stage, unit.spec, {}, 16) > 1.2 * footprint.memory(unit.stage, unit.spec, {})
    # in turn: more weights, and the activations of one network
    in_turn = footprint.memory(unit.stage, unit.spec, {}, 16, in_turn=True)
    assert footprint.memory(unit.stage, unit.spec, {}) < in_turn < footprint.memory(unit.stage, unit.spec, {}, 16)


# --- the fit ------------------------------------------------------------------------------------------------------------

def test_least_squares_are_non_negative_and_least():
    rows = [[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]
    assert non_negative(rows, [5.0, 4.0, 3.0]) == pytest.approx([1.0, 2.0], abs=1e-6)
    rows, values = [[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], [3.0, 2.0, 1.0]  # a line that falls
    assert non_negative(rows, values) == pytest.approx([2.0, 0.0], abs=1e-6)


def test_without_timings_the_table_is_the_model_and_says_so(store):
    unit = study().dense(0, "child")
    expected = Model.of(store).unit(unit)
    assert expected.seconds == pytest.approx(unit.cost)
    assert expected.error > costs.KNOWN
    assert forecast.of(store, {unit.key: unit}).guessed
    assert Model.of(store).error("network/fp32") < Model(other=True).error("network/fp32")


def test_one_long_timing_sets_the_pace_of_everything_and_a_short_one_hardly():
    network, path = (described(u) for u in (study(width=64).dense(0, "child"), study().connectivity()[0].unit))
    usual = costs._dot(costs.table(network.kind), network.amounts)
    assert usual > 1
    model = Model([Timing(network, 3 * usual)])
    assert 2.4 < model.pace < 3
    assert model.expected(network).seconds == pytest.approx(3 * usual, rel=0.03)
    assert model.expected(path).seconds == pytest.approx(model.pace * Model().expected(path).seconds)
    brief = described(study(width=4, train_images=100).dense(0, "child"))
    brief = feats.Features(brief.kind, {name: value / 100 for name, value in brief.amounts.items()})
    assert 1 < Model([Timing(brief, 3 * costs._dot(costs.table(brief.kind), brief.amounts))]).pace < 1.5


def test_a_store_predicts_settings_that_it_has_not_seen(store):
    for changes in ({"width": 8}, {"width": 32, "batch_size": 32}, {"width": 16, "epochs": 5}, {"width": 64, "epochs": 1},
                    {"width": 16, "distill_inner": 3, "ipc": 2, "points": 5, "hessian_images": 100, "plane_resolution": 5}):
        fill(store, study(**changes))
    model = Model.of(store)
    unseen = study(width=48, epochs=3, batch_size=50, points=7, hessian_images=200, distill_outer=7)
    before = {True: [], False: []}
    for unit in everything(unseen).values():
        found = described(unit)
        if truth(found) > 0.05:
            before[True].append(abs(math.log(model.expected(found).seconds / truth(found))))
            before[False].append(abs(math.log(Model().expected(found).seconds / truth(found))))
    assert max(before[True]) < 0.25  # what is asked of whole profiles
    assert sum(before[True]) < 0.4 * sum(before[False])
    assert model.error("network/fp32") < 0.25


def test_the_same_timings_give_the_same_model_in_any_order(store):
    fill(store, study(width=8))
    fill(store, study(width=32))
    found = Model.of(store).found
    assert Model(found).coefficients == Model(found[::-1]).coefficients


def test_only_timings_of_this_machine_and_device_count(store, monkeypatch):
    fill(store, study(width=8))
    assert Model.of(store).found
    assert Model.of(store, "cuda").found == []
    monkeypatch.setattr(costs, "machine", lambda: machine() | {"processor": "another"})
    assert Model.of(store).found == []


def test_processor_seconds_count_and_compiling_is_counted_apart(store):
    made = study(precision="bf16", compile=True)
    fill(store, made, first=False)
    network = described(made.dense(0, "child"))
    later = [t for t in Model.of(store).found if t.features.kind == network.kind]
    assert later[0].seconds == pytest.approx(truth(later[0].features))
    first = [Timing(t.features, t.seconds + 30 * len(t.features.compiled), first=True) for t in later[:1]]
    model = Model(later + first)
    assert model.compile_seconds == pytest.approx(30, rel=0.05)
    assert model.expected(network).seconds == pytest.approx(truth(network), rel=0.1)


def test_a_damaged_or_foreign_artifact_does_no_harm(store):
    fill(store, study(width=8))
    count = len(Model.of(store).found)
    store.put("ab" * 32, stage="number", version=1, spec={}, parents={}, tensors={}, result={}, seconds=1.0)
    keys = sorted(store.keys())
    (store.path(keys[0]) / "meta.json").write_text("{", encoding="utf-8")
    assert count - 3 <= len(Model.of(store).found) < count + 1


def test_every_kind_of_a_profile_has_a_row_in_the_table():
    for ways in ({}, {"precision": "bf16"}, {"precision": "bf16", "compile": True, "distill_precision": "bf16"}):
        for unit in everything(study(**ways)).values():
            found = described(unit)
            for device in ("cpu", "cuda"):
                row = costs.table(found.kind, device)
                assert row
                assert set(row) <= set(found.amounts) | {"compiled"}
            assert unit.cost == pytest.approx(max(1e-3, costs._dot(costs.table(found.kind), found.amounts)))
    assert costs.table("unknown") is None
