"""The library: the engine in this process, with the server's own validation and text handling."""

from __future__ import annotations

import threading

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import InvalidRequestError, JaxserveError, UnavailableError

GREEDY = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM(
        "configs/tiny",
        load_format="dummy",
        tokenizer_path="bytes",
        chat_template="chatml",
        dtype="float32",
        context_length=512,
        max_running_requests=4,
        log_level="warning",
        compilation_cache_dir=str(tmp_path_factory.mktemp("programs")),
    ) as model:
        yield model


def test_one_prompt_gives_one_answer_and_several_give_a_list(llm):
    one = llm.generate("hello", GREEDY)
    several = llm.generate(["hello", list(b"hello")], GREEDY)
    assert len(one["output_ids"]) == 8
    assert one["meta_info"]["prompt_tokens"] == 5
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    assert [answer["text"] for answer in several] == [one["text"]] * 2


def test_choices_of_one_prompt_are_a_list_in_order(llm):
    sampled = SamplingParams(max_new_tokens=4, n=3, seed=5, ignore_eos=True)
    choices = llm.generate("hello", sampled)
    assert len(choices) == 3
    assert len({tuple(choice["output_ids"]) for choice in choices}) == 3
    assert choices == [
        {**again, "meta_info": {**again["meta_info"], "cached_tokens": choice["meta_info"]["cached_tokens"]}}
        for again, choice in zip(llm.generate("hello", sampled), choices, strict=True)
    ]


def test_scoring_a_reply_gives_the_logprobs_it_was_made_with(llm):
    sampled = SamplingParams(max_new_tokens=6, seed=3, ignore_eos=True, logprobs=2, logprob_ids=(7, 9))
    made = llm.generate("hello", sampled)
    made_entries = made["meta_info"]["output_token_logprobs"]
    prompt = [*b"hello", *made["output_ids"]]
    scoring = SamplingParams(max_new_tokens=0, logprobs=0, logprob_start=4)
    scored = llm.generate(prompt, scoring)["meta_info"]
    first, *others = scored["input_token_logprobs"]
    assert first == (None, ord("o"), "o")
    assert [entry[1:] for entry in others] == [entry[1:] for entry in made_entries]
    assert [entry[0] for entry in others] == pytest.approx([entry[0] for entry in made_entries], abs=1e-4)
    assert [len(tops) for tops in made["meta_info"]["output_top_logprobs"]] == [2] * 6
    assert [item[1] for item in made["meta_info"]["output_token_ids_logprobs"][0]] == [7, 9]


def test_beams_are_a_list_best_first_with_their_scores(llm):
    search = SamplingParams(temperature=0, max_new_tokens=4, beam_width=3, ignore_eos=True, logprobs=1)
    beams = llm.generate("hello", search)
    totals = [beam["meta_info"]["cumulative_logprob"] for beam in beams]
    assert totals == sorted(totals, reverse=True)
    for beam, total in zip(beams, totals, strict=True):
        assert sum(entry[0] for entry in beam["meta_info"]["output_token_logprobs"]) == pytest.approx(total)
        assert len(beam["output_ids"]) == 4
    assert len({tuple(beam["output_ids"]) for beam in beams}) == 3
    plain = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True, logprobs=0)
    greedy = llm.generate("hello", plain)
    best_alone = sum(entry[0] for entry in greedy["meta_info"]["output_token_logprobs"])
    assert totals[0] >= best_alone - 1e-4
    assert len(llm.generate(["a", "b"], search)[1]) == 3


def test_a_stream_is_the_same_text_in_parts_and_may_be_left(llm):
    messages = [{"role": "user", "content": "hello"}]
    assert "".join(llm.stream(messages, GREEDY)) == llm.chat(messages, GREEDY)["text"]
    long = SamplingParams(temperature=0, max_new_tokens=400, ignore_eos=True)
    for text in llm.stream("hello", long):
        assert text
        break
    assert len(llm.generate("after", GREEDY)["output_ids"]) == 8


