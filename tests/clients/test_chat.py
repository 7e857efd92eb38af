"""Chat completions without streaming, through the official Python client."""

import asyncio

import openai
import pytest
from conftest import user

STORY = "Tell me a story about Lily and a kitten."


def test_the_model_list_names_the_model_and_it_can_be_retrieved(client, model):
    listed = client.models.list().data
    assert [one.id for one in listed] == [model]
    assert listed[0].object == "model"
    assert client.models.retrieve(model).id == model


def test_an_answer_has_the_shape_that_the_client_expects(ask, model):
    answer = ask("Who are you?")
    assert answer.object == "chat.completion"
    assert answer.model == model
    assert answer.id
    [choice] = answer.choices
    assert choice.index == 0
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert "Murmur" in choice.message.content
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_earlier_turns_are_part_of_the_prompt(client, model):
    messages = user("Hi, I am Nora.")
    first = client.chat.completions.create(model=model, messages=messages, temperature=0)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *user("What is my name?")]
    second = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert "Nora" in second.choices[0].message.content


def test_content_may_be_a_list_of_text_parts(client, model, ask):
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}], temperature=0)
    assert answer.choices[0].message.content == ask("Who are you?").choices[0].message.content


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_token_limit_ends_the_answer_with_length(ask, name):
    answer = ask(STORY, **{name: 7})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_greedy_answers_are_repeatable(ask):
    assert ask(STORY).choices[0].message.content == ask(STORY).choices[0].message.content


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(ask):
    answers = [ask(STORY, temperature=1, seed=seed, max_tokens=60).choices[0].message.content for seed in (7, 7, 8)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_without_a_seed_every_request_gets_a_fresh_one(ask):
    answers = {ask(STORY, temperature=1, max_tokens=60).choices[0].message.content for _ in range(4)}
    assert len(answers) == 4


def test_the_seed_in_force_is_reported_and_repeats_the_answer(ask):
    first = ask(STORY, temperature=1, max_tokens=60)
    again = ask(STORY, temperature=1, max_tokens=60, seed=first.seed)
    assert again.choices[0].message.content == first.choices[0].message.content


def test_n_answers_are_independent_and_repeatable(ask):
    def answers():
        choices = ask(STORY, n=3, temperature=1, seed=11, max_tokens=40).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        return [choice.message.content for choice in choices]

    first = answers()
    assert len(set(first)) == 3
    assert answers() == first


def test_n_answers_are_all_counted_in_the_usage(ask):
    answer = ask(STORY, n=3, temperature=1, seed=3, max_tokens=10)
    assert answer.usage.completion_tokens == 30


def test_a_stop_string_ends_the_answer_before_itself_also_across_tokens(ask):
    whole = ask(STORY).choices[0].message.content
    for begin, end in [(20, 23), (31, 44), (60, 61)]:
        stop = whole[begin:end]
        choice = ask(STORY, stop=[stop]).choices[0]
        assert choice.message.content == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"


def test_the_first_of_several_stop_strings_wins(ask):
    whole = ask(STORY).choices[0].message.content
    early, late = whole[15:22], whole[50:57]
    assert ask(STORY, stop=[late, early]).choices[0].message.content == whole[: whole.index(early)]


def test_logprobs_describe_every_token_of_the_answer(ask):
    choice = ask("Who are you?", logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    spelt = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert spelt.startswith(choice.message.content)
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        best = [one.logprob for one in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        # Greedy: the token is the most probable one.
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == pytest.approx(best[0])


def test_logprobs_are_absent_unless_asked_for(ask):
    assert ask("Who are you?", max_tokens=3).choices[0].logprobs is None


def test_logit_bias_can_ban_a_token(ask):
    # The tokens that end an answer of the demo model: without them it goes on to the limit.
    answer = ask("Who are you?", logit_bias={"0": -100, "2": -100}, max_tokens=80)
    assert answer.choices[0].finish_reason == "length"


def test_penalties_change_the_answer(ask):
    plain = ask(STORY).choices[0].message.content
    assert ask(STORY, frequency_penalty=2, presence_penalty=2).choices[0].message.content != plain


def test_the_extensions_of_local_servers_are_honoured(ask):
    plain = ask(STORY, max_tokens=40).choices[0].message.content
    one = ask(STORY, temperature=1, seed=5, max_tokens=40, extra_body={"top_k": 1}).choices[0].message.content
    assert one == plain
    endless = ask("Who are you?", max_tokens=90, extra_body={"ignore_eos": True})
    assert endless.usage.completion_tokens == 90


def test_a_shared_prefix_is_not_computed_twice(default_server):
    # In exact mode only whole chunks of a prompt are reused, and these are longer than this one.
    client, model = default_server.client(), default_server.model
    beginning = "Tom has a dog, a red ball and a kite. He likes to play in the garden. " * 8
    usages = [
        client.chat.completions.create(
            model=model, messages=user(beginning + end), temperature=0, max_tokens=30
        ).usage
        for end in ("Tell me a story.", "Tell me a story.", "Who are you?")
    ]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached[0] == 0
    assert 100 < cached[1] < usages[1].prompt_tokens
    assert 100 < cached[2] < usages[2].prompt_tokens


def test_many_requests_at_once_each_get_their_own_answer(server, ask):
    names = ["Tom", "Mia", "Ben", "Zoe", "Max", "Anna", "Leo", "Ruby"]
    questions = [f"Hi, I am {name}." for name in names]
    alone = [ask(question).choices[0].message.content for question in questions]

    async def together():
        async with server.client(kind=openai.AsyncOpenAI) as client:
            answers = await asyncio.gather(*(
                client.chat.completions.create(model=server.model, messages=user(question), temperature=0)
                for question in questions
            ))
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(together()) == alone


def test_any_unicode_is_taken(client, model):
    text = "Gr\u00fc\u00dfe, \u4f60\u597d, \U0001f98a, \u202e, e\u0301"
    answer = client.chat.completions.create(model=model, messages=user(text), temperature=0, max_tokens=20)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_the_metrics_page_declares_every_figure_once(server, ask):
    ask("Who are you?", max_tokens=2)
    page = server.request("GET", "/metrics")[2].decode()
    names = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
    assert server.metric("murmur_generated_tokens_total") > 0
