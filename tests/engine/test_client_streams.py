"""What a listener gets of one request when it is quick, slow, or gone."""

from __future__ import annotations

import asyncio

from jaxserve.engine.client import EngineClient
from jaxserve.engine.messages import Abort, Ready, StepOutput, Submit, ToEngine
from jaxserve.types import EngineStats, FinishReason, TokenDelta, TokenParams, TokenScores
from tests.fakes import FAKE_INFO

PARAMS = TokenParams(max_new_tokens=9)


class Wire:
    """A client, and what it sent."""

    def __init__(self):
        self.sent: list[ToEngine] = []
        self.client = EngineClient()
        self.client.connect(self.sent.append)
        self.client.handle(Ready(FAKE_INFO))

    def tell(self, token_id: int, num_output: int, *, is_last: bool = False) -> None:
        """One more token for the request that was submitted last."""
        submit = [message for message in self.sent if isinstance(message, Submit)][-1]
        delta = TokenDelta(
            rid=submit.rid,
            token_ids=[token_id],
            num_prompt_tokens=3,
            num_cached_tokens=0,
            num_output_tokens=num_output,
            finish=FinishReason(kind="length") if is_last else None,
            scores=[TokenScores(-float(token_id), [], [], [])],
        )
        self.client.handle(StepOutput([delta], EngineStats()))


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 20))


def test_a_slow_listener_gets_fewer_deltas_and_every_token_with_its_score():
    async def scenario():
        wire = Wire()
        stream = wire.client.generate("r", [1, 2, 3], PARAMS)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        wire.tell(10, 1)
        assert (await first).token_ids == [10]
        for order in range(2, 5):  # three steps pass before it asks again
            wire.tell(9 + order, order, is_last=order == 4)
        wire.tell(99, 5)  # after the end: not its own any more
        rest = [delta async for delta in stream]
        assert [(delta.token_ids, delta.num_output_tokens) for delta in rest] == [([11, 12, 13], 4)]
        assert [scores.logprob for scores in rest[0].scores] == [-11, -12, -13]
        assert not any(isinstance(message, Abort) for message in wire.sent)

    run(scenario())


def test_a_listener_that_was_cancelled_while_it_waited_takes_its_request_along():
    async def scenario():
        wire = Wire()

        async def listen() -> None:
            async for _ in wire.client.generate("r", [1, 2, 3], PARAMS):
                pass

        listener = asyncio.create_task(listen())
        await asyncio.sleep(0)
        listener.cancel()
        wire.tell(10, 1)  # on its way when the listener left
        await asyncio.gather(listener, return_exceptions=True)
        assert [type(message) for message in wire.sent] == [Submit, Abort]
        assert list(wire.client.live_rids()) == []

    run(scenario())


def test_a_rid_that_is_used_again_gets_no_tokens_of_its_former_request():
    async def scenario():
        wire = Wire()
        former = wire.client.generate("r", [1, 2, 3], PARAMS)
        first = asyncio.create_task(anext(former))
        await asyncio.sleep(0)
        wire.tell(10, 1)
        await first
        await former.aclose()
        submit = wire.sent[0]
        new = asyncio.create_task(anext(wire.client.generate("r", [1, 2, 3], PARAMS)))
        await asyncio.sleep(0)
        assert isinstance(submit, Submit)
        late = TokenDelta(
            rid=submit.rid, token_ids=[66], num_prompt_tokens=3, num_cached_tokens=0, num_output_tokens=2
        )
        wire.client.handle(StepOutput([late], EngineStats()))
        wire.tell(20, 1)
        assert (await new).token_ids == [20]

    run(scenario())
