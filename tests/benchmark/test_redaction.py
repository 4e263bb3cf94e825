import io
import json

import pytest

from benchmark.environment import collect, variables
from benchmark.redaction import HIDDEN, Redacted, redact


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"]
)
def test_values_of_secret_variables_are_hidden(name):
    assert redact("got s3cr3t-value here", {name: "s3cr3t-value"}) == f"got {HIDDEN} here"


def test_what_looks_like_a_token_is_hidden_and_the_rest_is_kept():
    assert redact("hf_abcdefghijklmnopqrstuvwx", {}) == HIDDEN
    assert redact("http://me:pass@proxy:80/x", {}) == f"http://{HIDDEN}@proxy:80/x"
    assert (
        redact("TOKENIZERS_PARALLELISM=false", {"TOKENIZERS_PARALLELISM": "parallel"})
        == "TOKENIZERS_PARALLELISM=false"
    )


def test_a_stream_hides_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "topsecrettoken")
    target = io.StringIO()
    stream = Redacted(target)
    stream.write("token topsecrettoken\n")
    stream.flush()
    assert target.getvalue() == f"token {HIDDEN}\n"


def test_the_environment_holds_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "topsecrettoken")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:topsecrettoken@example.org")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = collect({"device_name": "fake"}, tmp_path)
    assert "topsecrettoken" not in json.dumps(found)
    assert variables({"HF_HUB_OFFLINE": "1", "HOME": "/x"}) == {"HF_HUB_OFFLINE": "1"}
    assert {"device_name", "driver", "cpu_name", "commit", "packages", "python", "variables"} <= found.keys()
