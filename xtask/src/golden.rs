//! `cargo xtask golden`: writes the generated files anew.

use crate::Failure;
use crate::command::Line;

/// Runs every generator; `git status` then shows what changed.
///
/// Integration tests of the library that check generated files have an ignored
/// test `regenerate` that writes them.
pub fn run() -> Result<(), Failure> {
    let tests = ["cargo", "test", "--release", "--package", "transom", "--test", "*"];
    Line::new(&[&tests[..], &["--", "--ignored", "regenerate"]].concat()).run()?;
    let words = ["cargo", "run", "--release", "--package", "transom-fuzz", "--example", "seeds"];
    Line::new(&words).run()?;
    Line::new(&["git", "status", "--short"]).run()
}
