//! The rules of the house that can be counted: folders are layers, arrows only point downwards, files do not import each
//! other in circles, and no file grows past what one can keep in mind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Top-level modules from the ground up. A module may import from those on lower floors, and from itself.
const FLOORS: &[&[&str]] = &[
    &["clock", "codec", "disk", "memory", "partitioning", "protocol"],
    &["telemetry", "client", "views"],
    &["panics", "outbound"],
    &["log", "store"],
    &["auth", "projector", "search"],
    &["ingest"],
    &["delivery", "dispatch"],
    &["webhook"],
    &["edge", "reaper", "config"],
    &["app"],
    &["cli"],
    &["main"],
];

const MAX_LINES: usize = 700;

/// A source file by its module path, such as `edge::ws::session`, with the text that is not a unit test.
fn modules() -> BTreeMap<String, String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules = BTreeMap::new();
    for file in rust_files(&src) {
        let text = fs::read_to_string(&file).unwrap();
        let inside = file.strip_prefix(&src).unwrap().with_extension("");
        let mut path: Vec<&str> = inside.iter().map(|part| part.to_str().unwrap()).collect();
        if path.last() == Some(&"mod") {
            path.pop();
        }
        if path == ["lib"] || path.last() == Some(&"tests") {
            continue;
        }
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let code: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        modules.insert(path.join("::"), code.join("\n"));
    }
    assert!(modules.len() > 60, "the sources were found");
    modules
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The module paths that a file's code names: those of `crate::`, `super::` and `self::`, with groups in braces opened.
fn named_paths(module: &str, code: &str) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for root in ["crate::", "weft::", "super::", "self::"] {
        for (at, _) in code.match_indices(root) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let base = match root {
                "super::" => module.rsplit_once("::").map_or("", |(parent, _)| parent),
                "self::" => module,
                _ => "",
            };
            collect(base, &code[at + root.len()..], &mut named);
        }
    }
    named
}

/// Adds the paths at the start of `rest`, which is what follows `base::`.
fn collect(base: &str, rest: &str, named: &mut BTreeSet<String>) {
    if let Some(group) = rest.strip_prefix('{') {
        let (mut depth, mut begin) = (0, 0);
        for (at, c) in group.char_indices() {
            let ends = c == '}' && depth == 0;
            if ends || (c == ',' && depth == 0) {
                collect(base, group[begin..at].trim_start(), named);
                begin = at + 1;
            }
            match c {
                _ if ends => return,
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
        }
        return;
    }
    let word: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    if word.is_empty() {
        return;
    }
    let rest = &rest[word.len()..];
    let path = match (word.as_str(), base) {
        ("self", _) => base.to_owned(),
        ("super", _) => base.rsplit_once("::").map_or("", |(parent, _)| parent).to_owned(),
        (_, "") => word,
        _ => format!("{base}::{word}"),
    };
    match rest.strip_prefix("::") {
        Some(rest) => collect(&path, rest, named),
        None => drop(named.insert(path)),
    }
}

/// Which file imports which, by module path.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let modules = modules();
    let file_of = |path: &str| {
        let mut path = path;
        loop {
            if modules.contains_key(path) {
                return Some(path.to_owned());
            }
            path = path.rsplit_once("::")?.0;
        }
    };
    let mut imports = BTreeMap::new();
    for (module, code) in &modules {
        let mut found: BTreeSet<String> = named_paths(module, code).iter().filter_map(|path| file_of(path)).collect();
        found.remove(module);
        imports.insert(module.clone(), found);
    }
    imports
}

#[test]
fn imports_only_point_to_lower_floors() {
    let floor = |module: &str| {
        let top = module.split("::").next().unwrap_or(module);
        let floor = FLOORS.iter().position(|floor| floor.contains(&top));
        floor.unwrap_or_else(|| panic!("{top} stands on no floor: add it to FLOORS"))
    };
    let mut upward = Vec::new();
    for (from, all) in imports() {
        for to in all {
            let same_room = from.split("::").next() == to.split("::").next();
            if !same_room && floor(&from) <= floor(&to) {
                upward.push(format!("{from} imports {to}"));
            }
        }
    }
    assert!(upward.is_empty(), "{upward:#?}");
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let imports = imports();
    // A folder's mod.rs and the files in it are one room: it holds what they share, and names them.
    let is_family =
        |a: &str, b: &str| a.strip_prefix(b).or(b.strip_prefix(a)).is_some_and(|rest| rest.starts_with("::"));
    let next = |module: &str| -> Vec<&String> {
        imports.get(module).into_iter().flatten().filter(|to| !is_family(module, to)).collect()
    };
    let mut circles = BTreeSet::new();
    for begin in imports.keys() {
        let (mut seen, mut open) = (BTreeSet::new(), next(begin));
        while let Some(module) = open.pop() {
            if module == begin {
                circles.insert(begin.clone());
                break;
            }
            if seen.insert(module) {
                open.extend(next(module));
            }
        }
    }
    assert!(circles.is_empty(), "on a circle of imports: {circles:#?}");
}

#[test]
fn no_file_is_longer_than_one_can_keep_in_mind() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files: Vec<PathBuf> =
        ["src", "tests", "benches"].iter().flat_map(|folder| rust_files(&root.join(folder))).collect();
    let lines = |file: &PathBuf| fs::read_to_string(file).unwrap().lines().count();
    let long: Vec<_> = files.iter().map(|file| (file, lines(file))).filter(|(_, lines)| *lines > MAX_LINES).collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines: {long:#?}");
}
