//! A generator of traces: conversations of several turns that begin with one of a few shared prompts.

#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command, value_parser};

use super::format::{Request, TOKENS_PER_ID};
use crate::random::Random;

/// What traffic looks like.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// Requests.
    pub requests: u64,
    /// Arrivals a second, Poisson.
    pub rate: f64,
    /// Different shared prompts; low numbers are used more often.
    pub prompts: u64,
    /// Tokens of a shared prompt.
    pub prompt_tokens: u64,
    /// Mean tokens of a turn's question.
    pub question_tokens: u64,
    /// Mean tokens of an answer.
    pub answer_tokens: u64,
    /// Share of requests that continue a conversation.
    pub continued: f64,
    /// Seed.
    pub seed: u64,
}

/// Conversations that may still be continued.
const OPEN_CONVERSATIONS: usize = 256;
/// The longest input, in tokens; a longer conversation ends.
const INPUT_MAX: u64 = 128 << 10;

/// A conversation: its length in tokens, and the ids of its full stretches.
#[derive(Clone)]
struct Conversation {
    tokens: u64,
    ids: Vec<u64>,
}

/// The subcommand.
pub fn command() -> Command {
    let number = |name: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name).long(name).default_value(default).value_parser(value_parser!(u64)).help(help)
    };
    let fraction = |name: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name).long(name).default_value(default).value_parser(value_parser!(f64)).help(help)
    };
    Command::new("generate")
        .about("Writes a synthetic trace: conversations with shared prompts, Poisson arrivals")
        .arg(Arg::new("file").required(true).help("Where it goes; - is standard output"))
        .arg(number("requests", "1000", "Requests"))
        .arg(fraction("request-rate", "2.0", "Requests a second"))
        .arg(number("prompts", "8", "Shared prompts"))
        .arg(number("prompt-tokens", "2048", "Tokens of a shared prompt"))
        .arg(number("question-tokens", "1024", "Mean tokens of a question"))
        .arg(number("answer-tokens", "256", "Mean tokens of an answer"))
        .arg(fraction("continued", "0.6", "Share of requests that continue a conversation"))
        .arg(number("seed", "1", "Seed"))
}

/// `ucm-bench trace generate`.
pub fn main(matches: &ArgMatches) -> Result<ExitCode, String> {
    let number = |name: &str| matches.get_one::<u64>(name).copied().unwrap_or_default();
    let fraction = |name: &str| matches.get_one::<f64>(name).copied().unwrap_or_default();
    let traffic = Traffic {
        requests: number("requests"),
        rate: fraction("request-rate"),
        prompts: number("prompts"),
        prompt_tokens: number("prompt-tokens"),
        question_tokens: number("question-tokens"),
        answer_tokens: number("answer-tokens"),
        continued: fraction("continued"),
        seed: number("seed"),
    };
    if traffic.rate <= 0.0 || !(0.0..=1.0).contains(&traffic.continued) || traffic.prompts == 0 {
        return Err("request-rate is above 0, continued is 0 to 1, prompts is at least 1".into());
    }
    let path = matches.get_one::<String>("file").cloned().unwrap_or_default();
    let mut text = String::new();
    for request in generate(traffic) {
        text += &serde_json::to_string(&request).map_err(|error| error.to_string())?;
        text.push('\n');
    }
    if path == "-" {
        // A reader that closed the pipe has what it wanted.
        let _ = std::io::stdout().write_all(text.as_bytes());
    } else {
        std::fs::write(&path, text).map_err(|error| format!("{path}: {error}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The requests of some traffic, by time.
pub fn generate(traffic: Traffic) -> Vec<Request> {
    let mut random = Random::new(traffic.seed);
    let stretches = traffic.prompt_tokens / TOKENS_PER_ID;
    // Ids of shared prompts come first; everything later is new.
    let mut next_id = traffic.prompts * stretches;
    let mut open: Vec<Conversation> = Vec::new();
    let mut seconds = 0.0;
    let mut requests = Vec::new();
    for _ in 0..traffic.requests {
        seconds += random.exponential(1.0 / traffic.rate);
        let continues = !open.is_empty() && random.fraction() < traffic.continued;
        let mut talk = if continues {
            let which = random.below(open.len() as u64) as usize;
            open.swap_remove(which)
        } else {
            // The square prefers low numbers: some prompts are more popular.
            let popular = (random.fraction().powi(2) * traffic.prompts as f64) as u64;
            let first = popular * stretches;
            Conversation {
                tokens: traffic.prompt_tokens,
                ids: (first..first + stretches).collect(),
            }
        };
        talk.tokens += length(&mut random, traffic.question_tokens);
        let answer = length(&mut random, traffic.answer_tokens);
        while (talk.ids.len() as u64) < talk.tokens / TOKENS_PER_ID {
            talk.ids.push(next_id);
            next_id += 1;
        }
        let mut hash_ids = talk.ids.clone();
        if talk.tokens % TOKENS_PER_ID != 0 {
            // The last stretch is not full: what it becomes next turn has another id.
            hash_ids.push(next_id);
            next_id += 1;
        }
        requests.push(Request {
            timestamp: (seconds * 1e3).floor(),
            input_length: talk.tokens,
            output_length: answer,
            hash_ids,
        });
        talk.tokens += answer;
        if talk.tokens < INPUT_MAX && open.len() < OPEN_CONVERSATIONS {
            open.push(talk);
        }
    }
    requests
}

/// Exponentially distributed, at least one token.
fn length(random: &mut Random, mean: u64) -> u64 {
    (random.exponential(mean as f64) as u64).clamp(1, INPUT_MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::format;

    const TRAFFIC: Traffic = Traffic {
        requests: 500,
        rate: 10.0,
        prompts: 4,
        prompt_tokens: 2048,
        question_tokens: 800,
        answer_tokens: 200,
        continued: 0.5,
        seed: 3,
    };

    /// Goal: what is generated is a valid trace, in order of time, at the rate asked for.
    #[test]
    fn is_a_valid_trace() {
        let lines: Vec<String> = generate(TRAFFIC)
            .iter()
            .map(|request| serde_json::to_string(request).unwrap())
            .collect();
        let trace = format::parse(&lines.join("\n"), "generated").unwrap();
        assert!(trace.is_sorted_by(|a, b| a.timestamp <= b.timestamp));
        let seconds = trace[499].timestamp / 1e3;
        assert!((40.0..60.0).contains(&seconds), "{seconds}");
        for request in &trace {
            assert_eq!(request.hash_ids.len() as u64, request.input_length.div_ceil(TOKENS_PER_ID));
        }
    }

    /// Goal: prefixes are shared: a good part of all blocks has been seen before, and an id always stands
    /// behind the same ids.
    #[test]
    fn prefixes_are_shared() {
        let mut before = std::collections::HashMap::new();
        let (mut seen, mut all) = (0, 0);
        for request in generate(TRAFFIC) {
            let mut previous = None;
            for id in request.hash_ids {
                all += 1;
                if let Some(other) = before.insert(id, previous) {
                    seen += 1;
                    assert_eq!(other, previous, "id {id} stands behind two different prefixes");
                }
                previous = Some(id);
            }
        }
        assert!(seen * 3 > all, "{seen} of {all}");
    }
}
