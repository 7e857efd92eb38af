"""A model split into stages says exactly what the whole model says, in exact mode; in the default mode it says it all."""

import concurrent.futures
import json

import murmur_server
import pytest
from conftest import user

QUESTIONS = ["Who are you?", "Tell me a story about Lily and a kitten.", "Name three colors.", "Hi, I am Tom."]


def answers(server):
    """Greedy and seeded answers, then the same from eight requests at once."""
    client = server.client()

    def ask(question, temperature, seed):
        answer = client.chat.completions.create(
            model=server.model, messages=user(question), temperature=temperature, seed=seed, max_tokens=120,
            logprobs=True, top_logprobs=2,
        )
        [choice] = answer.choices
        return choice.message.content, choice.finish_reason, answer.usage.completion_tokens

    cases = [(question, temperature, seed) for question in QUESTIONS for temperature, seed in ((0, 1), (0.9, 42))]
    alone = [ask(*case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: ask(*case), cases))
    return alone, together


@pytest.fixture(scope="module")
def whole():
    with murmur_server.Server(stages=1, args=["--exact"]) as server:
        return answers(server)


def test_answers_alone_and_together_are_the_same(whole):
    alone, together = whole
    assert together == alone


@pytest.mark.parametrize("stages", [2, 3])
def test_the_number_of_stages_changes_nothing(whole, stages):
    with murmur_server.Server(stages=stages, args=["--exact"]) as server:
        assert answers(server) == whole


@pytest.mark.parametrize("stages", [1, 3])
def test_guesses_change_nothing(whole, stages):
    with murmur_server.Server(stages=stages, args=["--exact", "--draft", "lookup"]) as server:
        assert answers(server) == whole
        _, _, body = server.request("GET", "/api/status")
    [model] = json.loads(body)["node"]["models"]
    assert 0 < model["guessed_tokens"]
    assert model["right_tokens"] <= model["guessed_tokens"]


def test_more_stages_than_layers_are_refused():
    ended = murmur_server.run(
        "serve", murmur_server.DEMO_MODEL, "--stages", 13, "--api", f"127.0.0.1:{murmur_server.free_port()}"
    )
    assert ended.returncode != 0
    assert "12" in ended.stderr


@pytest.mark.parametrize("stages", [1, 3])
def test_the_default_mode_answers_everyone_in_full(stages):
    """Batches may flip a near-tie there, so texts are not compared; that every answer ends properly is."""
    with murmur_server.Server(stages=stages) as server:
        alone, together = answers(server)
        assert len(together) == len(alone)
        for text, finish, tokens in alone + together:
            assert text
            assert finish in ("stop", "length")
            assert tokens > 0
