"""Tool calls. The model is tiny: what is asserted is what a grammar forces and what the protocol promises."""

import json

import openai
import pytest
from conftest import user

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
LIGHT = {
    "type": "function",
    "function": {
        "name": "switch_light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}
QUESTION = user("How is the weather in Rome?")


def call(client, model, **options):
    options = {"tools": [WEATHER, LIGHT], "temperature": 0, "max_tokens": 200, **options}
    return client.chat.completions.create(model=model, messages=QUESTION, **options)


def check_weather(arguments):
    value = json.loads(arguments)
    assert value["city"] in ("Paris", "Rome")
    assert 1 <= value["days"] <= 9
    assert set(value) == {"city", "days"}


def test_a_named_tool_is_called_with_arguments_that_match_its_schema(client, model):
    [choice] = call(client, model, tool_choice={"type": "function", "function": {"name": "get_weather"}}).choices
    # OpenAI says "stop" for a named tool and "tool_calls" for the rest; both are seen in the field.
    assert choice.finish_reason in ("tool_calls", "stop")
    [tool_call] = choice.message.tool_calls
    assert tool_call.id
    assert tool_call.type == "function"
    assert tool_call.function.name == "get_weather"
    check_weather(tool_call.function.arguments)


def test_required_forces_a_call_of_one_of_the_tools(client, model):
    [choice] = call(client, model, tool_choice="required", parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls"
    [tool_call] = choice.message.tool_calls
    assert tool_call.function.name in ("get_weather", "switch_light")
    value = json.loads(tool_call.function.arguments)
    if tool_call.function.name == "get_weather":
        check_weather(tool_call.function.arguments)
    else:
        assert isinstance(value["on"], bool)


def test_streamed_calls_add_up_to_the_whole_call(client, model):
    forced = {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    whole = call(client, model, **forced).choices[0].message.tool_calls[0]
    name, arguments, ids, reasons = "", "", set(), []
    for chunk in call(client, model, stream=True, **forced):
        for choice in chunk.choices:
            reasons.append(choice.finish_reason)
            assert not choice.delta.content
            for part in choice.delta.tool_calls or []:
                assert part.index == 0
                name += part.function.name or ""
                arguments += part.function.arguments or ""
                if part.id:
                    ids.add(part.id)
    assert name == whole.function.name
    assert arguments == whole.function.arguments
    assert len(ids) == 1
    assert [reason for reason in reasons if reason] in (["tool_calls"], ["stop"])


def test_auto_leaves_the_choice_to_the_model(client, model):
    for options in ({}, {"tool_choice": "auto"}):
        [choice] = call(client, model, **options).choices
        assert choice.message.content or choice.message.tool_calls
        assert choice.finish_reason in ("stop", "length", "tool_calls")


def test_none_forbids_calls(client, model):
    [choice] = call(client, model, tool_choice="none").choices
    assert not choice.message.tool_calls


def test_a_result_can_be_handed_back(client, model):
    [choice] = call(client, model, tool_choice={"type": "function", "function": {"name": "get_weather"}}).choices
    tool_call = choice.message.tool_calls[0]
    messages = [
        *QUESTION,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": tool_call.id, "content": '{"sky": "clear"}'},
    ]
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=60
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tools": [{"type": "retrieval"}]},
        {"tool_choice": {"type": "function", "function": {"name": "no_such_tool"}}},
        {"tool_choice": "sometimes"},
    ],
    ids=["empty name", "unknown type", "unknown tool", "unknown choice"],
)
def test_tools_that_make_no_sense_are_refused(client, model, options):
    with pytest.raises(openai.BadRequestError) as refused:
        call(client, model, **options)
    assert refused.value.param


def test_a_choice_without_tools_is_refused(server):
    body = {"model": server.model, "messages": QUESTION, "tool_choice": "required"}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 400
    assert answer["error"]["message"]
