//! `ucm-bench sweep`: one job over lists of block sizes, depths and workloads, as table, data and drawing.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::ArgMatches;

use crate::cli;
use crate::job::Job;
use crate::plot::{self, Chart, Line};
use crate::report::{self, Format, Group};
use crate::run::{self, Context, GroupResult};
use crate::units::{show_size, size};

/// `ucm-bench sweep`.
pub fn main(matches: &ArgMatches, context: &Context) -> Result<ExitCode, String> {
    let format = crate::format(matches)?;
    let base = cli::single(matches, Job::default())?;
    let results = context.each(points(matches, &base)?, |job| {
        job.validate()?;
        run::run_group(&[job], context)
    })?;
    crate::write(matches, &report::render(&results, context.is_interrupted(), format))?;
    let path = matches.get_one::<String>("report").cloned().unwrap_or_default();
    let svg = draw(&results)?;
    let page = if path.ends_with(".svg") { svg } else { page(&svg, &results, context) };
    std::fs::write(&path, page).map_err(|error| format!("{path}: {error}"))?;
    if format == Format::Normal {
        println!("report: {path}");
    }
    let jobs = results.iter().flat_map(|group| &group.jobs);
    Ok(crate::status_of(jobs.map(|job| job.tally.failures()).sum()))
}

fn points(matches: &ArgMatches, base: &Job) -> Result<Vec<Job>, String> {
    let list = |id: &str| -> Vec<String> {
        let text = matches.get_one::<String>(id).cloned().unwrap_or_default();
        text.split(',').map(|item| item.trim().to_owned()).collect()
    };
    // A model gives its own size.
    let sizes = if base.model.is_some() {
        vec![None]
    } else {
        list("sweep-block-size")
            .iter()
            .map(|text| size(text).map(Some))
            .collect::<Result<_, _>>()?
    };
    let mut points = Vec::new();
    for rw in list("sweep-rw") {
        for &bytes in &sizes {
            for depth in list("sweep-iodepth") {
                let mut job = base.clone();
                crate::keys::apply(&mut job, "rw", &rw)?;
                crate::keys::apply(&mut job, "iodepth", &depth)?;
                job.block_size = bytes.unwrap_or(job.block_size);
                job.batch = job.batch.min(job.iodepth);
                job.name = format!("{rw} {} depth {depth}", show_size(job.shape()?.bytes()));
                points.push(job);
            }
        }
    }
    Ok(points)
}

/// Reads one figure of a group.
type Figure = fn(&Group) -> Option<f64>;

/// The drawings, as SVG.
fn draw(results: &[GroupResult]) -> Result<String, String> {
    const FIGURES: [(&str, &str, Figure); 3] = [
        ("Throughput", "GB/s", |group| Some(group.jobs[0].gb_per_second)),
        ("Latency, 99 %", "ms", |group| {
            let stages = &group.jobs[0].latency_us;
            let last = stages.iter().find(|(name, _)| **name != "copied")?;
            Some(last.1.p99 * 1e-3)
        }),
        ("CPU per GB", "CPU s/GB", |group| {
            Some(group.cpu_user_seconds_per_gb? + group.cpu_system_seconds_per_gb?)
        }),
    ];
    let groups: Vec<Group> = results.iter().map(Group::new).collect();
    let mut workloads: Vec<&str> = groups.iter().map(|group| group.jobs[0].rw).collect();
    workloads.dedup();
    let mut charts = Vec::new();
    for rw in workloads {
        let of_rw: Vec<&Group> = groups.iter().filter(|group| group.jobs[0].rw == rw).collect();
        for (title, unit, figure) in FIGURES {
            let mut lines: Vec<Line> = Vec::new();
            for group in &of_rw {
                let job = &group.jobs[0];
                let name = show_size(job.block_bytes);
                let Some(value) = figure(group) else { continue };
                if lines.last().is_none_or(|line| line.name != name) {
                    lines.push(Line { name, points: Vec::new() });
                }
                if let Some(line) = lines.last_mut() {
                    line.points.push((f64::from(job.iodepth), value));
                }
            }
            charts.push(Chart {
                title: format!("{rw}: {title}"),
                x_label: "blocks in flight".into(),
                y_label: unit.into(),
                lines,
            });
        }
    }
    plot::draw(&charts, 3)
}

fn page(svg: &str, results: &[GroupResult], context: &Context) -> String {
    let table = report::render(results, context.is_interrupted(), Format::Normal);
    let escaped = table.replace('&', "&amp;").replace('<', "&lt;");
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>ucm-bench sweep</title>\n\
         <style>body{{font-family:sans-serif;margin:2em}}svg{{max-width:100%;height:auto}}\
         pre{{font-size:12px;line-height:1.35}}</style></head>\n<body><h1>ucm-bench sweep</h1>\n\
         <p>Absolute figures of one run on one machine. To judge the engine, see the ratios of \
         <code>ucm-bench compare fio</code>.</p>\n{svg}\n<h2>All figures</h2>\n<pre>{escaped}</pre>\n</body></html>\n"
    )
}
