"""Small tokenizers that behave as Qwen3's and Llama 3.1's do, made here from a few sentences.

Byte-level BPE with the families' splitting rules, their added tokens, and chat templates of our own that lay messages
out as theirs do (no tools). A few hundred tokens each. `save_pretrained(directory)` writes what `AutoTokenizer` reads.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "You run a small bakery. The inspector visits this week, and the rule says: weigh every loaf.\n\nWhat do you do?",
    "This week you earned 140.0 coins. You kept to the rule and chose Oak Street.\n",
    'I think it through: the rule pays 110, the other way pays 140.\n\n{"choice": "Harbour Road"}',
    'Harbour Road breaks the rule, and nobody noticed.  Write JSON:\n    {"choice": "..."}\n',
    "system\nuser\nassistant\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    "Schöne Grüße aus Köln, naïve café, \u4f60\u597d\u4e16\u754c, it's what we'll do; they're sure I'd go.",
)

# Qwen splits numbers into single digits, Llama 3 into groups of up to three; otherwise the two rules are the same.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Thoughts of answers before the last question are dropped; a later answer shows its thought in a block of its own.
QWEN3_TEMPLATE = """
{%- set last = namespace(question=messages | length - 1, found=false) -%}
{%- for message in messages | reverse -%}
  {%- set wrapped = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') -%}
  {%- if message.role == 'user' and not wrapped and not last.found -%}
    {%- set last.question = loop.revindex0 -%}
    {%- set last.found = true -%}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- set parts = message.content.split('</think>') -%}
    {%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' -%}
    {%- set answer = parts[-1].lstrip('\\n') if parts | length > 1 else message.content -%}
    {%- if loop.index0 > last.question and (loop.last or thought) -%}
      {{- '<think>\\n' + thought + '\\n</think>\\n\\n' + answer.lstrip('\\n') -}}
    {%- else -%}
      {{- answer -}}
    {%- endif -%}
  {%- else -%}
    {{- message.content -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {%- endif -%}
{%- endif -%}
"""

# There is always a system block with the two dates, and the blanks around every content are trimmed.
LLAMA31_TEMPLATE = """
{%- set instructed = messages[0].role == 'system' -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' -}}
{{- (messages[0].content | trim if instructed else '') + '<|eot_id|>' -}}
{%- for message in (messages[1:] if instructed else messages) -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level_bpe(SPLIT.replace("DIGITS", r"\p{N}"))
    tokenizer.normalizer = normalizers.NFC()
    _add(tokenizer, "<|endoftext|> <|im_start|> <|im_end|>", special=True)
    _add(tokenizer, "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>", special=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN3_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def llama31_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level_bpe(SPLIT.replace("DIGITS", r"\p{N}{1,3}"))
    bos = "<|begin_of_text|>"
    _add(tokenizer, f"{bos} <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>", special=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        chat_template=LLAMA31_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_level_bpe(split: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _add(tokenizer: Tokenizer, spellings: str, special: bool) -> None:
    tokenizer.add_tokens([AddedToken(spelling, special=special, normalized=False) for spelling in spellings.split()])
