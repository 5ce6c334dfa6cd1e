//! What is refused: by name, with the remedy, under an exit status of its own, and before anything is made.

use crate::rig::Bench;

/// Exit status of a run that could not begin.
const REFUSED: i32 = 1;
/// clap's, of a flag that it does not know.
const UNKNOWN: i32 = 2;

/// Goal: a value that makes no sense, and settings that contradict each other, are refused by name.
#[test]
fn bad_values_are_refused_by_name() {
    let bench = Bench::new();
    let cases: [(&[&str], &str); 14] = [
        (&["--bs=4x"], "block-size: `4x` is not a size"),
        (&["--runtime=2parsecs"], "runtime: `2parsecs` is not a time"),
        (&["--iodepth=deep"], "iodepth: `deep` does not begin with a number"),
        (&["--iodepth=0"], "iodepth, batch and numjobs are at least 1"),
        (&["--hit=101"], "hit: `101` is not between 0 and 100 percent"),
        (&["--verify=perhaps"], "verify: `perhaps` is neither 1 nor 0"),
        (&["--rw=read"], "rw: `read` is none of save, load, randload"),
        (
            &["--rate=1m", "--rate-process=even"],
            "rate-process: `even` is neither poisson nor linear",
        ),
        (&["--model=gpt-0"], "gpt-0"),
        (&["--batch=64"], "batch=64 is more than iodepth=32"),
        (&["--time-based"], "time_based needs runtime"),
        (&["--size=1k"], "size=1024 is less than one block of 65536 bytes"),
        (&["--output-format=xml"], "`xml` is none of normal, json, csv"),
        (&["-o", "io_thread=2"], "io_thread"),
    ];
    for (arguments, message) in cases {
        let answer = bench.small(arguments);
        assert_eq!(answer.code, Some(REFUSED), "{arguments:?}: {}", answer.complaint);
        assert!(answer.complaint.contains(message), "{arguments:?}: {}", answer.complaint);
        assert_eq!(answer.text, "", "{arguments:?}");
        assert!(bench.entries().is_empty(), "{arguments:?} left {:?}", bench.entries());
    }
}

/// Goal: a flag that does not exist is refused with the one that was meant.
#[test]
fn unknown_flag_names_the_nearest() {
    let answer = Bench::new().small(&["--iodeth=4"]);
    assert_eq!(answer.code, Some(UNKNOWN));
    assert!(answer.complaint.contains("'--iodepth'"), "{}", answer.complaint);
}

/// Goal: an error in a job file names file and line.
#[test]
fn job_file_error_names_its_line() {
    let bench = Bench::new();
    let file = bench.file("bad.fio");
    std::fs::write(&file, "[global]\nbs=64k\n\n[a]\nrw=sav\n").unwrap();
    let answer = bench.run(&[file.to_str().unwrap()]);
    assert_eq!(answer.code, Some(REFUSED));
    let told = format!("{}:5: rw: `sav`", file.display());
    assert!(answer.complaint.contains(&told), "{}", answer.complaint);
}

/// Goal: a run that does not fit is refused with numbers, and leaves nothing.
#[test]
fn too_little_space_is_refused() {
    let bench = Bench::new();
    let answer = bench.small(&["--rw=save", "--size=900000t"]);
    assert_eq!(answer.code, Some(REFUSED));
    for word in [bench.path().to_str().unwrap(), "are free, the run needs", "--size"] {
        assert!(answer.complaint.contains(word), "{word}: {}", answer.complaint);
    }
    assert!(bench.entries().is_empty());
}

/// Goal: no directory, and one whose parent is missing, are told before anything is measured.
#[test]
fn a_directory_is_needed() {
    let bench = Bench::new();
    let answer = bench.run(&["--rw=save", "--size=2m"]);
    assert_eq!(answer.code, Some(REFUSED));
    assert!(answer.complaint.contains("no --directory"), "{}", answer.complaint);
    let missing = format!("--directory={}", bench.file("mistyped/kv").display());
    let answer = bench.run(&["--rw=save", "--size=2m", &missing]);
    assert_eq!(answer.code, Some(REFUSED));
    assert!(answer.complaint.contains("mistyped/kv: cannot be made"), "{}", answer.complaint);
}
