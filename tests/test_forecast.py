"""Forecasts: the schedule played through, what there is room for, the record of what was predicted and what came."""
from __future__ import annotations

import json
import threading

import pytest
from small_study import plan, units
from test_costs import everything, study

from dpkit.progress import outlook, size, span
from dpkit.stages import Progress, closure, compute, footprint, forecast, missing, run
from dpkit.stages import features as feats
from dpkit.store import Store, machine


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# --- the schedule -------------------------------------------------------------------------------------------------------

def test_the_schedule_is_played_through():
    made = study()
    names = "abcd"
    todo = {n: made.dense(i, "child") for i, n in enumerate(names)}
    todo = {unit.key: unit for unit in todo.values()}
    took = dict(zip(todo, (4.0, 3.0, 2.0, 1.0), strict=True))

    def seconds(workers, **options):
        return forecast.simulate(todo, lambda unit, many: took[unit.key], workers, **options).seconds

    assert [seconds(n) for n in (1, 2, 9)] == [10, 5, 4]
    assert seconds(2, start=3.0, load=0.5) == 3 + 5.5
    compiled = dict.fromkeys(todo, ("one",))
    assert seconds(1, compiled=compiled, compile_seconds=20) == 30
    assert seconds(2, compiled=compiled, compile_seconds=20) == 25
    chain = closure([made.child("imp", 0, 1, 0)])
    assert forecast.simulate(chain, lambda unit, many: 1.0, 4).seconds == len(chain) == 3  # each waits for the one before


def test_workers_take_their_part_of_what_is_alike():
    assert [forecast.at_once(n, 2, 4) for n in (1, 2, 3, 5, 8, 100)] == [1, 1, 2, 3, 4, 4]
    assert [forecast.at_once(n, 1, 16) for n in (1, 5, 100)] == [1, 5, 16]
    ready = [(-float(i), f"{'ab'[i % 2]}{i}") for i in range(9, -1, -1)]  # a heap, the most urgent first
    names = {key: key[0] if key[0] == "a" else None for _, key in ready}
    assert forecast.take(ready, names, 2, 4) == ["b9"]
    assert forecast.take(ready, names, 2, 4) == ["a8", "a6", "a4"]  # three of five: the other worker gets two
    assert forecast.take(ready, names, 2, 4) == ["b7"]
    assert {key for _, key in ready} == {"b5", "b3", "b1", "a2", "a0"}


def test_on_a_processor_networks_of_equal_noise_are_made_together():
    made = study(arms=("imp", "random"), children=2, plane_arms=("dense",), hessian_arms=("dense",), robust_arms=("dense",))
    one, other = (made.child(arm, 0, 1, 0) for arm in ("imp", "random"))
    assert forecast.group_name(one, "cpu") == forecast.group_name(other, "cpu")
    second = made.child("imp", 0, 1, 1)
    assert forecast.group_name(one, "cpu") != forecast.group_name(second, "cpu")
    assert forecast.group_name(one, "cuda:1") == forecast.group_name(second, "cuda:1")
    assert forecast.group_name(made.ticket("imp", 0, 1), "cpu") is None


def test_populations_are_played_through_too():
    made = study(seeds=3, arms=("imp", "random"), children=2, plane_arms=("dense",), hessian_arms=("dense",),
                 robust_arms=("dense",))
    todo = closure(e.unit for e in made.tickets())
    seen = []

    def expected(unit, many):
        seen.append((unit.stage, many))
        return 1 / many

    assert forecast.simulate(todo, expected, 1, device="cuda").seconds == len(todo)
    seen.clear()
    groups = forecast.simulate(todo, expected, 1, device="cuda", population=16)
    assert {many for stage, many in seen if stage != "network"} == {1}
    assert max(many for _, many in seen) >= 6
    assert groups.seconds < len(todo) - 12
    assert sum(groups.costs.values()) == pytest.approx(groups.seconds)
    assert set(groups.costs) == set(groups.sizes) == set(todo)
    on_cpu = forecast.simulate(todo, expected, 2, population=4)
    assert max(on_cpu.sizes.values()) <= 4
    assert on_cpu.seconds < len(todo) / 2


def test_a_population_shares_its_steps_and_not_its_arithmetic(store):
    todo = closure(e.unit for e in study(seeds=4).tickets())
    one, many = (forecast.of(store, todo, device="cuda", population={"cuda": n}) for n in (1, 16))
    assert many.seconds < one.seconds
    found = feats.features("network", study().dense(0, "child").spec, {})
    part = feats.together(found, 4, "cuda")
    assert (4 * part.amounts["step"], part.amounts["gflop"]) == (found.amounts["step"], found.amounts["gflop"])
    augmented = study(augment="flip").dense(0, "child")
    found = feats.features("network", augmented.spec, {})
    part = feats.together(found, 4, "cpu")
    assert 4 * part.amounts["augmented mpixel"] == found.amounts["augmented mpixel"] > 0
    assert part.amounts["step"] == found.amounts["step"]


def test_a_forecast_adds_up(store):
    todo = everything(study())
    one, two = (forecast.of(store, todo, device="cpu", workers=n) for n in (1, 2))
    assert one.units == len(todo)
    assert sum(one.costs.values()) < one.seconds
    assert one.seconds / 2 < two.seconds < one.seconds
    assert two.low < two.seconds < two.high
    assert two.memory > one.memory
    assert two.disk == one.disk == sum(footprint.disk(u.stage, u.spec, {r: p.spec for r, p in u.parents.items()})
                                       for u in todo.values())
    nothing = forecast.of(store, {})
    assert (nothing.seconds, nothing.disk, nothing.units) == (0, 0, 0)


