from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

import train_spec_stream
from training.arguments import TrainingFlags
from training.checkpoints import last_complete
from training.errors import DivergedError
from training.objective import StreamObjective
from training.run import base_reference, cast_weights, run
from training.trainer import StreamTrainer, training_arguments

from .conftest import TINY_NEO, text_pairs, write_rows

COMMON = {
    "datasets": (),
    "vocab_size": 300,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 3,
    "eval_examples": 2,
    "save_steps": 3,
    "warmup_steps": 2,
    "max_new_tokens": 12,
    "calibration_prompts": 2,
    "max_steps": 6,
}


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def flags_for(mode: str, folder: Path, **changes) -> TrainingFlags:
    values = {**COMMON, "mode": mode, "output_dir": folder, **changes}
    if mode != "scratch":
        values.pop("vocab_size")
    return TrainingFlags(**values)


@pytest.fixture
def scratch(tmp_path, own_file, model_file):
    def make(name: str = "out", **changes) -> TrainingFlags:
        values = {"train_file": own_file, "model_config": model_file, **changes}
        return flags_for("scratch", tmp_path / name, **values)

    return make


def test_a_process_trains_on_one_gpu_however_many_it_sees(scratch, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 2))
    arguments = training_arguments(scratch())
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)


@pytest.fixture
def stock_llama(tmp_path, tokenizer) -> Path:
    folder = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        eos_token_id=0,
        bos_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_scratch_trains_saves_and_calibrates(scratch, caplog):
    with caplog.at_level(logging.INFO):
        folder = run(scratch(save_dtype="bfloat16"))
    assert "held out: acceptance_length" in caplog.text
    assert "streams" in caplog.text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "spec_stream_gpt_neo"
    saved = json.loads((folder / "generation_config.json").read_text())
    assert len(saved["spec_stream"]["rank_accuracy"]) == 2
    assert model.generation_config.spec_stream["rank_accuracy"] == saved["spec_stream"]["rank_accuracy"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Thing: red boat\nText:", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=5, do_sample=False, drafts="streams")
    assert output.shape[1] <= ids["input_ids"].shape[1] + 5
    card = (folder / "README.md").read_text()
    assert "python train_spec_stream.py --mode scratch" in card
    assert "Acceptance, measured" in card
    assert not list(folder.rglob("*.bin"))


def test_the_loss_falls(scratch, caplog):
    with caplog.at_level(logging.INFO):
        run(scratch(max_steps=60, eval_steps=0, calibration_prompts=0, learning_rate=1e-2, logging_steps=10))
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in caplog.messages if " loss " in line]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "save_steps": 3},
        {"bf16_weights": True, "learning_rate": 1e-2},
        {"batch_rows": 120},
    ],
)
def test_a_resumed_run_equals_an_uncut_one(scratch, changes):
    whole = run(scratch("whole", **changes))
    cut = scratch("cut", **changes)
    run(cut)
    shutil.rmtree(cut.output_dir / "checkpoint-6")
    (cut.output_dir / "model.safetensors").unlink()
    resumed = run(scratch("cut", resume_from_checkpoint="latest", **changes))
    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_a_torn_checkpoint_is_passed_over(scratch, caplog):
    whole = weights(run(scratch()))
    torn = scratch().output_dir / "checkpoint-6" / "optimizer.pt"
    os.truncate(torn, 100)
    with caplog.at_level(logging.WARNING):
        again = weights(run(scratch(resume_from_checkpoint="latest")))
    assert "checkpoint-6 is not whole" in caplog.text
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_adapters_leave_the_base_as_it_was(tmp_path, own_file, stock_llama):
    flags = flags_for("adapter", tmp_path / "out", train_file=own_file, model_name_or_path=str(stock_llama))
    folder = run(flags)
    base, trained = weights(stock_llama), weights(folder)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in base.items())
    assert any(
        name.startswith("streams.lora") and tensor.abs().sum() > 0
        for name, tensor in trained.items()
        if "up" in name
    )
    assert list((folder / "targets").glob("*.jsonl"))
    stock = LlamaForCausalLM.from_pretrained(stock_llama)
    streaming = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(stock(ids).logits, streaming(ids).logits, rtol=0, atol=0)


def streams_alone(folder: Path, own_file: Path, base: Path) -> Path:
    changes = {"train_file": own_file, "model_name_or_path": str(base), "streams_only": True}
    return run(flags_for("adapter", folder, **changes))


def assert_whole(folder: Path, base: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in weights(base).items())


def test_adapters_can_be_saved_without_their_base(tmp_path, own_file, stock_llama):
    folder = streams_alone(tmp_path / "out", own_file, stock_llama)
    assert all(name.startswith("streams.") for name in weights(folder))
    assert_whole(folder, stock_llama)


