"""Chat templates that mark the assistant's text: one per family of language models, and the choice among them.

Each renders the very text that the family's published template renders. To that it adds the `{% generation %}` marks,
from which labels come, and it takes a message's content as a string or as the list of parts that processors write.
"""

import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from encoder.errors import DataError

_CONTENT = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)


def _template(
    question: str,
    answer: str,
    start: str = "bos_token",
    system: str = "''",
    header: str = "''",
    after: str = "''",
    fold: str = "",
) -> str:
    """A template of Jinja expressions in which `said` is the turn's text.

    question, answer: a user's turn, and what the assistant learns to say; header, after: before and behind an answer
    start: before all turns; system: a system turn; fold: its text in front of the first question, where it has no turn
    """
    system = f"{{% set before.text = {fold} %}}" if fold else f"{{{{ {system} }}}}"
    return (
        _CONTENT + f"{{{{ {start} }}}}{{% set before = namespace(text='') %}}"
        "{% for message in messages %}{% set said = text(message['content']) %}"
        f"{{% if message['role'] == 'system' %}}{system}"
        "{% elif message['role'] == 'user' %}{% set said = before.text + said %}{% set before.text = '' %}"
        f"{{{{ {question} }}}}"
        f"{{% else %}}{{{{ {header} }}}}{{% generation %}}{{{{ {answer} }}}}{{% endgeneration %}}{{{{ {after} }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {header.replace('loop.last', 'true')} }}}}{{% endif %}}"
    )


def _vicuna(system: str = "") -> str:
    """LLaVA's two separators: a space inside an exchange, the end token behind it."""
    return _template(
        start=f"bos_token + ('' if messages[0]['role'] == 'system' else {system!r})",
        system="said + ' '",
        question="'USER: ' + said + ' ASSISTANT:'",
        answer="' ' + said + eos_token",
    )


def _chatml(system: str = "", thought: str = "") -> str:
    """system: what the family says where a conversation brings no system turn; thought: opens the last answer."""
    turn = "'<|im_start|>' + message['role'] + '\\n' + said + '<|im_end|>\\n'"
    default = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return _template(
        start=f"'' if messages[0]['role'] == 'system' else {default!r}",
        system=turn,
        question=turn,
        header=f"'<|im_start|>assistant\\n' + ({thought!r} if loop.last else '')",
        answer="said + '<|im_end|>'",
        after="'\\n'",
    )


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_LLAMA_3 = "'<|start_header_id|>{}<|end_header_id|>\\n\\n'"
# simple: USER and ASSISTANT turns and nothing else; plain: LLaVA's alignment step, the picture and its caption.
# qwen_3 answers without thinking, as its published template renders with enable_thinking false.
TEMPLATES = {
    "simple": _vicuna(),
    "vicuna_v1": _vicuna(_VICUNA_SYSTEM),
    "plain": _template(question="'<image>' * said.count('<image>')", answer="said + '\\n'"),
    "llama_2": _template(
        start="''",
        fold="'<<SYS>>\\n' + said + '\\n<</SYS>>\\n\\n'",
        question="bos_token + '[INST] ' + said | trim + ' [/INST]'",
        answer="' ' + said | trim + ' ' + eos_token",
    ),
    "llama_3": _template(
        system=f"{_LLAMA_3.format('system')} + said | trim + '<|eot_id|>'",
        question=f"{_LLAMA_3.format('user')} + said | trim + '<|eot_id|>'",
        header=_LLAMA_3.format("assistant"),
        answer="said | trim + '<|eot_id|>'",
    ),
    "chatml": _chatml(),
    "qwen_2_5": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen_3": _chatml(thought="<think>\n\n</think>\n\n"),
    "smollm_2": _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "mistral": _template(fold="said + '\\n\\n'", question="'[INST] ' + said + '[/INST]'", answer="' ' + said + eos_token"),
    "gemma": _template(
        fold="said + '\\n\\n'",
        question="'<start_of_turn>user\\n' + said | trim + '<end_of_turn>\\n'",
        header="'<start_of_turn>model\\n'",
        answer="said | trim + '<end_of_turn>'",
        after="'\\n'",
    ),
}
_EXCHANGE = [{"role": "user", "content": "One and two?"}, {"role": "assistant", "content": "Three, of course."}]


def has_generation_marks(template: str | None) -> bool:
    return template is not None and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Sets the tokenizer's chat template and returns its name.

    name: one of `TEMPLATES`, or `auto`: the tokenizer's own where it marks the assistant's text; where it does not, ours
        that renders the same text; `simple` for a tokenizer without a template
    """
    if name == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several, of which `default` is the one for chats
            own = tokenizer.chat_template = own.get("default")
        if has_generation_marks(own):
            return "own"
        name = "simple" if own is None else _same_text(tokenizer, own)
    if name not in TEMPLATES:
        raise DataError(f"template '{name}' is not known; choose auto or one of {', '.join(TEMPLATES)}")
    tokenizer.chat_template = TEMPLATES[name]
    return name


def lead_with_space(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer of Llama's kind the tokens that LLaVA learned: the first word behind <s> and </s> has its space.

    So it was in the tokenizers of that time; some of today put the space at the start of a text alone.
    """
    bos, text = tokenizer.bos_token or "", "A word"
    alone, behind, spaced = (tokenizer(start + text, add_special_tokens=False)["input_ids"] for start in ("", bos, f"{bos} "))
    if bos and behind[1:] != alone and spaced[1:] == alone:
        template = tokenizer.chat_template.replace("bos_token", "bos_token + ' '", 1)
        follows = "loop.index0 and messages[loop.index0 - 1]['role'] == 'assistant'"
        tokenizer.chat_template = template.replace("{{ 'USER: '", f"{{{{ (' ' if {follows} else '') + 'USER: '")


def _same_text(tokenizer: PreTrainedTokenizerBase, own: str) -> str:
    """The name of our template that renders what `own` does."""
    theirs = _rendered(tokenizer, own)
    for name, template in TEMPLATES.items():
        if theirs == _rendered(tokenizer, template):
            return name
    raise DataError(
        "the tokenizer's chat template does not mark the assistant's text with {% generation %}, and none of ours renders "
        f"what it does; mark it there, or name the nearest in template: {', '.join(TEMPLATES)}"
    )


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str] | None:
    """A chat of two exchanges and the prompt for an answer; None where the template cannot render them."""
    arguments = {"chat_template": template, "tokenize": False, "enable_thinking": False}
    try:
        return [
            tokenizer.apply_chat_template(_EXCHANGE * 2, **arguments),
            tokenizer.apply_chat_template(_EXCHANGE[:1], add_generation_prompt=True, **arguments),
        ]
    except TemplateError:
        return None


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens at which an answer is over: the one that ends it in the tokenizer's template, and the end of all text."""
    encoded = tokenizer.apply_chat_template(_EXCHANGE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, spoken in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if spoken]
    marks = [i for i in said if i in tokenizer.added_tokens_decoder]  # a template's own mark may have a newline after it
    return sorted({(marks or said)[-1], tokenizer.eos_token_id} - {None})
