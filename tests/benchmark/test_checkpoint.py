import json
import struct

import pytest

from benchmark.checkpoint import inspect, locate
from benchmark.errors import RunError, UsageError
from tests.benchmark.builders import write_checkpoint


def test_a_sound_checkpoint(tmp_path):
    found = inspect(write_checkpoint(tmp_path / "a"))
    assert (found.parameters, found.weight_bytes, found.config["model_type"]) == (4, 16, "gpt_neo")


def test_the_fingerprint_follows_weights_and_config(tmp_path):
    path = write_checkpoint(tmp_path / "a")
    first = inspect(path).fingerprint
    assert inspect(write_checkpoint(tmp_path / "b")).fingerprint == first
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1] + b"\1")
    assert inspect(path).fingerprint != first
    assert inspect(write_checkpoint(tmp_path / "c", vocab_size=7)).fingerprint != first


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("random_weights", [False, True])
def test_the_fingerprint_follows_the_files_beside_the_config(tmp_path, name, random_weights):
    path = write_checkpoint(tmp_path)
    found = []
    for text in (None, '{"a": 1}', '{"a": 2}'):
        if text is not None:
            (path / name).write_text(text)
        found.append(inspect(path, random_weights).fingerprint)
    assert len(set(found)) == 3


@pytest.mark.parametrize("keep", [0, 7, 8, 30, -16, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError) as caught:
        inspect(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert f"{path.stat().st_size} bytes" in message
    assert "again" in message


def test_trailing_bytes_are_refused(tmp_path):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(RunError, match="promises"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]}}, "gaps"),
        ({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]}}, "do not fit its shape"),
        ({"w": {"dtype": "F32", "shape": [2, 2]}}, "incomplete"),
        ({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, "x"]}}, "incomplete"),
        ({"w": [1]}, "incomplete"),
        ({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}}, "do not fit"),
        ([1], "no object"),
    ],
)
def test_an_inconsistent_header_is_refused(tmp_path, tensors, words):
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(RunError, match=words):
        inspect(tmp_path)


def test_a_header_that_is_no_json_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope")
    with pytest.raises(RunError, match="no JSON"):
        inspect(tmp_path)


def test_pickled_weights_are_refused_unopened(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04payload")
    with pytest.raises(RunError, match=r"pickled weights only \(pytorch_model.bin\)"):
        inspect(tmp_path)


def test_no_weights_at_all(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RunError, match="--random_weights"):
        inspect(tmp_path)
    assert inspect(tmp_path, random_weights=True).parameters == 0


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation_internal", "trust_remote_code"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_asks_for_code_is_refused(tmp_path, key, nested):
    extra = {key: "owner/code"}
    write_checkpoint(tmp_path, **({"text_config": extra} if nested else extra))
    with pytest.raises(RunError, match=key):
        inspect(tmp_path)


def test_a_tokenizer_that_asks_for_code_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.py"}}')
    with pytest.raises(RunError, match="tokenizer_config.json sets 'auto_map'"):
        inspect(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_an_unreadable_config_is_refused(tmp_path, text):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json"):
        inspect(tmp_path)


def test_a_missing_shard_and_a_shard_outside(tmp_path):
    write_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for name in ("other.safetensors", "../model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(RunError, match="missing"):
            inspect(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    assert inspect(tmp_path).parameters == 4


def test_names_are_folders_or_hub_ids(tmp_path):
    folder = write_checkpoint(tmp_path / "models" / "a")
    assert locate(str(folder), tmp_path) == folder
    assert locate("models/a", tmp_path) == folder
    assert locate("EleutherAI/gpt-neo-125m", tmp_path) is None
    for name in (str(tmp_path / "none"), "./none", "models/none", "a/b/c", "~/none-here", "no good"):
        with pytest.raises(UsageError, match="no such directory"):
            locate(name, tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        locate(str(folder / "config.json"), tmp_path)


def test_a_damaged_generation_config_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(RunError, match="generation_config.json cannot be read"):
        inspect(tmp_path)


def test_streams_alone_are_looked_at_with_their_base(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    streams = write_checkpoint(tmp_path / "streams", base_model_name_or_path="../base")
    found = inspect(streams)
    assert (found.parameters, found.weight_bytes) == (8, 32)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1] + b"\1")
    assert inspect(streams).fingerprint != found.fingerprint
    (base / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"base/model.safetensors is corrupt"):
        inspect(streams)


@pytest.mark.parametrize("base", ["/nowhere/base", "../base", "./base"])
def test_streams_whose_base_is_gone_say_so(tmp_path, base):
    write_checkpoint(tmp_path, base_model_name_or_path=base)
    with pytest.raises(RunError, match="put the base model back"):
        inspect(tmp_path)


@pytest.mark.parametrize("base", ["owner/name", "."])
def test_a_base_on_the_hub_or_in_itself_ends(tmp_path, base):
    write_checkpoint(tmp_path, base_model_name_or_path=base)
    assert inspect(tmp_path).parameters in (4, 8)
