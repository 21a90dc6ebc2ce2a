"""The configuration of a decoder, read from and written as a Hugging Face `config.json`."""

import dataclasses

from atp_jax.errors import UserError
from atp_jax.models.rope import Rope

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What fixes the shape and the arithmetic of a decoder. Hashable, so it can be static in `jit`.

    Sizes are counts of elements, `max_position_embeddings` is the context in tokens. `attention_bias` means biases on
    the query, key and value projections (see `output_bias` for the fourth). `eos_token_id` holds every stop id.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def qk_norm(self) -> bool:
        """RMSNorm over each head's query and key (Qwen3)."""
        return self.architecture == "Qwen3ForCausalLM"

    @property
    def output_bias(self) -> bool:
        """A bias on the attention's output projection: wherever there are biases, except in Qwen2."""
        return self.attention_bias and self.architecture != "Qwen2ForCausalLM"

    @staticmethod
    def from_dict(config: dict, where: str) -> "DecoderConfig":
        """Read a parsed `config.json`; `where` names it in errors.

        Raises UserError for an unknown architecture or rope type, a missing or impossible value, and for what this
        decoder does not compute (sliding windows, quantised weights, another activation).
        """
        architecture = _architecture(config, where)

        def size(key, default=None):
            value = config.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{where}: {key} must be a positive integer, found {value!r}")
            return value

        layers, hidden, heads = size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads")
        _refuse_unsupported(config, layers, where)
        # What a file leaves out means what transformers takes for that architecture.
        kv_heads = size("num_key_value_heads", heads if architecture == "LlamaForCausalLM" else None)
        head_dim = size("head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden // heads)
        if heads % kv_heads:
            raise UserError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if head_dim % 2:
            raise UserError(f"{where}: head_dim must be even (rotary embedding pairs its dimensions), found {head_dim}")
        biases = True if architecture == "Qwen2ForCausalLM" else bool(config.get("attention_bias", False))
        eos = config.get("eos_token_id")
        return DecoderConfig(
            architecture=architecture,
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=size("max_position_embeddings"),
            rope=Rope.from_dict(config, where),
            rms_norm_eps=_fraction(config, "rms_norm_eps", 1e-6, where),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=biases,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias", False)),
            initializer_range=_fraction(config, "initializer_range", 0.02, where),
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            pad_token_id=config.get("pad_token_id"),
        )

    def to_dict(self) -> dict:
        """A `config.json` that transformers reads, and `from_dict` reads back as the same configuration.

        The rope is written in both spellings: transformers 5 reads `rope_parameters`, everything older (and most
        other programs) `rope_theta` with `rope_scaling`, and takes a wrong default when it finds neither.
        """
        rope = self.rope.to_dict()
        out = {
            "architectures": [self.architecture],
            "model_type": ARCHITECTURES[self.architecture],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.type == "default" else rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id) or None,
            "pad_token_id": self.pad_token_id,
            "attention_dropout": 0.0,
            "use_cache": True,
        }
        if self.architecture != "Qwen2ForCausalLM":
            out["attention_bias"] = self.attention_bias
        if self.architecture == "LlamaForCausalLM":
            out["mlp_bias"] = self.mlp_bias
        else:
            out["use_sliding_window"] = False
        return out


def _architecture(config: dict, where: str) -> str:
    """The class name, from `architectures` or else from `model_type`."""
    by_type = {kind: name for name, kind in ARCHITECTURES.items()}
    named = config.get("architectures") or [by_type.get(config.get("model_type"), config.get("model_type"))]
    name = named[0] if isinstance(named, list) else named
    if name not in ARCHITECTURES:
        raise UserError(f"{where}: unknown architecture {name!r}; supported: {', '.join(ARCHITECTURES)}")
    if config.get("model_type", ARCHITECTURES[name]) != ARCHITECTURES[name]:
        raise UserError(f"{where}: architecture {name} and model_type {config['model_type']!r} contradict each other")
    return name


def _refuse_unsupported(config: dict, num_layers: int, where: str) -> None:
    """Stop at what would silently be computed wrong."""
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantised weights are not supported; use the unquantised model")
    kinds = config.get("layer_types")
    if kinds is None and config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None:
        full = config.get("max_window_layers", 28)
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(num_layers)]
    others = sorted(set(kinds or ()) - {"full_attention"})
    if others:
        raise UserError(f"{where}: layers of type {others[0]!r} are not supported (use_sliding_window must be false)")


def _fraction(config: dict, key: str, default: float, where: str) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise UserError(f"{where}: {key} must be a number between 0 and 1, found {value!r}")
    return float(value)