def test_more_prompts_than_rows_from_several_threads(llm):
    answers: list[list[str]] = []

    def work() -> None:
        replies = llm.generate([f"prompt {i}" for i in range(9)], GREEDY)
        answers.append([reply["text"] for reply in replies])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0] == answers[1] == answers[2]


def test_places_in_a_prompt_are_asked_about_by_a_literal(llm):
    reply = llm.sample("Is it <answer>? Or <answer>?", "<answer>", logprobs=3)
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["selector_match"] * 2
    assert [len(choice["logprobs"]["token_ids"]) for choice in reply["choices"]] == [3, 3]
    several = llm.sample(["Is it <answer>? Or <answer>?", "none"], ["<answer>", "<x>"], logprobs=3)
    assert [one["choices"] for one in several] == [reply["choices"], []]
    expected = llm.generate("Is it ", SamplingParams(temperature=0, max_new_tokens=1))["output_ids"]
    assert reply["choices"][0]["logprobs"]["token_ids"][:1] == expected
    with pytest.raises(InvalidRequestError, match="logprobs must be between 1 and 5, got 6"):
        llm.sample("a<x>", "<x>", logprobs=6)
    with pytest.raises(InvalidRequestError, match="one selector for each of the 1 prompts, got 2"):
        llm.sample("a<x>", ["<x>", "<y>"])


def test_progress_is_shown_when_asked_for(llm, capsys):
    llm.generate(["a", "b"], GREEDY)
    assert "Generating" not in capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, show_progress=True)
    assert "Generating" in capsys.readouterr().err


def test_a_closed_model_says_so_and_closes_once(tmp_path):
    model = LLM(
        "configs/tiny", load_format="dummy", tokenizer_path="bytes", context_length=64, log_level="error"
    )
    failures: list[Exception] = []

    def wait_in_vain() -> None:
        try:
            model.generate("hello", SamplingParams(max_new_tokens=50, ignore_eos=True, n=40))
        except JaxserveError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait_in_vain)
    waiting.start()
    while not model.info or not model._client.stats.num_running:
        waiting.join(0.01)
    model.close()
    model.close()
    waiting.join(30)
    assert [str(failure) for failure in failures] == ["The model was closed."]
    with pytest.raises(UnavailableError, match="was closed"):
        model.generate("hello")


def test_sampling_may_be_asked_for_by_a_dict_as_in_generate(llm):
    asked = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    assert llm.generate("hello", asked)["output_ids"] == llm.generate("hello", GREEDY)["output_ids"]
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        llm.generate("hello", {"max_tokens": 8})
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.chat([{"role": "user", "content": "hello"}], {"temperature": "hot"})
    with pytest.raises(InvalidRequestError, match="must be SamplingParams or a dict, got float"):
        llm.generate("hello", 0.5)


def test_what_is_impossible_is_refused_with_a_sentence(llm):
    with pytest.raises(InvalidRequestError, match="temperature must be a finite number >= 0, got -1"):
        llm.generate("hello", SamplingParams(temperature=-1))
    with pytest.raises(InvalidRequestError, match="longer than the model's context length"):
        llm.generate("x" * 600, GREEDY)
    with pytest.raises(InvalidRequestError, match="n must be 1 for a stream, got 2"):
        next(llm.stream("hello", SamplingParams(n=2)))
    with pytest.raises(InvalidRequestError, match="beam_width must be 1 for a stream, got 2"):
        next(llm.stream("hello", SamplingParams(temperature=0, beam_width=2)))
    with pytest.raises(InvalidRequestError, match="beam_width must be at most 4, the sequences"):
        llm.generate("hello", SamplingParams(temperature=0, beam_width=5))
    with pytest.raises(InvalidRequestError, match="logprob_start must be at most the number of prompt"):
        llm.generate("hello", SamplingParams(logprobs=0, logprob_start=6))
    with pytest.raises(InvalidRequestError, match="at least one message"):
        llm.chat([[]])
    with pytest.raises(JaxserveError, match="is one engine; several serve with `jaxserve launch`"):
        LLM("configs/tiny", dp_size=2)
    with pytest.raises(TypeError, match="no setting modle"):
        LLM("configs/tiny", modle=1)
