//! The demonstration: prefill and decode as processes of their own, on one directory, for three models.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::{Outcome, build_release, install};

/// One model's story: how many tokens its prompts have, and the TP of the decoding side.
struct Scene {
    model: &'static str,
    tokens: u32,
    decode_tp: &'static str,
    what: &'static str,
}

const BLOCK_TOKENS: u32 = 128;

const SCENES: &[Scene] = &[
    Scene { model: "qwen2.5-7b", tokens: 4096, decode_tp: "1", what: "GQA, one rank" },
    Scene { model: "deepseek-v3", tokens: 2048, decode_tp: "1", what: "MLA" },
    Scene {
        model: "llama-3-70b",
        tokens: 1024,
        decode_tp: "4",
        what: "GQA, prefill at TP 8 and decode at TP 4",
    },
];

/// Builds everything and plays all scenes; `directory` is where the KV goes, by default below `target/`.
pub fn run(root: &Path, directory: Option<&Path>) -> Outcome {
    let start = Instant::now();
    let built = build_release()?;
    let stage = built.parent().unwrap_or(&built).join("demo");
    let prefix = stage.join("prefix");
    install::install(root, &built, &prefix)?;
    println!("installed the library below {}", prefix.display());
    let programs = Programs {
        prefill: compile(root, &prefix, &stage, "prefill")?,
        decode: compile(root, &prefix, &stage, "decode")?,
    };

    let kv = directory.unwrap_or(&stage).join(format!("kv-{}", std::process::id()));
    let mut results = Vec::new();
    let outcome = SCENES.iter().try_for_each(|scene| play(scene, &programs, &kv, &mut results));
    let removed = std::fs::remove_dir_all(&kv);

    println!("\nsummary (KV was in {}, now removed)", kv.display());
    for line in &results {
        println!("  {line}");
    }
    outcome?;
    removed.map_err(|error| format!("{}: {error}", kv.display()))?;
    println!(
        "demonstration ok: {} processes, every byte that was loaded is the byte that was saved ({:.0} s)",
        results.len(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

struct Programs {
    prefill: PathBuf,
    decode: PathBuf,
}

/// Compiles an example the way a user does.
fn compile(root: &Path, prefix: &Path, stage: &Path, name: &str) -> Result<PathBuf, String> {
    let program = stage.join(name);
    let mut compiler = Command::new("g++");
    compiler.args(["-std=c++17", "-O2", "-Wall", "-Wextra"]);
    compiler.arg(root.join("examples/cpp").join(format!("{name}.cpp"))).arg("-o").arg(&program);
    compiler.arg(format!("-I{}", prefix.join("include").display()));
    compiler.arg(format!("-L{}", prefix.join("lib").display())).arg("-lucm");
    compiler.arg(format!("-Wl,-rpath,{}", prefix.join("lib").display()));
    println!("{}", show(&compiler));
    match compiler.status() {
        Ok(status) if status.success() => Ok(program),
        Ok(status) => Err(format!("g++ ended with {status}")),
        Err(error) => Err(format!("g++: {error}; install it with `apt-get install g++`")),
    }
}

/// One model: five processes, each of which must find exactly what it should.
fn play(scene: &Scene, programs: &Programs, kv: &Path, results: &mut Vec<String>) -> Outcome {
    let blocks = scene.tokens / BLOCK_TOKENS;
    let shared = scene.tokens / 2;
    println!("\n{}: {}, prompts of {} tokens", scene.model, scene.what, scene.tokens);
    let mut step = |program: &Path, title: &str, prompt: &str, hits: u32| {
        let mut command = Command::new(program);
        command.arg("--directory").arg(kv).args(["--model", scene.model]);
        command.args(["--tokens", &scene.tokens.to_string(), "--prompt", prompt]);
        command.args(["--shared-tokens", &shared.to_string()]);
        command.args(["--expect-hits", &hits.to_string()]);
        if program == programs.decode {
            command.args(["--tp", scene.decode_tp]);
        }
        println!("- {title}");
        let output = command.output().map_err(|error| format!("{}: {error}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        print!("{text}{}", String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            return Err(format!("failed: {}", show(&command)));
        }
        if program == programs.decode
            && !text.contains(&format!("verified every byte of {blocks} blocks"))
        {
            return Err(format!("verified fewer than {blocks} blocks: {}", show(&command)));
        }
        let numbers = text.lines().find(|line| line.contains("GB/s")).unwrap_or_default().trim();
        results.push(format!("{:12} {title}: {numbers}", scene.model));
        Ok(())
    };
    step(&programs.prefill, "prefill saves prompt 1", "1", 0)?;
    step(&programs.decode, "decode loads prompt 1 into other pages", "1", blocks)?;
    step(&programs.prefill, "prefill saves prompt 2, whose first half it shares", "2", blocks / 2)?;
    step(&programs.decode, "decode loads prompt 2", "2", blocks)?;
    step(&programs.decode, "all are gone; decode loads prompt 1 again", "1", blocks)
}

/// A command as a person would type it.
fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
