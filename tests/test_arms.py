"""Arms by name: what each one searches with, where its tickets start, and which units follow."""
from __future__ import annotations

import pytest
import torch
from small_study import plan, units

from dpkit import prune
from dpkit.stages import ARMS, CONTROLS, SUFFIXES, Context, Study, closure, compute
from dpkit.stages.arms import arm_of

SETS = ("idc", "dm", "herding", "idc_soft")
EVERY = (*ARMS, "dm", "herding", "imp_weights", "distilled_norm_only", "imp_shuffled", "distilled_reinit", "ltr_signs",
         "distilled_weights_shuffled", "combined_shuffled", "combined_weights")
WIDE = {"arms": EVERY, "combined_round": 1, "large_batch": 64, "early_epochs": 1, "score_per_class": 2, "snapshots": (3,),
        "robust_arms": ("dense", "snip")}


# --- names ---
@pytest.mark.parametrize("name, told", [
    ("imp", {"source": "real", "once": False, "early": False}), ("ltr", {"early": True, "step": None}),
    ("distilled", {"source": "idc"}), ("dm", {"source": "dm", "score": "magnitude"}), ("idc_soft", {"source": "idc_soft"}),
    ("distilled_pretrained", {"source": "idc", "early": True, "pretrained": True}), ("combined", {"before": "distilled"}),
    ("snip", {"source": "none", "score": "snip", "once": True}), ("one_shot", {"source": "real", "once": True}),
    ("imp_weights", {"scope": "weights", "source": "real"}), ("dm_norm_only", {"scope": "norm_only", "source": "dm"}),
    ("imp_shuffled", {"control": "shuffled", "of": "imp"}), ("random_reinit", {"control": "reinit", "of": "random"}),
    ("distilled_weights_signs", {"control": "signs", "of": "distilled_weights", "scope": "weights"}),
    ("ltr_30", {"early": True, "step": 30}), ("ltr_30_shuffled", {"control": "shuffled", "of": "ltr_30", "step": 30}),
])
def test_a_name_says_how_an_arm_searches(name, told):
    found = arm_of(name, SETS, (30,))
    assert {field: getattr(found, field) for field in told} == told
    assert found.title


@pytest.mark.parametrize("name, line", [
    ("rigl", "unknown arm 'rigl'; there are imp, ltr, "), ("imp_", "unknown arm 'imp_'; did you mean imp?"),
    ("mtt", "unknown arm 'mtt'; "),
    ("imp_shuffled_reinit", "unknown arm"), ("imp_reinit_weights", "unknown arm"),
    ("imp_weights_norm_only", "unknown arm"), ("ltr_x", "unknown arm"), ("ltr_030", "unknown arm"),
    ("ltr_31", "arm ltr_31 must rewind to one of the dense run's snapshots (30), got 31; add it to snapshots"),
    ("random_weights", "arm random_weights must have a search that trains"), ("snip_norm_only", "arm snip_norm_only must have"),
])
def test_a_name_that_is_none_is_refused_in_one_line(name, line):
    with pytest.raises(ValueError) as caught:
        arm_of(name, SETS, (30,))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings, line", [
    ({"combined_round": 3, "rounds": 2, "at_rounds": (2,), "arms": ("combined",), "plane_arms": ("dense",),
      "hessian_arms": ("dense",), "robust_arms": ("dense",)}, "combined_round must lie in [1, 2], the rounds; got 3"),
    ({"combined_round": 3, "rounds": 2, "at_rounds": (2,), "arms": ("combined_shuffled",), "plane_arms": ("dense",),
      "hessian_arms": ("dense",), "robust_arms": ("dense",)}, "combined_round must lie in [1, 2], the rounds; got 3"),
    ({"large_batch": 0}, "large_batch must be >= 1, got 0"), ({"early_epochs": 0}, "early_epochs must be >= 1, got 0"),
    ({"score_per_class": 0}, "score_per_class must be >= 1, got 0"), ({"bits": (1,)}, "bits must lie in [2, "),
    ({"corruptions": ("rain",)}, "corruptions must be chosen from"), ({"severities": (6,)}, "severities must lie in [1, 5]"),
    ({"robust_arms": ("snip",)}, "robust_arms must be chosen from dense, "), ({"robust_images": -1}, "robust_images must be"),
    ({"early_bird_sources": ("nothing",)}, "early_bird_sources must be chosen from real, idc, "),
    ({"arch": "mlp", "arms": ("imp_norm_only",), "plane_arms": ("dense",), "hessian_arms": ("dense",), "robust_arms": ("dense",)},
     "arm imp_norm_only keeps norms (scope norm_only), but mlp has none here; use another scope or norm"),
    ({"arch": "vit", "width": 32, "arms": ("synflow",), "plane_arms": ("dense",), "hessian_arms": ("dense",),
      "robust_arms": ("dense",)}, "arm synflow needs a network without attention, got vit; use snip or grasp"),
    ({"arms": ()}, "arms must name at least one, each once; got none"),
    ({"arms": ("imp", "imp")}, "arms must name at least one, each once; got imp, imp"),
    ({"arms": ("imp", "early_stopped"), "early_epochs": 16, "plane_arms": ("dense",), "hessian_arms": ("dense",),
      "robust_arms": ("dense",)}, "early_epochs must be at most epochs (15) for arm early_stopped, got 16"),
    ({"robust_round": 3}, "robust_round must be 0 (the last) or one of at_rounds (2, 5), got 3"),
    ({"allocation": "even"}, "allocation must be one of "), ({"spare": ("middle",)}, "spare must "),
])
def test_a_setting_of_arms_that_makes_no_sense_is_refused(settings, line):
    with pytest.raises(ValueError) as caught:
        Study(**settings)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_snapshot_must_lie_within_the_dense_run():
    with pytest.raises(ValueError, match=r"snapshots must be steps before the end of the dense run, in \[1, 9\]; got \[10\]"):
        plan(snapshots=(10,))  # 160 images in batches of 32, two epochs


