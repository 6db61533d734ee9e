"""Config: plain data that refuses a typo, a wrong type and an impossible value by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fasttrain.config import GenerationConfig, TrainConfig, from_dict, load_config, to_dict


def test_there_are_no_more_fields_than_a_person_can_know() -> None:
    assert len(dataclasses.fields(TrainConfig)) <= 36


def test_a_config_survives_json_and_toml(tmp_path: Path) -> None:
    config = TrainConfig(max_steps=7, lr=1e-3, betas=(0.8, 0.99), precision="bfloat16", compile=True,
                         warmup_steps=0.1, every_tokens={"eval": 10, "save": 20})
    (tmp_path / "run.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "run.toml").write_text(
        'max_steps = 7\nlr = 1e-3\nbetas = [0.8, 0.99]\nprecision = "bfloat16"\ncompile = true\n'
        'warmup_steps = 0.1\nevery_tokens = {eval = 10, save = 20}\n')
    assert load_config(tmp_path / "run.json", TrainConfig) == config
    assert load_config(str(tmp_path / "run.toml"), TrainConfig) == config
    assert load_config(None, TrainConfig) == TrainConfig()
    assert load_config(config, TrainConfig) is config


@pytest.mark.parametrize(("key", "meant"), [
    ("max_step", "max_steps"), ("learning_rate", "lr"), ("gradient_accumulation_steps", "grad_accum_steps"),
    ("num_train_epochs", "max_epochs"), ("loging_steps", "log_every_steps"), ("warmup_ratio", "warmup_steps"),
    ("eval_every_tokens", "every_tokens"), ("max_new_token", "max_new_tokens"),
])
def test_an_unknown_key_names_the_one_that_was_meant(key: str, meant: str) -> None:
    cls: Any = GenerationConfig if meant == "max_new_tokens" else TrainConfig
    with pytest.raises(ValueError, match=f"no field '{key}'; did you mean '{meant}'"):
        from_dict(cls, {key: 1})


def test_a_key_like_nothing_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="known: max_steps, max_epochs"):
        from_dict(TrainConfig, {"zzz": 1})


@pytest.mark.parametrize(("values", "message"), [
    ({"max_steps": -1}, "max_steps is -1"),
    ({"max_steps": 1.5}, "max_steps is 1.5; it must be a whole number"),
    ({"max_steps": True}, "max_steps is True"),
    ({"lr": "1e-3"}, "lr is '1e-3'; it must be a finite number"),
    ({"lr": float("nan")}, "lr is nan"),
    ({"lr": float("inf")}, "lr is inf"),
    ({"min_lr": 1.0}, "must not exceed lr"),
    ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
    ({"betas": (0.9,)}, "must hold two numbers"),
    ({"betas": (0.9, "x")}, "must hold two numbers"),
    ({"optimizer_state_dtype": "int4"}, "must be one of 'float32', 'bfloat16', 'int8'"),
    ({"precision": "fp16"}, "must be one of 'auto', 'float32', 'bfloat16', 'float16'"),
    ({"compile": 1}, "must be true or false"),
    ({"log_every_steps": 0}, "must be at least 1"),
    ({"grad_accum_steps": 2, "global_batch_size": 8}, "give one of the two"),
    ({"warmup_steps": 1.5}, "warmup_steps is 1.5; it must be a whole number of steps, or a share of them below 1"),
    ({"warmup_steps": -0.1}, "warmup_steps is -0.1"),
    ({"every_tokens": {"evl": 3}}, "every_tokens is {'evl': 3}; it must give .* any of log, eval and save"),
    ({"every_tokens": {"eval": 0}}, "must give a positive number"),
    ({"every_tokens": {"eval": 1.5}}, "must map names to whole numbers"),
    ({"every_tokens": 5}, "must map names to whole numbers"),
])
def test_values_that_cannot_be_meant_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(("values", "message"), [
    ({"temperature": -0.1}, "temperature is -0.1"), ({"top_p": 0.0}, r"must lie in \(0, 1\]"),
    ({"max_new_tokens": 0}, "at least 1"), ({"stop": ("",)}, "empty string"), ({"stop": (1,)}, "must hold strings"),
    ({"eos_token_id": "x"}, "whole number or None"), ({"repetition_penalty": 0.0}, "must be positive"),
])
def test_generation_options_are_checked_too(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(GenerationConfig, values)


def test_a_file_that_is_missing_or_malformed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "none.toml", TrainConfig)
    for name, text, message in (("a.yaml", "", "must be .toml or .json"), ("a.json", "{", "does not parse"),
                                ("b.json", "[1]", "must hold one table"), ("a.toml", "= 3", "does not parse")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / name, TrainConfig)
    with pytest.raises(ValueError, match="config is a int"):
        load_config(3, TrainConfig)  # type: ignore[arg-type]
