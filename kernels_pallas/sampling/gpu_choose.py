"""The second sampling kernel: top-k, top-p, min-p and the draw for rows that something is cut from.

One block a row, of one or several warpgroups. The lines' maxima bound the floor from below; only lines that
reach the bound are live, and only they are read, each by one warpgroup. The floor is searched among floats
in the order of their bits, three pivots a pass, until one logit is left between the bounds. Every warpgroup
takes every decision, from the same sums. Letters: C slots of line statistics; a line's logits V lie as [4,
32], a warp a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels_pallas import mosaic
from jaxserve.kernels_pallas.sampling.division import LINE, LOG2_E, SLAB_LINES, Geometry, Rows
from jaxserve.kernels_pallas.sampling.gpu_team import (
    LANES,
    LAYOUT,
    MAX_REDUCED,
    WARPS,
    Team,
    from_key,
    splat,
    to_key,
)
from jaxserve.kernels_pallas.sampling.noise import LARGEST_NOISE, SMALLEST_NOISE, gumbel

READ_LINES = 8  # live lines that a search reads at once
DRAW_LINES = 4  # and that the draw does, which needs registers for its random numbers
NEGLIGIBLE = 104.0  # exp(-104) is 0 in float32: what lies further below the largest has no mass
ROUNDING = 1e-5  # of the whole mass: more than sums of it may err
LOWEST = np.float32(-3e38)


def choose(geometry: Geometry, interpret: Any) -> Any:
    """(logits [B, L, 128], line maxima, line masses [B, C], *Rows) -> tokens, int32, and largest logits [B].

    Only cut rows whose largest logit is finite have a token.
    """
    num_rows, num_teams = geometry.num_rows, geometry.num_teams
    table = (WARPS, geometry.num_slots // WARPS)

    def body(*refs):
        _choose_for_block(geometry, *refs)

    kernel = mosaic.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((num_rows,), kind) for kind in (jnp.int32, jnp.float32)],
        scratch_types=[
            mosaic.SMEM((num_teams, *table), jnp.float32),
            mosaic.SMEM((num_teams, geometry.num_slots + LINE), jnp.int32),
            mosaic.SMEM((num_teams, MAX_REDUCED, WARPS), jnp.float32),
            mosaic.SMEM((num_teams, MAX_REDUCED, WARPS), jnp.int32),
            mosaic.Barrier(num_arrivals=num_teams),
        ],
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=num_teams,
        thread_name="team",
        kernel_name="sampling_choose",
        compiler_params=mosaic.CompilerParams(lowering_semantics=mosaic.LoweringSemantics.Lane),
        interpret=interpret,
    )

    def launch(logits_BLV, max_BC, mass_BC, *rows):
        warps_BLV = logits_BLV.reshape(*logits_BLV.shape[:2], WARPS, LANES)
        return kernel(warps_BLV, max_BC.reshape(num_rows, *table), mass_BC.reshape(num_rows, *table), *rows)

    return launch


def _choose_for_block(geometry, logits_ref, max_ref, mass_ref, *refs):
    """The largest logit of the block's row, and its token if the row is cut."""
    rows_ref, (token_ref, largest_ref, max_smem, live_smem, *team_refs) = Rows(*refs[:8]), refs[8:]
    row = jax.lax.axis_index("row")
    team = Team(jax.lax.axis_index("team"), geometry.num_teams, *team_refs)
    max_C = mosaic.load(max_ref.at[row], layout=LAYOUT, optimized=False)
    largest, largest_key = team.reduce(("max", max_C), ("max", to_key(max_C)))

    @mosaic.when(team.index == 0)
    def _():
        largest_ref[row] = largest

    is_finite = (largest > -jnp.inf) & (largest < jnp.inf)  # and not NaN

    @mosaic.when((rows_ref.is_cut[row] > 0) & is_finite)
    def _():
        mass_C = mosaic.load(mass_ref.at[row], layout=LAYOUT, optimized=False)
        one = Row(
            temperature=rows_ref.temperature[row],
            top_k=rows_ref.top_k[row],
            top_p=rows_ref.top_p[row],
            log_min_p=rows_ref.log_min_p[row],
            key_0=rows_ref.key_0[row],
            key_1=rows_ref.key_1[row],
            largest=largest,
            largest_key=largest_key,
        )
        own_max_smem, own_live_smem = max_smem.at[team.index], live_smem.at[team.index]
        mosaic.store(own_max_smem, max_C)
        lines = Lines(geometry, logits_ref.at[row], own_max_smem, own_live_smem, jnp.int32(0))
        token = _choose_in_row(team, lines, one, max_C, mass_C)

        @mosaic.when(team.index == 0)
        def _():
            token_ref[row] = token


