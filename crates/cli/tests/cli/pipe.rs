//! A reader that has seen enough.

use std::io::Read as _;
use std::process::Stdio;

use crate::{str, tiny_model, transom};

/// Starts the binary, reads at most `n_bytes` of its stdout and closes it.
fn read_and_close(args: &[&str], n_bytes: usize) -> (i32, String) {
    let mut child = transom(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut stdout = child.stdout.take().expect("piped");
    stdout.read_exact(&mut vec![0; n_bytes]).expect("some output");
    drop(stdout);
    let output = child.wait_with_output().expect("it ends");
    (output.status.code().expect("not killed"), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_broken_pipe_is_quiet() {
    let model = tiny_model(1);
    for args in [
        &["inspect", str(model.path()), "--json"][..],
        &["inspect", str(model.path())],
        &["run", str(model.path()), "--prompt", "a", "--ignore-eos", "--max-tokens", "100"],
    ] {
        let (code, stderr) = read_and_close(args, 0);
        assert_eq!((code, stderr.contains("transom:")), (0, false), "{args:?}: {stderr}");
    }
}
