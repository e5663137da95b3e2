//! A job that is killed half way.

use std::time::{Duration, Instant};

use crate::{assert_same_folders, run, str, tiny_model, transom};

#[test]
fn a_killed_job_leaves_nothing_that_looks_whole_and_is_resumed() {
    let work = tempfile::tempdir().unwrap();
    let model = tiny_model(3);
    let expected = work.path().join("expected");
    assert_eq!(run(&["pack", str(model.path()), str(&expected)]).0, 0);
    for delay_ms in [0, 1, 2, 5, 10, 20, 40] {
        let packed = work.path().join(format!("packed-{delay_ms}"));
        let mut child = transom(&["pack", str(model.path()), str(&packed)]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        let started = Instant::now();
        // SIGKILL: nothing can be cleaned up.
        let _ = child.kill();
        let finished = child.wait().unwrap().success();
        assert!(started.elapsed() < Duration::from_secs(10));
        if !finished {
            let (code, _, _) = run(&["verify", str(&packed)]);
            assert_ne!(code, 0, "an unfinished destination does not verify");
        }
        let (code, _, stderr) = run(&["pack", str(model.path()), str(&packed)]);
        // A job that had finished is not overwritten.
        assert_eq!(code, if finished { 2 } else { 0 }, "{stderr}");
        assert_eq!(run(&["verify", str(&packed)]).0, 0);
        assert_same_folders(&expected, &packed);
    }
}
