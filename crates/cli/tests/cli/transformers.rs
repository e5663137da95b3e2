//! Quantised and trained checkpoints as other programs open them: `transformers` with
//! `compressed-tensors`, in a virtual environment of the test's own.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::{run, shared_model, str, tiny_model};

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python")
}

fn succeed(program: &Path, arguments: &[&OsStr]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr)),
    }
}

/// The Python of an environment that has what `requirements.txt` names. It is
/// made on CI only, where there has to be one: it takes 5.6 GB and some minutes.
fn python() -> Option<PathBuf> {
    let requirements = here().join("requirements.txt");
    let wanted = std::fs::read_to_string(&requirements).unwrap();
    let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join("transformers");
    let python = environment.join(if cfg!(windows) { "Scripts/python" } else { "bin/python" });
    let marker = environment.join("complete");
    if std::fs::read_to_string(&marker).is_ok_and(|found| found == wanted) {
        return Some(python);
    }
    if std::env::var_os("CI").is_none() {
        eprintln!("SKIPPED: no Python environment; with CI=1 this test makes it (5.6 GB)");
        return None;
    }
    let started = Instant::now();
    let make = [OsStr::new("-m"), OsStr::new("venv"), environment.as_os_str()];
    succeed(Path::new("python3"), &make).expect("CI needs python3 with venv for this test");
    let install = ["-m", "pip", "install", "--quiet", "--no-cache-dir", "-r"].map(OsStr::new);
    let install = [&install[..], &[requirements.as_os_str()]].concat();
    succeed(&python, &install).expect("CI needs the packages of tests/python/requirements.txt");
    std::fs::write(marker, wanted).unwrap();
    eprintln!("the Python environment took {:.0} s", started.elapsed().as_secs_f64());
    Some(python)
}

#[test]
fn transformers_opens_quantised_and_trained_checkpoints_with_the_same_weights() {
    let Some(python) = python() else { return };
    let work = tempfile::tempdir().unwrap();
    let tiny = tiny_model(2);
    let mut checkpoints = Vec::new();
    for source in [Some(tiny.path().to_owned()), shared_model("stories260k")].into_iter().flatten()
    {
        for more in [
            &["--granularity", "tensor"][..],
            &["--granularity", "channel", "--skip", "q_proj|layers.1.mlp"],
            &["--granularity", "channel", "--target-bits", "4"],
        ] {
            let target = work.path().join(checkpoints.len().to_string());
            let (code, _, stderr) =
                run(&[&["quantize", str(&source), str(&target)][..], more].concat());
            assert_eq!(code, 0, "{stderr}");
            checkpoints.push(target);
        }
    }
    for name in ["demo", "demo-int8"] {
        let target = work.path().join(name);
        let packed = here().join("../../../../models").join(name);
        let (code, _, stderr) = run(&["unpack", str(&packed), str(&target)]);
        assert_eq!(code, 0, "{stderr}");
        checkpoints.push(target);
    }
    let script = here().join("open_quantized.py");
    let mut arguments = vec![script.as_os_str()];
    arguments.extend(checkpoints.iter().map(|path| path.as_os_str()));
    let text = succeed(&python, &arguments).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(text.matches("as stored").count(), checkpoints.len(), "{text}");
}
