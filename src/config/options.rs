//! The options of a store as they were given, key by key. Each value is checked for itself when it is
//! set; how they fit together is checked when the [`Config`] is built.

use std::path::Path;

use crate::block::SliceShape;
use crate::error::{Error, ErrorKind, Result};

use super::Config;
use super::keys::{KEYS, Key, Scope};
use super::upstream::{UPSTREAM_KEYS, UPSTREAM_PREFIXES};
use super::value::{self, Raw, Value};
use super::yaml;

/// Connector names of upstream UCM. Ours is the first; the others are accepted with a warning.
const CONNECTORS: &[&str] = &[
    "UcmPipelineStore",
    "UcmNfsStore",
    "UcmPosixStore",
    "UcmCacheStore",
    "UcmPcStore",
    "UcmDramStore",
    "UcmDs3fsStore",
    "UcmMooncakeStore",
    "UcmLocalStore",
];

/// Largest configuration file. A real one has a few hundred bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Keys and values, before they are checked against each other. A key set twice has its last value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    entries: Vec<(&'static str, Value)>,
    warnings: Vec<String>,
}

/// The key of this name or alias.
pub(super) fn find_key(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name || key.aliases.contains(&name))
}

impl Options {
    /// No options: every key has its default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads YAML text: a whole UCM file (with `ucm_connectors`), or the inner mapping alone.
    pub fn from_yaml(text: &str) -> Result<Self> {
        let document = yaml::parse_document(text).map_err(|why| {
            Error::new(ErrorKind::InvalidConfig, format!("the configuration cannot be read: {why}"))
        })?;
        let mut options = Self::new();
        let whole_file = document.connectors.is_some();
        for (key, raw) in &document.entries {
            if whole_file && find_key(key).is_some_and(|key| key.scope == Scope::Store) {
                return Err(Error::new(
                    ErrorKind::InvalidConfig,
                    format!(
                        "{key}: belongs below ucm_connector_config, not at the top of the file"
                    ),
                ));
            }
            options.set_raw(key, raw)?;
        }
        if let Some(connectors) = document.connectors {
            options.take_connectors(connectors)?;
        }
        Ok(options)
    }

    /// As [`Options::from_yaml`], from a file.
    pub fn from_yaml_file(path: &Path) -> Result<Self> {
        let attempt = || -> std::io::Result<String> {
            let bytes = std::fs::metadata(path)?.len();
            if bytes > FILE_BYTES_MAX {
                return Err(std::io::Error::other(format!(
                    "the file has {bytes} bytes; at most {FILE_BYTES_MAX} are read"
                )));
            }
            std::fs::read_to_string(path)
        };
        let text = attempt()
            .map_err(|error| Error::io("reading the configuration", Some(path), &error))?;
        Self::from_yaml(&text).map_err(|error| error.at(path))
    }