def test_streams_and_their_base_move_together(tmp_path, own_file, stock_llama):
    folder = streams_alone(tmp_path / "out", own_file, stock_llama)
    assert json.loads((folder / "config.json").read_text())["base_model_name_or_path"] == "../llama"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = shutil.move(folder, elsewhere / "out")
    with pytest.raises(ValueError, match=r"need their base model.*does not exist"):
        AutoModelForCausalLM.from_pretrained(moved)
    base = shutil.move(stock_llama, elsewhere / "llama")
    assert_whole(moved, base)


def test_streams_trained_on_streams_alone_stand_on_their_base(tmp_path, own_file, stock_llama):
    first = streams_alone(tmp_path / "first", own_file, stock_llama)
    again = streams_alone(tmp_path / "again", own_file, first)
    assert json.loads((again / "config.json").read_text())["base_model_name_or_path"] == "../llama"
    assert_whole(again, stock_llama)


def test_a_base_from_another_tree_keeps_its_whole_path(tmp_path, stock_llama):
    flags = flags_for(
        "adapter", tmp_path / "deep" / "out", model_name_or_path=str(stock_llama), datasets=("spider",)
    )
    assert base_reference(flags) == str(stock_llama.resolve())


def test_a_hub_id_stays_as_it_is(tmp_path):
    flags = flags_for("adapter", tmp_path / "out", model_name_or_path="owner/model", datasets=("spider",))
    assert base_reference(flags) == "owner/model"


def test_joint_trains_the_base_too(tmp_path, own_file, stock_llama):
    folder = run(
        flags_for("joint", tmp_path / "out", train_file=own_file, model_name_or_path=str(stock_llama))
    )
    base, trained = weights(stock_llama), weights(folder)
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in base.items())
    again = run(flags_for("adapter", tmp_path / "more", train_file=own_file, model_name_or_path=str(folder)))
    config = json.loads((again / "config.json").read_text())
    assert (config["model_type"], config["lora_rank"]) == ("spec_stream_llama", 0)


