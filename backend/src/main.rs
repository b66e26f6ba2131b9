//! The binary `hawser`.
fn main() {}
