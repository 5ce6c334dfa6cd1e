//! Whether prefill and decode can share KV at all, from what servers publish of themselves as
//! `ucm_namespace_info{logical,order,dtype,block_size,...}`. Owns reading and comparing; the
//! fetching is another file's. Without that metric the answer is "unknown", never "ok".

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use crate::app::Pools;
use crate::instance::Instance;
use crate::log;

/// The metric's name; a prefix before it (`vllm:`) is allowed.
const METRIC: &str = "ucm_namespace_info";
/// Fingerprint of what KV means; equal or nothing can be shared.
const LOGICAL: &str = "logical";
/// Name of the order of bytes; a different one has to be converted.
const ORDER: &str = "order";
/// Labels that name the server and not its KV. `model_name` is the name it is served under.
const NOT_COMPARED: [&str; 6] = ["engine", "engine_index", "model_name", "instance", "job", "pod"];

/// What one server says of its KV.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Namespace {
    /// It was not asked yet.
    #[default]
    NotAsked,
    /// Nothing.
    Unknown,
    /// These labels.
    Known(BTreeMap<String, String>),
}

/// What two servers can share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// At least one did not say.
    Unknown,
    /// Everything.
    Shared,
    /// The same content in two orders of bytes: what decode knows to convert.
    OtherOrder(String),
    /// Nothing, and why.
    Apart(Vec<String>),
}

impl Verdict {
    fn label(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Shared => "ok",
            Self::OtherOrder(_) => "other_order",
            Self::Apart(_) => "mismatch",
        }
    }

    const LABELS: [&str; 4] = ["unknown", "ok", "other_order", "mismatch"];
}

impl Namespace {
    /// Finds the metric in a Prometheus text.
    pub fn read(text: &str) -> Self {
        for line in text.lines() {
            let Some((name, rest)) = line.split_once('{') else { continue };
            let bare = name.rsplit_once(':').map_or(name, |(_, bare)| bare);
            if !name.starts_with('#')
                && bare == METRIC
                && let Some(labels) = labels(rest)
            {
                return Self::Known(labels);
            }
        }
        Self::Unknown
    }

    /// Compares prefill's (`self`) with decode's.
    pub fn compare(&self, decode: &Self) -> Verdict {
        let (Self::Known(prefill), Self::Known(decode)) = (self, decode) else {
            return Verdict::Unknown;
        };
        let value = |of: &BTreeMap<String, String>, name: &str| {
            of.get(name).cloned().unwrap_or_else(|| "(not given)".to_owned())
        };
        let differs = |name: &str| {
            let (ours, theirs) = (value(prefill, name), value(decode, name));
            (ours != theirs).then(|| format!("{name} is {ours} at prefill and {theirs} at decode"))
        };
        let compared = |name: &&String| {
            !NOT_COMPARED.contains(&name.as_str()) && *name != LOGICAL && *name != ORDER
        };
        let mut names: Vec<_> = prefill.keys().chain(decode.keys()).filter(compared).collect();
        names.sort();
        names.dedup();
        let mut differences: Vec<_> = names.into_iter().filter_map(|name| differs(name)).collect();
        let fingerprint = differs(LOGICAL);
        if prefill.contains_key(LOGICAL) && fingerprint.is_none() {
            // The fingerprint covers all that matters; a label beside it is only a description.
            return differs(ORDER).map_or(Verdict::Shared, Verdict::OtherOrder);
        }
        if differences.is_empty() {
            differences.extend(fingerprint);
        }
        match differs(ORDER) {
            _ if !differences.is_empty() => Verdict::Apart(differences),
            Some(order) => Verdict::OtherOrder(order),
            None => Verdict::Shared,
        }
    }
}

/// `name="value",...}` with the escapes of the text format.
fn labels(text: &str) -> Option<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    let mut rest = text.trim_start();
    while !rest.starts_with('}') {
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.insert(name.trim().to_owned(), value);
        rest = after[end + 1..].trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
    }
    Some(labels)
}

fn namespace_of(instance: &Instance) -> Namespace {
    instance.namespace.lock().expect("no panic while held").clone()
}

/// Every pair of a prefill and a decode server with its verdict.
pub fn verdicts(pools: &Pools) -> Vec<(Arc<Instance>, Arc<Instance>, Verdict)> {
    let Pools::Disaggregated { prefill, decode } = pools else { return Vec::new() };
    let mut all = Vec::new();
    for prefiller in prefill.members() {
        for decoder in decode.members() {
            let verdict = namespace_of(&prefiller).compare(&namespace_of(&decoder));
            all.push((prefiller.clone(), decoder, verdict));
        }
    }
    all
}

