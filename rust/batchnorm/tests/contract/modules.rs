//! The modules of each crate, with each folder as one, have no cycle of imports.

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

fn needs(of: &str) -> Needs {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(of).join("src");
    let mut needs = Needs::new();
    for path in sources(&root) {
        let inside = path.strip_prefix(&root).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        if module != "lib" {
            needs.entry(module).or_default().extend(named(&fs::read_to_string(&path).unwrap()));
        }
    }
    let modules: BTreeSet<String> = needs.keys().cloned().collect();
    let exported = exported(&fs::read_to_string(root.join("lib.rs")).unwrap());
    for (module, others) in &mut needs {
        let named = std::mem::take(others).into_iter().map(|name| exported.get(&name).cloned().unwrap_or(name));
        *others = named.filter(|other| other != module && modules.contains(other)).collect();
    }
    needs
}

/// The module of each name that `lib.rs` exports: `crate::Name` needs it too.
fn exported(lib: &str) -> BTreeMap<String, String> {
    let uses = lib.split(';').filter_map(|statement| statement.trim().strip_prefix("pub use "));
    let paths = uses.filter_map(|path| path.split_once("::"));
    let names = paths.flat_map(|(module, names)| {
        names.split(['{', '}', ',']).map(|name| (name.trim().to_owned(), module.to_owned())).collect::<Vec<_>>()
    });
    names.filter(|(name, _)| !name.is_empty()).collect()
}

#[test]
fn modules_need_each_other_in_one_direction() {
    for (of, least, seen) in [
        ("batchnorm", 20, [("parallel", "float_mode"), ("view", "parallel"), ("train", "infer"), ("element", "simd")]),
        ("batchnorm-json", 6, [("data", "reader"), ("reader", "decimal"), ("data", "float"), ("print", "float")]),
        (
            "batchnorm-python",
            10,
            [("buffer", "memory"), ("training", "values"), ("frozen", "run"), ("values", "buffer")],
        ),
    ] {
        let mut needs = needs(of);
        assert!(needs.len() >= least, "{of}: saw only {:?}", needs.keys());
        for (module, other) in seen {
            assert!(needs[module].contains(other), "{of}: {module} needs {other}, and this test does not see it");
        }
        // Take away what needs nothing that is left, until all is gone or a circle remains.
        while let Some(module) = needs.iter().find(|(_, others)| others.is_empty()).map(|(module, _)| module.clone()) {
            needs.remove(&module);
            needs.values_mut().for_each(|others| {
                others.remove(&module);
            });
        }
        assert!(needs.is_empty(), "{of}: modules that need each other, or stand above such: {needs:#?}");
    }
}

#[test]
fn names_are_read_from_every_form() {
    let source = "use crate::view::{Rect, Tile};\nuse crate::{error::Error, parallel, simd::{A, B}}; // crate::no\nlet x = crate::copy::copy(y);";
    let found: Vec<String> = named(source).into_iter().collect();
    assert_eq!(found, ["copy", "error", "parallel", "simd", "view"]);
    let exported = exported("mod a;\npub use a::B;\npub use c::{D, E};\n");
    assert_eq!((&exported["B"][..], &exported["D"][..], &exported["E"][..]), ("a", "c", "c"));
}