    /// Sets one key from text. Lists are YAML flow text (`[a, b]`), directories also `a:b`, numbers also
    /// `1,2`. An unknown key or a value out of range is an error that says what is allowed; a key of
    /// upstream UCM without meaning here is accepted with a warning.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        self.set_raw(key, &Raw::Text(value.to_owned()))
    }

    /// Checks everything against everything.
    pub fn build(&self) -> Result<Config> {
        super::build::build(self)
    }

    /// What was said so far about keys without effect and values replaced.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn take_connectors(&mut self, connectors: Vec<(Option<String>, yaml::Entries)>) -> Result<()> {
        let others = connectors.len().saturating_sub(1);
        let Some((name, entries)) = connectors.into_iter().next() else {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                "ucm_connectors: the list is empty; give one {ucm_connector_name, ucm_connector_config}",
            ));
        };
        if others > 0 {
            self.warn(format!(
                "ucm_connectors: only the first of {} is used; name tiers in store_pipeline",
                others + 1
            ));
        }
        if let Some(name) = name {
            self.check_connector(&name)?;
        }
        for (key, raw) in &entries {
            self.set_raw(key, raw)?;
        }
        Ok(())
    }

    fn check_connector(&mut self, name: &str) -> Result<()> {
        if !CONNECTORS.contains(&name) {
            let near = value::nearest(name, CONNECTORS.iter().copied())
                .map(|near| format!("; did you mean {near}?"))
                .unwrap_or_default();
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "ucm_connector_name: \"{name}\" is not known; allowed: {}{near}",
                    CONNECTORS[0]
                ),
            ));
        }
        if name != CONNECTORS[0] {
            self.warn(format!(
                "ucm_connector_name: {name} is taken as {}; store_pipeline says which tiers there are",
                CONNECTORS[0]
            ));
        }
        Ok(())
    }

    fn set_raw(&mut self, name: &str, raw: &Raw) -> Result<()> {
        let Some(key) = find_key(name) else {
            return self.set_unknown(name, raw);
        };
        if *raw == Raw::Absent {
            self.entries.retain(|(set, _)| *set != key.name);
            return Ok(());
        }
        let replaced = (name == "posix_io_engine").then(|| self.upstream_engine(raw)).flatten();
        let value = value::parse(key, replaced.as_ref().unwrap_or(raw))?;
        match self.entries.iter_mut().find(|(set, _)| *set == key.name) {
            Some(entry) => entry.1 = value,
            None => self.entries.push((key.name, value)),
        }
        Ok(())
    }

    /// Upstream's words for its engines, in ours.
    fn upstream_engine(&mut self, raw: &Raw) -> Option<Raw> {
        let Raw::Text(text) = raw else { return None };
        match text.trim() {
            "aio" => {
                self.warn(
                    "posix_io_engine: aio is taken as io_engine: auto (io_uring where the kernel allows it)",
                );
                Some(Raw::Text("auto".into()))
            }
            "psync" => {
                self.warn(
                    "posix_io_engine: psync is kept; io_engine: auto costs less CPU where the kernel allows io_uring",
                );
                None
            }
            _ => None,
        }
    }

    fn set_unknown(&mut self, name: &str, raw: &Raw) -> Result<()> {
        let named = UPSTREAM_KEYS.iter().find(|(key, _)| *key == name);
        let family = || UPSTREAM_PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix));
        if let Some((_, why)) = named.or_else(family) {
            self.warn(format!("{name}: has no effect: {why}"));
            return Ok(());
        }
        let names = KEYS
            .iter()
            .flat_map(|key| std::iter::once(key.name).chain(key.aliases.iter().copied()));
        let near = match value::nearest(name, names).and_then(|near| Some((near, find_key(near)?)))
        {
            Some((near, key)) => {
                format!("; the nearest known key is {near} (allowed: {})", key.kind.allowed())
            }
            None => "; docs/configuration.md lists all keys".to_owned(),
        };
        Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("unknown key \"{name}\" (value {}){near}", raw.shown()),
        ))
    }

    fn warn(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.warnings.contains(&text) {
            self.warnings.push(text);
        }
    }
}

/// Reading, for the rooms that build a configuration. The name is always one of [`KEYS`].
impl Options {
    /// The value, or the default; `None` where there is neither.
    fn value(&self, name: &str) -> Option<Value> {
        if let Some((_, value)) = self.entries.iter().find(|(set, _)| *set == name) {
            return Some(value.clone());
        }
        let key = find_key(name)?;
        if key.default.is_empty() {
            return None;
        }
        value::parse(key, &Raw::Text(key.default.into())).ok()
    }

    /// Whether the key was given.
    pub(super) fn is_given(&self, name: &str) -> bool {
        self.entries.iter().any(|(set, _)| *set == name)
    }

    /// A number that was given or has a default; 0 for a key without either.
    pub(super) fn integer(&self, name: &str) -> i64 {
        self.given_integer(name).unwrap_or_default()
    }

    /// A number, where there is one.
    pub(super) fn given_integer(&self, name: &str) -> Option<i64> {
        match self.value(name) {
            Some(Value::Integer(value)) => Some(value),
            _ => None,
        }
    }

    /// A number with a fraction.
    pub(super) fn number(&self, name: &str) -> f64 {
        match self.value(name) {
            Some(Value::Number(value)) => value,
            _ => 0.0,
        }
    }

    /// A switch.
    pub(super) fn boolean(&self, name: &str) -> bool {
        matches!(self.value(name), Some(Value::Bool(true)))
    }

    /// One of the words that the key allows; empty where an integer was given instead.
    pub(super) fn word(&self, name: &str) -> &'static str {
        match self.value(name) {
            Some(Value::Word(word)) => word,
            _ => "",
        }
    }

    /// A text; empty by default.
    pub(super) fn text(&self, name: &str) -> String {
        match self.value(name) {
            Some(Value::Text(text)) => text,
            _ => String::new(),
        }
    }

    /// Directories.
    pub(super) fn texts(&self, name: &str) -> Vec<String> {
        match self.value(name) {
            Some(Value::Texts(texts)) => texts,
            _ => Vec::new(),
        }
    }

    /// A list of numbers, where it was given.
    pub(super) fn integers(&self, name: &str) -> Option<&[u64]> {
        self.entries.iter().find_map(|(set, value)| match value {
            Value::Integers(numbers) if *set == name => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// Slice shapes, where they were given.
    pub(super) fn shapes(&self, name: &str) -> Option<&[SliceShape]> {
        self.entries.iter().find_map(|(set, value)| match value {
            Value::Shapes(shapes) if *set == name => Some(shapes.as_slice()),
            _ => None,
        })
    }
}
