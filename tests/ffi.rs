//! The C ABI from C and C++: installs what cargo built, compiles the programs of `ffi-tests/` and `examples/`
//! with gcc and clang in every way that users do, and runs them.
//!
//! A compiler that is missing fails the tests with the command that installs it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

mod fakes;
#[path = "../xtask/src/install.rs"]
#[allow(dead_code)]
mod install;

/// Longest run of one program, sanitizers on a busy machine included.
const RUN_MAX: Duration = Duration::from_secs(240);

const INSTALL_TOOLS: &str =
    "run `cargo xtask test`, or: apt-get install g++ clang cmake pkg-config binutils";

/// How a program is compiled.
#[derive(Clone, Copy, Debug)]
struct Toolchain {
    compiler: &'static str,
    flags: &'static [&'static str],
    library: Library,
}

/// What it is linked with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Library {
    Shared,
    Static,
    None,
}

const SANITIZE: &str = "-fsanitize=address,undefined";

const C: &[Toolchain] = &[
    Toolchain { compiler: "gcc", flags: &["-std=c11"], library: Library::Shared },
    Toolchain { compiler: "clang", flags: &["-std=c11"], library: Library::Shared },
    Toolchain { compiler: "gcc", flags: &["-std=c11"], library: Library::Static },
    Toolchain { compiler: "gcc", flags: &["-std=c11", SANITIZE], library: Library::Shared },
    Toolchain { compiler: "clang", flags: &["-std=c11", SANITIZE], library: Library::Shared },
];

const CPP: &[Toolchain] = &[
    Toolchain { compiler: "g++", flags: &["-std=c++17"], library: Library::Shared },
    Toolchain { compiler: "clang++", flags: &["-std=c++20"], library: Library::Shared },
    Toolchain { compiler: "clang++", flags: &["-std=c++17"], library: Library::Static },
    Toolchain { compiler: "g++", flags: &["-std=c++20", SANITIZE], library: Library::Shared },
    Toolchain { compiler: "clang++", flags: &["-std=c++17", SANITIZE], library: Library::Shared },
];

const STRICT: &[&str] = &["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g", "-pthread"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A folder below cargo's target folder: on a real disk, not on a tmpfs.
fn scratch() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("ffi")
}

/// An empty folder of its own for one run.
fn fresh_folder() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = scratch().join(format!("run-{}-{number}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Where the libraries are installed that cargo built for this test.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let executable = std::env::current_exe().unwrap();
        let built = executable.parent().unwrap();
        let prefix = scratch().join("prefix");
        install::install(root(), built, &prefix).unwrap();
        prefix
    })
}

/// Runs a tool and returns what it printed; anything but success fails the test with all it said.
fn tool(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{}: {error}; {INSTALL_TOOLS}", command.get_program().display())
    });
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}\n{}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

impl Toolchain {
    /// Compiles one source, with this library, to a program of its own name.
    fn compile(&self, source: &Path) -> PathBuf {
        let stem = source.file_stem().unwrap().to_str().unwrap();
        let name: String = format!("{stem}-{self:?}")
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || "-+".contains(*c))
            .collect();
        let folder = scratch().join("bin");
        fs::create_dir_all(&folder).unwrap();
        let program = folder.join(format!("{name}-{}", std::process::id()));
        let lib = prefix().join("lib");
        let mut command = Command::new(self.compiler);
        command.args(STRICT).args(self.flags).arg(source).arg("-o").arg(&program);
        command.arg("-I").arg(prefix().join("include"));
        match self.library {
            Library::Shared => {
                command.arg("-L").arg(&lib).arg("-lucm");
                command.arg(format!("-Wl,-rpath,{}", lib.display()));
            }
            Library::Static => {
                command.arg(lib.join("libucm.a")).args(install::STATIC_LIBS);
            }
            Library::None => {
                command.arg("-ldl");
            }
        }
        tool(&mut command);
        program
    }

    fn is_sanitized(&self) -> bool {
        self.flags.contains(&SANITIZE)
    }
}

/// How a run ended.
struct Ended {
    success: bool,
    output: String,
}

