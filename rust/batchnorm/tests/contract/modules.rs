//! The modules of the crate, with each folder as one, have no cycle of imports.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

type Needs = BTreeMap<String, BTreeSet<String>>;

/// Every source file under a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// The names that follow `crate::` in a source, one or several in braces, comments left out.
fn named(source: &str) -> BTreeSet<String> {
    let code: String = source.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let first_word =
        |path: &str| path.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned();
    let mut names = BTreeSet::new();
    for (at, found) in code.match_indices("crate::") {
        let path = &code[at + found.len()..];
        let Some(list) = path.strip_prefix('{') else {
            names.insert(first_word(path));
            continue;
        };
        let mut depth = 1;
        let end = list.find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0
        });
        let items = list[..end.unwrap()].split(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0 && c == ','
        });
        names.extend(items.map(first_word));
    }
    names
}

fn needs() -> Needs {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut needs = Needs::new();
    for path in sources(&root) {
        let inside = path.strip_prefix(&root).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        if module != "lib" {
            needs.entry(module).or_default().extend(named(&fs::read_to_string(&path).unwrap()));
        }
    }
    let modules: BTreeSet<String> = needs.keys().cloned().collect();
    for (module, others) in &mut needs {
        others.retain(|other| other != module && modules.contains(other));
    }
    needs
}

#[test]
fn modules_need_each_other_in_one_direction() {
    let mut needs = needs();
    for (module, other) in [("parallel", "float_mode"), ("view", "parallel"), ("train", "infer"), ("layout", "error")] {
        assert!(needs[module].contains(other), "{module} needs {other}, and this test does not see it");
    }
    assert!(needs.len() >= 15, "saw only {:?}", needs.keys());
    // Take away what needs nothing that is left, until all is gone or a circle remains.
    while let Some(module) = needs.iter().find(|(_, others)| others.is_empty()).map(|(module, _)| module.clone()) {
        needs.remove(&module);
        needs.values_mut().for_each(|others| {
            others.remove(&module);
        });
    }
    assert!(needs.is_empty(), "modules that need each other, or stand above such: {needs:#?}");
}

#[test]
fn names_are_read_from_every_form() {
    let source = "use crate::view::{Rect, Tile};\nuse crate::{error::Error, parallel, simd::{A, B}}; // crate::no\nlet x = crate::copy::copy(y);";
    let found: Vec<String> = named(source).into_iter().collect();
    assert_eq!(found, ["copy", "error", "parallel", "simd", "view"]);
}