@pytest.mark.parametrize("half", [False, True])
def test_joint_can_learn_what_its_checkpoint_writes(tmp_path, own_file, stock_llama, half, monkeypatch):
    learnt = []
    plain = StreamTrainer.__init__

    def remember(self, objective, flags, examples, *others, **named):
        learnt.append(examples)
        plain(self, objective, flags, examples, *others, **named)

    monkeypatch.setattr(StreamTrainer, "__init__", remember)
    changes = {"train_file": own_file, "model_name_or_path": str(stock_llama), "targets": "own"}
    folder = run(flags_for("joint", tmp_path / "out", **changes, bf16_weights=half))
    base, trained = weights(stock_llama), weights(folder)
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in base.items())
    writer = LlamaForCausalLM.from_pretrained(
        stock_llama, dtype=torch.bfloat16 if half else torch.float32, attn_implementation="eager"
    )
    (examples,) = learnt
    prompts = [examples.example(index)[0] for index in range(len(examples))]
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
    likely = []
    for index in range(min(8, len(examples))):
        prompt, completion = examples.example(index)
        logits = writer(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
        likely += (logits.amax(1) - chosen).tolist()
    # In half precision a tie may fall the other way in a batch.
    assert max(likely) <= (0.05 if half else 1e-4)


def test_nan_stops_with_the_last_good_checkpoint(scratch, monkeypatch):
    forward, calls = StreamObjective.forward, []

    def breaks(self, **batch):
        calls.append(1)
        output = forward(self, **batch)
        return {**output, "loss": output["loss"] * (float("nan") if len(calls) > 4 else 1.0)}

    monkeypatch.setattr(StreamObjective, "forward", breaks)
    flags = scratch(eval_steps=0)
    with pytest.raises(DivergedError, match=r"nan by step 5.*last good checkpoint is .*checkpoint-3"):
        run(flags)
    assert last_complete(flags.output_dir).name == "checkpoint-3"


def test_broken_weights_are_never_saved_as_good(scratch, monkeypatch):
    forward, calls = StreamObjective.forward, []

    def breaks(self, **batch):
        calls.append(1)
        output = forward(self, **batch)
        if len(calls) == 6:
            self.model.streams.embedding.weight.data.fill_(float("inf"))
        return output

    monkeypatch.setattr(StreamObjective, "forward", breaks)
    with pytest.raises(DivergedError, match="checkpoint-3"):
        run(scratch(eval_steps=0, logging_steps=100))


def test_the_clock_stops_a_run(scratch):
    folder = run(scratch(max_steps=None, max_train_minutes=0.01, eval_steps=0, calibration_prompts=0))
    state = json.loads((last_complete(folder) / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 5000
    assert state["log_history"][-1]["learning_rate"] < 5e-4


def test_no_checkpoints_are_written_where_none_are_wanted(scratch):
    folder = run(scratch(save_steps=0, max_steps=None, max_train_minutes=0.01, calibration_prompts=0))
    assert not list(folder.glob("checkpoint-*"))
    assert (folder / "model.safetensors").is_file()


def test_bfloat16_weights_learn_and_are_saved_from_their_float32_copies(scratch, caplog):
    changes = {"max_steps": 60, "learning_rate": 1e-2, "logging_steps": 10, "save_steps": 0}
    with caplog.at_level(logging.INFO):
        saved = weights(run(scratch(bf16_weights=True, eval_steps=0, calibration_prompts=0, **changes)))
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in caplog.messages if " loss " in line]
    assert losses[-1] < 0.6 * losses[0]
    weight = saved["transformer.h.0.mlp.c_fc.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_a_budget_of_rows_changes_the_batches_alone(scratch, caplog):
    changes = {"max_steps": 60, "learning_rate": 1e-2, "logging_steps": 10, "save_steps": 0}
    with caplog.at_level(logging.INFO):
        run(scratch(batch_rows=100, eval_steps=0, calibration_prompts=0, **changes))
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in caplog.messages if " loss " in line]
    assert losses[-1] < 0.6 * losses[0]


def test_compiling_does_not_take_lora(scratch):
    with pytest.raises(ValueError, match="lora_rank"):
        run(scratch(compile=True, lora_rank=2))


@pytest.mark.slow
def test_a_compiled_run_equals_the_plain_one(scratch):
    changes = {"eval_steps": 0, "calibration_prompts": 0, "save_steps": 0}
    plain = weights(run(scratch("plain", **changes)))
    compiled = weights(run(scratch("compiled", compile=True, **changes)))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)


def test_casting_weights_leaves_buffers_alone(stock_llama):
    model = LlamaForCausalLM.from_pretrained(stock_llama)
    before = model.model.rotary_emb.inv_freq.clone()
    cast_weights(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_prompts_that_never_fit_are_an_error(scratch):
    with pytest.raises(ValueError, match="too long for 5 tokens"):
        run(scratch(max_length=5))


def test_unsupported_architectures_are_refused(scratch, model_file):
    model_file.write_text(json.dumps({"model_type": "gptj", "n_layer": 2}))
    with pytest.raises(ValueError, match=r"gptj.*supported: gpt2, gpt_neo, llama, mistral, qwen2"):
        run(scratch())


def test_stream_weights_must_fit_the_streams(scratch):
    with pytest.raises(ValueError, match="1 number or 2"):
        run(scratch(stream_loss_weight=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize(
    "damage",
    ["truncated", "no tokenizer", "other shapes", "missing weights", "code", "unsupported", "no config"],
)
def test_a_bad_base_is_one_line(tmp_path, own_file, stock_llama, damage, capsys):
    if damage == "truncated":
        os.truncate(stock_llama / "model.safetensors", 500)
    elif damage == "no tokenizer":
        (stock_llama / "tokenizer.json").unlink()
    elif damage in ("other shapes", "missing weights", "code"):
        changes = {
            "other shapes": {"intermediate_size": 24},
            "missing weights": {"num_hidden_layers": 6},
            "code": {"auto_map": {"AutoConfig": "evil.Config"}},
        }
        config = json.loads((stock_llama / "config.json").read_text())
        (stock_llama / "config.json").write_text(json.dumps(config | changes[damage]))
    elif damage == "unsupported":
        (stock_llama / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    else:
        (stock_llama / "config.json").unlink()
    words = ["--mode", "adapter", "--output_dir", str(tmp_path / "out"), "--datasets", "none"]
    code = train_spec_stream.main(
        [*words, "--train_file", str(own_file), "--model_name_or_path", str(stock_llama)]
    )
    error = capsys.readouterr().err
    assert code == (2 if damage in ("unsupported", "no config") else 1), error
    assert "Traceback" not in error
    assert "error: " in error
    assert str(stock_llama) in error or "gptj" in error


def test_an_unreadable_line_exits_with_1(tmp_path, own_file, model_file, capsys):
    own_file.write_text(own_file.read_text() + "{broken\n")
    words = ["--mode", "scratch", "--output_dir", str(tmp_path / "out"), "--model_config", str(model_file)]
    assert train_spec_stream.main([*words, "--datasets", "none", "--train_file", str(own_file)]) == 1
    assert "own.jsonl:61" in capsys.readouterr().err


def test_several_sets_are_weighted_and_reported(tmp_path, scratch, caplog):
    held_out = write_rows(tmp_path / "held.jsonl", text_pairs(6, seed=9))
    with caplog.at_level(logging.INFO):
        run(
            scratch(
                validation_file=held_out,
                data_weights=("train_file=0.5",),
                num_train_epochs=1.0,
                max_steps=None,
            )
        )
    assert "60 to train on, 6 held out" in caplog.text
    assert "step 8 epoch 1.00" in caplog.text


def test_scratch_on_the_own_samples(scratch, model_file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model_file.write_text(json.dumps({**TINY_NEO, "max_position_embeddings": 512}))
    sets = ("spider", "dialogsum", "e2e_nlg")
    folder = run(scratch(train_file=None, datasets=sets, max_steps=3, eval_steps=0, calibration_prompts=1))
    saved = json.loads((folder / "generation_config.json").read_text())["spec_stream"]
    assert set(saved["rank_accuracy_by_set"]) == set(sets)
    assert "CC BY-NC-SA 4.0" in (folder / "README.md").read_text()
