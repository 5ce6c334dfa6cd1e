//! Units as fio takes them: sizes `4m`, times `30s`, percentages. Knows no option names.

#![forbid(unsafe_code)]

use std::time::Duration;

/// Bytes of `4096`, `4k`, `1m`, `2g`, `1t`, also `4kb`, `4KiB`: powers of 1024, as fio's default `kb_base`.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => {
            return Err(format!("`{text}` is not a size; write a number with k, m, g or t, as 4m"));
        }
    };
    let bytes = number * (1_u64 << shift) as f64;
    if bytes > (1_u64 << 60) as f64 {
        return Err(format!("`{text}` is more than an exbibyte"));
    }
    Ok(bytes.round() as u64)
}

/// `30` (seconds), `30s`, `500ms`, `100us`, `5m`, `2h`, `1d`.
pub fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let seconds = match unit.as_str() {
        "" | "s" | "sec" => 1.0,
        "us" | "usec" => 1e-6,
        "ms" | "msec" => 1e-3,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => {
            return Err(format!(
                "`{text}` is not a time; write a number with us, ms, s, m or h, as 30s"
            ));
        }
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| format!("`{text}` is too long"))
}

/// A whole number, with `k`, `m`, `g` as powers of 1000 (counts are not bytes).
pub fn count(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let scale = match unit.as_str() {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        _ => return Err(format!("`{text}` is not a count; write a number, as 32 or 1m")),
    };
    Ok((number * scale).round() as u64)
}

/// `50` or `50%`, 0 to 100, as a fraction.
pub fn percent(text: &str) -> Result<f64, String> {
    let value: f64 = text
        .trim()
        .trim_end_matches('%')
        .parse()
        .map_err(|_| format!("`{text}` is not a percentage"))?;
    if !(0.0..=100.0).contains(&value) {
        return Err(format!("`{text}` is not between 0 and 100 percent"));
    }
    Ok(value / 100.0)
}

/// `1`, `0`, `true`, `false`, `yes`, `no`, `on`, `off`; empty means yes, as a bare key in a job file.
pub fn switch(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "" | "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(format!("`{text}` is neither 1 nor 0")),
    }
}

fn split(text: &str) -> Result<(f64, String), String> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number =
        text[..end].parse().map_err(|_| format!("`{text}` does not begin with a number"))?;
    Ok((number, text[end..].trim().to_ascii_lowercase()))
}

/// `1.00 MiB` of bytes.
pub fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value} {}", UNITS[unit])
    } else {
        format!("{value:.2} {}", UNITS[unit])
    }
}

/// A time in the unit that gives it three or four digits.
pub fn show_time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-6 => format!("{:.0} ns", s * 1e9),
        s if s < 1e-3 => format!("{:.1} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.2} s"),
        s => format!("{:.0}m{:02.0}s", (s / 60.0).floor(), s % 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: sizes read as fio reads them, and nonsense is refused by name.
    #[test]
    fn sizes() {
        assert_eq!(size("4m"), Ok(4 << 20));
        assert_eq!(size("64K"), Ok(64 << 10));
        assert_eq!(size("1.5g"), Ok(3 << 29));
        assert_eq!(size("4KiB"), Ok(4096));
        assert_eq!(size("4kb"), Ok(4096));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("4x").unwrap_err().contains("4x"));
        assert!(size("m").is_err());
        assert!(size("9000000t").is_err());
    }

    /// Goal: times in every unit of fio.
    #[test]
    fn times() {
        assert_eq!(time("30"), Ok(Duration::from_secs(30)));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("2m"), Ok(Duration::from_secs(120)));
        assert!(time("2 parsecs").is_err());
    }

    /// Goal: what is shown is what a person would write.
    #[test]
    fn shown() {
        assert_eq!(show_size(1 << 20), "1 MiB");
        assert_eq!(show_size(147_456), "144 KiB");
        assert_eq!(show_time(0.0000123), "12.3 us");
        assert_eq!(show_time(125.0), "2m05s");
    }
}
