"""The budget controller: nodes are verified where they raise tokens per second, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers import DraftTree
from vllm_lookahead.drafting.budget import GAIN, StepCost
from vllm_lookahead.drafting.policy import EXPLORE_STEPS, LONGEST_REST, REST_AFTER, AutoBudget, measure_step_cost

FREE = StepCost([1, 1000], [0.01, 0.01])  # a pass over a thousand tokens takes as long as over one
DEAR = StepCost([1, 1000], [0.01, 10.0])  # every token takes as long as the first

chances = st.lists(st.floats(0.01, 1.0), max_size=20).map(lambda c: np.array(sorted(c, reverse=True), np.float32))


def chain(*chances: float) -> DraftTree:
    return replace(DraftTree.chain(list(range(len(chances)))), chances=np.array(chances, np.float32))


def steps_of(cost: StepCost, overhead: float, scale: float, drafting: float, node: float = 0.0) -> None:
    """Show it some seconds of decoding on a machine with these constants."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        rows, nodes = int(rng.integers(1, 30)), int(rng.integers(0, 30) * rng.integers(2))
        extra = drafting + node * nodes if nodes else 0.0
        cost.observe(rows + nodes, nodes, overhead + scale * cost.forward(rows + nodes) + extra)
    cost.adopt(cost.fit())


# ---- which nodes


def test_nodes_that_cost_nothing_are_all_verified() -> None:
    assert FREE.allocate([np.array([0.5, 0.1], np.float32), np.array([0.9], np.float32)], 2).counts == [2, 1]


def test_nodes_that_cost_as_much_as_tokens_are_not_verified() -> None:
    assert DEAR.allocate([np.array([0.9, 0.8], np.float32)], 1).counts == [0]


def test_the_likelier_request_gets_the_nodes() -> None:
    cost = StepCost([1, 2, 3, 4, 1000], [0.01, 0.01, 0.01, 0.01, 10.0])
    assert cost.allocate([np.array([0.2, 0.1], np.float32), np.array([0.9, 0.8], np.float32)], 2).counts == [0, 2]


def test_a_gain_too_small_to_be_sure_of_is_left() -> None:
    assert FREE.allocate([np.array([0.01], np.float32)], 1).counts == [0]


@given(st.lists(chances, min_size=1, max_size=6), st.floats(0.0, 1.0), st.floats(0.0, 0.01), st.floats(0.0, 1e-3))
def test_no_other_prefix_promises_more(values: list[np.ndarray], slope: float, drafting: float, node: float) -> None:
    cost = StepCost([1, 500], [0.01, 0.01 + slope])
    cost.adopt((0.001, 1.0, drafting, node))
    rows = len(values)

    def rate(counts: list[int]) -> float:
        expected = rows + sum(float(v[:n].astype(np.float64).sum()) for v, n in zip(values, counts, strict=True))
        return expected / cost.seconds(rows + sum(counts), sum(counts))

    chosen = cost.allocate(values, rows)
    none = [0] * rows
    assert chosen.rate == pytest.approx(rate(chosen.counts))
    assert chosen.counts == none or rate(chosen.counts) >= GAIN * rate(none) * (1 - 1e-9)
    for row, value in enumerate(values):
        for n in range(len(value) + 1):
            other = [*chosen.counts[:row], n, *chosen.counts[row + 1 :]]
            assert max(chosen.rate, GAIN * rate(none)) >= rate(other) * (1 - 1e-6)


# ---- what a step costs


def test_constants_are_found() -> None:
    cost = StepCost([1, 10, 100], [0.002, 0.003, 0.02])
    steps_of(cost, overhead=0.004, scale=2.0, drafting=0.001, node=0.0002)
    assert cost.overhead == pytest.approx(0.004, rel=0.1)
    assert cost.scale == pytest.approx(2.0, rel=0.05)
    assert cost.drafting == pytest.approx(0.001, rel=0.1)
    assert cost.node == pytest.approx(0.0002, rel=0.1)


def test_a_pause_does_not_count_as_a_slow_step() -> None:
    cost = StepCost([1, 10, 100], [0.002, 0.003, 0.02])
    steps_of(cost, overhead=0.004, scale=2.0, drafting=0.001)
    before = cost.seconds(8)
    cost.observe(8, 0, 60.0)
    cost.adopt(cost.fit())
    assert cost.seconds(8) < 1.2 * before


def test_without_observations_the_first_guess_stays() -> None:
    cost = StepCost([1, 10], [0.002, 0.003])
    before = cost.seconds(5)
    cost.adopt(cost.fit())
    assert cost.seconds(5) == pytest.approx(before)


