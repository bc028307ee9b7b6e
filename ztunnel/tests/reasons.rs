//! The reason codes in docs/reasons.md are exactly those in the source.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The text right before a code in the places that do not take it from a `code()` function.
const CODE_PREFIXES: [&str; 6] = [
    ".stop(\"",
    ".abort(\"",
    "Verification::MustReenrol(\"",
    "record_capture_repair(\"",
    "refuse(None, \"",
    ".reason().unwrap_or(\"",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The text of every source file of the crates that define codes, without their tests.
fn sources() -> Vec<String> {
    let mut folders: Vec<PathBuf> = ["hbone/src", "mesh/src", "ztunnel/src"]
        .map(|folder| root().join(folder))
        .into();
    let mut texts = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a source folder") {
            let path = entry.expect("a folder entry").path();
            let name = path.file_name().unwrap_or_default();
            if path.is_dir() && name != "tests" {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") && name != "tests.rs" {
                let text = fs::read_to_string(&path).expect("a source file");
                let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
                texts.push(text[..end].to_owned());
            }
        }
    }
    texts
}

fn is_code(text: &str) -> bool {
    let is_code_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    text.starts_with(|c: char| c.is_ascii_lowercase()) && text.chars().all(is_code_char)
}

/// The string literals of a text that have the form of a code.
fn literals(text: &str) -> impl Iterator<Item = String> {
    let quoted = text.split('"').skip(1).step_by(2);
    quoted.filter(|text| is_code(text)).map(str::to_owned)
}

/// The codes that a source file defines for connections and pods.
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
    for before in CODE_PREFIXES {
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
fn every_code_in_the_source_is_documented() {
    let documented = documented();
    let defined: BTreeSet<String> = sources().iter().flat_map(|source| codes(source)).collect();
    assert!(
        defined.len() > 50,
        "too few codes, the search is broken: {defined:?}"
    );
    let missing: Vec<_> = defined.difference(&documented).collect();
    assert!(missing.is_empty(), "not in docs/reasons.md: {missing:?}");
}

#[test]
fn every_documented_code_is_in_the_source() {
    let sources = sources();
    let is_in_source = |code: &String| {
        let literal = format!("\"{code}\"");
        sources.iter().any(|source| source.contains(&literal))
    };
    let documented = documented();
    let unused: Vec<_> = documented
        .iter()
        .filter(|code| !is_in_source(code))
        .collect();
    assert!(
        unused.is_empty(),
        "documented but not in the source: {unused:?}"
    );
}
