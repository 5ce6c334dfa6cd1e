//! Traces of requests: JSON lines as in the public Mooncake traces.
//!
//! `timestamp` in milliseconds, `input_length` and `output_length` in tokens, `hash_ids` one for each 512
//! tokens of the input: equal ids at equal places mean equal prefixes.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize, Serializer};

/// Tokens that one hash id stands for.
pub const TOKENS_PER_ID: u64 = 512;
/// The latest arrival, some 300 years, so that times since 1970 fit: more than a `Duration` holds would end the replay in a panic.
const TIMESTAMP_MS_MAX: f64 = 1e13;

/// One request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Arrival, milliseconds since the begin of the trace; a fraction is kept.
    #[serde(serialize_with = "whole_without_point")]
    pub timestamp: f64,
    /// Tokens of the prompt.
    pub input_length: u64,
    /// Tokens of the answer.
    pub output_length: u64,
    /// What the prompt consists of.
    pub hash_ids: Vec<u64>,
}

/// Writes whole milliseconds as the public traces do, without a point.
fn whole_without_point<S: Serializer>(milliseconds: &f64, to: S) -> Result<S::Ok, S::Error> {
    if milliseconds.fract() == 0.0 && *milliseconds >= 0.0 {
        to.serialize_u64(*milliseconds as u64)
    } else {
        to.serialize_f64(*milliseconds)
    }
}

/// Reads a trace; an error names file and line.
pub fn parse(text: &str, origin: &str) -> Result<Vec<Request>, String> {
    let mut requests = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let told = |message: String| format!("{origin}:{}: {message}", index + 1);
        let request: Request =
            serde_json::from_str(line).map_err(|error| told(error.to_string()))?;
        if !(0.0..=TIMESTAMP_MS_MAX).contains(&request.timestamp) {
            return Err(told(format!(
                "timestamp {}: milliseconds since the begin of the trace, 0 to {TIMESTAMP_MS_MAX}",
                request.timestamp
            )));
        }
        let needed = request.input_length.div_ceil(TOKENS_PER_ID);
        if (request.hash_ids.len() as u64) < request.input_length / TOKENS_PER_ID {
            return Err(told(format!(
                "{} hash_ids for an input of {} tokens; {needed} are needed, one per {TOKENS_PER_ID}",
                request.hash_ids.len(),
                request.input_length
            )));
        }
        requests.push(request);
    }
    if requests.is_empty() {
        return Err(format!("{origin}: no request"));
    }
    requests.sort_by(|a, b| a.timestamp.total_cmp(&b.timestamp));
    Ok(requests)
}

/// Numbers of the full blocks of a request's prompt: `block_tokens` divides 512, or is a multiple of it.
pub fn blocks(request: &Request, block_tokens: u64) -> Vec<u64> {
    let count = request.input_length / block_tokens;
    if block_tokens <= TOKENS_PER_ID {
        let parts = TOKENS_PER_ID / block_tokens;
        let number = |n: u64| Some(request.hash_ids.get((n / parts) as usize)? * parts + n % parts);
        return (0..count).map_while(number).collect();
    }
    let ids = block_tokens / TOKENS_PER_ID;
    // Named by the last id it covers: ids stand for their whole prefix.
    (0..count).map_while(|n| request.hash_ids.get(((n + 1) * ids - 1) as usize).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str =
        r#"{"timestamp": 27, "input_length": 1300, "output_length": 5, "hash_ids": [7, 8, 9]}"#;

    /// Goal: a line of the public traces is read; prompts that share ids share blocks, and only full
    /// blocks count.
    #[test]
    fn reads_mooncake_lines() {
        let trace = parse(LINE, "t").unwrap();
        assert_eq!(trace[0].timestamp.to_bits(), 27_f64.to_bits());
        assert_eq!(blocks(&trace[0], 512), [7, 8]);
        assert_eq!(blocks(&trace[0], 128).len(), 10);
        assert_eq!(blocks(&trace[0], 128)[..5], [28, 29, 30, 31, 32]);
        assert_eq!(blocks(&trace[0], 1024), [8]);
    }

    /// Goal: arrivals between two milliseconds are read, kept in order, and whole ones written as they were.
    #[test]
    fn fractional_timestamps_were_refused() {
        let later = LINE.replace("27,", "27.75,");
        let trace = parse(&format!("{later}\n{LINE}\n"), "t").unwrap();
        let written: Vec<_> = trace.iter().map(|r| serde_json::to_string(r).unwrap()).collect();
        assert!(parse(&LINE.replace("27,", "1e300,"), "t").unwrap_err().contains("timestamp"));
        assert!(written[0].contains("27,") && written[1].contains("27.75,"), "{written:?}");
    }

    /// Goal: a broken line is refused by its number.
    #[test]
    fn names_the_line() {
        let error = parse(&format!("{LINE}\n{{\"timestamp\": 1}}\n"), "t").unwrap_err();
        assert!(error.starts_with("t:2:"), "{error}");
        let short = LINE.replace("[7, 8, 9]", "[7]");
        assert!(parse(&short, "t").unwrap_err().contains("hash_ids"));
    }
}
