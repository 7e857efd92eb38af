"""Fixtures: servers are started once and shared, as a user's is."""

import pytest

import murmur_server


@pytest.fixture(scope="session")
def server():
    """The demo model. In exact mode, as tests compare texts that come about in different batches."""
    with murmur_server.Server(args=["--exact"]) as server:
        yield server


@pytest.fixture(scope="session")
def default_server():
    """The demo model with the defaults, as users start it."""
    with murmur_server.Server() as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    return server.client()


@pytest.fixture(scope="session")
def model(server):
    return server.model


@pytest.fixture
def ask(client, model):
    """One greedy question, one answer; keyword arguments go into the request."""

    def ask(question, **options):
        options = {"temperature": 0, **options}
        return client.chat.completions.create(model=model, messages=user(question), **options)

    return ask


def user(text):
    return [{"role": "user", "content": text}]
