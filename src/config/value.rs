//! From the text of a value to the value: one parser for YAML, `ucm_options_set` and the command line.
//! Knows kinds and ranges, not what a key means.

use crate::block::SliceShape;
use crate::error::{Error, ErrorKind, Result};

use super::geometry::{parse_shape_text, shape_from_fields};
use super::keys::{Key, Kind};

/// A value as it was written. Numbers and booleans keep their text.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Raw {
    /// Nothing: the key is there without a value, or with `null`.
    Absent,
    /// One scalar.
    Text(String),
    /// A list.
    List(Vec<Raw>),
    /// A mapping.
    Map(Vec<(String, Raw)>),
}

/// A value that has the form of its key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Bool(bool),
    Integer(i64),
    Number(f64),
    Word(&'static str),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<u64>),
    Shapes(Vec<SliceShape>),
}

/// Longest list of any key.
const LIST_MAX: usize = 16384;
/// So much of a bad value is shown in a message.
const SHOWN_MAX: usize = 80;

impl Raw {
    /// The value as a message shows it.
    pub(super) fn shown(&self) -> String {
        let text = match self {
            Raw::Absent => "nothing".to_owned(),
            Raw::Text(text) => format!("\"{text}\""),
            Raw::List(_) => "a list".to_owned(),
            Raw::Map(_) => "a mapping".to_owned(),
        };
        if text.chars().count() <= SHOWN_MAX {
            return text;
        }
        text.chars().take(SHOWN_MAX).chain("...".chars()).collect()
    }
}

/// Gives `raw` the form of `key`. The error names the key, the value and what is allowed.
pub(super) fn parse(key: &Key, raw: &Raw) -> Result<Value> {
    let parsed = match &key.kind {
        Kind::Bool => text(raw).and_then(boolean).map(Value::Bool),
        Kind::Integer(min, max) => {
            text(raw).and_then(|t| integer(t, *min, *max)).map(Value::Integer)
        }
        Kind::Number(min, max) => text(raw).and_then(|t| number(t, *min, *max)).map(Value::Number),
        Kind::Word(words) => text(raw).and_then(|t| word(t, words)).map(Value::Word),
        Kind::WordOrInteger(words, max) => text(raw).and_then(|t| {
            word(t, words).map(Value::Word).or_else(|| integer(t, 0, *max).map(Value::Integer))
        }),
        Kind::Text(max) => text(raw)
            .filter(|t| t.len() <= *max && !t.contains('\0'))
            .map(|t| Value::Text(t.into())),
        Kind::Name(max) => text(raw).filter(|t| is_name(t, *max)).map(|t| Value::Text(t.into())),
        Kind::Directories => directories(raw).map(Value::Texts),
        Kind::Integers(min, max) => integers(raw, *min, *max).map(Value::Integers),
        Kind::Shapes => {
            return shapes(raw).map(Value::Shapes).map_err(|why| refuse(key, raw, &why));
        }
    };
    parsed.ok_or_else(|| refuse(key, raw, ""))
}

fn refuse(key: &Key, raw: &Raw, why: &str) -> Error {
    let near = match (&key.kind, raw) {
        (Kind::Word(words) | Kind::WordOrInteger(words, _), Raw::Text(text)) => {
            nearest(text, words.iter().copied())
                .map(|word| format!("; did you mean {word}?"))
                .unwrap_or_default()
        }
        _ => String::new(),
    };
    let why = if why.is_empty() { String::new() } else { format!(": {why}") };
    Error::new(
        ErrorKind::InvalidConfig,
        format!(
            "{}: {} is not allowed{why}; allowed: {}{near}",
            key.name,
            raw.shown(),
            key.kind.allowed()
        ),
    )
}

/// The known word that looks most like `text`, where one does.
pub(super) fn nearest<'a>(text: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const SIMILAR_MIN: f64 = 0.5;
    let text = text.to_lowercase();
    known
        .map(|word| (strsim::normalized_damerau_levenshtein(&text, &word.to_lowercase()), word))
        .filter(|(likeness, _)| *likeness >= SIMILAR_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, word)| word)
}

fn text(raw: &Raw) -> Option<&str> {
    match raw {
        Raw::Text(text) => Some(text.trim()),
        _ => None,
    }
}

fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

fn integer(text: &str, min: i64, max: i64) -> Option<i64> {
    let digits: String = text.chars().filter(|c| *c != '_').collect();
    let value = match digits.strip_prefix("0x") {
        Some(hex) => i64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok().or_else(|| whole(number(&digits, min as f64, max as f64)?))?,
    };
    (min..=max).contains(&value).then_some(value)
}

