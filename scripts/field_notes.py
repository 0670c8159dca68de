"""What each field of the generation routes means, in a line: the words of the table in docs/api.md.

Read by gen_docs.py, which refuses to run while a field has no line here, or a line no field.
"""

from __future__ import annotations

# In the order of the table.
FIELD_NOTES: dict[str, str] = {
    "messages": "The conversation. Contents are strings or lists of parts: text, and images if the model "
    "takes them. Required.",
    "prompt": "Text, token ids, or a list of either: a batch. Required.",
    "suffix": "Text that comes after the reply; for models with fill-in-the-middle tokens.",
    "echo": "Put the prompt before the reply; with `logprobs`, its logprobs too.",
    "image_data": "An image or a list of them, for image tokens in `text`: data URL, base64, or an object "
    "with a `url`. A batch has an entry a prompt.",
    "mm_processor_kwargs": "`min_pixels` and `max_pixels` of the images, within the server's limits.",
    "text": "The prompt, or a list of prompts: a batch.",
    "input_ids": "The prompt as token ids, or a list of such lists. Wins over `text` and the chat template.",
    "add_special_tokens": "Put the model's special tokens around the prompt. Default: not in chat.",
    "sampling_params": "The fields marked *sampling*; a list has one entry a prompt.",
    "model": "Any name is taken, and sent back in the reply.",
    "max_tokens": "Most tokens of the reply. Default: what the context holds; 16 in completions. "
    "0 only with `echo`.",
    "max_completion_tokens": "The same under its newer name, which wins.",
    "max_new_tokens": "Most tokens of the reply; null: what the context holds; 0: compute the prompt only.",
    "min_tokens": "Stop tokens and strings do not end a shorter reply.",
    "min_new_tokens": "The same under SGLang's name.",
    "temperature": "0 is greedy. Chat takes the model's recommendation first, as for the next four.",
    "top_p": "Keep the likeliest tokens that make up this share.",
    "top_k": "Keep this many tokens; -1 keeps all.",
    "min_p": "Keep tokens at least this likely, relative to the likeliest.",
    "repetition_penalty": "Divides the logits of tokens seen in prompt or reply.",
    "frequency_penalty": "Subtracted once for each time that a token is in the reply.",
    "presence_penalty": "Subtracted from every token that is in the reply.",
    "logit_bias": "Token id to a number added to its logit.",
    "seed": "Reproduces the reply, whatever else is in the batch.",
    "sampling_seed": "SGLang's name for `seed`; wins over it.",
    "stop": "A string or up to 32 that end the reply and are taken off it.",
    "stop_regex": "A regular expression or up to 32, of at most 256 bytes each, that do the same.",
    "stop_token_ids": "Token ids that end the reply besides the model's own.",
    "ignore_eos": "No token ends the reply.",
    "no_stop_trim": "Keep the stop string or token in the text.",
    "include_stop_str_in_output": "The same under xLLM's name.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "spaces_between_special_tokens": "Taken for compatibility; the text is the same either way.",
    "n": "Choices for each prompt.",
    "best_of": "Accepted up to `n`.",
    "beam_width": "Above 1: beam search, and a choice a beam, best first. 0 and 1: none. In generate also "
    "beside `sampling_params`.",
    "num_return_sequences": "Accepted where it equals `beam_width`.",
    "logprobs": "Chat: true for logprobs of the reply. Completions: so many alternatives with them.",
    "top_logprobs": "Alternatives at each token, up to 128. Switches `logprobs` on unless that is false.",
    "return_logprob": "The switch for the next four: without it they do nothing.",
    "logprob_start_len": "First prompt position with logprobs; -1: those of the reply only.",
    "top_logprobs_num": "Alternatives at each position, up to 128.",
    "token_ids_logprob": "Up to 128 token ids to tell the logprobs of at each position.",
    "return_text_in_logprobs": "Put each token's text into its entry.",
    "logprobs_mode": "`raw`: of the model's own distribution. `scaled`: after penalties, bias and "
    "temperature. Default: raw.",
    "stream": "Send server-sent events as tokens come.",
    "stream_options": "`include_usage`: counts in a last chunk; `continuous_usage_stats`: in every chunk.",
    "stream_interval": "Tokens between two events.",
    "return_prompt_token_ids": "Add `prompt_token_ids`. Chat and completions: not with `stream`.",
    "return_token_ids": "Add them and the reply's: `response_token_ids` in chat, `token_ids` in completions. "
    "Chat: not with `stream`.",
    "return_meta_info": "Add the `meta_info` of /generate to each choice. Not with `stream`.",
    "return_cached_tokens_details": "Add `sglext`, which says where cached tokens came from.",
    "tools": "Shown to the model by its chat template; calls are not parsed out of the reply.",
    "tool_choice": '`"auto"` or `"none"`.',
    "continue_final_message": "Take the last assistant message as the beginning of the reply.",
    "chat_template_kwargs": "Further variables for the chat template.",
    "reasoning_effort": "Handed to the chat template.",
    "rid": "An id of the client's choice, for `/abort_request`; must be unique among open requests.",
    "request_id": "xLLM's name for `rid`, which wins.",
    "priority": "Higher ones are admitted first. Also HIGH (1), NORMAL or DEFAULT (0), LOW (-1).",
    "routed_dp_rank": "The copy of the model that is to serve it, counted from 0; there are `--dp-size`.",
    "data_parallel_rank": "SGLang's older name for `routed_dp_rank`, which wins.",
    "cache_salt": "Requests with different salts never share cached pages.",
    "extra_key": "Another name for `cache_salt`.",
}
