//! Names, paths and interruptions at the edge of what a checkpoint may hold.

use std::fs;
use std::path::Path;

use transom::checkpoint::{Options, Progress, inspect, pack, unpack, verify};
use transom::{Checkpoint, CheckpointError};

fn options() -> Options {
    Options { threads: 2, ..Options::default() }
}

/// A safetensors file: its header and its data.
fn safetensors(json: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    file.extend(data);
    file
}

fn write_checkpoint(root: &Path) {
    fs::create_dir_all(root).unwrap();
    for (i, name) in ["model-a.safetensors", "model-b.safetensors"].iter().enumerate() {
        let json =
            format!(r#"{{"w{i}":{{"dtype":"BF16","shape":[32,16],"data_offsets":[0,1024]}}}}"#);
        fs::write(root.join(name), safetensors(&json, &[i as u8 + 60; 1024])).unwrap();
    }
    fs::write(root.join("config.json"), "{\"model_type\":\"llama\"}").unwrap();
}

fn differences(packed: &Path, against: &Path) -> Vec<String> {
    let report = verify(packed, Some(against), &options(), &()).unwrap();
    report.differences.into_iter().map(|d| format!("{}: {}", d.file.display(), d.what)).collect()
}

#[cfg(unix)]
#[test]
fn file_names_that_are_special_elsewhere_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"));
    let names =
        ["10:00:00.log", "back\\slash", "new\nline", "quo\"te", "C:", "...", "sub/transom.json"];
    fs::create_dir(at("a/sub")).unwrap();
    for name in names {
        fs::write(at("a").join(name), name).unwrap();
    }
    pack(&at("a"), &at("b"), &options(), &()).unwrap();
    assert_eq!(differences(&at("b"), &at("a")), [""; 0]);
    unpack(&at("b"), &at("c"), &options(), &()).unwrap();
    for name in names {
        assert_eq!(fs::read_to_string(at("c").join(name)).unwrap(), name);
    }
}

#[test]
fn tensor_names_and_shapes_of_every_kind_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let ones = vec!["1"; 300].join(",");
    let json = format!(
        r#"{{"":{{"dtype":"U8","shape":[2],"data_offsets":[3,5]}},
            "qu\"o\\te\n\u00e9":{{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}},
            "many":{{"dtype":"I8","shape":[{ones}],"data_offsets":[2,3]}},
            "long":{{"dtype":"BF16","shape":[{ones},0],"data_offsets":[5,5]}},
            "sub-byte":{{"dtype":"F4","shape":[4],"data_offsets":[5,7]}}}}"#
    );
    for (i, json) in [json.as_str(), "{}", "{\"__metadata__\":{}}  "].into_iter().enumerate() {
        let original = safetensors(json, if i == 0 { &[1, 2, 3, 4, 5, 6, 7] } else { &[] });
        let [a, b, c] = ["a", "b", "c"].map(|name| at(&format!("{name}{i}.safetensors")));
        fs::write(&a, &original).unwrap();
        pack(&a, &b, &options(), &()).unwrap();
        safetensors::SafeTensors::deserialize(&fs::read(&b).unwrap()).unwrap();
        assert_eq!(differences(&b, &a), [""; 0]);
        inspect(&b, &options(), &()).unwrap();
        unpack(&b, &c, &options(), &()).unwrap();
        assert!(fs::read(&c).unwrap() == original, "{json}");
    }
}

#[test]
fn no_way_leads_into_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"));
    let force = Options { force: true, ..options() };
    let refused = |target: &Path| {
        let result = pack(&at("a"), target, &force, &());
        let refused = matches!(result, Err(CheckpointError::DestinationInSource { .. }));
        assert!(refused, "{}: {result:?}", target.display());
        assert_eq!(fs::read_dir(at("a")).unwrap().count(), 3, "{}", target.display());
    };
    refused(&at("a/."));
    refused(&at("a/x/../y"));
    refused(&at("absent/../a/y"));
    refused(&at("absent/../a"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(at("a"), at("link")).unwrap();
        refused(&at("link"));
        refused(&at("link/y"));
        refused(&at("absent/../link/y"));
    }
}

