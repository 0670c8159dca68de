"""What the compiler says of a program's cycles and copies, against a program that is written here."""

from __future__ import annotations

import math

from jaxserve.planning.estimate import count_collectives, count_cycles, find_largest_copy, find_sum_gaps

HLO = """
%nobody_asks (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} fusion(%p), backend_config={"window_config":{"estimated_cycles":"5"}}
}

%somebody_asks (p: f32[8]) -> f32[8] {
  %g.1 = s32[2,8]{1,0} all-gather(%p), dimensions={0}
  %b = f32[8]{0} fusion(%p), backend_config={"window_config":{"estimated_cycles":"700"}}
}

%bisection (p: f32[8]) -> f32[8] {
  %r.1 = f32[8]{0} all-reduce(%p), to_apply=%add
  %c = f32[8]{0} fusion(%p), backend_config={"window_config":{"estimated_cycles":"3000"}}
}

%by_sparse_cores (p: f32[8]) -> f32[8] {
  ROOT %r.5 = f32[8]{0} all-reduce(%p), to_apply=%add
}

%layer (p: f32[8]) -> f32[8] {
  %d = f32[8]{0} fusion(%p), backend_config={"window_config":{"estimated_cycles":"20"}}
  %copy.1 = bf16[4,7]{1,0} copy(%d)
  %r.2 = (f32[8]{0}, f32[8]{0}) all-reduce(%d, %d), to_apply=%add
  %r.3 = f32[8]{0} all-reduce-start(%d), to_apply=%add
  %r.4 = f32[8]{0} all-reduce-done(%r.3)
  %r.6 = ((), ()) custom-call-start(), custom_call_target="x", called_computations={%by_sparse_cores}
  %e = f32[8]{0} custom-call(%d), custom_call_target="tpu_custom_call", operand_layout={}
  %i = f32[8] custom-call(), custom_call_target="tpu_custom_call", x={"cost_estimate":{"bytes_accessed":"64"}}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%a), condition=%cond.1, body=%layer
  %u = f32[8]{0} while(%w), condition=%cond.2, body=%bisection
  %k = f32[8]{0} conditional(%u, %w), branch_computations={%nobody_asks, %somebody_asks}, metadata={}
  %g.2 = f32[16]{0} all-gather(%w), dimensions={0}
  %copy.2 = s32[10]{0} copy(%k)
  %l = f32[8]{0} fusion(%k), backend_config={"window_config":{"estimated_cycles":"1"}}
}
"""


def test_layers_count_as_often_as_they_run_and_what_nobody_asks_for_does_not():
    assert count_cycles(HLO, 3, 0, math.inf) == 3 * 20 + 5 + 1
    assert count_collectives(HLO, 3) == {"all-reduce": 3 * 3, "all-gather": 1}


def test_a_kernel_takes_a_launch_and_the_time_of_the_bytes_that_it_declares():
    assert count_cycles(HLO, 3, 100, 16.0) == 3 * (20 + 2 * 100 + 64 // 16) + 5 + 1


# A sum that nothing goes on beside, one within products, and one on sparse cores that begins before it ends.
SUMS = """
%by_sparse_cores (p: f32[8]) -> f32[8] {
  ROOT %r.1 = f32[8]{0} all-reduce(%p), to_apply=%add
}

%layer (p: f32[8]) -> f32[8] {
  %r.2 = f32[8]{0} all-reduce(%p), to_apply=%add
  %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", operand_layout={}
  %async-collective-start.3 = (f32[8]{0}, s32[2]{0}) fusion(%k), calls=%begin
  %a = f32[8]{0} fusion(%k), backend_config={"window_config":{"estimated_cycles":"20"}}
  %all-reduce.4.cloned.1.call-start = ((), ()) custom-call-start(), called_computations={%by_sparse_cores}
  %b = f32[8]{0} fusion(%k), backend_config={"window_config":{"estimated_cycles":"3"}}
  %all-reduce.4.cloned.1.call-update = ((f32[8]), ()) custom-call-update(%b)
  %c = f32[8]{0} fusion(%k), backend_config={"window_config":{"estimated_cycles":"400"}}
  %async-collective-done.3 = f32[8]{0} fusion(%async-collective-start.3), calls=%end
  %d = f32[8]{0} fusion(%k), backend_config={"window_config":{"estimated_cycles":"5000"}}
  %all-reduce.4.cloned.1.call-done.y_TD = f32[8]{0} custom-call-done(%all-reduce.4.cloned.1.call-update)
  %e = f32[8]{0} fusion(%k), backend_config={"window_config":{"estimated_cycles":"60000"}}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%a), condition=%cond.1, body=%layer
}
"""


def test_what_can_hide_a_sum_lies_between_its_begin_and_its_end():
    assert find_sum_gaps(SUMS, 0, math.inf) == [0, 20 + 3 + 400, 400 + 5000]
    assert count_collectives(SUMS, 2) == {"all-reduce": 2 * 3}
    assert find_sum_gaps(HLO.replace("all-reduce", "copy"), 0, math.inf) == []


def test_another_compilers_program_has_no_cycles():
    assert (
        count_cycles(
            "ENTRY %main (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} fusion(%p)\n}\n", 3, 100, 16.0
        )
        == 0
    )


def test_the_largest_copy_is_told_in_bytes():
    assert find_largest_copy(HLO) == 2 * 4 * 7