# --- units ---
def test_rewinding_to_a_stored_step_costs_no_training():
    made = plan(**WIDE | {"arms": ("imp", "ltr", "ltr_3"), "robust_arms": ("dense",)})
    dense = made.dense(0, "search")
    assert dense.spec["snapshots"] == [2, 3]
    assert made.rewind_step == 2
    assert made.searched("ltr_3", 0, 0) is dense
    late = made.ticket("ltr_3", 0, 1)
    assert late.parents == {"network": dense, "start": dense}
    assert late.spec["rewind_step"] == 3
    assert made.child("ltr_3", 0, 2, 0).spec["first_step"] == 3
    assert made.ticket("ltr", 0, 1).spec["rewind_step"] == 2


def test_combined_takes_distilled_masks_first_and_goes_on_with_real_data():
    made = plan(**WIDE)
    assert made.ticket("combined", 0, 1) is made.ticket("distilled", 0, 1)
    second = made.ticket("combined", 0, 2)
    assert second.parents["previous"] is made.ticket("distilled", 0, 1)
    network = second.parents["network"]
    assert "images" not in network.parents
    assert network.parents["ticket"] is made.ticket("distilled", 0, 1)
    assert [u.parents.get("images") is not None for u in made.searches_of("combined", 0, 2)] == [True, False]


def test_controls_and_scopes_of_combined_are_its_own_in_every_round():
    made = plan(**WIDE)
    for round in (1, 2):
        shuffled = made.ticket("combined_shuffled", 0, round)
        assert shuffled.parents["of"] is made.ticket("combined", 0, round)
        assert shuffled.key != made.ticket("combined", 0, round).key
    assert made.ticket("combined_weights", 0, 1) is made.ticket("distilled_weights", 0, 1)
    second = made.ticket("combined_weights", 0, 2)
    assert second.parents["previous"] is made.ticket("distilled_weights", 0, 1)
    assert second.spec["prune"]["scope"] == "weights"


@pytest.mark.parametrize("settings, line", [
    ({"fraction": 0.999, "rounds": 5, "at_rounds": (5,)}, "fraction 0.999 leaves 0 of "),
    ({"fraction": 0.7, "rounds": 5, "at_rounds": (5,), "spare": ("last",)}, "fraction 0.7 leaves "),
])
def test_pruning_everything_is_refused_before_anything_runs(settings, line):
    with pytest.raises(ValueError) as caught:
        plan(**settings)
    assert str(caught.value).startswith(line)
    assert "take a smaller fraction or fewer rounds" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arms_without_masks_of_their_own_make_no_comparison():
    assert plan(arms=("imp_shuffled",), robust_arms=("dense",), hessian_arms=("dense",)).masks() == []


def test_pretrained_searches_on_the_set_from_the_early_step():
    made = plan(**WIDE)
    first = made.searched("distilled_pretrained", 0, 0)
    assert first.parents["images"] is made.small_set("idc", 0)
    start = first.parents["ticket"]
    assert (start.spec["round"], start.spec["rewind_step"]) == (0, made.rewind_step)
    assert set(start.parents) == {"start"}
    assert made.child("distilled_pretrained", 0, 2, 0).spec["first_step"] == made.rewind_step


