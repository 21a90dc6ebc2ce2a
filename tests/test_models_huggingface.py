"""Model directories: what is refused and how it is said, what is read, what is left behind by saving."""

import fnmatch
import json
import math
import shutil

import chex
import huggingface_hub
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import small_models
from flax import nnx
from hypothesis import given

from atp_jax.errors import UserError
from atp_jax.models import huggingface
from atp_jax.models.decoder import abstract

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def llama(tmp_path):
    """A copy of the Llama fixture (one file, bfloat16, separate head) that a test may spoil."""
    return shutil.copytree(small_models.FIXTURES / "llama31", tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path):
    """A copy of the Qwen3 fixture (two files and an index, tied head)."""
    return shutil.copytree(small_models.FIXTURES / "qwen3", tmp_path / "qwen3")


def change_weights(directory, change):
    """Rewrite the one weight file with `change(tensors)` applied."""
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def refused(directory, *said):
    """Loading ends in one line that holds everything in `said` and names the directory."""
    with pytest.raises(UserError) as raised:
        small_models.load(directory)
    message = str(raised.value)
    assert "\n" not in message and str(directory) in message
    for words in said:
        assert words in message


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(KEY), [KEY, "is missing"]),
        (lambda t: [t.pop(KEY), t.pop("model.norm.weight")], ["is missing (and 1 more)"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "is missing", "tie_word_embeddings"]),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}), ["surplus", "q_proj"]),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[KEY]}),
            ["surplus", "layers.2", "LlamaForCausalLM"],
        ),
        (lambda t: t.update({KEY: t[KEY].T.copy()}), [KEY, "[32, 16]", "[16, 32]"]),
        (lambda t: t.update({KEY: t[KEY].astype(np.float64)}), [KEY, "F64", "bfloat16"]),
        (lambda t: t.update({KEY: t[KEY].astype(np.int8)}), [KEY, "I8"]),
    ],
    ids=["missing", "several missing", "no head", "bias", "a layer more", "shape", "float64", "int8"],
)
def test_tensors_that_do_not_fit_are_named(llama, change, said):
    change_weights(llama, change)
    refused(llama, *said)


