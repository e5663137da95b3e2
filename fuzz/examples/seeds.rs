//! Writes the generated seeds of the corpus: `cargo xtask golden`.

use std::path::Path;
use std::{fs, io};

fn main() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus-seed");
    for seed in transom_fuzz::seeds::all() {
        let dir = root.join(seed.target);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(seed.name), seed.bytes)?;
    }
    Ok(())
}
