//! Other programs: how they are called, and what to say when they fail.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Failure;

/// Number of tests that a program said it ran.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// They held.
    pub passed: usize,
    /// They did not.
    pub failed: usize,
    /// They were not run.
    pub ignored: usize,
}

impl Count {
    /// Both together.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in a folder").to_owned()
}

/// A command line: environment, program, arguments.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a> {
    /// Variables on top of those of this process.
    pub env: &'a [(&'a str, &'a str)],
    /// The program, then its arguments.
    pub words: &'a [&'a str],
}

impl<'a> Line<'a> {
    /// A line without variables.
    pub const fn new(words: &'a [&'a str]) -> Self {
        Self { env: &[], words }
    }

    /// As one would type it.
    pub fn typed(&self) -> String {
        let quote = |text: &str| match text.contains([' ', '*']) {
            true => format!("'{text}'"),
            false => text.to_owned(),
        };
        let env = self.env.iter().map(|(name, value)| format!("{name}={}", quote(value)));
        env.chain(self.words.iter().map(|word| quote(word))).collect::<Vec<_>>().join(" ")
    }

    fn command(&self) -> Command {
        // The cargo that runs this program, rather than another on the path.
        let program = match self.words[0] {
            "cargo" => std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()),
            other => other.to_owned(),
        };
        let mut command = Command::new(program);
        command.args(&self.words[1..]).envs(self.env.iter().copied());
        command
    }

    fn failure(&self, why: impl std::fmt::Display) -> Failure {
        format!("\nFAILED: {why}. To repeat it:\n\n    {}\n", self.typed())
    }

    /// Runs it, its output going where ours goes.
    pub fn run(&self) -> Result<(), Failure> {
        match self.command().status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(self.failure(status)),
            Err(error) => Err(self.failure(error)),
        }
    }

    /// Runs it and returns what it writes to its standard output.
    pub fn output(&self) -> Result<Vec<u8>, Failure> {
        let mut command = self.command();
        let output = command.stderr(Stdio::inherit()).output().map_err(|e| self.failure(e))?;
        match output.status.success() {
            true => Ok(output.stdout),
            false => Err(self.failure(output.status)),
        }
    }

    /// Runs a `cargo test`, passes its output on and counts the tests.
    pub fn count_tests(&self) -> Result<Count, Failure> {
        let mut child =
            self.command().stdout(Stdio::piped()).spawn().map_err(|e| self.failure(e))?;
        let mut count = Count::default();
        let stdout = child.stdout.take().expect("it is piped");
        for line in BufReader::new(stdout).lines() {
            let line = line.map_err(|e| self.failure(e))?;
            println!("{line}");
            count.add(count_line(&line).unwrap_or_default());
        }
        let status = child.wait().map_err(|e| self.failure(e))?;
        if !status.success() {
            println!("\n{} passed, {} failed", count.passed, count.failed.max(1));
            return Err(self.failure(status));
        }
        Ok(count)
    }
}

/// Reads a line like `test result: ok. 4 passed; 0 failed; 0 ignored; ...`.
fn count_line(line: &str) -> Option<Count> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let of = |what: &str| {
        let part = counts.split("; ").find(|part| part.ends_with(what))?;
        part.split_once(' ')?.0.parse().ok()
    };
    Some(Count { passed: of(" passed")?, failed: of(" failed")?, ignored: of(" ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_a_test_run_is_read() {
        let line = "test result: FAILED. 40 passed; 2 failed; 1 ignored; 0 measured; \
                    0 filtered out; finished in 0.00s";
        assert_eq!(count_line(line), Some(Count { passed: 40, failed: 2, ignored: 1 }));
        assert_eq!(count_line("test tile::tests::x ... ok"), None);
    }

    #[test]
    fn a_command_is_shown_as_it_is_typed() {
        let line = Line { env: &[("RUSTDOCFLAGS", "-D warnings")], words: &["cargo", "doc"] };
        assert_eq!(line.typed(), "RUSTDOCFLAGS='-D warnings' cargo doc");
    }
}
