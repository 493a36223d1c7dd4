"""Chat formats for tokenizers that bring none, as Jinja texts. Knows no tokenizer.

Each answer ends with the tokenizer's end-of-text token, so that it can be learnt as the stop.
`alpaca` is Stanford Alpaca's prompt, `instruction-ja` the form of the Japanese QLoRA guides.
"""

from __future__ import annotations

_BOS = "{{ bos_token if starts_with_bos else '' }}"

PLAIN = (
    _BOS + "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}{{ m.content }}{{ eos_token }}"
    "{%- else -%}{{ m.content }}{{ '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
)

CHATML = (
    _BOS + "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{{ eos_token + '\\n' if m.role == 'assistant' else '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def _instruction(head: str, head_with_input: str, ask: str, given: str, answer: str) -> str:
    return (
        _BOS + "{%- for m in messages -%}"
        "{%- if m.role == 'assistant' -%}{{ m.content }}{{ eos_token }}"
        "{%- if not loop.last -%}{{ '\\n\\n' }}{%- endif -%}"
        "{%- elif m.role == 'system' -%}{{ m.content + '\\n\\n' }}"
        "{%- else -%}"
        "{%- if loop.index0 == 0 or messages[0].role == 'system' and loop.index0 == 1 -%}"
        f"{{{{ '{head_with_input}' if m.input else '{head}' }}}}"
        "{%- endif -%}"
        f"{{{{ '{ask}' + (m.instruction or m.content) + '\\n\\n' }}}}"
        f"{{%- if m.input -%}}{{{{ '{given}' + m.input + '\\n\\n' }}}}{{%- endif -%}}"
        f"{{{{ '{answer}' }}}}"
        "{%- endif -%}{%- endfor -%}"
    )


ALPACA = _instruction(
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\\n\\n",
    "### Instruction:\\n",
    "### Input:\\n",
    "### Response:\\n",
)
INSTRUCTION_JA = _instruction("", "", "### 指示:\\n", "### 入力:\\n", "### 回答:\\n")


def with_bos(template: str, starts: bool) -> str:
    """A fallback to be stored with a model: it says itself whether a text starts with a token."""
    return f"{{%- set starts_with_bos = {'true' if starts else 'false'} -%}}{template}"


FALLBACKS = {
    "chatml": CHATML,
    "alpaca": ALPACA,
    "instruction-ja": INSTRUCTION_JA,
    "plain": PLAIN,
}