/// Notes what a server says now; logs what changed for its pairs.
pub fn note(pools: &Pools, instance: &Instance, namespace: Namespace) {
    let before = verdicts(pools);
    let silent = namespace == Namespace::Unknown;
    if silent && namespace_of(instance) == Namespace::NotAsked {
        log::warn(format!(
            "{} server {} publishes no {METRIC}: whether KV can be shared with it is unknown",
            instance.role, instance.name
        ));
    }
    *instance.namespace.lock().expect("no panic while held") = namespace;
    for ((prefill, decode, verdict), (_, _, old)) in verdicts(pools).iter().zip(before) {
        let concerned = prefill.id == instance.id || decode.id == instance.id;
        if concerned && *verdict != old {
            say(&prefill.name, &decode.name, verdict);
        }
    }
}

fn say(prefill: &str, decode: &str, verdict: &Verdict) {
    match verdict {
        Verdict::Unknown => log::warn(format!(
            "prefill {prefill} and decode {decode}: unknown whether they can share KV"
        )),
        Verdict::Shared => log::info(format!("prefill {prefill} and decode {decode} share KV")),
        Verdict::OtherOrder(order) => log::info(format!(
            "prefill {prefill} and decode {decode} hold the same KV in other orders of bytes \
             ({order}): decode converts what it knows, and computes the rest"
        )),
        Verdict::Apart(differences) => log::warn(format!(
            "PREFILL {prefill} AND DECODE {decode} CAN NEVER SHARE KV: {}. Every prompt is \
             computed twice until both servers are started alike",
            differences.join("; ")
        )),
    }
}

/// The verdicts for `/metrics`: one gauge a pair and state, 1 for the state that holds.
pub fn metrics_text(pools: &Pools) -> String {
    let name = "ucm_proxy_namespace";
    let mut out = format!(
        "# HELP {name} Whether a prefill and a decode server can share KV.\n# TYPE {name} gauge\n"
    );
    for (prefill, decode, verdict) in verdicts(pools) {
        for label in Verdict::LABELS {
            let holds = u8::from(label == verdict.label());
            let _ = writeln!(
                out,
                "{name}{{prefill=\"{}\",decode=\"{}\",state=\"{label}\"}} {holds}",
                prefill.name, decode.name
            );
        }
    }
    out
}

/// One word for all pairs: the worst of them.
pub fn summary(pools: &Pools) -> &'static str {
    let verdicts = verdicts(pools);
    let has = |label: &str| verdicts.iter().any(|(_, _, verdict)| verdict.label() == label);
    ["mismatch", "unknown", "other_order"].into_iter().find(|label| has(label)).unwrap_or("ok")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(labels: &str) -> Namespace {
        let text = format!(
            "# HELP vllm:{METRIC} x\n# TYPE vllm:{METRIC} gauge\nother{{a=\"b\"}} 1\n\
             vllm:{METRIC}{{engine=\"0\",{labels}}} 1.0\n"
        );
        Namespace::read(&text)
    }

    #[test]
    fn differences_are_named_and_silence_is_unknown() {
        // Goal: equal, other order, other content with its fields, and no metric at all.
        let ours = read(r#"logical="a",order="x",dtype="bfloat16",block_size="128""#);
        assert_eq!(ours.compare(&ours), Verdict::Shared);
        let order = read(r#"logical="a",order="y",dtype="bfloat16",block_size="128""#);
        assert!(matches!(ours.compare(&order), Verdict::OtherOrder(_)));
        let apart = read(r#"logical="b",order="y",dtype="float16",block_size="64",engine="1""#);
        let Verdict::Apart(differences) = ours.compare(&apart) else { panic!() };
        assert_eq!(
            differences,
            [
                "block_size is 128 at prefill and 64 at decode",
                "dtype is bfloat16 at prefill and float16 at decode"
            ]
        );
        let unnamed = read(r#"logical="b",order="x",dtype="bfloat16",block_size="128""#);
        let Verdict::Apart(differences) = ours.compare(&unnamed) else { panic!() };
        assert_eq!(differences, ["logical is a at prefill and b at decode"]);
        assert_eq!(ours.compare(&Namespace::read("up 1\n")), Verdict::Unknown);
    }

    #[test]
    fn label_values_may_hold_anything() {
        // Goal: commas, braces, escaped quotes and line breaks inside values.
        let Namespace::Known(labels) = read(r#"model="a,b}\"c\\\n", order="o","#) else { panic!() };
        assert_eq!(labels["model"], "a,b}\"c\\\n");
        assert_eq!(labels["order"], "o");
        assert_eq!(Namespace::read("ucm_namespace_info{broken"), Namespace::Unknown);
    }
}