def test_what_there_is_no_room_for_is_said(store, monkeypatch):
    found = forecast.of(store, everything(study()))
    assert forecast.shortages(store, found) == []
    monkeypatch.setattr(forecast, "free_memory", lambda: 1e6)
    monkeypatch.setattr(forecast, "free_disk", lambda folder: 1e3)
    memory, disk = forecast.shortages(store, found)
    assert "of memory and 0.0 GB are free; lower workers" in memory
    assert "DPKIT_STORE" in disk
    assert (forecast.free_memory(), forecast.free_disk(store.root)) == (1e6, 1e3)


# --- the past -----------------------------------------------------------------------------------------------------------

def test_predictions_are_recorded_and_their_errors_shown(store):
    found = forecast.of(store, everything(study()))
    assert forecast.past(store) is None
    for times in (1.0, 1.25, 0.5):
        forecast.record(store, found, found.seconds * times)
    forecast.record(store, found, found.seconds / 2, 0.5, complete=False)  # of what was stopped, the part done
    forecast.record(store, found, 1.0, 0.0)  # nothing was done: nothing to compare
    with open(store.root / forecast.FILE, "a", encoding="utf-8") as handle:
        handle.write('{"expected": 1\n[]\n{"expected": "x", "actual": 2}\n')
    assert [r["complete"] for r in forecast.records(store)] == [True, True, True, False]
    past = forecast.past(store, shortest=0.0)
    assert (past.n, past.median, past.worst) == (4, pytest.approx(0.1, abs=1e-3), pytest.approx(1.0, abs=1e-3))
    assert forecast.past(store, shortest=1e9) is None
    assert forecast.past(store, ["study"], shortest=0.0) is None


def test_lines_of_many_writers_do_not_mix(store):
    found = forecast.of(store, everything(study()))
    writers = [threading.Thread(target=lambda: [forecast.record(store, found, 1.0) for _ in range(25)]) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (store.root / forecast.FILE).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 100 == len([json.loads(line) for line in lines])


def test_a_computation_leaves_a_line_and_one_that_is_stopped_too(store, monkeypatch):
    wanted = units(plan(), "data")
    compute(store, wanted, device="cpu")
    line, = forecast.records(store)
    assert (line["what"], line["units"], line["complete"], line["share"]) == ("compute", 1, True, 1.0)
    assert line["processor"] == machine()["processor"]
    spent = sum(store.get(u.key).meta["cpu_seconds"] for u in wanted)
    assert (line["work"], line["actual"] > 0) == (pytest.approx(spent, abs=1e-3), True)
    assert line["work_expected"] == pytest.approx(sum(u.cost for u in wanted), abs=1e-3)
    compute(store, wanted, device="cpu")  # nothing to make, nothing to learn
    assert len(forecast.records(store)) == 1
    single, made = run.make, []

    def stop(context, group):
        if made:
            raise KeyboardInterrupt
        made.append(group)
        return single(context, group)

    monkeypatch.setattr(run, "make", stop)
    with pytest.raises(KeyboardInterrupt):
        compute(store, units(plan(), "tickets"), device="cpu")
    line = forecast.records(store)[-1]
    assert line["complete"] is False
    assert 0 < line["share"] < 0.5
    total = sum(forecast.of(store, missing(store, units(plan(), "tickets"))).costs.values())
    assert line["expected"] < total


def test_a_store_that_cannot_be_written_does_not_stop_anything(store):
    (store.root / forecast.FILE).mkdir()
    forecast.record(store, forecast.of(store, everything(study())), 1.0)
    assert forecast.records(store) == []
    assert forecast.past(store) is None


# --- time left, and words -----------------------------------------------------------------------------------------------

def progress(work, seconds, expected=100.0):
    return Progress(0, 1, work, 200.0, seconds, (), expected)


def test_time_left_begins_with_the_prediction_and_follows_the_pace():
    assert progress(0, 0).left == pytest.approx(100)
    assert progress(100, 50).left == pytest.approx(50)  # as predicted
    assert 90 < progress(100, 100).left < 100  # twice as slow as predicted: nearly as much again
    assert progress(200, 300).left == 0
    assert progress(0, 100).left > 500
    assert progress(0, 10, None).left is None
    assert progress(100, 10, None).left == 10


@pytest.mark.parametrize("values, words", [
    ((45.2, 30, 61), ("45 s", "30 to 61")), ((0.2, 0.1, 0.4), ("1 s", "1 to 1")), ((300, 240, 420), ("5.0 min", "4.0 to 7.0")),
    ((1200, 900, 1500), ("20 min", "15 to 25")), ((9000, 5400, 14400), ("2.5 h", "1.5 to 4.0"))])
def test_a_span_has_one_unit(values, words):
    assert span(*values) == words


def test_the_line_before_a_computation(store):
    found = forecast.of(store, everything(study()), device="cpu", workers=2)
    text = outlook(found, forecast.Past(5, 0.14, 0.3))
    assert text.startswith(f"about {span(found.seconds, found.low, found.high)[0]} on 2 cores (")
    assert f"{size(found.memory)} of memory, {size(found.disk)} on disk; " in text
    assert "no timings" in text
    assert text.endswith("past predictions were off by 14% (median of 5)")
    assert "past predictions" not in outlook(found, None)
    assert (size(1.23e9), size(4.01e7), size(3e5)) == ("1.2 GB", "40 MB", "0.3 MB")
