//! Which prefill legs a request gets, and their bodies. Owns the rules of what decides a prompt;
//! does not know servers.
//!
//! A leg asks for one token. Whatever decides the prompt's tokens (messages, tools, templates,
//! images, salts, truncation) stays as the client wrote it; whatever only shapes the output goes,
//! since it could make a one-token request invalid or compile a grammar for nothing.

use bytes::Bytes;

use crate::body::{Fields, KV_TRANSFER_PARAMS, elements};
use crate::endpoint::Generation;

/// What to ask prefill servers for.
#[derive(Debug)]
pub enum Plan {
    /// One body a prompt, to `path`.
    Legs(Vec<Bytes>),
    /// Nothing: decode computes alone.
    Skip(Skip),
}

/// Why a request gets no prefill leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// Logprobs of the prompt have to be computed, loaded KV would leave them out.
    PromptLogprobs,
    /// `echo` with `logprobs` are logprobs of the prompt.
    EchoLogprobs,
    /// No token is asked for.
    NoTokens,
    /// Beams do not start from loaded KV.
    BeamSearch,
    /// The conversation is stored on one server; prefill does not have it.
    StoredConversation,
    /// Nothing that could be read as a request.
    Unreadable,
}

impl Skip {
    /// Name for metrics and the access log.
    pub fn label(self) -> &'static str {
        match self {
            Self::PromptLogprobs => "prompt_logprobs",
            Self::EchoLogprobs => "echo_logprobs",
            Self::NoTokens => "no_tokens",
            Self::BeamSearch => "beam_search",
            Self::StoredConversation => "stored_conversation",
            Self::Unreadable => "unreadable",
        }
    }

    /// All of them, for metrics that are zero.
    pub const ALL: [Self; 6] = [
        Self::PromptLogprobs,
        Self::EchoLogprobs,
        Self::NoTokens,
        Self::BeamSearch,
        Self::StoredConversation,
        Self::Unreadable,
    ];
}

/// Fields that shape only the output. The guided_* names are those of servers before 0.12.
const OUTPUT_FIELDS: [&str; 17] = [
    KV_TRANSFER_PARAMS,
    "stream_options",
    "min_tokens",
    "best_of",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "prompt_logprobs",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "structural_tag",
];

const LIMITS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

/// Decides the legs of one request.
pub fn plan(generation: Generation, fields: &Fields<'_>) -> Plan {
    if let Some(skip) = skip(generation, fields) {
        return Plan::Skip(skip);
    }
    match generation {
        Generation::Completions => completions(fields),
        Generation::Chat => Plan::Legs(vec![chat(fields)]),
        Generation::Responses => Plan::Legs(vec![responses(fields)]),
        Generation::Messages => Plan::Legs(vec![messages(fields)]),
        Generation::Tokens => tokens(fields),
    }
}

fn skip(generation: Generation, fields: &Fields<'_>) -> Option<Skip> {
    let nested = fields.get("sampling_params").and_then(|text| Fields::parse(text.as_bytes()));
    let sampling = if generation == Generation::Tokens { nested.as_ref()? } else { fields };
    let asks_logprobs = |name| sampling.get(name).is_some_and(|value| value != "false");
    if asks_logprobs("prompt_logprobs") {
        Some(Skip::PromptLogprobs)
    } else if sampling.is_true("echo") && asks_logprobs("logprobs") {
        Some(Skip::EchoLogprobs)
    } else if LIMITS.iter().any(|limit| sampling.is_zero(limit)) {
        Some(Skip::NoTokens)
    } else if sampling.is_true("use_beam_search") {
        Some(Skip::BeamSearch)
    } else if fields.get("previous_response_id").is_some() {
        Some(Skip::StoredConversation)
    } else {
        None
    }
}

/// Several prompts in one request: one leg each, for a server answers several prompts with the
/// transfer parameters of the first only.
fn completions(fields: &Fields<'_>) -> Plan {
    let prompts = fields.get("prompt").map(|text| several(text).unwrap_or_else(|| vec![text]));
    let embeds =
        fields.get("prompt_embeds").map(|text| several(text).unwrap_or_else(|| vec![text]));
    let (prompts, embeds) = (prompts.unwrap_or_default(), embeds.unwrap_or_default());
    if prompts.len() + embeds.len() <= 1 {
        return Plan::Legs(vec![completion_leg(fields, &[], &[])]);
    }
    let leg = |name: &'static str, other: &'static str| {
        move |value: &&str| completion_leg(fields, &[other], &[(name, *value)])
    };
    let by_embeds = embeds.iter().map(leg("prompt_embeds", "prompt"));
    Plan::Legs(by_embeds.chain(prompts.iter().map(leg("prompt", "prompt_embeds"))).collect())
}