/// Runs a program on a fresh directory, `RUN_MAX` at most.
fn run(program: &Path, arguments: &[&str]) -> Ended {
    let folder = fresh_folder();
    let log = folder.join("output");
    let file = fs::File::create(&log).unwrap();
    let store = folder.join("store");
    let mut child = Command::new(program)
        .args(arguments)
        .env("UCM_TEST_DIRECTORY", &store)
        .env("UCM_TEST_LIBRARY", prefix().join("lib/libucm.so.0"))
        .env("ASAN_OPTIONS", "detect_leaks=1:abort_on_error=0")
        .env("UBSAN_OPTIONS", "halt_on_error=1:print_stacktrace=1")
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if start.elapsed() > RUN_MAX {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut output = String::from_utf8_lossy(&fs::read(&log).unwrap()).into_owned();
    match status {
        None => output += &format!("\nstopped after {RUN_MAX:?}"),
        Some(status) if !status.success() => output += &format!("\nended with {status}"),
        Some(_) => {}
    }
    fs::remove_dir_all(&folder).unwrap();
    Ended { success: status.is_some_and(|status| status.success()), output }
}

/// Compiles and runs a program in all ways of its language.
fn check(source: &str) {
    let path = root().join("ffi-tests").join(source);
    for toolchain in if source.ends_with(".c") { C } else { CPP } {
        let ended = run(&toolchain.compile(&path), &[]);
        assert!(
            ended.success && ended.output.ends_with("ok\n"),
            "{source} with {toolchain:?}:\n{}",
            ended.output
        );
    }
}

// Goal: both headers compile alone and twice, in every standard, with every warning an error, with and
// without exceptions.
#[test]
fn headers_compile_alone_and_twice() {
    let folder = root().join("ffi-tests");
    let compile = |compiler: &str, flags: &[&str], source: &str| {
        let mut command = Command::new(compiler);
        command.args(STRICT).args(["-Wshadow", "-Wconversion", "-fsyntax-only"]).args(flags);
        tool(command.arg("-I").arg(prefix().join("include")).arg(folder.join(source)));
    };
    for compiler in ["gcc", "clang"] {
        for standard in ["-std=c99", "-std=c11", "-std=c17"] {
            compile(compiler, &[standard, "-Wno-missing-field-initializers"], "header_alone.c");
        }
    }
    for compiler in ["g++", "clang++"] {
        for standard in ["-std=c++17", "-std=c++20"] {
            for extra in [&[][..], &["-fno-exceptions"], &["-fno-rtti"], &["-DUCM_NO_EXCEPTIONS"]] {
                let flags = [&[standard][..], extra].concat();
                compile(compiler, &flags, "hpp_alone.cpp");
            }
            compile(
                compiler,
                &[standard, "-Wno-missing-field-initializers", "-xc++"],
                "header_alone.c",
            );
        }
        for standard in ["-std=c++11", "-std=c++14"] {
            compile(
                compiler,
                &[standard, "-Wno-missing-field-initializers", "-xc++"],
                "header_alone.c",
            );
        }
    }
}

// Goal: the library exports exactly the functions of include/symbols.txt.
#[test]
fn only_declared_symbols_are_exported() {
    let listed = fs::read_to_string(root().join("include/symbols.txt")).unwrap();
    let listed: BTreeSet<&str> = listed.lines().collect();
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only", "--format=posix"]).arg(prefix().join("lib/libucm.so"));
    let exported = tool(&mut nm);
    let exported: BTreeSet<&str> =
        exported.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(exported, listed);
    assert!(listed.len() >= 36, "{} functions", listed.len());
}

// Goal: the soname carries the ABI's major version and the library is never unmapped.
#[test]
fn soname_is_versioned_and_dlclose_keeps_the_library() {
    let mut readelf = Command::new("readelf");
    let dynamic = tool(readelf.args(["-dW"]).arg(prefix().join("lib/libucm.so")));
    assert!(dynamic.contains(&format!("[libucm.so.{}]", install::ABI_MAJOR)), "{dynamic}");
    assert!(dynamic.contains("NODELETE"), "{dynamic}");
    // Nothing that a bare system lacks.
    for needed in dynamic.lines().filter(|line| line.contains("(NEEDED)")) {
        let known = ["libc.so", "libm.so", "libgcc_s.so", "ld-linux", "libdl.so", "libpthread.so"];
        assert!(known.iter().any(|name| needed.contains(name)), "{needed}");
    }
}

// Goal: sizes, offsets and numbers are those that programs were compiled with, in C and in C++.
#[test]
fn abi_layout() {
    check("abi_layout.c");
    let source = root().join("ffi-tests/abi_layout.c");
    for compiler in ["g++", "clang++"] {
        let flags = &["-std=c++17", "-xc++"];
        let toolchain = Toolchain { compiler, flags, library: Library::Shared };
        assert!(run(&toolchain.compile(&source), &[]).success);
    }
}

// Goal: see the programs' first lines.
#[test]
fn bad_arguments() {
    check("bad_arguments.c");
}

#[test]
fn save_load() {
    check("save_load.c");
}

#[test]
fn deadlines() {
    check("deadlines.c");
}

#[test]
fn handles() {
    check("handles.c");
}

#[test]
fn reap() {
    check("reap.c");
}

#[test]
fn forked() {
    check("forked.c");
}

#[test]
fn executed() {
    check("executed.c");
}

#[test]
fn hostile() {
    check("hostile.cpp");
}

#[test]
fn surroundings() {
    check("surroundings.c");
}

#[test]
fn signals() {
    check("signals.c");
}

#[test]
fn logs() {
    check("logs.c");
}

#[test]
fn hold() {
    check("hold.c");
}

#[test]
fn threads() {
    check("threads.cpp");
}

#[test]
fn close_in_flight() {
    check("close_in_flight.cpp");
}

#[test]
fn wrapper() {
    check("wrapper.cpp");
}

#[test]
fn dlopened() {
    let source = root().join("ffi-tests/dlopened.c");
    for compiler in ["gcc", "clang"] {
        let toolchain = Toolchain { compiler, flags: &["-std=c11"], library: Library::None };
        let ended = run(&toolchain.compile(&source), &[]);
        assert!(ended.success, "{compiler}: {}", ended.output);
    }
}

// Goal: the sanitizers are really there: a program that is wrong on purpose is caught, by both compilers.
#[test]
fn sanitizers_catch_a_wrong_program() {
    let source = root().join("ffi-tests/asan_control.c");
    let mut caught = 0;
    for toolchain in C.iter().filter(|toolchain| toolchain.is_sanitized()) {
        let ended = run(&toolchain.compile(&source), &[]);
        assert!(!ended.success && ended.output.contains("AddressSanitizer"), "{}", ended.output);
        caught += 1;
    }
    assert_eq!(caught, 2);
}

/// Goal: random saves and loads of a C++ program through a store that evicts keep every byte in device memory, with two
/// processes at it, in every way of copying: the program that `cargo xtask gpu-test` runs, on a pretended GPU.
#[test]
fn traffic_on_a_pretended_gpu() {
    let program = CPP[0].compile(&root().join("tests/gpu/traffic.cpp"));
    let model = root().join("tests/gpu/model.ptx");
    for copies in ["plain", "batch", "bounce", "kernel"] {
        let folder = fresh_folder();
        let children = ["1", "2"].map(|seed| {
            Command::new(&program)
                .args([folder.as_path(), &model])
                .args(["200", seed])
                .env("UCM_CUDA_LIBRARY", fakes::folder().join("libcuda.so.1"))
                .env("UCM_CUDA_COPY", copies)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        });
        for child in children {
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{copies}: {}\n{text}", output.status);
        }
    }
}

/// Prefill and decode as processes on one directory, a C program reading what a C++ program wrote and back.
fn exchange(cpp: (&Path, &Path), c: (&Path, &Path)) {
    let folder = fresh_folder();
    let directory = folder.join("kv");
    let step = |program: &Path, model: &str, prompt: &str, hits: &str| {
        let mut command = Command::new(program);
        command.args(["--model", model, "--tokens", "512", "--prompt", prompt]);
        tool(command.args(["--expect-hits", hits, "--directory"]).arg(&directory))
    };
    for model in ["qwen2.5-7b", "deepseek-v3"] {
        step(cpp.0, model, "1", "0");
        assert!(step(cpp.1, model, "1", "4").contains("verified every byte of 4 blocks"));
        assert!(step(c.1, model, "1", "4").contains("verified every byte of 4 blocks"));
        step(c.0, model, "2", "0");
        assert!(step(cpp.1, model, "2", "4").contains("verified every byte of 4 blocks"));
        assert!(step(cpp.0, model, "2", "4").contains("4 are stored already"));
    }
    fs::remove_dir_all(&folder).unwrap();
}

fn example(language: &str, name: &str) -> PathBuf {
    root().join("examples").join(language).join(name)
}

// Goal: the examples build with one line of g++ or gcc, and find and verify each other's blocks.
#[test]
fn examples_build_with_one_line_and_read_each_other() {
    let cpp = |name| CPP[0].compile(&example("cpp", name));
    let c = |name| C[1].compile(&example("c", name));
    exchange((&cpp("prefill.cpp"), &cpp("decode.cpp")), (&c("prefill.c"), &c("decode.c")));
}

// Goal: find_package(ucm) gives a target that builds the examples, and they run.
#[test]
fn cmake_finds_the_package() {
    let build = fresh_folder();
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(root().join("examples/cpp")).arg("-B").arg(&build);
    tool(configure.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix().display())));
    tool(Command::new("cmake").arg("--build").arg(&build));
    let c = |name| C[0].compile(&example("c", name));
    exchange((&build.join("prefill"), &build.join("decode")), (&c("prefill.c"), &c("decode.c")));
    fs::remove_dir_all(&build).unwrap();
}

