import math

import pytest

from benchmark.config import RunConfig
from benchmark.errors import UsageError
from benchmark.flags import command_line, parse

CONTRACT = {
    "model_type": ("spec_stream",),
    "assistant_model": None,
    "datasets": ("spider", "dialogsum", "e2e_nlg"),
    "data_dir": None,
    "limit": 32,
    "batch_size": (1,),
    "max_new_tokens": 256,
    "attn_implementation": "auto",
    "num_runs": 3,
    "warmup": 1,
    "seed": 0,
    "temperature": 0.0,
    "acceptance_sweep": (),
    "draft_nodes": "auto",
    "dtype": "auto",
    "device": "auto",
    "output_dir": "results",
    "resume": True,
    "overwrite": False,
    "on_long": "truncate_left",
    "breakdown": True,
}


@pytest.mark.parametrize(("name", "value"), CONTRACT.items())
def test_defaults_are_those_of_the_contract(name, value):
    assert getattr(parse([]), name) == value


def test_lists_aliases_dashes_and_equals_signs():
    config = parse(
        ["--model-type=naive,int4+spec_stream", "--sample_size", "7", "--batch-size", "1,4", "--no-resume"]
    )
    assert config.model_type == ("naive", "int4+spec_stream")
    assert (config.limit, config.batch_size, config.resume) == (7, (1, 4), False)
    assert parse(["--acceptance_sweep", "0,0.5,1"]).acceptance_sweep == (0.0, 0.5, 1.0)
    assert parse(["--acceptance_sweep", "off"]).acceptance_sweep == ()
    assert parse(["--draft_nodes", "32"]).draft_nodes == 32


def test_an_option_without_a_default_takes_text():
    assert parse(["--calibration_text", "some.txt"]).technique_options == {"calibration_text": "some.txt"}


def test_options_of_techniques_are_flags_too():
    assert parse(["--prompt_lookup_num_tokens", "5"]).technique_options == {"prompt_lookup_num_tokens": 5}
    with pytest.raises(UsageError, match="whole number"):
        parse(["--prompt_lookup_num_tokens", "x"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--limitt", "3"], "did you mean '--limit'"),
        (["--modeltype", "naive"], "did you mean '--model_type'"),
        (["naive"], "unknown argument 'naive'"),
        (["--limit"], "expected one argument"),
        (["--limit", "0"], "--limit got 0, expected 1 or more"),
        (["--limit", "many"], "--limit got 'many', expected a whole number"),
        (["--max_new_tokens", "-1"], "--max_new_tokens got -1, expected 0 or more"),
        (["--batch_size", "1,0"], "--batch_size got 0"),
        (["--batch_size", "1,,a"], "whole numbers"),
        (["--batch_size", "2,2"], "each value once"),
        (["--model_type", "int8+spec_stream,spec_stream+int8"], "each value once"),
        (["--acceptance_sweep", "0.5,0.5"], "each value once"),
        (["--model_type", ","], "at least one"),
        (["--temperature", "nan"], "--temperature got nan"),
        (["--temperature", "-0.5"], "--temperature got -0.5"),
        (["--temperature", "inf"], "--temperature got inf"),
        (["--temperature", "1", "--top_p", "0"], "--top_p got 0.0"),
        (["--temperature", "1", "--top_p", "1.5"], "--top_p got 1.5"),
        (["--temperature", "1", "--top_k", "-1"], "--top_k got -1"),
        (["--top_k", "5"], "add --temperature"),
        (["--temperature", "1", "--acceptance_sweep", "0.5"], "needs greedy decoding"),
        (["--acceptance_sweep", "0,1.2"], "ratios from 0 to 1"),
        (["--draft_nodes", "0"], "--draft_nodes got 0"),
        (["--draft_nodes", "few"], "expected auto|N"),
        (["--dtype", "float8"], "one of auto, float32"),
        (["--on_long", "cut"], "one of truncate_left"),
        (["--device", "tpu"], "--device got tpu"),
        (["--device", "cpu:1"], "--device got cpu:1"),
        (["--num_runs", "0"], "--num_runs got 0"),
        (["--warmup", "-1"], "--warmup got -1"),
        (["--timeout_s", "0"], "--timeout_s got 0.0"),
        (["--run_name", "../x"], "plain folder name"),
        (["--run_name", ".."], "plain folder name"),
        (["--seed", "-1"], "--seed got -1"),
    ],
)
def test_mistakes_are_named_with_what_was_expected(words, expected):
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert expected in str(caught.value)


def test_zero_and_one_new_tokens_are_allowed():
    assert parse(["--max_new_tokens", "0"]).max_new_tokens == 0
    assert parse(["--max_new_tokens", "1"]).max_new_tokens == 1


def test_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "limit: 5\nmodel_type: [naive, half]\nbatch_size: 2\nresume: false\nacceptance_sweep: off\n"
    )
    config = parse(["--config", str(file), "--limit", "6"])
    assert (config.limit, config.model_type, config.batch_size) == (6, ("naive", "half"), (2,))
    assert (config.resume, config.num_runs, config.acceptance_sweep) == (False, 3, ())
    assert parse(["--config", str(file), "--resume"]).resume is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("limt: 3", "did you mean 'limit'"),
        ("limit: x", "expected a whole number"),
        ("limit:", "no value"),
        ("limit: {a: 1}", "mapping"),
        ("resume: maybe", "true or false"),
        ("- limit", "holds a list"),
        ("a: [", "is not YAML"),
        ("limit: 0", "--limit got 0"),
        ("limit: 3\nseed: 1\nlimit: 4", "gives limit more than once"),
        ("limit: 3\nsample_size: 4", "gives limit more than once"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, expected):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        parse(["--config", str(file)])
    assert expected in str(caught.value)


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        parse(["--config", str(tmp_path / "none.yaml")])


def test_the_resume_command_gives_the_same_config_again():
    words = ["--model_type", "naive,half", "--no-breakdown", "--batch_size", "1,4", "--draft_nodes", "8"]
    words += ["--data_dir", "a b", "--max_matching_ngram_size", "3"]
    assert parse(command_line(parse(words))) == parse(words)
    assert command_line(RunConfig()) == []


def test_the_reproduce_config_is_valid():
    config = parse(["--config", "configs/reproduce.yaml"])
    assert config.model_type == ("naive", "half", "flash", "spec_stream")
    assert config.datasets == ("spider", "dialogsum", "e2e_nlg")


def test_every_option_has_a_help_text():
    from benchmark.flags import _known

    assert all(item.metadata["help"] for item in _known().values())
    assert not math.isnan(RunConfig().timeout_s)
