"""Loading, asking, scoring and saving a model through the Python contract, and what is said when a directory is bad."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_models
import tiny_tokenizers
from flax import nnx

import atp_jax
from atp_jax import parallel
from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.generate.sampling import Sampling
from atp_jax.models import huggingface
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import Decoder

GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
MESSAGES = [{"role": "system", "content": "You run a bakery."}, {"role": "user", "content": "What do you do?"}]
ASKED = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random Llama with more ids than its tokenizer has, as released models do."""
    folder = tmp_path_factory.mktemp("model") / "in"
    tokenizer = tiny_tokenizers.llama31_tokenizer()
    config = DecoderConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(tokenizer) + 10,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "initializer_range": 0.2,
            "eos_token_id": 3,
        },
        "test",
    )
    _, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    huggingface.save(folder, config, params)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION | {"eos_token_id": [5, 6]}))
    return folder


@pytest.fixture(scope="module")
def model(directory):
    return atp_jax.load_model(directory)


@pytest.fixture
def copy(directory, tmp_path):
    """The same directory, to be damaged."""
    return shutil.copytree(directory, tmp_path / "model")


def test_logits_are_those_of_each_row_alone(model):
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 50, (3, 9)), np.array([9, 4, 1])
    logits = model.logits(tokens, lengths)
    assert logits.shape == (3, 9, model.config.vocab_size) and logits.dtype == np.float32
    for row, length in enumerate(lengths):
        alone = model.logits(tokens[row : row + 1, :length], lengths[row : row + 1])
        np.testing.assert_allclose(logits[row, :length], alone[0], atol=1e-5)
    with pytest.raises(UserError, match=f"token id {model.config.vocab_size}"):
        model.logits(np.array([[model.config.vocab_size, 0]]), [1])
    model.logits(np.array([[0, model.config.vocab_size]]), [1])  # padding may be anything
    with pytest.raises(UserError, match=r"found \(3, 9\) and \(2,\)"):
        model.logits(tokens, lengths[:2])


def test_ids_and_messages_are_answered_alike(model):
    ids = Chat(model.tokenizer).encode(MESSAGES)
    by_ids, by_messages = (model.generate([prompt, [1]], ASKED, seed=4)[0] for prompt in (ids, MESSAGES))
    assert by_ids == by_messages and len(by_ids.logprobs) == len(by_ids.tokens) == 6
    assert by_ids.text == model.tokenizer.decode(by_ids.tokens, skip_special_tokens=True)


def test_an_answer_follows_from_seed_and_place_alone(model):
    prompts = [[1, 2, 3], [1, 2, 3]]
    first, second = model.generate(prompts, ASKED, seed=1)
    assert first.tokens != second.tokens  # the same prompt twice is two samples
    assert model.generate([[7], prompts[1]], ASKED, seed=1)[1].tokens == second.tokens
    assert model.generate(prompts, ASKED, seed=2)[0].tokens != first.tokens


def test_text_leaves_special_tokens_and_unknown_ids_out(model):
    hello, end = model.tokenizer.encode("Hello", add_special_tokens=False), model.tokenizer.eos_token_id
    assert model.decode([*hello, end, len(model.tokenizer) + 5]) == "Hello"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, 3, (5, 6)),
        ({"eos_token_id": 5}, 3, (5,)),
        ({}, 3, (3,)),
        (None, [3, 4], (3, 4)),
        (None, None, "tokenizer"),
    ],
)
def test_stop_ids_come_from_the_first_that_names_any(copy, generation, config, expected):
    changed = json.loads((copy / "config.json").read_text()) | {"eos_token_id": config}
    (copy / "config.json").write_text(json.dumps(changed))
    (copy / "generation_config.json").unlink()
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    model = atp_jax.load_model(copy)
    assert model.stop == ((model.tokenizer.eos_token_id,) if expected == "tokenizer" else expected)
    assert dict(model.generation) == (generation or {})


def test_saved_and_loaded_again_it_is_the_same(model, tmp_path):
    model.save(tmp_path / "out")
    again = atp_jax.load_model(tmp_path / "out")
    assert again.config == model.config and again.stop == model.stop == (5, 6)
    assert dict(again.generation) == dict(model.generation)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert Chat(again.tokenizer).encode(MESSAGES) == Chat(model.tokenizer).encode(MESSAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left
    with pytest.raises(UserError, match="exists already"):
        model.save(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        model.save(tmp_path / "file" / "out")


@pytest.mark.torch
def test_transformers_reads_what_is_saved(model, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model.save(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.generation_config.eos_token_id == [5, 6] and theirs.generation_config.temperature == 0.6
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids == Chat(model.tokenizer).encode(MESSAGES)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(model.logits([ids], [len(ids)]), expected, atol=1e-4)


def test_bfloat16_keeps_weights_small_and_logits_wide(directory, model):
    half = atp_jax.load_model(directory, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype("bfloat16")}
    tokens = np.random.default_rng(1).integers(0, 50, (2, 30))
    ours, exact = (np.asarray(m.logits(tokens, [30, 30])) for m in (half, model))
    assert ours.dtype == np.float32 and 0 < np.abs(ours - exact).mean() < 0.05 * exact.std()
    answer = half.generate([[1, 2, 3]], Sampling(temperature=0.0, max_new_tokens=5))[0]
    row = np.array([[1, 2, 3, *answer.tokens]])
    log_probs = jax.nn.log_softmax(half.logits(row, [8]))[0, 2:7]
    np.testing.assert_allclose(answer.logprobs, log_probs[np.arange(5), row[0, 3:]], atol=0.1)


def spoil_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "no config.json"),
        (remove("model.safetensors"), "no weights"),
        (pickle_only, "only pickles"),
        (remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
        (spoil_tokenizer, "the tokenizer cannot be loaded"),
        (lambda folder: (folder / "generation_config.json").write_text("{\n ]"), "generation_config.json, line 2"),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "x"}'), "found 'x'"),
    ],
)
def test_a_directory_that_lacks_something_is_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        atp_jax.load_model(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_a_template_is_needed_for_messages_only(copy):
    (copy / "chat_template.jinja").unlink()
    model = atp_jax.load_model(copy)
    assert len(model.generate([[1, 2, 3], [4]], ASKED)[0].tokens) == 6
    with pytest.raises(UserError, match="no chat template"):
        model.generate([MESSAGES], ASKED)


def test_what_cannot_be_loaded_at_all(tmp_path, directory):
    with pytest.raises(UserError, match="not a directory, nor a hub id"):
        atp_jax.load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="float32, bfloat16, not 'float16'"):
        atp_jax.load_model(directory, dtype="float16")


def test_a_mesh_of_ones_own_is_used(directory):
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    model = atp_jax.load_model(directory, mesh=mesh)
    assert model.mesh is mesh and all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(model.params))


def test_a_model_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        atp_jax.load_model(small_models.FIXTURES / "qwen3")
