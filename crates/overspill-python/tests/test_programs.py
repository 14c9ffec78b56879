"""Any program of groups, gradients and states does to ours what it does to PyTorch's."""

from __future__ import annotations

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import overspill
from support import SMALL, assert_same, parameters, set_gradients, ulps

OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.6)]),
    }
)
GROUPS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([(3,), (4, 5), (), (64, 33), (1000,)]), min_size=1, max_size=3), OPTIONS
    ),
    min_size=1,
    max_size=3,
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.sets(st.integers(0, 8))),
        st.tuples(st.just("freeze"), st.integers(0, 8)),
        st.tuples(st.just("rate"), st.sampled_from([1e-2, 0.3])),
        st.tuples(st.just("add"), OPTIONS),
        st.tuples(st.just("reload"), st.booleans()),
        st.tuples(st.just("purge"), st.integers(0, 8)),
        st.tuples(st.just("commit"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups=GROUPS, actions=ACTIONS)
def test_any_program_of_groups_gradients_and_states_is_torchs(groups, actions, tmp_path_factory, exact_sqrt):
    sides = []
    for make in (overspill.AdamW, torch.optim.AdamW):
        built = [
            {"params": parameters(shapes, seed=i), **options} for i, (shapes, options) in enumerate(groups)
        ]
        if make is overspill.AdamW:
            path = tmp_path_factory.mktemp("program") / "swap"
            optimizer = overspill.AdamW(built, swap_dir=path, **SMALL)
        else:
            optimizer = make(built, foreach=False)
        sides.append(optimizer)
    ours, theirs = sides

    def every(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]

    for number, (action, argument) in enumerate(actions):
        for optimizer in sides:
            model = every(optimizer)
            if action == "step":
                set_gradients(number, model)
                for index, p in enumerate(model):
                    if index in argument or not p.requires_grad:
                        p.grad = None
                optimizer.step()
            elif action == "freeze":
                frozen = model[argument % len(model)]
                frozen.requires_grad_(not frozen.requires_grad)
            elif action == "rate":
                optimizer.param_groups[-1]["lr"] = argument
            elif action == "add":
                optimizer.add_param_group({"params": parameters([(6, 7)], seed=number), **argument})
        if action == "reload":
            sides[argument].load_state_dict(copy.deepcopy(sides[not argument].state_dict()))
        elif action == "purge":
            model = [every(optimizer) for optimizer in sides]
            index = argument % len(model[0])
            ours.purge(model[0][index])
            theirs.state.pop(model[1][index], None)
        elif action == "commit":
            ours.commit({"at": number})
            ours.roll_back()
            assert ours.extra == {"at": number}
        assert_same(every(ours), every(theirs))
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert ours_state["param_groups"] == [{**g, "foreach": None} for g in theirs_state["param_groups"]]
    assert ours_state["state"].keys() == theirs_state["state"].keys()
    for key, own in theirs_state["state"].items():
        assert own.keys() == ours_state["state"][key].keys()
        assert all(ulps(own[name], x) == 0 for name, x in ours_state["state"][key].items())
    ours.close()
