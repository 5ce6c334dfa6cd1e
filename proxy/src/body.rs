//! The body of a request as its top-level fields, each value kept as the client's own bytes.
//! Owns reading, editing and writing of that one level; does not know which fields matter.
//!
//! Values are not decoded: a number like `1e400`, a key given twice or a 10 MiB image part reaches
//! the server as the client wrote it, and costs one scan instead of a tree.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The field by which prefill tells decode what to wait for. Never taken from a client.
pub const KV_TRANSFER_PARAMS: &str = "kv_transfer_params";

/// The fields of one JSON object in their order.
#[derive(Debug)]
pub struct Fields<'a> {
    entries: Vec<(Cow<'a, str>, &'a RawValue)>,
}

#[derive(serde::Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Fields<'de>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some((key, value)) = map.next_entry::<Key, &RawValue>()? {
                    entries.push((key.0, value));
                }
                Ok(Fields { entries })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'a> Fields<'a> {
    /// Reads an object. Anything else, and anything that is not JSON, is `None`.
    pub fn parse(text: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }

    /// The text of a field that is there and not null. The last of equal keys counts, as in Python.
    pub fn get(&self, name: &str) -> Option<&'a str> {
        let (_, value) = self.entries.iter().rev().find(|(key, _)| key == name)?;
        (value.get() != "null").then(|| value.get())
    }

    /// Whether the key is there at all.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.iter().any(|(key, _)| key == name)
    }

    /// Whether a flag is set, in any spelling that the servers' validation takes for true.
    pub fn is_true(&self, name: &str) -> bool {
        let spelled = self.get(name).unwrap_or("false").trim_matches('"').to_ascii_lowercase();
        matches!(spelled.as_str(), "true" | "1" | "1.0" | "t" | "y" | "yes" | "on")
    }

    /// Whether the field is the number zero.
    pub fn is_zero(&self, name: &str) -> bool {
        let number = self.get(name).map(|text| text.trim_matches('"').parse::<f64>());
        matches!(number, Some(Ok(value)) if value == 0.0)
    }

    /// Writes the object without the fields of `without`, and with those of `with` at its end.
    pub fn write(&self, without: &[&str], with: &[(&str, &str)]) -> Bytes {
        let added = |key: &str| with.iter().any(|(name, _)| *name == key);
        let kept = self.entries.iter().filter(|(key, _)| !without.contains(&&**key) && !added(key));
        let kept = kept.map(|(key, value)| (&**key, value.get()));
        let size: usize = self.entries.iter().map(|(k, v)| k.len() + v.get().len() + 4).sum();
        let mut out = Vec::with_capacity(size + 128);
        for (key, value) in kept.chain(with.iter().copied()) {
            out.push(if out.is_empty() { b'{' } else { b',' });
            serde_json::to_writer(&mut out, key).expect("a string into memory");
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
        }
        if out.is_empty() {
            out.push(b'{');
        }
        out.push(b'}');
        out.into()
    }
}

/// The elements of a JSON array as their own texts; `None` for anything else.
pub fn elements(text: &str) -> Option<Vec<&str>> {
    let raw: Vec<&RawValue> = serde_json::from_str(text).ok()?;
    Some(raw.into_iter().map(RawValue::get).collect())
}

/// The client's body for decode: untouched but for `kv_transfer_params`, of which the client's own
/// is taken out and prefill's, if any, put in. Without either the very same bytes come back.
pub fn for_decode(body: &Bytes, fields: &Fields<'_>, handoff: Option<&str>) -> Bytes {
    let nested = without_nested_params(fields);
    if !fields.contains(KV_TRANSFER_PARAMS) && nested.is_none() {
        return match handoff {
            None => body.clone(),
            Some(params) => spliced(body, fields, params),
        };
    }
    let mut with = Vec::new();
    if let Some(sampling) = &nested {
        with.push((SAMPLING_PARAMS, sampling.as_str()));
    }
    with.extend(handoff.map(|params| (KV_TRANSFER_PARAMS, params)));
    fields.write(&[KV_TRANSFER_PARAMS], &with)
}

