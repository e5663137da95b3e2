//! What `--help` and wrong usage say.

use crate::snapshot;

#[test]
fn help_of_every_command() {
    let commands: [&[&str]; 15] = [
        &[],
        &["pack"],
        &["unpack"],
        &["verify"],
        &["quantize"],
        &["inspect"],
        &["run"],
        &["compare"],
        &["bench"],
        &["bench", "codec"],
        &["bench", "matmul"],
        &["bench", "stream"],
        &["bench", "decode"],
        &["doctor"],
        &["demo"],
    ];
    for command in commands {
        let args = [command, &["--help"]].concat();
        let name = ["help", &command.join("_")].join("_");
        insta::assert_snapshot!(name.trim_end_matches('_'), snapshot(None, &args));
    }
}

#[test]
fn wrong_usage_is_an_error() {
    let cases: [(&str, &[&str]); 10] = [
        ("no_command", &[]),
        ("unknown_command", &["compress"]),
        ("pack_without_destination", &["pack", "x"]),
        ("pack_share_out_of_range", &["pack", "a", "b", "--shard", "4/4"]),
        ("run_without_prompt", &["run", "x"]),
        ("run_layout_unknown", &["run", "x", "--prompt", "a", "--layout", "zip"]),
        ("run_temperature_negative", &["run", "x", "--prompt", "a", "--temperature=-1"]),
        ("run_no_threads", &["run", "x", "--prompt", "a", "--threads", "0"]),
        ("run_memory_without_unit", &["run", "x", "--prompt", "a", "--memory", "6 gigs"]),
        ("matmul_shape", &["bench", "matmul", "--shapes", "15x16"]),
    ];
    for (name, args) in cases {
        let text = snapshot(None, args);
        assert!(text.starts_with("exit code: 2"), "{text}");
        insta::assert_snapshot!(["usage", name].join("_"), text);
    }
}