def test_files_that_are_not_there_are_named(llama, sharded):
    weights = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    refused(llama, WEIGHTS, "safetensors")
    (llama / WEIGHTS).unlink()
    refused(llama, "no weights", WEIGHTS)
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(llama, "pytorch_model.bin", "pickles")

    (sharded / "model-00002-of-00002.safetensors").rename(sharded / "elsewhere")
    refused(sharded, "model-00002-of-00002.safetensors", "is missing")
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model-00002-of-00002.safetensors")
    refused(sharded, "has no tensor", INDEX)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1"),
        ("[]", "one JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {"model.norm.weight": "../../etc/passwd"}}', "same directory"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(sharded, content, said):
    (sharded / INDEX).write_text(content)
    refused(sharded, INDEX, said)


def test_a_config_that_cannot_be_read_is_refused(llama):
    path = llama / "config.json"
    path.write_text('{"vocab_size": 64,\n"hidden_size" 32}')
    refused(llama, "config.json, line 2", "malformed JSON")
    path.write_bytes(b'{"a": "\xff"}')
    refused(llama, "config.json", "UTF-8")
    path.unlink()
    refused(llama, "no config.json")


def test_surplus_that_does_no_harm_is_left_out(tmp_path):
    """Rotary frequencies of old checkpoints, and a head beside tied embeddings: equal is fine, different is not."""
    directory = shutil.copytree(small_models.FIXTURES / "qwen2", tmp_path / "qwen2")
    _, _, before = small_models.load(directory)
    change_weights(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f")}))
    change_weights(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    chex.assert_trees_all_equal(small_models.load(directory)[2], before)
    change_weights(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + np.float16(1)}))
    refused(directory, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("name", small_models.NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_the_stored_ones_in_the_wanted_type(name, dtype):
    """Whatever they are stored as: the values of two projections, by hand, rounded once to the target."""
    config, _, params = small_models.load(small_models.FIXTURES / name, dtype)
    files = (small_models.FIXTURES / name).glob("*.safetensors")
    stored = {key: value for file in files for key, value in safetensors.numpy.load_file(file).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(getattr(ml_dtypes, dtype, dtype))}
    query = stored["model.layers.1.self_attn.q_proj.weight"].astype(dtype)
    output = stored["model.layers.0.self_attn.o_proj.weight"].astype(dtype)
    layers = params["layers"]
    for head in range(config.num_heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        chex.assert_trees_all_equal(np.asarray(layers["query"][...])[1, :, head], query[rows].T)
        chex.assert_trees_all_equal(np.asarray(layers["output"][...])[0, head], output[:, rows].T)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(array.size for array in stored.values())


@pytest.mark.parametrize("name", ["llama_linear", "qwen3"])
def test_a_part_of_a_parameter_reads_only_its_bytes(name):
    """As every process of several will: each half, of each axis that may be split, costs half, and is read once."""
    directory = small_models.FIXTURES / name
    _, _, whole = small_models.load(directory)
    files = {key: safetensors.numpy.load_file(file) for key, file in enumerate(directory.glob("*.safetensors"))}
    stored = {key: value for tensors in files.values() for key, value in tensors.items()}
    read = []

    class Recorder:
        def slices(self, tensor):
            return self if setattr(self, "tensor", tensor) is None else None

        def __getitem__(self, index):
            read.append(stored[self.tensor][index])
            return read[-1]

    for path, variable in nnx.to_flat_state(whole):
        array = np.asarray(variable[...])
        for axis, axis_name in enumerate(variable.get_metadata("axes")):
            if axis_name == "head_dim":
                continue
            half = array.shape[axis] // 2
            index = tuple(slice(half, None) if i == axis else slice(None) for i in range(array.ndim))
            read.clear()
            reader = huggingface._reader(Recorder(), path, array.shape, array.dtype)
            chex.assert_trees_all_equal(reader(index), array[index])
            reader(index)  # what the next device with the same part asks for
            assert sum(piece.size for piece in read) == array[index].size
            chex.assert_trees_all_equal(reader((slice(None),) * array.ndim), array)


def test_saving_in_one_file_and_in_several_is_the_same_model(sharded, tmp_path):
    """And what an earlier save left, files and index, does not stay beside it."""
    config, _, params = small_models.load(sharded)
    out = tmp_path / "out"
    for limit, several in ((50_000, True), (10**9, False), (1, True), (50_000, True)):
        huggingface.save(out, config, params, max_shard_bytes=limit)
        again, _, loaded = small_models.load(out)
        assert again == config
        chex.assert_trees_all_equal(loaded, params)
        files = {path.name for path in out.iterdir()} - {"config.json"}
        if several:
            index = json.loads((out / INDEX).read_text())
            assert files == set(index["weight_map"].values()) | {INDEX} and len(files) > 2
            assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        else:
            assert files == {WEIGHTS}


def test_a_save_that_fails_leaves_the_old_model(llama, monkeypatch):
    config, _, params = small_models.load(llama)
    before = {path.name: path.read_bytes() for path in llama.iterdir()}

    def fail(content, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(UserError, match="no space left"):
        huggingface.save(llama, config, params)
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before
    with pytest.raises(UserError, match="cannot be written"):
        huggingface.save(llama / "config.json" / "x", config, params)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 150))
def test_shards_hold_everything_in_order_and_are_as_few_as_order_allows(sizes, limit):
    named = {str(i): size for i, size in enumerate(sizes)}
    shards = huggingface._plan(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    totals = [sum(named[name] for name in shard) for shard in shards]
    assert all(total <= limit or len(shard) == 1 for total, shard in zip(totals, shards, strict=True))
    for total, after in zip(totals, shards[1:], strict=False):
        assert total + named[after[0]] > limit


def test_the_table_names_every_parameter_of_every_architecture():
    paths = set()
    for name in small_models.NAMES:
        config = huggingface.load_config(small_models.FIXTURES / name)
        for path, variable in nnx.to_flat_state(abstract(config)[1]):
            paths.add(path)
            dims = huggingface.TENSORS[path][1]
            shape = variable.shape[path[0] == "layers" :]
            assert sorted(axis for axes in dims for axis in axes) == list(range(len(shape))) and math.prod(shape) > 0
    assert paths == set(huggingface.TENSORS)


def test_a_model_is_found_by_directory_or_by_hub_id(llama, monkeypatch):
    assert huggingface.resolve(llama) == llama
    assert huggingface.resolve(str(llama)) == llama
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert huggingface.resolve("Qwen/Qwen3-8B") == llama
    ((name, patterns),) = asked
    assert name == "Qwen/Qwen3-8B"
    wanted = ["config.json", "generation_config.json", "model-00001-of-00005.safetensors", INDEX, "tokenizer.json"]
    for file in [*wanted, "tokenizer_config.json", "chat_template.jinja", "merges.txt"]:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns), file
    for file in ["pytorch_model.bin", "modeling_x.py", "consolidated.00.pth", "training_args.bin"]:
        assert not any(fnmatch.fnmatch(file, pattern) for pattern in patterns), file


@pytest.mark.parametrize("name", ["", "nowhere", "/no/such/place", "./a/b", "a/b/c", "../x"])
def test_a_model_that_is_nowhere_is_refused_without_asking_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    if name:
        with pytest.raises(UserError, match="not a directory"):
            huggingface.resolve(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a directory"):
        huggingface.resolve("file")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def fail(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot be reached\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="organisation/name.*cannot be reached$"):
        huggingface.resolve("organisation/name")
