//! Licences of the crates that the workspace depends on.
//!
//! `deny.toml` says the same to cargo-deny; this needs nothing installed.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::Failure;
use crate::command::{Count, Line};

/// The file that lists the licences allowed.
const LIST: &str = "deny.toml";

/// Checks the licence of every crate of the lock file.
pub fn check() -> Result<Count, Failure> {
    let list = std::fs::read_to_string(LIST).map_err(|error| format!("{LIST}: {error}"))?;
    let allowed = allowed(&list)?;
    let allowed: Vec<&str> = allowed.iter().map(String::as_str).collect();
    let output = Line::new(&["cargo", "metadata", "--format-version", "1", "--locked"]).output()?;
    let metadata: Value =
        serde_json::from_slice(&output).map_err(|error| format!("cargo metadata: {error}"))?;
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut refused = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let licence = package["license"].as_str().unwrap_or("none stated");
        *seen.entry(licence.to_owned()).or_default() += 1;
        if !permits(licence, &allowed) {
            let (name, version) = (&package["name"], &package["version"]);
            refused.push(format!("{name} {version}: {licence}"));
        }
    }
    seen.iter().for_each(|(licence, n)| println!("{n:4}  {licence}"));
    if refused.is_empty() {
        return Ok(Count::default());
    }
    Err(format!("licences that {LIST} does not allow:\n{}", refused.join("\n")))
}

/// The strings of the list `allow = [..]`.
fn allowed(list: &str) -> Result<Vec<String>, Failure> {
    let list = list.split_once("allow = [").and_then(|(_, rest)| rest.split_once(']'));
    let (inside, _) = list.ok_or_else(|| format!("{LIST}: no list `allow = [..]`"))?;
    Ok(inside.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Whether an SPDX expression can be satisfied with the licences allowed.
fn permits(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let permitted = alternatives(&mut words, allowed);
    permitted && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn alternatives(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    let mut permitted = conjunction(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        permitted |= conjunction(words, allowed);
    }
    permitted
}

fn conjunction(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    let mut permitted = licence(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        permitted &= licence(words, allowed);
    }
    permitted
}

fn licence(words: &mut Words<'_>, allowed: &[&str]) -> bool {
    let Some(word) = words.next() else { return false };
    if word == "(" {
        let permitted = alternatives(words, allowed);
        return words.next() == Some(")") && permitted;
    }
    // An exception only ever permits more.
    if words.next_if_eq(&"WITH").is_some() && words.next().is_none() {
        return false;
    }
    allowed.contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_understood() {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"];
        for expression in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/Apache-2.0",
            "Unlicense OR MIT",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-3.0",
        ] {
            assert!(permits(expression, &allowed), "{expression}");
        }
        for expression in [
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT OR Apache-2.0) AND Zlib",
            "none stated",
            "",
            "(MIT",
        ] {
            assert!(!permits(expression, &allowed), "{expression}");
        }
    }

    #[test]
    fn the_list_is_read() {
        let list = "[licenses]\nallow = [\n  \"MIT\", # ours\n  \"Zlib\",\n]\n";
        assert_eq!(allowed(list).unwrap(), ["MIT", "Zlib"]);
        assert!(allowed("[licenses]").is_err());
    }
}