/// The prompts of a list of prompts; `None` where the text is one prompt: a string, or token ids.
fn several(text: &str) -> Option<Vec<&str>> {
    let items = elements(text)?;
    let is_prompt = |item: &&str| item.starts_with(['"', '[']);
    (items.len() > 1 && items.iter().all(|item| is_prompt(&item.trim()))).then_some(items)
}

fn completion_leg(fields: &Fields<'_>, without: &[&str], prompt: &[(&str, &str)]) -> Bytes {
    let mut with = vec![("stream", "false"), ("max_tokens", "1"), ("n", "1")];
    if fields.contains("max_completion_tokens") {
        with.push(("max_completion_tokens", "1"));
    }
    with.extend_from_slice(prompt);
    fields.write(&[&OUTPUT_FIELDS[..], without].concat(), &with)
}

fn chat(fields: &Fields<'_>) -> Bytes {
    completion_leg(fields, &[], &[])
}

/// Nothing is stored or run in the background: the client asks decode for its response, not us.
/// Of `text` only the output's grammar goes; `include` may ask for logprobs.
fn responses(fields: &Fields<'_>) -> Bytes {
    let mut with = vec![("stream", "false"), ("max_output_tokens", "1"), ("store", "false")];
    if fields.contains("background") {
        with.push(("background", "false"));
    }
    let text = fields.get("text").and_then(|text| Fields::parse(text.as_bytes()));
    let text = text.map(|text| text.write(&["format"], &[]));
    let text = text.as_ref().and_then(|text| std::str::from_utf8(text).ok());
    with.extend(text.map(|text| ("text", text)));
    fields.write(&[&OUTPUT_FIELDS[..], &["include"]].concat(), &with)
}