/// The integer that a number such as `4e6` or `32.0` stands for.
fn whole(number: f64) -> Option<i64> {
    const EXACT_MAX: f64 = (1_u64 << 53) as f64;
    (number.fract() == 0.0 && number.abs() <= EXACT_MAX).then_some(number as i64)
}

fn number(text: &str, min: f64, max: f64) -> Option<f64> {
    let value: f64 = text.parse().ok()?;
    (value.is_finite() && value >= min && value <= max).then_some(value)
}

/// The word as the table spells it. YAML writes `off` and `false` alike, so booleans match either.
fn word(text: &str, words: &[&'static str]) -> Option<&'static str> {
    let same = |word: &&&'static str| word.eq_ignore_ascii_case(text);
    if let Some(word) = words.iter().find(same) {
        return Some(word);
    }
    let synonyms: &[&str] = match boolean(text)? {
        true => &["true"],
        false => &["false", "off"],
    };
    words.iter().find(|word| synonyms.contains(word)).copied()
}

fn is_name(text: &str, max: usize) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !text.is_empty() && text.len() <= max && text.chars().all(plain) && !text.starts_with('.')
}

/// A list that was written as YAML flow text (`[a, b]`), for callers that only have strings.
fn unfolded(raw: &Raw) -> Option<Raw> {
    match raw {
        Raw::Text(text) if text.trim_start().starts_with('[') => super::yaml::parse_flow(text).ok(),
        other => Some(other.clone()),
    }
}

fn directories(raw: &Raw) -> Option<Vec<String>> {
    let names: Vec<String> = match unfolded(raw)? {
        Raw::Text(joined) => joined.split(':').map(str::trim).map(str::to_owned).collect(),
        Raw::List(items) => {
            items.iter().map(|item| text(item).map(str::to_owned)).collect::<Option<_>>()?
        }
        _ => return None,
    };
    let usable = !names.is_empty()
        && names.len() <= LIST_MAX
        && names.iter().all(|name| !name.is_empty() && !name.contains('\0'));
    usable.then_some(names)
}

fn integers(raw: &Raw, min: i64, max: i64) -> Option<Vec<u64>> {
    let one = |text: &str| integer(text.trim(), min, max).map(|value| value as u64);
    let numbers = match unfolded(raw)? {
        Raw::Text(joined) if joined.trim().is_empty() => Vec::new(),
        Raw::Text(joined) => joined.split(',').map(one).collect::<Option<Vec<_>>>()?,
        Raw::List(items) => {
            items.iter().map(|item| text(item).and_then(one)).collect::<Option<Vec<_>>>()?
        }
        _ => return None,
    };
    (numbers.len() <= LIST_MAX).then_some(numbers)
}

fn shapes(raw: &Raw) -> std::result::Result<Vec<SliceShape>, String> {
    let shapes = match unfolded(raw).ok_or("the list is not YAML")? {
        Raw::Text(text) => text
            .split(';')
            .map(str::trim)
            .filter(|shape| !shape.is_empty())
            .map(parse_shape_text)
            .collect::<std::result::Result<Vec<_>, _>>()?,
        Raw::List(items) => items.iter().map(shape).collect::<std::result::Result<Vec<_>, _>>()?,
        _ => return Err("neither a list nor text".into()),
    };
    if shapes.is_empty() || shapes.len() > LIST_MAX {
        return Err(format!("{} slices; there must be 1 to {LIST_MAX}", shapes.len()));
    }
    Ok(shapes)
}

fn shape(raw: &Raw) -> std::result::Result<SliceShape, String> {
    const SIZE_MAX: i64 = 1 << 48;
    let fields = match raw {
        Raw::Text(text) => return parse_shape_text(text),
        Raw::Map(fields) => fields,
        other => return Err(format!("a slice is {}", other.shown())),
    };
    let (mut run, mut counts, mut strides) = (None, Vec::new(), Vec::new());
    for (name, value) in fields {
        let list = || {
            integers(value, 0, SIZE_MAX)
                .ok_or_else(|| format!("{name} of a slice is {}", value.shown()))
        };
        match name.as_str() {
            "run" => run = text(value).and_then(|text| integer(text, 1, SIZE_MAX)),
            "counts" => counts = list()?,
            "strides" => strides = list()?,
            other => return Err(format!("a slice has run, counts and strides, not {other}")),
        }
    }
    let run = run.ok_or("a slice lacks run, its contiguous bytes")?;
    shape_from_fields(run as u64, &counts, &strides)
}
