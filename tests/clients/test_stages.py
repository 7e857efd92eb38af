"""A model split into stages says exactly what the whole model says, in exact mode; in the default mode it says it all."""

import concurrent.futures
import json

import murmur_server
import pytest
from conftest import user

# So long an answer of so small a model repeats itself, and what is looked up is guessed even where models are too slow.
LONG = {"temperature": 0, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
# Far more than it takes on a busy machine.
GUESS_ATTEMPTS = 30
QUESTIONS = ["Who are you?", "Tell me a story about Lily and a kitten.", "Name three colors.", "Hi, I am Tom."]
GREEDY, SAMPLED = {"temperature": 0, "seed": 1}, {"temperature": 0.9, "seed": 42}
PENALISED = {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.4, "presence_penalty": 0.2, "seed": 7}
NAMES = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 2, "maxItems": 4}
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}, "names": NAMES}, "required": ["age", "names"], "additionalProperties": False}
FORMED = {
    "temperature": 0.8, "seed": 5,
    "response_format": {"type": "json_schema", "json_schema": {"name": "cat", "strict": True, "schema": SCHEMA}},
}


def answers(server, usages=None):
    """Answers of all kinds, then the same from all requests at once. `usages` takes those of the former and the latter."""
    client = server.client()

    def ask(question, options):
        answer = client.chat.completions.create(
            model=server.model, messages=user(question), max_tokens=120, logprobs=True, top_logprobs=2, **options,
        )
        [choice] = answer.choices
        if usages is not None:
            usages.append(answer.usage)
        return choice.message.content, choice.finish_reason, answer.usage.completion_tokens

    cases = [(question, options) for question in QUESTIONS for options in (GREEDY, SAMPLED)]
    cases += [(question, options) for question in QUESTIONS[:2] for options in (PENALISED, FORMED)]
    alone = [ask(*case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: ask(*case), cases))
    return alone, together


def status(server):
    _, _, body = server.request("GET", "/api/status")
    [model] = json.loads(body)["node"]["models"]
    return model


def long_answer(server, usages=None):
    """One in which tokens are guessed, if anybody guesses. `usages` takes what it took."""
    answer = server.client().completions.create(model=server.model, prompt=QUESTIONS[0], **LONG)
    [choice] = answer.choices
    if usages is not None:
        usages.append(answer.usage)
    return choice.text, choice.finish_reason, answer.usage.completion_tokens


def until_guessed(server, plain, usages=None):
    """Its status once a token was guessed: that is done only where it pays, by times that are measured, and on a busy machine it may
    not for a while. Until then it is asked for long answers, which repeat themselves, and each has to be that without guesses. `usages`
    takes theirs."""
    for _ in range(GUESS_ATTEMPTS):
        assert long_answer(server, usages) == plain
        after = status(server)
        if after["guessed_tokens"]:
            return after
    raise AssertionError(f"nothing was guessed: {after}")


@pytest.fixture(scope="module")
def whole():
    with murmur_server.Server(stages=1, args=["--exact"]) as server:
        return answers(server), long_answer(server)


def test_answers_alone_and_together_are_the_same(whole):
    (alone, together), _ = whole
    assert together == alone


@pytest.mark.parametrize("stages", [2, 3])
def test_the_number_of_stages_changes_nothing(whole, stages):
    with murmur_server.Server(stages=stages, args=["--exact"]) as server:
        assert (answers(server), long_answer(server)) == whole


@pytest.mark.parametrize("stages", [1, 3])
def test_guesses_change_nothing(whole, stages):
    plain, long = whole
    with murmur_server.Server(stages=stages, args=["--exact", "--draft", "lookup"]) as server:
        assert answers(server) == plain
        model = until_guessed(server, long)
    assert model["right_tokens"] <= model["guessed_tokens"]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Two models of one vocabulary that have nothing else in common, the second small and fast, and the answers of the first: those of
    all kinds, and a long one."""
    folder = tmp_path_factory.mktemp("models")
    model, draft = folder / "model.gguf", folder / "draft.gguf"
    for path, more in ((model, ()), (draft, ("--layers", 1, "--seed", 7))):
        assert murmur_server.run("models", "synth", "llama", path, *more).returncode == 0
    with murmur_server.Server(model, stages=1, args=["--exact"]) as server:
        return model, draft, answers(server), long_answer(server)


def predictions(details):
    return details.accepted_prediction_tokens, details.rejected_prediction_tokens


@pytest.mark.parametrize("stages", [1, 3])
def test_guesses_of_a_model_change_nothing_and_are_told(whole, stages):
    draft = ["--draft", murmur_server.DEMO_MODEL, "--draft-spoilt", "0.3"]
    plain, long = whole
    usages = []
    with murmur_server.Server(stages=stages, args=["--exact", *draft]) as server:
        assert answers(server, usages) == plain
        after = until_guessed(server, long, usages)
        assert server.metric("murmur_guessed_tokens_total") == after["guessed_tokens"]
        assert server.metric("murmur_right_guesses_total") == after["right_tokens"]
        assert server.metric("murmur_rejected_seconds_total") == pytest.approx(after["rejected_us"] / 1e6)
    assert after["draft"]["model"] == murmur_server.DEMO_MODEL.name
    assert after["draft"]["process_id"]
    assert after["guessing"]["rows_per_frame"] > 0
    assert after["guessing"]["plain_left"] >= 0
    assert after["guessing"]["pays"] in (True, False)
    assert after["guessing"]["tokens_around"] is None or after["guessing"]["tokens_around"] > 0
    assert after["travel_us"] >= 0
    assert [stage["hop_us"] for stage in after["stages"]] == [0] * stages
    assert sum(after["right_by_depth"]) == after["right_tokens"]
    assert after["right_tokens"] <= sum(after["guessed_by_depth"]) <= after["guessed_tokens"]
    details = [usage.completion_tokens_details for usage in usages if usage.completion_tokens_details]
    assert details
    right, wrong = (sum(column) for column in zip(*map(predictions, details), strict=True))
    assert right == after["right_tokens"]
    assert right + wrong == after["guessed_tokens"]


@pytest.mark.parametrize("stages", [1, 3])
def test_guesses_of_a_model_that_is_mostly_wrong_change_nothing(strangers, stages):
    model, draft, plain, long = strangers
    with murmur_server.Server(model, stages=stages, args=["--exact", "--draft", draft]) as server:
        assert answers(server) == plain
        until_guessed(server, long)


def test_guesses_are_in_the_usage_of_streams_and_completions():
    draft = ["--draft", murmur_server.DEMO_MODEL, "--draft-spoilt", "0.3"]
    with murmur_server.Server(args=["--exact", *draft]) as server:
        client = server.client()
        options = {"model": server.model, **LONG}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        ways = [
            lambda: list(client.chat.completions.create(messages=user(QUESTIONS[0]), **options, **streamed))[-1].usage,
            lambda: list(client.completions.create(prompt=QUESTIONS[0], **options, **streamed))[-1].usage,
            lambda: client.completions.create(prompt=QUESTIONS[1], **options).usage,
        ]
        for ask in ways:
            for _ in range(GUESS_ATTEMPTS):
                before, details = status(server)["guessed_tokens"], ask().completion_tokens_details
                guessed = status(server)["guessed_tokens"] - before
                assert sum(predictions(details) if details else ()) == guessed
                if guessed:
                    break
            else:
                pytest.fail("nothing was guessed")


def test_nothing_is_said_of_guesses_where_there_are_none(client, model):
    answer = client.chat.completions.create(model=model, messages=user(QUESTIONS[0]), temperature=0)
    assert answer.usage.completion_tokens_details is None


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
