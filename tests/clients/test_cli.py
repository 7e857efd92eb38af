"""The binary from the shell: what prints where, what can be piped, which status it ends with."""

import json

import murmur_server
from murmur_server import DEMO_MODEL, run


def test_version_and_help_go_to_stdout():
    for args in (["--version"], ["--help"], ["serve", "--help"]):
        done = run(*args)
        assert done.returncode == 0
        assert done.stdout
        assert not done.stderr


def test_an_unknown_command_is_refused_with_advice():
    done = run("sreve")
    assert done.returncode == 2
    assert "serve" in done.stderr


def test_models_show_describes_a_file_also_as_json(tmp_path):
    done = run("--data-dir", tmp_path, "models", "show", DEMO_MODEL)
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout
    done = run("--data-dir", tmp_path, "--json", "models", "show", DEMO_MODEL)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_a_prompt_can_be_piped_and_only_the_answer_is_on_stdout(tmp_path):
    command = ["--data-dir", tmp_path, "run", DEMO_MODEL, "--temperature", 0]
    done = run(*command, "Who are you?")
    assert done.returncode == 0, done.stderr
    assert "Murmur" in done.stdout
    piped = run(*command, input="Who are you?\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == done.stdout


def test_status_says_what_a_server_serves(server):
    done = run("status", "--json", "--api", f"127.0.0.1:{server.port}")
    assert done.returncode == 0, done.stderr
    assert server.model in done.stdout


def test_status_without_a_server_says_so():
    done = run("status", "--api", f"127.0.0.1:{murmur_server.free_port()}")
    assert done.returncode != 0
    assert done.stderr


def test_doctor_ends_well_on_a_machine_that_runs_the_tests(tmp_path):
    done = run("--data-dir", tmp_path, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_a_missing_model_is_named(tmp_path):
    for model in (tmp_path / "no-such.gguf", tmp_path):
        done = run("--data-dir", tmp_path, "run", model, "Hi")
        assert done.returncode != 0
        assert model.name in done.stderr
        assert "panicked" not in done.stderr
