"""A network that diverges, a unit with an error, a device that is not there: seen, kept, and the rest goes on."""
from __future__ import annotations

import pytest
import torch
from small_study import contents, plan, same, units

from dpkit import prune
from dpkit.stages import choose_device, closure, compute, run
from dpkit.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def here(monkeypatch):
    """Compute in this process however much there is."""
    monkeypatch.setattr(run, "SMALL", float("inf"))


# --- when something goes wrong ---
def test_a_network_that_diverges_is_kept_and_the_rest_goes_on(store, here):
    made = plan(lr=1e9)  # on real data alone; small sets have a rate of their own
    report = compute(store, units(made), device="cpu")
    assert report.errors == {}
    assert sorted(report.made) == sorted(closure(units(made)))
    dense = store.get(made.dense(0, "search").key)
    assert dense.failed.startswith("diverged at step ")
    assert dense.tensors == {}
    ticket = store.get(made.ticket("imp", 0, 1).key)
    assert ticket.failed == f"parent network (dense network 0, search): {dense.failed}"
    assert store.get(made.searched("imp", 0, 1).key).failed == f"parent ticket (imp ticket 0, round 1): {ticket.failed}"
    assert report.failed[ticket.key] == ticket.failed
    for entry in made.connectivity():
        assert "diverged at step" in store.get(entry.unit.key).failed
    for good in (made.small_set("idc", 0), made.ticket("random_real", 0, 2), made.ticket("random", 0, 2),
                 made.distillation()[0].unit):
        assert store.get(good.key).failed is None
        assert good.key not in report.failed
    assert compute(store, units(made), device="cpu").made == []  # a failure is a result


def test_an_error_is_reported_tried_again_and_stops_only_what_needs_it(store, here, monkeypatch, tmp_path):
    made = plan()
    wanted = [*units(made, "data"), *units(made, "connectivity")]
    broken = made.ticket("imp", 0, 1)

    def fail(*_, **__):
        raise ArithmeticError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(prune, "next_ticket", fail)
        report = compute(store, wanted, device="cpu")
    assert report.errors[broken.key].endswith("ArithmeticError: no such luck")
    assert report.failed == {}
    kept = store.root / "errors" / f"{broken.key}.txt"
    assert "imp ticket 0, round 1" in kept.read_text()
    assert not store.has(broken.key)
    assert not store.has(made.searched("imp", 0, 1).key)
    assert store.has(made.ticket("random", 0, 2).key)
    assert store.has(made.connectivity()[0].unit.key)
    again = compute(store, wanted, device="cpu")
    assert again.errors == {}
    assert not kept.exists()
    straight = Store(tmp_path / "straight")
    compute(straight, wanted, device="cpu")
    assert same(contents(store), contents(straight))


@pytest.mark.parametrize("device", ["gpu", "tpu", "", "cuda:x" if not torch.cuda.is_available() else "mps"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda"):
        choose_device(device)


def test_auto_takes_a_gpu_where_there_is_one():
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == "cpu"
