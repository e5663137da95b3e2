//! Writes a checkpoint of a given size, for measurements:
//! `cargo run --release -p transom-runtime --example synthetic -- DIR BYTES [SHARDS]`.
//!
//! A Llama with random weights that have the statistics of trained ones; the
//! same arguments give the same bytes.

use std::path::Path;

use transom_runtime::tiny::SyntheticCheckpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (dir, bytes, shards) = match args.as_slice() {
        [dir, bytes] => (dir, bytes, "1"),
        [dir, bytes, shards] => (dir, bytes, shards.as_str()),
        _ => return Err("usage: synthetic DIR BYTES [SHARDS]".into()),
    };
    SyntheticCheckpoint::of_bytes(bytes.parse()?, shards.parse()?).write(Path::new(dir))?;
    Ok(())
}