/// A thinking budget must be below `max_tokens` unless the request says that decode comes after;
/// `thinking` itself decides the template, so it stays and the request says so.
fn messages(fields: &Fields<'_>) -> Bytes {
    let mut with = vec![("stream", "false"), ("max_tokens", "1")];
    if fields.get("thinking").is_some_and(|thinking| thinking.contains("budget_tokens")) {
        with.push((KV_TRANSFER_PARAMS, r#"{"do_remote_decode":true}"#));
    }
    fields.write(&OUTPUT_FIELDS, &with)
}

fn tokens(fields: &Fields<'_>) -> Plan {
    let sampling = fields.get("sampling_params").unwrap_or("{}");
    let Some(sampling) = Fields::parse(sampling.as_bytes()) else {
        return Plan::Skip(Skip::Unreadable);
    };
    let without = [&OUTPUT_FIELDS[..], &["extra_args"]].concat();
    let sampling = sampling.write(&without, &[("max_tokens", "1"), ("n", "1")]);
    let sampling = std::str::from_utf8(&sampling).expect("written from text");
    let with = [("sampling_params", sampling), ("stream", "false")];
    Plan::Legs(vec![fields.write(&[KV_TRANSFER_PARAMS, "stream_options"], &with)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn legs(generation: Generation, request: &Value) -> Vec<Value> {
        let text = request.to_string();
        match plan(generation, &Fields::parse(text.as_bytes()).unwrap()) {
            Plan::Legs(legs) => {
                legs.iter().map(|leg| serde_json::from_slice(leg).unwrap()).collect()
            }
            Plan::Skip(skip) => panic!("skipped: {skip:?}"),
        }
    }

    fn skipped(generation: Generation, request: Value) -> Option<Skip> {
        let text = request.to_string();
        match plan(generation, &Fields::parse(text.as_bytes()).unwrap()) {
            Plan::Legs(_) => None,
            Plan::Skip(skip) => Some(skip),
        }
    }

    #[test]
    fn output_fields_go_and_prompt_fields_stay() {
        // Goal: the leg is the request with one token, and keeps all that decides the prompt.
        let request = json!({"model": "m", "messages": [{"role": "user", "content": [{"type":
            "image_url", "image_url": {"url": "data:x"}}]}], "tools": [{"a": 1}], "tool_choice":
            "auto", "cache_salt": "s", "chat_template_kwargs": {"t": true}, "stream": true,
            "stream_options": {"include_usage": true}, "max_tokens": 99, "max_completion_tokens":
            98, "n": 4, "min_tokens": 5, "best_of": 6, "logprobs": true, "top_logprobs": 3,
            "truncate_prompt_tokens": 7, "response_format": {"type": "json_object"},
            "structured_outputs": {"json": {}}, "guided_json": {}, "seed": 1,
            "kv_transfer_params": {"mine": 1}});
        let expected = json!({"model": "m", "messages": request["messages"], "tools": [{"a": 1}],
            "tool_choice": "auto", "cache_salt": "s", "chat_template_kwargs": {"t": true},
            "stream": false, "max_tokens": 1, "max_completion_tokens": 1, "n": 1,
            "truncate_prompt_tokens": 7, "seed": 1});
        assert_eq!(legs(Generation::Chat, &request), [expected]);
    }

    #[test]
    fn one_leg_a_prompt() {
        // Goal: lists of strings and of token lists split; one prompt in any spelling does not.
        let prompt = |prompt: Value| legs(Generation::Completions, &json!({"prompt": prompt}));
        for one in [json!("a"), json!([1, 2]), json!(["a"]), json!([[1, 2]])] {
            let legs = prompt(one.clone());
            assert_eq!(legs.len(), 1);
            assert_eq!(legs[0]["prompt"], one);
        }
        let two = prompt(json!(["a,]", "b"]));
        assert_eq!((&two[0]["prompt"], &two[1]["prompt"]), (&json!("a,]"), &json!("b")));
        assert_eq!(prompt(json!([[1], [2, 3], [4]]))[1]["prompt"], json!([2, 3]));
        let both = json!({"prompt": "a", "prompt_embeds": ["e", "f"]});
        let both = legs(Generation::Completions, &both);
        assert_eq!(both.len(), 3);
        assert_eq!(both[0].get("prompt"), None);
        assert_eq!(both[2].get("prompt_embeds"), None);
    }

    #[test]
    fn some_requests_get_no_leg() {
        // Goal: each exception by itself, and its harmless neighbour.
        let completions = |request| skipped(Generation::Completions, request);
        assert_eq!(completions(json!({"prompt_logprobs": 0})), Some(Skip::PromptLogprobs));
        assert_eq!(completions(json!({"prompt_logprobs": null})), None);
        assert_eq!(completions(json!({"echo": true, "logprobs": 0})), Some(Skip::EchoLogprobs));
        assert_eq!(completions(json!({"echo": true})), None);
        assert_eq!(completions(json!({"logprobs": 1})), None);
        assert_eq!(completions(json!({"max_tokens": 0})), Some(Skip::NoTokens));
        assert_eq!(completions(json!({"max_tokens": null})), None);
        assert_eq!(completions(json!({"use_beam_search": true})), Some(Skip::BeamSearch));
        let stored = json!({"previous_response_id": "r", "input": "x"});
        assert_eq!(skipped(Generation::Responses, stored), Some(Skip::StoredConversation));
        let nested = json!({"sampling_params": {"prompt_logprobs": 1}});
        assert_eq!(skipped(Generation::Tokens, nested), Some(Skip::PromptLogprobs));
    }

    #[test]
    fn other_forms_name_their_limits_differently() {
        // Goal: responses, messages and token requests ask for one token in their own words.
        let responses = &legs(
            Generation::Responses,
            &json!({"input": "x", "store": true,
            "background": true, "max_output_tokens": 50, "text": {"format": 1, "verbosity": "low"},
            "stream": true}),
        )[0];
        assert_eq!(
            responses,
            &json!({"input": "x", "stream": false, "max_output_tokens": 1,
            "store": false, "background": false, "text": {"verbosity": "low"}})
        );
        let thinking = json!({"type": "enabled", "budget_tokens": 1024});
        let messages = json!({"messages": [], "max_tokens": 4096, "thinking": thinking});
        let messages = &legs(Generation::Messages, &messages)[0];
        assert_eq!(
            messages,
            &json!({"messages": [], "stream": false, "max_tokens": 1,
            "thinking": thinking, "kv_transfer_params": {"do_remote_decode": true}})
        );
        let tokens = &legs(
            Generation::Tokens,
            &json!({"token_ids": [1], "sampling_params":
            {"max_tokens": 9, "min_tokens": 3, "n": 2, "logprobs": 1, "seed": 4,
             "extra_args": {"kv_transfer_params": {}}}}),
        )[0];
        assert_eq!(
            tokens,
            &json!({"token_ids": [1], "stream": false,
            "sampling_params": {"seed": 4, "max_tokens": 1, "n": 1}})
        );
    }
}