class Row(NamedTuple):
    """What is known of the one row of a block, scalars."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    log_min_p: jax.Array
    key_0: jax.Array
    key_1: jax.Array
    largest: jax.Array
    largest_key: jax.Array

    def scale_down(self, x):
        """As the reference scales a logit: 0 for the largest, with the same rounding."""
        return x / self.temperature - self.largest / self.temperature

    def mass(self, x):
        """Of a logit, relative to the largest."""
        return jnp.exp2((x - self.largest) * (LOG2_E / self.temperature))


def _choose_in_row(team, lines, row, max_C, mass_C):
    """The token of a row that something is cut from."""
    has_k, has_p = row.top_k > 0, row.top_p < 1
    mass_C = mass_C * row.mass(max_C) * (1 / team.num_teams)  # each warpgroup has them all
    (total,) = team.reduce(("sum", mass_C))
    low, floor = _bound_floor(team, row, max_C, mass_C, total)
    lines = replace(lines, num_live=_list_live_lines(team, lines, floor))
    above_all = row.largest_key + 1

    def enough_tokens(count, _mass):
        return count >= row.top_k

    low_k = _search(team, lines, row, enough_tokens, low, jnp.where(has_k, above_all, low), by_mass=False)
    floor_k = jnp.where(has_k, _smallest_from(team, lines, low_k, has_k), -jnp.inf)
    mass_k = _mass_from(team, lines, row, row.scale_down(floor_k), has_k & has_p)
    wanted = row.top_p * jnp.where(has_k, mass_k, total)

    def enough_mass(_count, mass):
        return mass >= wanted

    low_p = _search(team, lines, row, enough_mass, low_k, jnp.where(has_p, above_all, low_k), by_mass=True)
    floor_p = jnp.where(has_p, _smallest_from(team, lines, low_p, has_p), -jnp.inf)
    return _draw_token(team, lines, row, jnp.maximum(floor_k, floor_p))


def _bound_floor(team, row, max_C, mass_C, total):
    """A lower bound on the floor, from the lines' statistics alone: its key, and the float itself.

    With top-k: if the maxima of k lines reach a float, so does the floor. With top-p: a line's mass below a
    float is at most that of 128 tokens there, and no more than what its maximum leaves, if that lies above.
    """
    has_k, has_p = row.top_k > 0, row.top_p < 1
    lowest = row.largest + row.temperature * jnp.where(
        has_k | has_p, -NEGLIGIBLE, jnp.maximum(row.log_min_p * 1.001 - 0.001, -NEGLIGIBLE)
    )
    lowest = jnp.maximum(lowest - jnp.abs(row.largest) * 1e-6, LOWEST)
    (low,) = team.reduce(("max", to_key(splat(lowest, jnp.float32))))
    width, share = max_C.shape[1], 1 / team.num_teams
    top_mass_C = row.mass(max_C) * share

    def measure(keys):
        pivots = [from_key(key, width) for key in keys]
        counts = [(max_C >= pivot_C).astype(jnp.int32) for pivot_C in pivots]
        below = [
            jnp.minimum(
                mass_C - jnp.where(max_C >= pivot_C, top_mass_C, 0.0),
                row.mass(pivot_C) * (LINE * share),
            )
            for pivot_C in pivots
        ]
        sums = team.reduce(
            *[("sum", count_C) for count_C in counts], *[("sum", below_C) for below_C in below]
        )
        num_pivots = len(keys)
        return [count // team.num_teams for count in sums[:num_pivots]], [
            total - x for x in sums[num_pivots:]
        ]

    def is_enough(count, mass):
        return jnp.where(has_k, count >= row.top_k, mass - ROUNDING * total >= row.top_p * total)

    low = _narrow(measure, is_enough, low, jnp.where(has_k | has_p, row.largest_key + 1, low))
    (floor,) = team.reduce(("max", from_key(low)))
    return low, floor


def _list_live_lines(team, lines, floor):
    """Write the slots of this warpgroup's lines that reach the floor to `live_smem`, in order; how many."""
    mosaic.commit_smem()  # which is also a barrier of the warpgroup
    num_groups = lines.geometry.num_slots // READ_LINES

    def look(trip, count):
        # Every slot is written, and written over by the next one unless it is live: no branches.
        slots = [(trip * team.num_teams + team.index) * READ_LINES + i for i in range(READ_LINES)]
        maxima = [lines.max_of(slot) for slot in slots]
        for slot, maximum in zip(slots, maxima, strict=True):
            lines.live_smem[count] = slot
            count += (maximum >= floor).astype(jnp.int32)
        return count

    num_live = jax.lax.fori_loop(0, num_groups // team.num_teams, look, jnp.int32(0))
    mosaic.commit_smem()
    return num_live


@dataclass(frozen=True, slots=True)
class Lines:
    """The live lines of a row that are this warpgroup's."""

    geometry: Geometry
    logits_ref: Any
    max_smem: Any
    live_smem: Any
    num_live: Any

    def fold(self, num_read: int, step: Any, start: Any, is_wanted: Any = True) -> Any:
        """step(slots, indices, carry) over the live lines, `num_read` at a time; `start` if not wanted.

        Indices behind the last live line repeat it: `read` gives -inf for them.
        """
        num_live = jnp.where(is_wanted, self.num_live, 0)

        def visit(trip, carry):
            indices = [trip * num_read + i for i in range(num_read)]
            slots = [self.live_smem[jnp.minimum(index, num_live - 1)] for index in indices]
            return step(slots, indices, carry)

        return jax.lax.fori_loop(0, (num_live + num_read - 1) // num_read, visit, start)

    def max_of(self, slot: Any) -> Any:
        """The largest logit of a slot's line."""
        width = self.geometry.num_slots // WARPS
        return self.max_smem[slot // width, slot % width]

    def line_of(self, slot: Any) -> Any:
        """The line whose statistics are in a slot."""
        geometry = self.geometry
        return jnp.where(
            slot < geometry.num_lines // SLAB_LINES * SLAB_LINES,
            slot,
            geometry.num_lines - SLAB_LINES + slot % SLAB_LINES,
        )

    def read(self, slot: Any, index: Any) -> jax.Array:
        x_V = mosaic.load(self.logits_ref.at[self.line_of(slot)], layout=LAYOUT, optimized=False)
        return jnp.where(index < self.num_live, x_V.astype(jnp.float32), -jnp.inf)


def _search(team, lines, row, is_enough, low, high, *, by_mass):
    """The largest floor, as a key, that is enough: see `_narrow`; measured over the live lines."""

    def measure(keys):
        pivots = [from_key(key) for key in keys]

        def step(slots, indices, carry):
            counts, masses = carry
            for slot, index in zip(slots, indices, strict=True):
                x_V = lines.read(slot, index)
                is_above = [x_V >= pivot_V for pivot_V in pivots]
                counts = [counts[i] + is_above[i].astype(jnp.int32) for i in range(len(counts))]
                if by_mass:
                    mass_V = row.mass(x_V)
                masses = [masses[i] + jnp.where(is_above[i], mass_V, 0.0) for i in range(len(masses))]
            return counts, masses

        start = ([splat(0, jnp.int32) for _ in keys], [splat(0.0, jnp.float32) for _ in keys if by_mass])
        counts, masses = lines.fold(READ_LINES, step, start)
        sums = team.reduce(*[("sum", x_V) for x_V in (*counts, *masses)])
        return sums[: len(keys)], sums[-len(keys) :]

    return _narrow(measure, is_enough, low, high)


def _narrow(measure, is_enough, low, high):
    """The largest float, as a key in [low, high), whose upper set is enough; `low` is taken to be.

    Each pass measures the upper sets of three floats in between, so it halves the interval twice. Ends as
    soon as no more than one element is left that could be the floor, whichever the float.
    """
    everything = jnp.int32(jnp.iinfo(jnp.int32).max)

    def goes_on(state):
        low, high, count_low, count_high = state
        return (high > low + 1) & (count_low - count_high > 1)

    def halve_twice(state):
        low, high, count_low, count_high = state
        middle = _mean(low, high)
        keys = (_mean(low, middle), middle, _mean(middle, high))
        counts, masses = measure(keys)
        for key, count, mass in zip(keys, counts, masses, strict=True):
            enough = is_enough(count, mass)
            is_next = high > key  # a lower pivot that is not enough has made `high` lower than this one
            low = jnp.where(enough & is_next, key, low)
            count_low = jnp.where(enough & is_next, count, count_low)
            high = jnp.where(~enough & is_next, key, high)
            count_high = jnp.where(~enough & is_next, count, count_high)
        return low, high, count_low, count_high

    return jax.lax.while_loop(goes_on, halve_twice, (low, high, everything, jnp.int32(0)))[0]


def _smallest_from(team, lines, low, is_wanted):
    """The smallest logit that is not below the float of a key; infinity if it is not wanted."""
    floor_V = from_key(low)

    def step(slots, indices, smallest_V):
        for slot, index in zip(slots, indices, strict=True):
            x_V = lines.read(slot, index)
            smallest_V = jnp.minimum(smallest_V, jnp.where(x_V >= floor_V, x_V, jnp.inf))
        return smallest_V

    (smallest,) = team.reduce(("min", lines.fold(READ_LINES, step, splat(jnp.inf, jnp.float32), is_wanted)))
    return smallest


def _mass_from(team, lines, row, floor, is_wanted):
    """The mass of the tokens whose scaled logit is not below the floor."""

    def step(slots, indices, mass_V):
        for slot, index in zip(slots, indices, strict=True):
            x_V = lines.read(slot, index)
            mass_V += jnp.where(row.scale_down(x_V) >= floor, row.mass(x_V), 0.0)
        return mass_V

    (mass,) = team.reduce(("sum", lines.fold(READ_LINES, step, splat(0.0, jnp.float32), is_wanted)))
    return mass


def _draw_token(team, lines, row, floor):
    """Gumbel-max over the logits from a floor on, and of min-p; the lowest id among equals.

    A logit below the floor that scales to the same value is a tie with it, as in the reference.
    """
    scaled_floor = row.scale_down(floor)
    warp_V, lane_V = (mosaic.broadcasted_iota(jnp.int32, (WARPS, LANES), d, layout=LAYOUT) for d in range(2))
    offset_V = warp_V * LANES + lane_V

    def step(slots, indices, carry):
        value_V, id_V = carry
        bound = lines.max_of(slots[0])
        for slot in slots[1:]:
            bound = jnp.maximum(bound, lines.max_of(slot))
        bound = row.scale_down(bound)

        def draw(value_V, id_V):
            for slot, index in zip(slots, indices, strict=True):
                x_V = lines.read(slot, index)
                scaled_V = row.scale_down(x_V)
                ids_V = lines.line_of(slot) * LINE + offset_V
                drawn_V = scaled_V + gumbel(row.key_0, row.key_1, ids_V.astype(jnp.uint32))
                is_kept_V = ((x_V >= floor) | (scaled_V >= scaled_floor)) & (scaled_V >= row.log_min_p)
                drawn_V = jnp.where(is_kept_V, drawn_V, -jnp.inf)
                id_V = jnp.where(drawn_V > value_V, ids_V, id_V)
                value_V = jnp.maximum(value_V, drawn_V)
            return value_V, id_V

        # The largest token has the noise to beat that any token has at least.
        could_win = (bound >= row.log_min_p) & (bound + LARGEST_NOISE > SMALLEST_NOISE)
        return jax.lax.cond(could_win, draw, lambda *carry: carry, value_V, id_V)

    start = (splat(-jnp.inf, jnp.float32), splat(0, jnp.int32))
    value_V, id_V = lines.fold(DRAW_LINES, step, start)
    (value,) = team.reduce(("max", value_V))
    (token,) = team.reduce(("min", jnp.where(value_V == value, id_V, jnp.iinfo(jnp.int32).max)))
    return token


def _mean(a, b):
    """Of two int32, rounded down, without overflow."""
    return (a & b) + ((a ^ b) >> 1)
