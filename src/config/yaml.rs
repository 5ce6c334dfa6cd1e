//! From YAML text to keys and raw values. Knows the two forms of a file (UCM's whole file, and the inner
//! mapping alone); which keys exist matters only in that scalars of known keys keep their text, so that
//! `model_id: 1.10` stays `1.10`.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::keys::Kind;
use super::options::find_key;
use super::value::Raw;

/// Keys with their values in the order of the text.
pub(super) type Entries = Vec<(String, Raw)>;

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Document {
    /// `ucm_connectors`: name and configuration of each; `None` where the file is the inner mapping.
    pub(super) connectors: Option<Vec<(Option<String>, Entries)>>,
    /// The other keys at the top.
    pub(super) entries: Entries,
}

/// Reads a file of either form.
pub(super) fn parse_document(text: &str) -> Result<Document, String> {
    if is_blank(text) {
        return Ok(Document::default());
    }
    serde_saphyr::with_deserializer_from_str(text, |deserializer| {
        deserializer.deserialize_map(DocumentVisitor)
    })
    .map_err(|error| error.to_string())
}

/// Reads the flow form of a list, `[a, b]`.
pub(super) fn parse_flow(text: &str) -> Result<Raw, String> {
    serde_saphyr::with_deserializer_from_str(text, |deserializer| {
        deserializer.deserialize_any(RawVisitor)
    })
    .map_err(|error| error.to_string())
}

/// Whether a text holds nothing but comments and empty lines.
fn is_blank(text: &str) -> bool {
    text.lines()
        .map(str::trim)
        .all(|line| line.is_empty() || line.starts_with('#') || line == "---")
}

struct DocumentVisitor;

impl<'de> Visitor<'de> for DocumentVisitor {
    type Value = Document;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping of keys to values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
        let mut document = Document::default();
        while let Some(key) = map.next_key::<String>()? {
            if key == "ucm_connectors" {
                document.connectors = Some(map.next_value_seed(Connectors)?);
            } else {
                let value = map.next_value_seed(ValueOf(&key))?;
                document.entries.push((key, value));
            }
        }
        Ok(document)
    }
}

/// The list below `ucm_connectors`.
struct Connectors;

impl<'de> DeserializeSeed<'de> for Connectors {
    type Value = Vec<(Option<String>, Entries)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Connectors {
    type Value = Vec<(Option<String>, Entries)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ucm_connectors: a list of {ucm_connector_name, ucm_connector_config}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut connectors = Vec::new();
        while let Some(connector) = seq.next_element_seed(Connector)? {
            connectors.push(connector);
        }
        Ok(connectors)
    }

    /// One connector that somebody forgot to make a list of.
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        Ok(vec![Connector.visit_map(map)?])
    }
}

struct Connector;

impl<'de> DeserializeSeed<'de> for Connector {
    type Value = (Option<String>, Entries);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Connector {
    type Value = (Option<String>, Entries);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping with ucm_connector_name and ucm_connector_config")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut name, mut entries) = (None, Entries::new());
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "ucm_connector_name" => name = Some(map.next_value::<String>()?),
                "ucm_connector_config" => entries = map.next_value_seed(Inner)?,
                other => {
                    map.next_value::<IgnoredAny>()?;
                    return Err(A::Error::custom(format!(
                        "ucm_connectors: unknown key \"{other}\"; allowed are ucm_connector_name and ucm_connector_config"
                    )));
                }
            }
        }
        Ok((name, entries))
    }
}

/// The mapping below `ucm_connector_config`; nothing there is an empty mapping.
struct Inner;

impl<'de> DeserializeSeed<'de> for Inner {
    type Value = Entries;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entries, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Inner {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ucm_connector_config: a mapping of keys to values")
    }

    fn visit_none<E>(self) -> Result<Entries, E> {
        Ok(Entries::new())
    }

    fn visit_unit<E>(self) -> Result<Entries, E> {
        Ok(Entries::new())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entries, D::Error> {
        deserializer.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = Entries::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(ValueOf(&key))?;
            entries.push((key, value));
        }
        Ok(entries)
    }
}

/// The value of one key: its text where the key is known to take a scalar, else whatever is there.
struct ValueOf<'k>(&'k str);

impl<'de> DeserializeSeed<'de> for ValueOf<'_> {
    type Value = Raw;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw, D::Error> {
        let listed =
            |kind: &Kind| matches!(kind, Kind::Directories | Kind::Integers(..) | Kind::Shapes);
        match find_key(self.0) {
            Some(key) if !listed(&key.kind) => {
                let text = <Option<String> as serde::Deserialize>::deserialize(deserializer)
                    .map_err(|error| D::Error::custom(format!("{}: {error}", self.0)))?;
                Ok(text.map_or(Raw::Absent, Raw::Text))
            }
            _ => deserializer.deserialize_any(RawVisitor),
        }
    }
}

struct RawVisitor;

impl<'de> DeserializeSeed<'de> for RawVisitor {
    type Value = Raw;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a scalar, a list or a mapping")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_owned()))
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Absent)
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Absent)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Raw, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(RawVisitor)? {
            items.push(item);
        }
        Ok(Raw::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            fields.push((name, map.next_value_seed(RawVisitor)?));
        }
        Ok(Raw::Map(fields))
    }
}
