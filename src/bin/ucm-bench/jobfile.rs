//! Job files as fio writes them: `[global]`, sections, `key=value`, `;` and `#` comments, `${VARIABLE}`.

#![forbid(unsafe_code)]

use crate::job::Job;
use crate::keys;

/// Keys of fio's files that change nothing here: threads always, one report for all of a job's, orders of whole
/// passes, and a page cache that the store's own reads go past.
const WITHOUT_EFFECT: [&str; 4] = ["group_reporting", "thread", "norandommap", "invalidate"];

/// Reads the jobs of a file's text. Settings of `[global]` hold for the sections after it, on top of
/// `defaults` (the flags before the file).
pub fn parse(text: &str, defaults: &Job, origin: &str) -> Result<Vec<Job>, String> {
    let mut global = defaults.clone();
    let mut jobs: Vec<Job> = Vec::new();
    let mut section: Option<bool> = None; // Some(true) inside [global]
    for (index, line) in text.lines().enumerate() {
        let told = |message: String| format!("{origin}:{}: {message}", index + 1);
        let line = strip_comment(line);
        if line.is_empty() {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            let name = name
                .strip_suffix(']')
                .ok_or_else(|| told(format!("`{line}`: a section is written [name]")))?
                .trim();
            section = Some(name == "global");
            if name != "global" {
                jobs.push(Job { name: name.to_owned(), ..global.clone() });
            }
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        if WITHOUT_EFFECT.contains(&key.trim()) && section.is_some() {
            eprintln!("ucm-bench: {}", told(format!("{} has no effect here", key.trim())));
            continue;
        }
        let value = expand(value.trim()).map_err(told)?;
        let target = match section {
            Some(true) => &mut global,
            Some(false) => jobs.last_mut().unwrap_or(&mut global),
            None => return Err(told(format!("`{line}` stands before the first [section]"))),
        };
        keys::apply(target, key, &value).map_err(told)?;
    }
    if jobs.is_empty() {
        return Err(format!("{origin}: no job; a job is a [section] besides [global]"));
    }
    Ok(jobs)
}

fn strip_comment(line: &str) -> &str {
    let line = line.trim();
    if line.starts_with([';', '#']) {
        return "";
    }
    // As in fio a comment may also follow a setting, after white space.
    let end = [" ;", " #", "\t;", "\t#"].iter().filter_map(|mark| line.find(mark)).min();
    line[..end.unwrap_or(line.len())].trim_end()
}

fn expand(value: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = value;
    while let Some(start) = rest.find("${") {
        let end =
            rest[start..].find('}').ok_or_else(|| format!("`{value}`: `${{` without `}}`"))?
                + start;
        let name = &rest[start + 2..end];
        out.push_str(&rest[..start]);
        out.push_str(
            &std::env::var(name)
                .map_err(|_| format!("the environment variable {name} is not set"))?,
        );
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Workload;

    const FILE: &str = "
; the shape of a small model
[global]
directory=/data
model=llama-3-8b   # 128 tokens a block
runtime=30s
time_based

[fill]
rw=save
size=2g

[read]
stonewall
rw=randload
iodepth=64
";

    /// Goal: a job file that a fio user would write: globals, sections, bare switches, comments.
    #[test]
    fn sections() {
        let jobs = parse(FILE, &Job::default(), "x.fio").unwrap();
        assert_eq!(jobs.len(), 2);
        assert_eq!(
            (jobs[0].name.as_str(), jobs[0].rw, jobs[0].size),
            ("fill", Workload::Save, 2 << 30)
        );
        assert_eq!(
            (jobs[1].rw, jobs[1].iodepth, jobs[1].stonewall),
            (Workload::RandLoad, 64, true)
        );
        assert!(
            jobs.iter().all(|job| job.time_based && job.model.as_deref() == Some("llama-3-8b"))
        );
    }

    /// Goal: a file made for fio is not refused for a key that is harmless.
    #[test]
    fn harmless_keys_of_fio_were_refused() {
        let text = "[global]\nthread\ngroup_reporting=1\n[a]\nnorandommap\ninvalidate = 0\nbs=4k\n";
        let jobs = parse(text, &Job::default(), "x.fio").unwrap();
        assert_eq!((jobs.len(), jobs[0].block_size), (1, 4096));
    }

    /// Goal: an error says file, line, and what is wrong.
    #[test]
    fn errors_name_the_line() {
        let error = parse("[a]\nrw=load\niodpth=3\n", &Job::default(), "x.fio").unwrap_err();
        assert!(error.starts_with("x.fio:3:") && error.contains("iodepth"), "{error}");
        assert!(parse("rw=load", &Job::default(), "x").unwrap_err().contains("[section]"));
        assert!(parse("[global]\nbs=4k", &Job::default(), "x").unwrap_err().contains("no job"));
        assert!(
            parse("[a]\ndirectory=${UCM_NOT_SET_ANYWHERE}", &Job::default(), "x")
                .unwrap_err()
                .contains("UCM_NOT_SET_ANYWHERE")
        );
    }
}
