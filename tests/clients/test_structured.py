"""Structured output: the answer matches the schema because nothing else can be generated."""

import enum
import json
import re

import openai
import pydantic
import pytest
from conftest import user

QUESTION = user("Tell me about a cat as JSON.")


class Colour(enum.Enum):
    red = "red"
    grey = "grey"


class Cat(pydantic.BaseModel):
    colour: Colour
    age: int = pydantic.Field(ge=0, le=30)
    friendly: bool
    names: list[Colour] = pydantic.Field(min_length=1, max_length=2)


def schema(value, strict=True):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": strict, "schema": value}}


def ask(client, model, response_format, **options):
    options = {"temperature": 0, "max_tokens": 200, **options}
    return client.chat.completions.create(model=model, messages=QUESTION, response_format=response_format, **options)


def test_the_clients_parse_helper_gets_an_object(client, model):
    answer = client.chat.completions.parse(
        model=model, messages=QUESTION, response_format=Cat, temperature=0, max_tokens=300
    )
    cat = answer.choices[0].message.parsed
    assert isinstance(cat, Cat)
    assert 0 <= cat.age <= 30


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize(
    "wanted, check",
    [
        ({"type": "integer", "minimum": 10, "maximum": 99}, lambda v: 10 <= v <= 99),
        ({"enum": ["yes", "no", "perhaps"]}, lambda v: v in ("yes", "no", "perhaps")),
        ({"const": {"a": [1, None]}}, lambda v: v == {"a": [1, None]}),
        ({"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"}, lambda v: re.fullmatch("[a-f]{3}-[0-9]{2}", v)),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}, lambda v: 2 <= len(v) <= 4),
        ({"anyOf": [{"const": 1}, {"const": "one"}]}, lambda v: v in (1, "one")),
        (
            {
                "type": "object",
                "properties": {"kind": {"$ref": "#/$defs/kind"}},
                "required": ["kind"],
                "additionalProperties": False,
                "$defs": {"kind": {"enum": ["cat", "dog"]}},
            },
            lambda v: v in ({"kind": "cat"}, {"kind": "dog"}),
        ),
    ],
    ids=["integer", "enum", "const", "pattern", "array", "anyOf", "ref"],
)
def test_an_answer_matches_its_schema_at_any_temperature(client, model, wanted, check, temperature):
    choice = ask(client, model, schema(wanted), temperature=temperature, seed=1).choices[0]
    assert choice.finish_reason == "stop", choice.message.content
    assert check(json.loads(choice.message.content))


def test_a_streamed_answer_matches_too(client, model):
    wanted = schema({"enum": ["left", "right"]})
    pieces = [c.choices[0].delta.content or "" for c in ask(client, model, wanted, stream=True) if c.choices]
    assert json.loads("".join(pieces)) in ("left", "right")


def test_a_json_object_is_json(client, model):
    choice = ask(client, model, {"type": "json_object"}, max_tokens=100, seed=2).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_plain_text_is_the_default_format(client, model):
    plain = ask(client, model, {"type": "text"}).choices[0].message.content
    assert plain == ask(client, model, openai.omit).choices[0].message.content


@pytest.mark.parametrize(
    "response_format",
    [
        schema({"type": "no such type"}),
        schema({"type": "integer", "minimum": 5, "maximum": 4}),
        schema({"$ref": "#/$defs/missing"}),
        {"type": "json_schema"},
        {"type": "yaml"},
        schema("not a schema"),
    ],
    ids=["unknown type", "unsatisfiable", "dangling reference", "no schema", "unknown format", "a string"],
)
def test_a_schema_that_nothing_can_match_is_refused(client, model, response_format):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, model, response_format)
    assert refused.value.message
