//! The PD proxy.

fn main() {}