def test_a_slow_moment_at_start_up_is_not_believed() -> None:
    passes = {"done": 0}

    def forward(tokens: int) -> float:
        passes["done"] += 1
        return 0.5 if passes["done"] in (2, 5, 20) else 0.01 + tokens * 1e-4

    cost = measure_step_cost(forward, 64, lambda value: value)
    assert [cost.forward(n) for n in (1, 2, 64)] == pytest.approx([0.0101, 0.0102, 0.0164])


def test_a_slow_model_is_measured_as_far_as_trees_reach() -> None:
    """What is extrapolated in proportion says that a draft token costs as much as the first one."""
    passes: list[int] = []

    def forward(tokens: int) -> float:
        passes.append(tokens)
        return 0.14 + tokens * 1e-4

    cost = measure_step_cost(forward, 512, lambda value: value)
    assert [cost.forward(n) for n in (1, 16, 64)] == pytest.approx([0.1401, 0.1416, 0.1464])
    assert len(passes) <= 12, "each of them takes long"


# ---- when to ask


def test_a_request_whose_guesses_are_not_worth_it_is_asked_ever_more_rarely_but_always_again() -> None:
    policy = AutoBudget(DEAR)
    asked = []
    for step in range(1000):
        if policy.wants_proposal("r"):
            asked.append(step)
            assert policy.choose(["r"], [chain(0.1)], 8) == [0]
    pauses = np.diff(asked)
    assert (pauses[: REST_AFTER - 1] == 1).all()
    assert (np.diff(pauses) >= 0).all()
    assert pauses.max() == LONGEST_REST


def test_one_good_guess_ends_the_rest() -> None:
    policy = AutoBudget(FREE)
    for _ in range(100):
        if policy.wants_proposal("r"):
            policy.choose(["r"], [chain(0.001)], 8)
    while not policy.wants_proposal("r"):
        pass
    assert policy.choose(["r"], [chain(0.9)], 8) == [1]
    assert all(policy.wants_proposal("r") for _ in range(REST_AFTER))


def test_where_no_request_had_a_use_for_guesses_the_next_is_asked_less_from_the_start() -> None:
    policy = AutoBudget(DEAR)

    def times_asked(req_id: str, steps: int) -> int:
        asked = 0
        for _ in range(steps):
            if policy.wants_proposal(req_id):
                asked += 1
                policy.choose([req_id], [chain(0.1)], 8)
        return asked

    first = times_asked("first", 64)
    for i in range(20):
        times_asked(f"in between {i}", 64)
    assert times_asked("late", 64) < 0.7 * first


def test_a_proposer_without_chances_is_judged_by_what_held() -> None:
    tree = DraftTree.chain([1, 2, 3, 4])
    nothing = np.empty(0, np.int32)
    cost = StepCost([1, 1000], [0.01, 0.8])
    good, bad = AutoBudget(cost), AutoBudget(cost)
    for _ in range(50):
        good.observe_walk("r", tree, 4, np.arange(4, dtype=np.int32))
        bad.observe_walk("r", tree, 4, nothing)
    assert good.choose(["r"], [tree], 8) == [4]
    assert bad.choose(["r"], [tree], 8) == [0]
    for _ in range(50):
        bad.observe_token("r", tree, 1)
    assert bad.choose(["r"], [tree], 8) != [0]


# ---- the lookahead branch

COMB = DraftTree(*np.array([[5, 6, 7, 8], [-1, 0, 1, 2], [1, 2, 3, 4]], np.int32), num_branch=4)


def branch_steps(policy: AutoBudget, req_id: str, gain: float, steps: int = 200) -> int:
    """In how many steps a request's branch is run."""
    kept = 0
    for _ in range(steps):
        policy.choose([req_id], [COMB], 0)
        kept += policy.keeps_branch(req_id, COMB, gain if kept else None)
    policy.finish([req_id])
    return kept


def test_a_branch_that_costs_nothing_runs() -> None:
    assert branch_steps(AutoBudget(FREE), "r", gain=0.1) == 200


def test_a_branch_that_adds_nothing_is_given_up() -> None:
    cost = StepCost([1, 5, 1000], [0.01, 0.011, 1.0])
    policy = AutoBudget(cost)
    for request in range(20):
        assert branch_steps(policy, f"{request}", gain=0.0) <= EXPLORE_STEPS


def test_a_branch_that_can_never_pay_is_not_tried() -> None:
    assert branch_steps(AutoBudget(DEAR), "r", gain=1.0) == 0


def test_trying_branches_costs_little() -> None:
    cost = StepCost([1, 5, 1000], [0.01, 0.02, 1.0])
    policy = AutoBudget(cost)
    kept = sum(branch_steps(policy, f"{request}", gain=0.0) for request in range(200))
    assert kept * 0.01 < 0.2 + 0.02 * 200 * 200 * cost.seconds(1)
