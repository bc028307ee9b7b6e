//! The list of reasons in the documentation is that of the source: nothing that the daemon says is
//! missing there, and nothing there is never said.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What stands right before a code wherever one is given that no `code()` gives.
const GIVEN: [&str; 6] = [
    ".stop(\"",
    ".abort(\"",
    "Found::Replaced(\"",
    "capture_repaired(\"",
    "refuse(None, \"",
    ".reason().unwrap_or(\"",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The text of every source file of the crates that give reasons, without their tests.
fn sources() -> Vec<String> {
    let mut folders: Vec<PathBuf> = ["hbone/src", "mesh/src", "ztunnel/src"]
        .map(|folder| root().join(folder))
        .into();
    let mut texts = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the source") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap_or_default();
            if path.is_dir() && name != "tests" {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") && name != "tests.rs" {
                let text = fs::read_to_string(&path).expect("a file of the source");
                let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
                texts.push(text[..end].to_owned());
            }
        }
    }
    texts
}

fn is_code(text: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    text.starts_with(|c: char| c.is_ascii_lowercase()) && text.chars().all(word)
}

/// The string literals of a text that look like codes.
fn literals(text: &str) -> impl Iterator<Item = String> {
    let quoted = text.split('"').skip(1).step_by(2);
    quoted.filter(|text| is_code(text)).map(str::to_owned)
}

/// The codes that a source file gives for connections and pods.
fn codes(source: &str) -> BTreeSet<String> {
    let mut codes = BTreeSet::new();
    for (at, _) in source.match_indices("fn code(") {
        let indent = source[..at].rfind('\n').map_or(0, |line| {
            let before = &source[line + 1..at];
            before.len() - before.trim_start().len()
        });
        let end = format!("\n{}}}", " ".repeat(indent));
        let body = &source[at..];
        codes.extend(literals(&body[..body.find(&end).unwrap_or(body.len())]));
    }
    for before in GIVEN {
        for (at, _) in source.match_indices(before) {
            let rest = &source[at + before.len()..];
            let code = rest.split('"').next().unwrap_or_default();
            codes.extend(is_code(code).then(|| code.to_owned()));
        }
    }
    codes
}

/// The codes in the first column of the documentation's tables.
fn documented() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("docs/reasons.md")).expect("the documentation");
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let first = rows.filter_map(|row| row.split('|').nth(1));
    first
        .flat_map(|column| column.split('`').skip(1).step_by(2).map(str::to_owned))
        .collect()
}

#[test]
fn every_reason_that_is_given_is_documented() {
    let documented = documented();
    let given: BTreeSet<String> = sources().iter().flat_map(|source| codes(source)).collect();
    assert!(given.len() > 50, "these are too few to be all: {given:?}");
    let missing: Vec<_> = given.difference(&documented).collect();
    assert!(missing.is_empty(), "not in docs/reasons.md: {missing:?}");
}

#[test]
fn every_reason_that_is_documented_is_given_somewhere() {
    let sources = sources();
    let said = |code: &String| {
        let literal = format!("\"{code}\"");
        sources.iter().any(|source| source.contains(&literal))
    };
    let documented = documented();
    let never: Vec<_> = documented.iter().filter(|code| !said(code)).collect();
    assert!(never.is_empty(), "nobody says {never:?}");
}
