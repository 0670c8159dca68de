"""What hosts that serve a model together tell each other: msgspec structs of plain data.

Host 0 leads, the others follow. First both prove that they know the token, then each tells what it is; from
then on the leader sends what its runner is to do, in order, and a follower answers where that is asked for.
"""

from __future__ import annotations

import msgspec

from jaxserve.runner.runner import StepPrograms
from jaxserve.runner.sizing import Machine
from jaxserve.scheduler.plan import StepPlan

# The handshake, in its order.


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Follower: who I am; prove that you know the token, with my nonce."""

    rank: int
    version: str
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """Leader: my proof; now yours, with my nonce."""

    nonce: bytes
    proof: bytes


class Introduction(msgspec.Struct, frozen=True, tag=True):
    """Follower: my proof, and what I was started with. `facts` must be the leader's, name by name."""

    proof: bytes
    facts: dict[str, str]


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Leader: all is well; join the others at this address of jax.distributed."""

    coordinator: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Leader: you cannot take part, and here is why."""

    reason: str


class Hardware(msgspec.Struct, frozen=True, tag=True):
    """Follower: what I have. Leader: what all have, so that all make the same of it."""

    machine: Machine


# What the leader sends then.


class Step(msgspec.Struct, frozen=True, tag=True):
    plan: StepPlan
    programs: StepPrograms


class Rehearse(msgspec.Struct, frozen=True, tag=True):
    programs: StepPrograms


class Release(msgspec.Struct, frozen=True, tag=True):
    """Answered by Done, as are the next three."""

    tags: tuple[str, ...]
    keeps_weights: bool


class Take(msgspec.Struct, frozen=True, tag=True):
    """Memory that was released, again."""

    tags: tuple[str, ...]


class ReadUpdate(msgspec.Struct, frozen=True, tag=True):
    """Read other weights, while steps go on."""

    model_path: str
    load_format: str


class InstallUpdate(msgspec.Struct, frozen=True, tag=True):
    """Serve what was read."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The leader ends; for good, or to begin again with the hosts that come back. A follower that was told to
    stop says so likewise."""

    reason: str
    is_final: bool


# What a follower sends then.


class Compiled(msgspec.Struct, frozen=True, tag=True):
    """A program is ready here, or never will be."""

    name: str
    is_ready: bool


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The weights are in place. `digest` is of all sizes that were decided."""

    digest: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """How an order went; a sentence if it failed."""

    error: str | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """This host cannot go on."""

    reason: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    """I am alive. Both send it, so that a host without power or network is noticed."""


ToFollower = (
    Challenge
    | Welcome
    | Refused
    | Hardware
    | Step
    | Rehearse
    | Release
    | Take
    | ReadUpdate
    | InstallUpdate
    | Goodbye
    | Beat
)
ToLeader = Hello | Introduction | Hardware | Compiled | Loaded | Done | Failed | Goodbye | Beat
