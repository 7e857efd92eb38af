"""Embeddings, from a BERT-style model with random weights that the binary itself makes."""

import math

import murmur_server
import openai
import pytest
from conftest import user


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "bert.gguf"
    made = murmur_server.run("models", "synth", "bert", path)
    assert made.returncode == 0, made.stderr
    with murmur_server.Server(path) as server:
        yield server


def embed(embedder, texts, **options):
    answer = embedder.client().embeddings.create(model=embedder.model, input=texts, **options)
    return [one.embedding for one in answer.data]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_every_text_gets_a_vector_of_length_one(embedder):
    answer = embedder.client().embeddings.create(model=embedder.model, input=["hello", "a longer text about a dog"])
    assert answer.object == "list"
    assert [one.index for one in answer.data] == [0, 1]
    assert len({len(one.embedding) for one in answer.data}) == 1
    for one in answer.data:
        assert math.sqrt(sum(value * value for value in one.embedding)) == pytest.approx(1, abs=1e-3)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_equal_texts_have_equal_vectors_and_others_differ(embedder):
    first, second, other = embed(embedder, ["hello", "hello", "goodbye"])
    assert cosine(first, second) == pytest.approx(1, abs=1e-5)
    assert cosine(first, other) < 0.99999


def test_a_text_has_the_same_vector_alone_and_in_a_batch(embedder):
    texts = ["one", "two two", "three three three"]
    for text, vector in zip(texts, embed(embedder, texts), strict=True):
        [alone] = embed(embedder, text)
        assert cosine(alone, vector) == pytest.approx(1, abs=1e-5)


def test_both_encodings_carry_the_same_numbers(embedder):
    # The client asks for base64 by itself and decodes it.
    [decoded] = embed(embedder, "hello")
    [plain] = embed(embedder, "hello", encoding_format="float")
    assert decoded == pytest.approx(plain, abs=1e-6)


def test_token_ids_are_an_input_too(embedder):
    assert len(embed(embedder, [[5, 6, 7], [8]])) == 2


@pytest.mark.parametrize("texts", ["", [], [""], "word " * 10_000], ids=["empty", "none", "one empty", "too long"])
def test_inputs_without_a_vector_are_refused(embedder, texts):
    with pytest.raises(openai.BadRequestError):
        embed(embedder, texts)


def test_an_embedding_model_does_not_chat(embedder):
    with pytest.raises(openai.BadRequestError):
        embedder.client().chat.completions.create(model=embedder.model, messages=user("Hi"))


def test_a_chat_model_does_not_embed(client, model):
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=model, input="hello")
