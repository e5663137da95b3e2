//! `cargo xtask golden`: writes the generated files anew.

use crate::Failure;
use crate::command::Line;

/// Runs every generator; `git diff` then shows what changed.
pub fn run() -> Result<(), Failure> {
    let words = ["cargo", "run", "--release", "--package", "transom-fuzz", "--example", "seeds"];
    Line::new(&words).run()?;
    Line::new(&["git", "status", "--short", "fuzz/corpus-seed"]).run()
}