def test_searches_on_real_data_differ_in_their_training_alone():
    made = plan(**WIDE)
    usual = made.dense(0, "search").spec["train"]
    large, early = (made.searched(arm, 0, 0).spec["train"] for arm in ("large_batch", "early_stopped"))
    assert large == usual | {"batch_size": 64}
    assert early == usual | {"epochs": 1, "schedule": "constant"}
    assert made.child("large_batch", 0, 2, 0).spec["train"] == usual  # children train as all children do


def test_a_control_is_made_of_its_arms_ticket_and_scopes_search_for_themselves():
    made = plan(**WIDE)
    control = made.ticket("distilled_weights_shuffled", 0, 2)
    assert control.parents == {"of": made.ticket("distilled_weights", 0, 2)}
    assert made.searches_of("distilled_weights_shuffled", 0, 2) == made.searches_of("distilled_weights", 0, 2)
    assert made.searched("distilled_weights", 0, 0) is not made.searched("distilled", 0, 1)
    assert made.ticket("distilled_weights", 0, 1).spec["prune"]["scope"] == "weights"
    assert made.ticket("distilled", 0, 1).spec["prune"] == {"fraction": 0.4, "scope": "all"}
    assert made.ticket("ltr_signs", 0, 2).parents["start"] is made.dense(0, "search")


def test_settings_that_came_later_leave_older_keys_alone():
    assert set(plan().ticket("imp", 0, 1).spec) == {"prune", "model", "round", "init_seed"}
    assert set(plan(allocation="erk").ticket("imp", 0, 1).spec["prune"]) == {"fraction", "scope", "allocation"}


# --- artifacts ---
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from dpkit.store import Store

    store, found = Store(tmp_path_factory.mktemp("arms") / "store"), plan(**WIDE)
    report = compute(store, units(found, "tickets", "masks", "robustness"), workers=1)
    assert not report.errors
    assert not report.failed
    return store, found


def mask_of(made, arm, round=2):
    store, found = made
    return store.get(found.ticket(arm, 0, round).key).group("mask")


def params_of(made, arm, round=2):
    store, found = made
    return store.get(found.ticket(arm, 0, round).key).group("params")


def test_all_arms_have_tickets_of_one_size(made):
    store, found = made
    for arm in EVERY:
        result = store.get(found.ticket(arm, 0, 2).key).result
        assert result["surviving"] == found.counts[2] == prune.surviving(mask_of(made, arm))


def test_controls_change_what_they_say(made):
    imp, shuffled = mask_of(made, "imp"), mask_of(made, "imp_shuffled")
    assert prune.density(imp) == prune.density(shuffled)
    assert any(not torch.equal(imp[n], shuffled[n]) for n in imp)
    start = params_of(made, "synflow")  # initialisation under another mask
    for name, mask in shuffled.items():
        both = mask & (start[name] != 0)
        assert torch.equal(params_of(made, "imp_shuffled")[name][both], start[name][both])
    for control, of in (("distilled_reinit", "distilled"), ("ltr_signs", "ltr")):
        before, after, mask = params_of(made, of), params_of(made, control), mask_of(made, of)
        assert all(torch.equal(mask[n], mask_of(made, control)[n]) for n in mask)
        assert not any(torch.equal(before[n], after[n]) for n in mask)
        assert all(torch.equal(before[n], after[n]) for n in before if n not in mask)
        if control == "ltr_signs":
            assert all(torch.equal(before[n].sign(), after[n].sign()) for n in mask)


def test_scopes_keep_what_they_say(made):
    plain = params_of(made, "distilled")
    weights, norms = params_of(made, "distilled_weights_shuffled"), params_of(made, "distilled_norm_only")
    for name in plain:
        if name in mask_of(made, "distilled"):
            continue
        trained = not torch.equal(weights[name], plain[name])
        assert trained, f"{name} stays as trained in the authors' form"
        assert torch.equal(norms[name], plain[name]) == (not name.startswith("norm"))


def test_one_cut_keeps_the_largest_of_the_dense_network(made):
    store, found = made
    dense = store.get(found.dense(0, "search").key).group("params")
    kept = torch.cat([dense[n][m].abs() for n, m in mask_of(made, "one_shot").items()])
    gone = torch.cat([dense[n][~m].abs() for n, m in mask_of(made, "one_shot").items()])
    assert float(kept.min()) >= float(gone.max())


