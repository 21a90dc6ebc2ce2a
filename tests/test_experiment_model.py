"""The model policy through the command line: a random checkpoint lives, is interrupted, is refused when it is bad."""

import json
import shutil

import pytest
import small_models
import small_run
import tiny_tokenizers

from atp_jax.__main__ import main
from atp_jax.models import huggingface


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(small_run.ROOT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Hugging Face directory: a random Qwen3 of two layers with a context of 2048, sampling at T = 0.9, top-k 50."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tiny_tokenizers.qwen3_tokenizer()
    config, params = small_models.drawn_qwen3(tokenizer, 2048)
    huggingface.save(folder, config, params)
    tokenizer.save_pretrained(folder)
    generation = {"do_sample": True, "temperature": 0.9, "top_k": 50, "eos_token_id": tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def arguments(folder, checkpoint, workdir, *more: str) -> list[str]:
    return [
        "--config=configs/role_play.py",
        f"--workdir={workdir}",
        f"--config.data.path={small_run.write_pack(folder)}",
        f"--config.policy.model={checkpoint}",
        "--config.sampling.max_new_tokens=12",
        "--config.evolve.rounds=3",
        "--config.evolve.window=1",
        "--config.evolve.samples=2",
        "--config.evolve.controls=('none', 'no_history')",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_run.ROOT)
        assert main(arguments(folder, checkpoint, folder / "run")) == 0
    return folder, small_run.left_behind(folder / "run")


def test_what_is_recorded_of_a_model(finished, checkpoint):
    folder, files = finished
    tokenizer = tiny_tokenizers.qwen3_tokenizer()
    for name in ("base", "base-no_history"):
        records = [json.loads(line) for line in files[f"evolve/{name}/episodes.jsonl"].splitlines()]
        assert [(r["round"], r["episode"]) for r in records] == [(n, e) for n in range(1, 4) for e in range(6)]
        for record in records:
            assert record["answer"] == tokenizer.decode(record["tokens"], skip_special_tokens=True)
            assert record["finish"] == ("stop" if record["tokens"][-1] == tokenizer.eos_token_id else "length")
            assert 1 <= len(record["tokens"]) <= 12 and record["logprob"] < 0
        assert len({tuple(r["tokens"]) for r in records}) == len(records)  # every episode and round draws its own
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["in_force"] == {
        "sampling.temperature": 0.9, "sampling.top_p": 1.0, "sampling.top_k": 50, "sampling.max_new_tokens": 12,
    }  # fmt: skip
    (setting, _) = (condition["setting"] for condition in json.loads(files["results.json"])["conditions"])
    assert setting["sampling.temperature"] == 0.9 and setting["sampling.max_new_tokens"] == 12


@pytest.mark.parametrize(("plain", "control"), [(0.4, None), (0.99, None), (1, None), (1, 0.6)])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(finished, checkpoint, tmp_path, plain, control):
    folder, expected = finished
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results.json", "report"))
    for name, share in (("base", plain), ("base-no_history", control)):
        path = tmp_path / "run" / "evolve" / name / "episodes.jsonl"
        if share is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert main(arguments(folder, checkpoint, tmp_path / "run")) == 0
    assert small_run.left_behind(tmp_path / "run") == expected


@pytest.mark.parametrize("how", ["--config.policy.rows=3", "--config.evolve.lockstep=False"])
def test_decoding_other_rows_together_says_the_same(finished, checkpoint, tmp_path, how):
    folder, expected = finished
    assert main(arguments(folder, checkpoint, tmp_path / "run", how)) == 0
    small_run.assert_same_but_log_probs(small_run.left_behind(tmp_path / "run"), expected)


def test_other_sampling_in_force_is_refused(finished, checkpoint, tmp_path, capsys):
    folder, _ = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.5}')
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["policy.model"] = str(tmp_path / "model")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert main(arguments(folder, tmp_path / "model", tmp_path / "run")) == 2
    assert "sampling.temperature (0.9 there, 0.5 now)" in capsys.readouterr().err


def without(*names: str):
    def change(model):
        for name in names:
            for path in model.glob(name):
                path.unlink()
        return []

    return change


def pickle_only(model):
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return without("*.safetensors")(model)


def no_template(model):
    without("chat_template*")(model)
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    return []


def short_context(model):
    path = model / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": 64}
    path.write_text(json.dumps(config))
    return []


BAD_MODELS = {
    "no weights": (without("*.safetensors"), ["weights"]),
    "pickle only": (pickle_only, ["safetensors"]),
    "no config": (without("config.json"), ["config.json"]),
    "no tokenizer": (without("tokenizer*", "chat_template*", "special_tokens*"), ["tokenizer"]),
    "no template": (no_template, ["template"]),
    "prompt longer than the context": (short_context, ["context"]),
    "mesh that does not fit": (lambda model: ["--config.mesh.tensor=3"], ["mesh"]),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(checkpoint, tmp_path, capsys, name):
    change, said = BAD_MODELS[name]
    shutil.copytree(checkpoint, tmp_path / "model")
    more = change(tmp_path / "model")
    capsys.readouterr()
    assert main(arguments(tmp_path, tmp_path / "model", tmp_path / "run", *more)) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    assert all(part in line for part in said), line
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_nowhere(tmp_path, capsys):
    assert main(arguments(tmp_path, tmp_path / "none", tmp_path / "run")) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
