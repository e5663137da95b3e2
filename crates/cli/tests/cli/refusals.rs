//! Input that cannot be served: exit code 2, one line, and nothing lost.

use std::fs;

use crate::{run, snapshot, str, tiny_model};

#[test]
fn wrong_sources_and_destinations_are_refused() {
    let work = tempfile::tempdir().unwrap();
    let folder = work.path();
    let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    fs::create_dir(at("empty")).unwrap();
    fs::create_dir(at("occupied")).unwrap();
    fs::write(at("occupied/keep.txt"), "precious").unwrap();
    fs::write(at("text.safetensors"), "this is no safetensors file").unwrap();
    let model = tiny_model(1);
    fs::rename(model.path(), at("model")).unwrap();
    assert_eq!(run(&["pack", &at("model"), &at("packed")]).0, 0);
    let (model, packed) = (at("model"), at("packed"));
    let (out, file, inside) = (at("out"), at("text.safetensors"), at("model/inside"));
    let (empty, occupied, none) = (at("empty"), at("occupied"), at("none"));
    let no_page = at("none/page.html");
    let cases: [(&str, &[&str]); 13] = [
        ("pack_missing", &["pack", &none, &out]),
        ("pack_empty_folder", &["pack", &empty, &out]),
        ("pack_not_safetensors", &["pack", &file, &out]),
        ("pack_occupied", &["pack", &model, &occupied]),
        ("pack_onto_itself", &["pack", &model, &model]),
        ("pack_into_itself", &["pack", &model, &inside]),
        ("pack_packed", &["pack", &packed, &out]),
        ("unpack_original", &["unpack", &model, &out]),
        ("verify_original", &["verify", &model]),
        ("inspect_missing", &["inspect", &none]),
        ("inspect_page_nowhere", &["inspect", &model, "--html", &no_page]),
        ("run_empty_folder", &["run", &empty, "--prompt", "a"]),
        ("compare_missing", &["compare", &model, &none]),
    ];
    for (name, args) in cases {
        let text = snapshot(Some(folder), args);
        assert!(text.starts_with("exit code: 2\n----- stdout -----\n----- stderr"), "{text}");
        assert_eq!(text.lines().count(), 4, "one line of error: {text}");
        insta::assert_snapshot!(["refused", name].join("_"), text);
    }
    assert!(!folder.join("out").exists());
    assert_eq!(fs::read_to_string(at("occupied/keep.txt")).unwrap(), "precious");
}

#[test]
fn an_unsupported_model_names_the_field() {
    let model = tiny_model(1);
    let config = model.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let changed = text.replace("\"silu\"", "\"relu\"");
    assert_ne!(text, changed);
    fs::write(&config, changed).unwrap();
    let (code, stdout, stderr) = run(&["run", str(model.path()), "--prompt", "a"]);
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("hidden_act") && stderr.contains("relu"), "{stderr}");
}

#[test]
fn damage_is_found_and_the_tensor_named() {
    let work = tempfile::tempdir().unwrap();
    let model = tiny_model(1);
    let packed = work.path().join("packed");
    assert_eq!(run(&["pack", str(model.path()), str(&packed)]).0, 0);
    let file = packed.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    // In the middle of the data, well behind the header.
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&file, bytes).unwrap();
    let (code, stdout, stderr) = run(&["verify", str(&packed)]);
    assert!(code == 1 || code == 2, "{code}");
    let said = stdout + &stderr;
    assert!(said.contains("tensor `") && said.contains("model.safetensors"), "{said}");
    let back = work.path().join("back");
    let (code, _, stderr) = run(&["unpack", str(&packed), str(&back)]);
    assert_eq!(code, 2);
    assert!(stderr.contains("tensor `"), "{stderr}");
    let (code, _, _) = run(&["run", str(&packed), "--prompt", "a", "--max-tokens", "1"]);
    assert_eq!(code, 2);
}