#[test]
fn overwriting_does_not_remove_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a/sub"));
    fs::write(at("a/empty.safetensors"), safetensors("{}", &[])).unwrap();
    pack(&at("a"), &at("b"), &options(), &()).unwrap();
    // What lies in `b/sub` is listed in the manifest of `b`.
    fs::remove_dir_all(at("b/sub")).unwrap();
    write_checkpoint(&at("b/sub"));
    let force = Options { force: true, ..options() };
    let result = pack(&at("b/sub"), &at("b"), &force, &());
    assert!(matches!(result, Err(CheckpointError::DestinationInSource { .. })), "{result:?}");
    assert_eq!(fs::read_dir(at("b/sub")).unwrap().count(), 3);
}

/// A job killed between its last file and the removal of its notes.
#[test]
fn notes_of_a_finished_job_go_when_it_is_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"));
    let first = Options { shard: Some((0, 2)), ..options() };
    assert!(!pack(&at("a"), &at("b"), &first, &()).unwrap().complete);
    let source = fs::read(at("b/.transom-job/source.json")).unwrap();
    assert!(pack(&at("a"), &at("b"), &options(), &()).unwrap().complete);
    fs::create_dir_all(at("b/.transom-job/done")).unwrap();
    fs::write(at("b/.transom-job/source.json"), source).unwrap();
    assert!(pack(&at("a"), &at("b"), &options(), &()).unwrap().complete);
    assert_eq!(differences(&at("b"), &at("a")), [""; 0]);
    Checkpoint::open(&at("b")).unwrap();
}

#[test]
fn files_only_one_side_has_are_differences() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"));
    pack(&at("a"), &at("b"), &options(), &()).unwrap();
    fs::write(at("a/added.txt"), "new").unwrap();
    let found = differences(&at("b"), &at("a"));
    assert!(found.len() == 1 && found[0].contains("added.txt"), "{found:?}");
    fs::remove_file(at("a/added.txt")).unwrap();
    fs::remove_file(at("a/model-a.safetensors")).unwrap();
    fs::write(at("b/config.json"), "{}").unwrap();
    let found = differences(&at("b"), &at("a"));
    assert_eq!(found.len(), 2, "one bad file hides another: {found:?}");
}

/// Changes a file when told of progress for the first time.
struct Meddler<F: Fn() + Sync>(std::sync::Once, F);

impl<F: Fn() + Sync> Progress for Meddler<F> {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {
        self.0.call_once(&self.1);
    }
}

#[test]
fn a_file_that_changes_is_an_error_and_leaves_nothing_whole() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_checkpoint(&at("a"));
    let changes: [(&str, &[u8]); 4] = [
        ("model-a.safetensors", &[7; 1000]),
        ("model-b.safetensors", &[]),
        ("config.json", b"{\"model_type\":"),
        ("config.json", b"{\"model_type\":\"gemma\"}"),
    ];
    for (i, (name, bytes)) in changes.into_iter().enumerate() {
        let original = fs::read(at("a").join(name)).unwrap();
        let meddler = Meddler(std::sync::Once::new(), || {
            fs::write(at("a").join(name), bytes).unwrap();
        });
        let target = at(&format!("b{i}"));
        let error = pack(&at("a"), &target, &options(), &meddler).unwrap_err().to_string();
        assert!(Checkpoint::open(&target).is_err(), "{name}: {error}");
        assert!(!target.join("transom.json").exists(), "{name}: {error}");
        fs::write(at("a").join(name), original).unwrap();
    }
}

#[test]
fn shapes_that_claim_anything_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let huge = |name| {
        format!(r#""{name}":{{"dtype":"NEW","shape":[9223372036854775808],"data_offsets":[0,0]}}"#)
    };
    let json = format!("{{{},{}}}", huge("a"), huge("b"));
    fs::write(&path, safetensors(&json, &[])).unwrap();
    assert_eq!(inspect(&path, &options(), &()).unwrap().weights, u64::MAX);
}

/// The file is sparse and takes no room.
#[test]
fn a_trailer_that_claims_a_terabyte_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let n_bytes = 1u64 << 40;
    let json = format!(
        r#"{{"__transom__":{{"dtype":"U8","shape":[{n_bytes}],"data_offsets":[0,{n_bytes}]}}}}"#
    );
    fs::write(&path, safetensors(&json, b"TRSF\x01\0\0\0")).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + json.len() as u64 + n_bytes).unwrap();
    let error = unpack(&path, &folder.path().join("b"), &options(), &()).unwrap_err();
    assert!(error.to_string().contains("trailer"), "{error}");
}
