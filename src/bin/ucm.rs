//! The operator's command line.

fn main() {
    println!("ucm {}", env!("CARGO_PKG_VERSION"));
}
