//! The binary, as its users meet it: exit code, stdout, stderr.

mod help;
mod json;
mod models;
mod pipe;
mod quantize;
mod refusals;
mod resume;
mod round_trip;
#[cfg(feature = "train")]
mod train;
mod transformers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use transom_runtime::tiny::SyntheticCheckpoint;

/// The binary, with an environment that is the same everywhere.
fn transom(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_transom"));
    command.args(args).env("COLUMNS", "100").env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
    command
}

/// Runs the binary; exit code, stdout and stderr.
fn run(args: &[&str]) -> (i32, String, String) {
    parts(transom(args).output().expect("the binary starts"))
}

fn parts(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    (output.status.code().expect("not killed"), text(output.stdout), text(output.stderr))
}

/// Runs the binary and takes its stdout as exactly one JSON document.
fn run_json(expected_code: i32, args: &[&str]) -> Value {
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, expected_code, "{args:?}: {stderr}");
    serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {stdout}"))
}

/// What a snapshot shows, with the names of temporary folders taken out.
fn snapshot(folder: Option<&Path>, args: &[&str]) -> String {
    let (code, mut stdout, mut stderr) = run(args);
    if let Some(folder) = folder {
        let folder = folder.to_str().expect("UTF-8");
        stdout = stdout.replace(folder, "DIR");
        stderr = stderr.replace(folder, "DIR");
    }
    format!("exit code: {code}\n----- stdout -----\n{stdout}----- stderr -----\n{stderr}")
}

/// The models outside the repository; says so on stderr if they are absent.
fn shared_model(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("TRANSOM_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let path = root.join("models").join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is absent", path.display());
    None
}

/// The tiny generated model in `parts` files.
fn tiny_model(parts: usize) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = SyntheticCheckpoint { n_shards: parts, ..SyntheticCheckpoint::tiny() };
    model.write(folder.path()).expect("the tiny model is written");
    folder
}

/// Asserts that two folders hold the same files with the same bytes.
fn assert_same_folders(a: &Path, b: &Path) {
    let names = |folder: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(a), names(b));
    for name in names(a) {
        let (a, b) = (a.join(&name), b.join(&name));
        if a.is_dir() {
            assert_same_folders(&a, &b);
        } else {
            assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap(), "{} differs", a.display());
        }
    }
}

fn str(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