def test_masks_are_compared_over_all_arms(made):
    store, found = made
    entry, = found.masks()
    artifact = store.get(entry.unit.key)
    arms, both = artifact.result["arms"], artifact.tensors["both"]
    assert arms == [arm for arm in EVERY if not found.study.arm(arm).control]
    a, b = mask_of(made, "imp"), mask_of(made, "snip")
    at = arms.index("imp"), arms.index("snip")
    assert both[at].tolist() == [int((a[n] & b[n]).sum()) for n in artifact.result["tensors"]]
    assert float(artifact.tensors["jaccard"][at][-1]) == pytest.approx(prune.jaccard(a, b))
    assert (artifact.tensors["effective"] <= artifact.tensors["kept"]).all()
    assert artifact.tensors["work"].sum() > 0


def test_a_mask_is_compared_once():
    made = plan(**WIDE | {"at_rounds": (1, 2), "arms": tuple(reversed(EVERY))})
    first, second = (set(e.unit.parents) for e in made.masks())
    # whose first masks are those of distilled pruning; a scope has the same, if the study has that arm
    assert second - first == {"combined"}
    assert not {arm for arm in second if made.study.arm(arm).control}


def test_masks_along_a_training_end_where_they_are(made):
    store, found = made
    for entry in found.early_bird():
        artifact = store.get(entry.unit.key)
        distance = artifact.tensors["distance"]
        assert distance.shape == (3, 3)
        assert torch.equal(distance, distance.T)
        assert float(distance.diagonal().sum()) == 0
        assert 0 < float(distance[0, -1]) < 1
        assert artifact.result["steps"][0] == 0


def test_robustness_is_measured(made):
    store, found = made
    for entry in found.robustness():
        artifact = store.get(entry.unit.key)
        assert artifact.tensors["corruption_errors"].shape == (1, 1)
        assert 0 <= artifact.result["error_4bit"] <= 1
        network = store.get(entry.unit.parents["network"].key)
        assert artifact.result["clean_error"] == pytest.approx(network.result["error"])


def test_an_arm_without_a_result_does_not_take_the_comparison_with_it(made, tmp_path):
    from dpkit.stages import execute
    from dpkit.store import Store

    store, found = made
    entry, = found.masks()
    other = Store(tmp_path / "store")
    for arm, ticket in entry.unit.parents.items():
        artifact = store.get(ticket.key)
        failed = "diverged at step 3" if arm == "imp" else None
        if not other.has(ticket.key):
            other.put(ticket.key, stage="ticket", version=1, spec=dict(ticket.spec), parents={}, label=arm, seconds=0.0,
                      tensors={} if failed else {n: t.clone() for n, t in artifact.tensors.items()},
                      result={} if failed else artifact.result, failed=failed)
    assert execute.make(Context(other), [entry.unit]) == {entry.unit.key: None}
    assert other.get(entry.unit.key).result["arms"] == [arm for arm in entry.unit.parents if arm != "imp"]


def test_every_suffix_and_control_is_named_in_the_refusal():
    with pytest.raises(ValueError) as caught:
        arm_of("none", SETS)
    assert all(f"_{word}" in str(caught.value) for word in (*SUFFIXES, *CONTROLS))
    assert len(str(caught.value)) < 330


def test_searches_count_the_networks_of_each_arm():
    made = plan(**WIDE)
    rows = [e.place for e in made.searches()]
    pieces = {arm: sum(r["arm"] == arm for r in rows) for arm in EVERY}
    assert {r["arm"]: r["pieces"] for r in rows} == {arm: n for arm, n in pieces.items() if n}
    networks = {r["arm"]: r["networks"] for r in rows}
    assert [networks[a] for a in ("imp", "one_shot", "snip", "combined", "imp_shuffled")] == [2, 1, 0, 2, 2]
    # scores train nothing and take images: two of each of ten classes here, twice for GraSP, and SynFlow a hundred of ones
    assert {r["arm"]: r["points"] for r in rows if "points" in r} == {"snip": 20, "grasp": 40, "synflow": 100}
    assert next(e.unit for e in made.searches() if e.place["arm"] == "snip") is made.ticket("snip", 0, 2)
    assert pieces["random"] == 0
    early = [r for r in rows if r["arm"] == "distilled_pretrained"]
    assert [r["part"] for r in early] == [1, 1, 2 / 10]  # the early training counts as far as it goes
    sets = {(e.place["arm"], e.unit) for e in made.search_sets()}
    assert ("distilled", made.small_set("idc", 0)) in sets
    assert ("combined", made.small_set("idc", 0)) in sets
    assert not any(arm == "imp" for arm, _ in sets)
    assert closure(e.unit for e in made.search_sets())
