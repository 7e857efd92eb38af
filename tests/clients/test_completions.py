"""The older completions endpoint, which continues a text."""

import openai
import pytest

BEGIN = "Once upon a time, there was a little"


def complete(client, model, prompt=BEGIN, **options):
    options = {"temperature": 0, "max_tokens": 24, **options}
    return client.completions.create(model=model, prompt=prompt, **options)


def test_a_text_is_continued(client, model):
    answer = complete(client, model)
    assert answer.object == "text_completion"
    [choice] = answer.choices
    assert choice.text
    assert not choice.text.startswith(BEGIN)
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_echo_puts_the_prompt_in_front(client, model):
    assert complete(client, model, echo=True).choices[0].text == BEGIN + complete(client, model).choices[0].text


def test_several_prompts_are_answered_in_order(client, model):
    prompts = [BEGIN, "One day, a dog"]
    answers = complete(client, model, prompts).choices
    assert [choice.index for choice in answers] == [0, 1]
    assert [choice.text for choice in answers] == [complete(client, model, one).choices[0].text for one in prompts]


def test_a_prompt_may_be_token_ids(client, model):
    # 1 and 2 open and close a turn in the demo model.
    answer = complete(client, model, [1, 300, 301, 2])
    assert answer.usage.prompt_tokens == 4


def test_a_stream_makes_the_whole_text(client, model):
    chunks = list(complete(client, model, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == complete(client, model).choices[0].text


def test_logprobs_have_the_old_shape(client, model):
    logprobs = complete(client, model, logprobs=2, max_tokens=5).choices[0].logprobs
    assert len(logprobs.tokens) == 5
    assert len(logprobs.token_logprobs) == 5
    assert all(len(one) >= 2 for one in logprobs.top_logprobs)
    assert "".join(logprobs.tokens) == complete(client, model, max_tokens=5).choices[0].text


def test_stop_and_seed_work_here_too(client, model):
    whole = complete(client, model).choices[0].text
    stopped = complete(client, model, stop=whole[10:14]).choices[0]
    assert stopped.text == whole[: whole.index(whole[10:14])]
    assert stopped.finish_reason == "stop"
    same = {complete(client, model, temperature=1, seed=9).choices[0].text for _ in range(2)}
    assert len(same) == 1


@pytest.mark.parametrize(
    "options",
    [{"suffix": " the end"}, {"best_of": 3}, {"prompt": []}, {"prompt": [-1]}, {"prompt": [10_000_000]}, {"logprobs": 99}],
    ids=["suffix", "best_of", "no prompt", "negative token", "unknown token", "too many logprobs"],
)
def test_what_cannot_be_honoured_is_refused(client, model, options):
    with pytest.raises(openai.BadRequestError):
        complete(client, model, **options)