// Goal: pkg-config gives the flags, also for the static library.
#[test]
fn pkg_config_gives_the_flags() {
    let ask = |arguments: &[&str]| {
        let mut command = Command::new("pkg-config");
        command.env("PKG_CONFIG_PATH", prefix().join("lib/pkgconfig"));
        tool(command.args(arguments).arg("ucm"))
    };
    let version = ask(&["--modversion"]);
    assert_eq!(version.trim(), install::version(root()).unwrap());
    let folder = fresh_folder();
    let source = root().join("ffi-tests/header_alone.c");
    for (program, arguments) in
        [("shared", &["--cflags", "--libs"][..]), ("static", &["--static", "--cflags", "--libs"])]
    {
        let program = folder.join(program);
        let flags = ask(arguments);
        let flags = flags.split_whitespace();
        let mut gcc = Command::new("gcc");
        gcc.arg(&source).arg("-o").arg(&program).args(flags);
        tool(gcc.arg(format!("-Wl,-rpath,{}", prefix().join("lib").display())));
        tool(&mut Command::new(&program));
    }
    fs::remove_dir_all(&folder).unwrap();
}

/// Whether a program asks for no other file at its start.
fn is_static(program: &Path) -> bool {
    let mut readelf = Command::new("readelf");
    !tool(readelf.args(["-lW"]).arg(program)).contains("INTERP")
}

