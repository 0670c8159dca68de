"""Whether a model fits, by how much it does not, what would help, and which slice is the cheapest."""

from __future__ import annotations

import pytest

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.planning.candidates import choose_arrangement, choose_cheapest
from jaxserve.planning.chips import GIB
from jaxserve.planning.fit import SliceFit, fit_slice, list_arrangements, suggest_remedies
from jaxserve.planning.options import PlanOptions
from jaxserve.planning.shapes import find_model
from jaxserve.planning.slices import list_slices


def fit(topology: str, model: str = "llama-3-8b", context: int = 1280, **flags) -> SliceFit:
    config = ServerConfig(model_path=model, **flags)
    (where,) = list_slices([topology])
    return fit_slice(config, find_model(config), where, context)


def test_what_fits_says_what_is_left():
    made = fit("v5e:2x2")
    assert made.fits
    assert (made.sketch.tp_size, made.num_copies, made.missing_bytes) == (4, 1, 0)
    assert made.largest_context == 8192
    assert 1 * GIB < made.free_bytes < 3 * GIB  # the share that is kept for programs


def test_copies_are_as_many_as_asked_for_or_as_there_is_room_for():
    assert (fit("v5e:4x4").sketch.tp_size, fit("v5e:4x4").num_copies) == (16, 1)
    assert (fit("v5e:4x4", tp_size=4).num_copies, fit("v5e:4x4", tp_size=4, dp_size=2).num_copies) == (4, 2)
    assert fit("v5e:4x4", dp_size=2).sketch.tp_size == 8
    with pytest.raises(ConfigError, match="dp_size 2 with tp_size 4 needs 8 devices, and v5e:2x2 has 4"):
        fit("v5e:2x2", tp_size=4, dp_size=2)


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    made = fit("v5e:1x1")
    assert not made.fits
    config = ServerConfig(model_path="llama-3-8b")
    usable_bytes = int(0.88 * made.where.chip.hbm_bytes)
    slots_bytes = 257 * made.sketch.slot_bytes
    pages_bytes = 11 * 128 * made.sketch.kv_bytes_per_token
    assert made.missing_bytes == made.sketch.param_bytes + slots_bytes + pages_bytes - usable_bytes
    remedies = suggest_remedies(config, find_model(config), made)
    assert remedies[0].startswith("--quantization int8: weights 7.5 GiB a device, ")
    assert remedies[-1].startswith("more chips, v5e:2x2: ")


def test_a_remedy_is_named_only_if_it_suffices():
    config = ServerConfig(model_path="llama-3-70b")
    remedies = suggest_remedies(config, find_model(config), fit("v5e:2x2", "llama-3-70b"))
    assert [remedy.partition(":")[0] for remedy in remedies] == ["more chips, v5e"]
    assert "v5e:4x4" in remedies[0]


def test_a_context_that_one_copy_cannot_hold_does_not_fit():
    assert fit("v5e:1x1", quantization="int8", context=8192).fits
    assert not fit("v5e:1x1", quantization="int8", context=8193).fits  # the model's own limit


def test_settings_that_no_memory_helps_with_stay_errors():
    with pytest.raises(ConfigError, match="at most the model's own, 8192"):
        fit("v5p:2x2x1", context_length=16384)
    with pytest.raises(ConfigError, match="tp_size 3 does not divide the 4 devices of v5e:2x2"):
        fit("v5e:2x2", tp_size=3)


def choose(topologies: list[str], **targets):
    options = PlanOptions(topologies=tuple(topologies), **targets)
    fits = [fit(str(where)) for where in list_slices(topologies)]
    return choose_cheapest(fits, options)


def test_the_cheapest_slice_has_the_fewest_chips_that_meet_the_targets():
    loose = choose(["v5e"], target_itl_ms=50.0)
    strict = choose(["v5e"], target_itl_ms=5.0)
    assert loose is not None
    assert strict is not None
    assert str(loose.fit.where) == "v5e:2x2"
    assert strict.fit.where.num_chips > loose.fit.where.num_chips
    assert strict.itl_s <= 5e-3
    assert choose(["v5e"], target_itl_ms=0.01) is None


def test_of_as_many_chips_the_lesser_is_cheaper():
    both = choose(["v5p:2x2x1", "v5e:2x2"], target_itl_ms=50.0)
    assert both is not None
    assert both.fit.where.chip.name == "v5e"


def test_throughput_must_be_reached_within_the_latency():
    found = choose(["v5e"], target_throughput=20000.0, target_itl_ms=20.0)
    assert found is not None
    assert found.tokens_per_s >= 20000
    assert found.itl_s <= 20e-3
    lower = choose(["v5e"], target_throughput=20000.0, target_itl_ms=20.0, efficiency=0.2)
    assert lower is None or lower.fit.where.num_chips > found.fit.where.num_chips


def arrange(topology: str, flags: dict, **targets) -> tuple[int, int]:
    """Copies, and the devices of each, that meet the targets best."""
    config = ServerConfig(model_path="qwen2.5-0.5b", **flags)
    (where,) = list_slices([topology])
    options = PlanOptions(topologies=(topology,), **targets)
    fits = list_arrangements(config, find_model(config), where, options.context)
    found = choose_arrangement(fits, options)
    return found.num_copies, found.sketch.tp_size


def test_few_devices_to_a_copy_give_most_tokens_and_many_give_each_the_soonest():
    assert arrange("v5e:2x2", {}, target_itl_ms=1.5) == (2, 2)  # alone on a chip a token takes 1.7 ms
    assert arrange("v5e:2x2", {}, target_throughput=100000.0) == (4, 1)
    assert arrange("v5e:2x2", {}, target_throughput=20000.0, target_itl_ms=5.0) == (2, 2)
    assert arrange("v5e:2x2", {}, target_itl_ms=0.1) == (2, 2)  # neither meets it


def test_an_arrangement_that_is_asked_for_is_kept():
    assert arrange("v5e:2x2", {"dp_size": 2}, target_throughput=100000.0) == (2, 2)