fn spliced(body: &Bytes, fields: &Fields<'_>, params: &str) -> Bytes {
    let end = body.iter().rposition(|byte| *byte == b'}').expect("a parsed object ends in a brace");
    let comma = if fields.entries.is_empty() { "" } else { "," };
    let field = format!("{comma}\"{KV_TRANSFER_PARAMS}\":{params}");
    [&body[..end], field.as_bytes(), &body[end..]].concat().into()
}

const SAMPLING_PARAMS: &str = "sampling_params";

/// `/inference/v1/generate` takes sampling parameters as they are, and their `extra_args` is where
/// the engine looks for transfer parameters: returns them without, when a client put some there.
fn without_nested_params(fields: &Fields<'_>) -> Option<String> {
    let sampling = fields.get(SAMPLING_PARAMS)?;
    let inner = Fields::parse(sampling.as_bytes())?;
    let extra = Fields::parse(inner.get("extra_args")?.as_bytes())?;
    if !extra.contains(KV_TRANSFER_PARAMS) {
        return None;
    }
    let extra = extra.write(&[KV_TRANSFER_PARAMS], &[]);
    let extra = std::str::from_utf8(&extra).expect("written from text");
    let sampling = inner.write(&[], &[("extra_args", extra)]);
    Some(String::from_utf8(sampling.into()).expect("written from text"))
}

/// Whether a body that is not a JSON object here could still name `kv_transfer_params` to a server
/// with a laxer parser (`NaN`, UTF-16, escaped keys). Such a body is not passed on.
pub fn may_hide_params(body: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(body) else { return true };
    text.contains('\0') || text.contains("\\u") || text.contains(KV_TRANSFER_PARAMS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(body: &'static str, handoff: Option<&str>) -> String {
        let body = Bytes::from_static(body.as_bytes());
        let fields = Fields::parse(&body).expect("an object");
        String::from_utf8(for_decode(&body, &fields, handoff).to_vec()).unwrap()
    }

    #[test]
    fn decode_gets_the_clients_bytes() {
        // Goal: odd spacing, odd numbers, equal keys and escapes survive; only the field is added.
        let odd = " { \"a\" : 1e400, \"a\":12345678901234567890123, \"\\u00e9\":\"\\ud83d\" }\n";
        assert_eq!(decode(odd, None), odd);
        let expected = odd.replace(" }\n", " ,\"kv_transfer_params\":{\"ucm\":1}}\n");
        assert_eq!(decode(odd, Some("{\"ucm\":1}")), expected);
        assert_eq!(decode("{}", Some("{}")), "{\"kv_transfer_params\":{}}");
    }

    #[test]
    fn a_clients_own_transfer_params_never_pass() {
        // Goal: plain, escaped, doubled and nested spellings are all stripped.
        assert_eq!(decode(r#"{"kv_transfer_params":{"x":1}}"#, None), "{}");
        assert_eq!(decode(r#"{"\u006bv_transfer_params":1,"b":2}"#, None), r#"{"b":2}"#);
        let twice = r#"{"kv_transfer_params":1,"b":2,"kv_transfer_params":3}"#;
        assert_eq!(decode(twice, Some("{}")), r#"{"b":2,"kv_transfer_params":{}}"#);
        let nested =
            r#"{"sampling_params":{"extra_args":{"kv_transfer_params":{"x":1},"y":2}},"b":3}"#;
        assert_eq!(decode(nested, None), r#"{"b":3,"sampling_params":{"extra_args":{"y":2}}}"#);
        assert!(may_hide_params(br#"{"a":NaN,"kv_transfer_params":{}}"#));
        assert!(may_hide_params(br#"{"a":NaN,"\u006bv_transfer_params":{}}"#));
        assert!(may_hide_params(&[0xff, 0xfe, b'{', 0]));
        assert!(!may_hide_params(br#"{"a":NaN}"#));
    }
}
