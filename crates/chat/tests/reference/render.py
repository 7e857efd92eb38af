#!/usr/bin/env python3
"""Renders conversations over every *.jinja file of a directory as Hugging Face transformers does, and prints JSON.

Usage: render.py TEMPLATES_DIR CONVERSATIONS_JSON > renderings.json

Output: {"template": {"conversation": {"text": ...} or {"error": ...}}}. Needs jinja2 (3.1.6; nothing else), so that the
reference costs no installation of transformers: the environment below states what its
`utils/chat_template_utils.py` sets up.
"""

import datetime
import json
import pathlib
import sys

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The time that `strftime_now` tells; the Rust test gives the same.
NOW = datetime.datetime(2024, 7, 26, 12, 34, 56)
BOS, EOS = "<s>", "</s>"


class Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; for the text itself it is a block that prints."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env


def render(template, conversation):
    variables = {
        "messages": conversation["messages"],
        "tools": conversation.get("tools"),
        "documents": None,
        "add_generation_prompt": conversation.get("add_generation_prompt", True),
        "bos_token": BOS,
        "eos_token": EOS,
    }
    variables.update(conversation.get("extra", {}))
    try:
        return {"text": template.render(**variables)}
    except Exception as error:  # whatever a template may raise is its result
        return {"error": f"{type(error).__name__}: {error}"}


def main():
    directory, conversations = sys.argv[1:3]
    conversations = json.loads(pathlib.Path(conversations).read_text(encoding="utf-8"))
    env = environment()
    results = {}
    for path in sorted(pathlib.Path(directory).glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        try:
            template = env.from_string(source)
        except jinja2.TemplateError as error:
            results[path.stem] = {name: {"error": f"compile: {error}"} for name in conversations}
            continue
        results[path.stem] = {name: render(template, one) for name, one in conversations.items()}
    json.dump(results, sys.stdout, ensure_ascii=False)


if __name__ == "__main__":
    main()