// Goal: programs without any shared library, as the comment in the header says: with the flags of pkg-config for C
// and C++, and with CMake's target ucm::static. They save and load.
#[test]
fn fully_static_programs_run() {
    let folder = fresh_folder();
    let mut pkg_config = Command::new("pkg-config");
    pkg_config.env("PKG_CONFIG_PATH", prefix().join("lib/pkgconfig"));
    let flags = tool(pkg_config.args(["--static", "--cflags", "--libs", "ucm"]));
    let runs = |program: &Path| {
        assert!(is_static(program), "{}", program.display());
        let ended = run(program, &[]);
        assert!(ended.success && ended.output.ends_with("ok\n"), "{}", ended.output);
    };
    for (compiler, standard, source) in [
        ("gcc", "-std=c11", "save_load.c"),
        ("clang", "-std=c11", "forked.c"),
        ("g++", "-std=c++17", "wrapper.cpp"),
    ] {
        let program = folder.join(source).with_extension(compiler);
        let mut command = Command::new(compiler);
        command.args([standard, "-static", "-pthread"]).arg(root().join("ffi-tests").join(source));
        tool(command.arg("-o").arg(&program).args(flags.split_whitespace()));
        runs(&program);
    }

    let source = root().join("ffi-tests/save_load.c");
    let text = format!(
        "cmake_minimum_required(VERSION 3.16)\n\
         project(app C)\n\
         find_package(ucm CONFIG REQUIRED)\n\
         add_executable(app {0})\n\
         target_link_libraries(app ucm::static)\n\
         add_executable(alone {0})\n\
         target_link_libraries(alone ucm::static -static)\n",
        source.display()
    );
    fs::write(folder.join("CMakeLists.txt"), text).unwrap();
    let build = folder.join("build");
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(&folder).arg("-B").arg(&build);
    tool(configure.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix().display())));
    tool(Command::new("cmake").arg("--build").arg(&build));
    let ended = run(&build.join("app"), &[]);
    assert!(ended.success && ended.output.ends_with("ok\n"), "{}", ended.output);
    let mut readelf = Command::new("readelf");
    let needed = tool(readelf.args(["-dW"]).arg(build.join("app")));
    assert!(!needed.contains("libucm"), "{needed}");
    runs(&build.join("alone"));
    fs::remove_dir_all(&folder).unwrap();
}

// Goal: the program in README.md is what it claims to be: it compiles, saves in its first run and loads in its
// second.
#[test]
fn the_program_in_the_readme_runs() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let program = readme.split("```cpp\n").nth(1).unwrap().split("```").next().unwrap();
    let folder = fresh_folder();
    let source = folder.join("readme.cpp");
    fs::write(&source, program.replace("/mnt/kv", &folder.join("kv").display().to_string()))
        .unwrap();
    let program = CPP[0].compile(&source);
    for _ in 0..2 {
        tool(&mut Command::new(&program));
    }
    fs::remove_dir_all(&folder).unwrap();
}
